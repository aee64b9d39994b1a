//! The log on standard error: text for people, or JSON lines for programs.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use super::journal::{self, JournalFormat};

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// One readable line per event, with colours on a terminal; in systemd's journal with a priority and without the time.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter cannot be parsed.
    #[error(
        "`{filter}` is not a log filter: {source}; write a level (`info`) or `target=level` pairs (`info,tightwad=debug`)"
    )]
    Filter {
        /// As given.
        filter: String,
        /// The problem.
        source: tracing_subscriber::filter::ParseError,
    },
    /// This process has a log already.
    #[error("the log is already set up: {0}")]
    Twice(Box<dyn std::error::Error + Send + Sync>),
}

/// Sends the events of this process that pass `filter` to standard error.
pub fn init(format: Format, filter: &str) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(filter).map_err(|source| LogError::Filter {
        filter: filter.to_owned(),
        source,
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Else a write to a terminal that was closed would panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match format {
        Format::Text if journal::is_stderr() => log.with_ansi(false).event_format(JournalFormat::new()).try_init(),
        Format::Text => log.with_ansi(is_coloured()).with_target(false).try_init(),
        Format::Json => log.json().flatten_event(true).with_current_span(false).try_init(),
    }
    .map_err(LogError::Twice)
}

/// Whether to use colours: on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
fn is_coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_is_none_is_named_in_the_error() {
        let error = init(Format::Text, "tightwad=loud").unwrap_err();
        assert!(
            error.to_string().contains("`tightwad=loud` is not a log filter"),
            "{error}"
        );
    }
}
