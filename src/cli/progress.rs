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
