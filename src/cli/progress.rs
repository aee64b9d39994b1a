//! What a person sees while servers start.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::supervise::command::Role;
use crate::supervise::service::{GaveUp, Service, State};

/// How often the line on a terminal is renewed.
const TICK: Duration = Duration::from_millis(200);
/// How soon a line that cannot tell yet how long it will take is followed by one that can, where there is no terminal.
const SOON: Duration = Duration::from_secs(10);
/// How soon any other line of a count is followed by the next one there.
const LATER: Duration = Duration::from_secs(30);

/// Waits until the server serves and shows how that goes.
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

/// A line on stderr that is renewed on a terminal.
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

    /// Says this instead, and on a line of its own where there is no terminal.
    pub fn tell(&self, text: &str) {
        if self.terminal {
            self.renew(text);
        } else {
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

/// Answers that are waited for: a line that is renewed on a terminal, and one now and then elsewhere.
pub struct Countdown {
    line: Line,
    began: Instant,
    /// When the next line is due where there is no terminal.
    due: Instant,
}

impl Countdown {
    /// Begins now.
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            line: Line::new(),
            began: now,
            due: now,
        }
    }

    /// Says what is done now, how many of all answers have come, and about how long the others will still take.
    pub fn show(&mut self, doing: &str, done: usize, all: usize) {
        let text = format!("{doing}: {}", counted(self.began.elapsed(), done, all));
        if self.line.terminal {
            self.line.renew(&text);
        } else if Instant::now() >= self.due {
            eprintln!("{text}");
            self.due = Instant::now() + if done == 0 { SOON } else { LATER };
        }
    }

    /// Leaves an empty line for what is printed next, on a terminal.
    pub fn clear(&self) {
        self.line.clear();
    }
}

/// How many answers came in this time, and how long the others will take if they are as quick.
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
