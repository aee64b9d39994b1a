//! The state of the machine as the status shows it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::event::Name;
use super::{Check, Phase, Swap};

/// Name of a phase in the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Nothing runs; it will be tried again.
    Down,
    /// Nothing runs until a worker returns, a command comes, or a later try succeeds.
    GaveUp,
    /// Workers are being leased.
    Leasing,
    /// The model is being loaded.
    Loading,
    /// The server answers.
    Ready,
    /// The server finishes its answers before another model starts.
    Draining,
    /// The server is ending.
    Stopping,
    /// The leases are being returned.
    Freeing,
    /// The coordinator has ended.
    Stopped,
    /// A state that only another version of the coordinator knows. This one reads it and never takes it.
    #[serde(other)]
    Unknown,
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
            Self::Unknown => "unknown",
        })
    }
}

/// The state at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The phase.
    pub state: State,
    /// The model that runs or is being started.
    pub model: Name,
    /// The model that follows it.
    pub next: Option<Name>,
    /// The model that is being checked meanwhile.
    pub checking: Option<Name>,
    /// Running answers.
    #[serde(default)]
    pub running: usize,
    /// Waiting requests.
    #[serde(default)]
    pub waiting: usize,
    /// Why nothing runs.
    pub problem: Option<String>,
    /// The last swap that failed.
    pub last_failure: Option<FailedSwap>,
    /// Number of the last start; it only grows.
    #[serde(default)]
    pub epoch: u64,
}

/// A swap that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedSwap {
    /// The model that should have started.
    pub model: Name,
    /// Why it could not start.
    pub why: String,
}

impl Swap {
    /// The state at this moment.
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
