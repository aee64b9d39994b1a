//! What the status tells of the machine.

use std::fmt;

use serde::Serialize;

use super::event::Name;
use super::{Check, Phase, Swap};

/// What the phase is called in the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Nothing runs; it will be tried again.
    Down,
    /// Nothing runs, and a worker's return or a command changes that; a later try perhaps.
    GaveUp,
    /// Workers are being leased.
    Leasing,
    /// The model is being loaded.
    Loading,
    /// It answers.
    Ready,
    /// It finishes its answers before another model comes.
    Draining,
    /// The server is being ended.
    Stopping,
    /// Leases are returned, memory becomes free.
    Freeing,
    /// The end.
    Stopped,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Down => "down",
            Self::GaveUp => "gave-up",
            Self::Leasing => "leasing",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Freeing => "freeing",
            Self::Stopped => "stopped",
        })
    }
}

/// What is told about the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Where it stands.
    pub state: State,
    /// The model that runs, or is on its way.
    pub model: Name,
    /// The model that is to come after it.
    pub next: Option<Name>,
    /// The model that is being checked beside it.
    pub checking: Option<Name>,
    /// Answers that run.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Why nothing runs.
    pub problem: Option<String>,
    /// The last swap that failed.
    pub last_failure: Option<Failed>,
    /// Starts so far, as a number that only grows.
    pub epoch: u64,
}

/// A model that another one was to give way to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// Which.
    pub model: Name,
    /// Why it could not be started.
    pub why: String,
}

impl Swap {
    /// What is told about it.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            state: match self.phase {
                Phase::Down { gave_up: false, .. } => State::Down,
                Phase::Down { gave_up: true, .. } => State::GaveUp,
                Phase::Leasing { .. } => State::Leasing,
                Phase::Loading => State::Loading,
                Phase::Ready { .. } => State::Ready,
                Phase::Draining { .. } => State::Draining,
                Phase::Stopping { .. } => State::Stopping,
                Phase::Freeing { .. } => State::Freeing,
                Phase::Gone => State::Stopped,
            },
            model: self.model.clone(),
            next: match &self.phase {
                Phase::Draining { next, .. } => next.clone(),
                _ => None,
            },
            checking: match &self.check {
                Some(Check::Asked(model)) => Some(model.clone()),
                _ => None,
            },
            running: self.running.len(),
            waiting: self.waiting.iter().filter(|it| !it.command).count(),
            problem: self.problem.clone(),
            last_failure: self.last_failure.clone(),
            epoch: self.epoch,
        }
    }
}
