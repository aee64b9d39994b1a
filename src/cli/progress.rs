//! What a person sees while servers start.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::supervise::command::Role;
use crate::supervise::service::{GaveUp, Service, State};

/// How often the line on a terminal is renewed.
const TICK: Duration = Duration::from_millis(200);

/// Waits until the server serves and shows how that goes.
pub async fn until_ready(role: Role, service: &mut Service) -> Result<(), GaveUp> {
    let began = Instant::now();
    let line = Line::new();
    line.begin(&format!("{role}: loading the model"));
    let state = service.state();
    let ready = {
        let ready = service.ready();
        tokio::pin!(ready);
        loop {
            tokio::select! {
                ready = &mut ready => break ready,
                () = tokio::time::sleep(TICK) => {
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

/// A line on stderr that is renewed on a terminal, and only begun and ended elsewhere.
pub struct Line {
    terminal: bool,
}

impl Line {
    /// A line that says nothing yet.
    pub fn new() -> Self {
        Self {
            terminal: io::stderr().is_terminal(),
        }
    }

    fn begin(&self, text: &str) {
        if !self.terminal {
            eprintln!("{text}");
        }
    }

    /// Says this instead, on a terminal.
    pub fn renew(&self, text: &str) {
        if self.terminal {
            let mut stderr = io::stderr().lock();
            // A terminal that is gone has no one to tell.
            let _ = write!(stderr, "\r\x1b[K{text}");
            let _ = stderr.flush();
        }
    }

    /// Leaves an empty line for what is printed next, on a terminal.
    pub fn clear(&self) {
        self.renew("");
    }

    fn end(&self, text: &str) {
        self.renew(text);
        if self.terminal {
            eprintln!();
        } else {
            eprintln!("{text}");
        }
    }
}

/// Steps, one after the other: each a line that is renewed on a terminal, and two or three lines elsewhere.
pub struct Steps {
    line: Line,
    /// The step, and how many tenths of it are done.
    last: Option<(String, Option<u64>)>,
}

impl Steps {
    /// Nothing is done so far.
    pub fn new() -> Self {
        Self {
            line: Line::new(),
            last: None,
        }
    }

    /// Says what is done now and how far it is, from 0 to 1; `detail` changes too often for more than a terminal.
    pub fn show(&mut self, doing: &str, progress: Option<f64>, detail: &str) {
        let percent = progress.map(|progress| format!(" {:.0} %", progress * 100.0));
        let text = format!("{doing}{}{detail}", percent.as_deref().unwrap_or_default());
        let tenths =
            progress.map(|progress| (0..10).filter(|tenth| progress * 10.0 > f64::from(*tenth)).count() as u64);
        let same = self.last.as_ref().is_some_and(|(last, _)| last == doing);
        if self.line.terminal {
            if self.last.is_some() && !same {
                eprintln!();
            }
            self.line.renew(&text);
        } else if !same || self.last.as_ref().is_some_and(|(_, last)| *last != tenths) {
            eprintln!("{text}");
        }
        self.last = Some((doing.to_owned(), tenths));
    }

    /// Leaves the last step as it is, for what is printed next.
    pub fn end(&mut self) {
        if self.last.take().is_some() && self.line.terminal {
            eprintln!();
        }
    }
}
