//! Breaks lines between words on a narrow terminal. Output to a file or a pipe stays as it is.

use std::io::{self, IsTerminal};

/// Smallest usable width.
const MIN_WIDTH: usize = 40;

/// Columns of the terminal: `COLUMNS`, else those of stdout. `None` for a file or a pipe, whose lines are not broken.
pub fn width() -> Option<usize> {
    let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let seen = || {
        let stdout = io::stdout();
        let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout))?;
        size.ok().map(|size| usize::from(size.ws_col))
    };
    columns.or_else(seen).filter(|width| *width >= MIN_WIDTH)
}

/// The text for the terminal. A continued line is indented by `indent` columns.
pub fn fitted(text: &str, indent: usize) -> String {
    width().map_or_else(|| text.to_owned(), |width| wrapped(text, width, indent))
}

fn wrapped(text: &str, width: usize, indent: usize) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let mut rest = line.to_owned();
        while let Some(at) = break_at(&rest, width, indent) {
            out.push_str(rest[..at].trim_end());
            out.push('\n');
            rest = format!("{:indent$}{}", "", rest[at..].trim_start());
        }
        out.push_str(&rest);
        out.push('\n');
    }
    out
}

/// The last blank within `width` columns, else the first one after them. Ignores the indentation.
fn break_at(line: &str, width: usize, indent: usize) -> Option<usize> {
    if line.chars().count() <= width {
        return None;
    }
    let begins = (line.len() - line.trim_start().len()).max(indent);
    let ends = line.trim_end().len();
    let blanks = line
        .char_indices()
        .enumerate()
        .filter(|(_, (at, c))| *c == ' ' && *at > begins && *at < ends);
    let mut found = None;
    for (column, (at, _)) in blanks {
        if column > width && found.is_some() {
            break;
        }
        found = Some(at);
        if column > width {
            break;
        }
    }
    found
}

/// A command line for a shell, continued with backslashes. `words` are already quoted.
pub fn command(words: &[String], width: Option<usize>) -> String {
    let Some(width) = width else { return words.join(" ") };
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.chars().count() + word.chars().count() + 3 <= width => {
                line.push(' ');
                line.push_str(word);
            }
            Some(_) => lines.push(format!("  {word}")),
            None => lines.push(word.clone()),
        }
    }
    lines.join(" \\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_between_words_and_short_ones_are_left_alone() {
        let text = "worker        one two three four\n              indented\n";
        let out = wrapped(text, 24, 14);
        assert_eq!(
            out,
            "worker        one two\n              three four\n              indented\n"
        );
        let long = "note: http://a-word-that-is-longer-than-the-line and more";
        assert_eq!(
            wrapped(long, 20, 2),
            "note:\n  http://a-word-that-is-longer-than-the-line\n  and more\n"
        );
        assert_eq!(wrapped("größer", 6, 2), "größer\n");
    }

    #[test]
    fn a_command_is_continued_as_a_shell_takes_it() {
        let words = ["llama-server", "--rpc", "a,b", "--device", "'x y'"].map(str::to_owned);
        assert_eq!(command(&words, None), "llama-server --rpc a,b --device 'x y'");
        assert_eq!(command(&words, Some(22)), "llama-server --rpc \\\n  a,b --device 'x y'");
    }
}
