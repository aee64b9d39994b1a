//! Log lines for systemd's journal. Each has a priority as prefix (`<4>`, see sd-daemon(3)), so that `journalctl -p err` finds it, and no
//! time, which the journal adds.

use std::fmt::{self, Write as _};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Whether standard error is the journal. `JOURNAL_STREAM` names the journal's file (systemd.exec(5)).
#[must_use]
pub fn is_stderr() -> bool {
    let Some(journal) = std::env::var("JOURNAL_STREAM").ok() else {
        return false;
    };
    rustix::fs::fstat(std::io::stderr()).is_ok_and(|stat| journal == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// One or several lines with the prefix of this level.
#[must_use]
pub fn lines(level: Level, text: &str) -> String {
    let priority = match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    };
    let mut prefixed = String::with_capacity(text.len() + 8);
    for line in text.lines() {
        let _ = writeln!(prefixed, "<{priority}>{line}");
    }
    prefixed
}

/// Formats events for the journal.
#[derive(Debug)]
pub(super) struct JournalFormat(Format<Full, ()>);

impl JournalFormat {
    pub(super) fn new() -> Self {
        let text = tracing_subscriber::fmt::format();
        Self(text.without_time().with_level(false).with_target(false))
    }
}

impl<S, N> FormatEvent<S, N> for JournalFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut text = String::new();
        self.0.format_event(context, Writer::new(&mut text), event)?;
        writer.write_str(&lines(*event.metadata().level(), &text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_the_priority_that_syslog_gives_its_level() {
        assert_eq!(lines(Level::ERROR, "one\ntwo"), "<3>one\n<3>two\n");
        assert_eq!(lines(Level::WARN, "a"), "<4>a\n");
        assert_eq!(lines(Level::INFO, "a\n"), "<6>a\n");
        assert_eq!(lines(Level::TRACE, "a"), "<7>a\n");
    }
}
