//! Progress on stderr: one line that is rewritten on a terminal, and a few separate lines elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use super::output::say;
use crate::supervise::command::Role;
use crate::supervise::service::{GaveUp, Service, State};

/// Interval between updates on a terminal.
const UPDATE_INTERVAL: Duration = Duration::from_millis(200);
/// Without a terminal: time from the first line, without an estimate, to the next one.
const FIRST_LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Without a terminal: interval between later lines.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// Waits until the server is ready, and shows the progress.
pub async fn until_ready(role: Role, service: &mut Service) -> Result<(), GaveUp> {
    let began = Instant::now();
    let line = Line::new();
    line.tell(&format!("{role}: loading the model"));
    let state = service.state();
    let ready = {
        let ready = service.ready();
        tokio::pin!(ready);
        loop {
            tokio::select! {
                ready = &mut ready => break ready,
                () = tokio::time::sleep(UPDATE_INTERVAL) => {
                    let doing = doing(&state.borrow());
                    line.renew(&format!("{role}: {doing} ({:.0} s)", began.elapsed().as_secs_f32()));
                }
            }
        }
    };
    match &ready {
        Ok(()) => line.end(&format!("{role}: ready after {:.1} s", began.elapsed().as_secs_f32())),
        Err(_) => line.end(&format!("{role}: failed")),
    }
    ready
}

fn doing(state: &State) -> String {
    match state {
        State::Starting => "starting".to_owned(),
        State::Loading => "loading the model".to_owned(),
        State::Ready { .. } => "ready".to_owned(),
        State::Waiting { death, .. } => format!("starting again, since {death}"),
        State::Stopped => "stopped".to_owned(),
        State::GaveUp { .. } => "given up".to_owned(),
    }
}

/// A line on stderr that is rewritten on a terminal.
pub struct Line {
    terminal: bool,
}

impl Line {
    /// An empty line.
    pub fn new() -> Self {
        Self {
            terminal: io::stderr().is_terminal(),
        }
    }

    /// Replaces the line; prints a new line without a terminal.
    pub fn tell(&self, text: &str) {
        if self.terminal {
            self.renew(text);
        } else {
            say(format_args!("{text}"));
        }
    }

    /// Replaces the line on a terminal.
    pub fn renew(&self, text: &str) {
        if self.terminal {
            let mut stderr = io::stderr().lock();
            // Ignores an error of a closed terminal.
            let _ = write!(stderr, "\r\x1b[K{text}");
            let _ = stderr.flush();
        }
    }

    /// Clears the line on a terminal, for the next output.
    pub fn clear(&self) {
        self.renew("");
    }

    fn end(&self, text: &str) {
        self.renew(text);
        if self.terminal {
            say("");
        } else {
            say(format_args!("{text}"));
        }
    }
}

/// Progress over a number of answers.
pub struct Countdown {
    line: Line,
    began: Instant,
    /// Time of the next line without a terminal.
    due: Instant,
}

impl Countdown {
    /// Starts the clock.
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            line: Line::new(),
            began: now,
            due: now,
        }
    }

    /// Shows the current work, the number of finished answers, and the estimated time for the others.
    pub fn show(&mut self, doing: &str, done: usize, all: usize) {
        let text = format!("{doing}: {}", counted(self.began.elapsed(), done, all));
        if self.line.terminal {
            self.line.renew(&text);
        } else if Instant::now() >= self.due {
            say(format_args!("{text}"));
            self.due = Instant::now() + if done == 0 { FIRST_LINE_INTERVAL } else { LINE_INTERVAL };
        }
    }

    /// Clears the line on a terminal, for the next output.
    pub fn clear(&self) {
        self.line.clear();
    }
}

/// The number of finished answers, and the time for the others at the same speed.
fn counted(elapsed: Duration, done: usize, all: usize) -> String {
    if done == 0 {
        return format!("0 of {all} answers");
    }
    let left = elapsed.as_secs_f64() * all.saturating_sub(done) as f64 / done as f64;
    let (left, unit) = match left {
        0.0..100.0 => (left, "s"),
        100.0..6000.0 => (left / 60.0, "min"),
        _ => (left / 3600.0, "h"),
    };
    format!("{done} of {all} answers, about {left:.0} {unit} to go")
}

/// Progress in steps: each one is a line on a terminal, and two or three lines elsewhere.
pub struct Steps {
    line: Line,
    /// The current step, and its progress in tenths.
    last: Option<(String, Option<u64>)>,
}

impl Steps {
    /// No step yet.
    pub fn new() -> Self {
        Self {
            line: Line::new(),
            last: None,
        }
    }

    /// Shows the current step and its progress from 0 to 1. `detail` changes often, and is shown only on a terminal.
    pub fn show(&mut self, doing: &str, progress: Option<f64>, detail: &str) {
        let percent = progress.map(|progress| format!(" {:.0} %", progress * 100.0));
        let text = format!("{doing}{}{detail}", percent.as_deref().unwrap_or_default());
        let tenths =
            progress.map(|progress| (0..10).filter(|tenth| progress * 10.0 > f64::from(*tenth)).count() as u64);
        let same = self.last.as_ref().is_some_and(|(last, _)| last == doing);
        if self.line.terminal {
            if self.last.is_some() && !same {
                say("");
            }
            self.line.renew(&text);
        } else if !same || self.last.as_ref().is_some_and(|(_, last)| *last != tenths) {
            say(format_args!("{text}"));
        }
        self.last = Some((doing.to_owned(), tenths));
    }

    /// Keeps the last step on the terminal, for the next output.
    pub fn end(&mut self) {
        if self.last.take().is_some() && self.line.terminal {
            say("");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_estimated_from_the_answers_so_far() {
        let counted = |seconds, done, all| counted(Duration::from_secs(seconds), done, all);
        assert_eq!(counted(7, 0, 158), "0 of 158 answers");
        assert_eq!(counted(10, 10, 60), "10 of 60 answers, about 50 s to go");
        assert_eq!(counted(60, 10, 60), "10 of 60 answers, about 5 min to go");
        assert_eq!(counted(3600, 10, 60), "10 of 60 answers, about 5 h to go");
        assert_eq!(counted(3600, 60, 60), "60 of 60 answers, about 0 s to go");
    }
}
