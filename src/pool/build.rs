//! The build of llama.cpp. All hosts of a pool must run the same one.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::supervise::environment;

/// Timeout for printing the version; a GPU driver that wakes up takes a while.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The name of an unknown build in the status of an agent.
pub const UNKNOWN: &str = "unknown";

/// The problem of a worker whose build differs from that of its coordinator.
#[must_use]
pub fn difference(worker: &str, theirs: &str, own: &str) -> Option<String> {
    (theirs != own).then(|| {
        format!("worker {worker} runs llama.cpp {theirs}, this coordinator {own}: install the same build on both")
    })
}

/// The build in the output of `llama-server --version`, such as `b11434`; `None` if there is none.
pub async fn build(llama_server: &Path) -> Option<String> {
    let mut command = Command::new(llama_server);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    environment::apply(&mut command, &[]);
    let output = timeout(TIMEOUT, command.output()).await.ok()?.ok()?;
    parse(&String::from_utf8_lossy(&output.stderr)).or_else(|| parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads `version: 0.6.0-dev (build 11434, commit unknown)`, or the older form `version: 6021 (1d72c84)`.
fn parse(text: &str) -> Option<String> {
    let version = text.lines().find_map(|line| line.trim().strip_prefix("version:"))?;
    let number = match version.split_once("build ") {
        Some((_, rest)) => rest,
        None => version.trim(),
    };
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    // A build outside of a git repository has number 0.
    let number: u32 = digits.parse().ok().filter(|number| *number != 0)?;
    Some(format!("b{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_is_read_from_both_ways_of_writing_it() {
        let new = "version: 0.6.0-dev (build 11434, commit unknown)\nbuilt with GNU 12.2.0 for Linux x86_64\n";
        assert_eq!(parse(new).as_deref(), Some("b11434"));
        assert_eq!(parse("version: 6021 (1d72c84)\n").as_deref(), Some("b6021"));
    }

    #[test]
    fn a_build_without_a_number_is_unknown() {
        assert_eq!(parse("version: 0 (unknown)"), None);
        assert_eq!(parse("usage: llama-server"), None);
    }
}
