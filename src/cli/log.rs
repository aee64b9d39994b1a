//! Where the log goes: to stderr, so that stdout holds results only.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// Environment variable with the log filter: `debug`, `warn,tightwad::child=info`, …
const FILTER: &str = "TIGHTWAD_LOG";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

/// Starts the log. `level` is what counts when `TIGHTWAD_LOG` is not set.
pub fn start(format: Format, level: &str) {
    let filter = EnvFilter::try_from_env(FILTER).unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false);
    // A second start (tests in one process) leaves the first one in place.
    let _ = match format {
        Format::Text => log
            .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
            .try_init(),
        Format::Json => log.json().try_init(),
    };
}
