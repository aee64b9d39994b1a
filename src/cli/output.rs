//! Output of commands: results on stdout, messages on stderr.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

use super::exit::Failure;

/// Writes `text` and flushes. If the reader has closed the pipe (`| head`), the command ends without a message.
pub fn print(text: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref())?;
    Ok(out.flush()?)
}

/// Like [`print()`], with a line break.
pub fn print_line(line: impl Display) -> Result<(), Failure> {
    print(format!("{line}\n"))
}

/// Writes a line on stderr. Where nobody reads it any more, as after the terminal was closed, the line is lost and the command goes on.
pub fn say(line: impl Display) {
    say_part(format_args!("{line}\n"));
}

/// Like [`say`], without a line break.
pub fn say_part(text: impl Display) {
    let _ = write!(io::stderr(), "{text}");
}

/// Prints a report as JSON or as `text`.
pub fn print_report<R: Serialize>(report: &R, json: bool, text: impl FnOnce(&R) -> String) -> Result<(), Failure> {
    if json {
        let json = serde_json::to_string_pretty(report).map_err(|error| Failure::other("write JSON", error))?;
        print_line(json)
    } else {
        print(text(report))
    }
}
