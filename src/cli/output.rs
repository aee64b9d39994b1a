//! What a command has to say, on stdout.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;
use terminal_size::{Width, terminal_size_of};

use super::exit::Failure;

/// Width of the column of names in a status.
const NAME_WIDTH: usize = 14;
/// Narrower than this nothing is wrapped: one word per line helps nobody.
const LEAST_WIDTH: usize = 40;

/// Writes `text` as it stands, at once. Where the reader has seen enough (`| head`) the work ends without a word.
pub fn print(text: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref())?;
    Ok(out.flush()?)
}

/// As [`print()`], with the end of the line.
pub fn print_line(line: impl Display) -> Result<(), Failure> {
    print(format!("{line}\n"))
}

/// Prints a report, as JSON or as `text`.
pub fn print_report<R: Serialize>(report: &R, json: bool, text: impl FnOnce(&R) -> String) -> Result<(), Failure> {
    if json {
        let json = serde_json::to_string_pretty(report).map_err(|error| Failure::other("write JSON", error))?;
        print_line(json)
    } else {
        print(text(report))
    }
}

/// A status of lines with a name each, wrapped between words at the width of the terminal; where stdout is none, as it is.
#[derive(Debug)]
pub struct Lines {
    text: String,
    width: Option<usize>,
}

impl Lines {
    /// No lines yet, for stdout.
    pub fn for_stdout() -> Self {
        let width = terminal_size_of(io::stdout()).map(|(Width(width), _)| usize::from(width));
        Self::of_width(width)
    }

    /// No lines yet, for a terminal of this width, or for something that has none.
    pub fn of_width(width: Option<usize>) -> Self {
        Self {
            text: String::new(),
            width: width.filter(|width| *width >= LEAST_WIDTH),
        }
    }

    /// Adds a line; an empty name continues the line before.
    pub fn add(&mut self, name: &str, value: &str) {
        let line = format!("{name:<NAME_WIDTH$}{value}");
        let indent = " ".repeat(NAME_WIDTH);
        match self.width {
            Some(width) => {
                let options = textwrap::Options::new(width)
                    .subsequent_indent(&indent)
                    .break_words(false);
                self.text.push_str(&textwrap::fill(&line, options));
            }
            None => self.text.push_str(&line),
        }
        self.text.push('\n');
    }

    /// All lines.
    pub fn into_text(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_breaks_between_words_and_goes_on_below_the_value() {
        let mut lines = Lines::of_width(Some(40));
        lines.add(
            "draft",
            "http://192.168.1.50:8081/with/a/long/path: down since this morning",
        );
        lines.add("", "short");
        assert_eq!(
            lines.into_text(),
            "draft\n              \
             http://192.168.1.50:8081/with/a/long/path:\n              \
             down since this morning\n              short\n"
        );
        let mut lines = Lines::of_width(Some(40));
        lines.add("verification", "attached, which is the best of all");
        assert_eq!(
            lines.into_text(),
            "verification  attached, which is the best\n              of all\n"
        );
    }

    #[test]
    fn what_no_terminal_reads_is_not_wrapped() {
        let mut lines = Lines::of_width(None);
        lines.add("verification", &"word ".repeat(50));
        assert_eq!(lines.into_text().lines().count(), 1);
    }
}
