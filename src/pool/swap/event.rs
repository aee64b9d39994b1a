//! The events that go into the machine and the actions that come out.

use std::sync::Arc;

use crate::count::count;

/// A model's name in the config.
pub type Name = Arc<str>;

/// Number of a request or a swap command; never reused.
pub type Id = u64;

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A request or a command asks for a model.
    Asked {
        /// Its number.
        id: Id,
        /// The model; `None`: the one that runs.
        model: Option<Name>,
        /// Whether it is a swap command.
        command: bool,
    },
    /// A request's answer is over, or its client left.
    Left(Id),
    /// The result of [`Action::Check`].
    Checked(Name, Result<(), String>),
    /// The result of [`Action::Lease`].
    Leased(u64, Result<(), NotReady>),
    /// The server of this epoch answers.
    Ready(u64),
    /// The server ended without [`Action::Stop`].
    Died(u64, Failure),
    /// A running server cannot continue: a worker is lost, or the server has stalled.
    Broken(u64, Failure),
    /// [`Action::Stop`] is done.
    Stopped(u64),
    /// [`Action::Free`] is done.
    Freed(u64),
    /// A lost worker answers again.
    WorkerBack,
    /// Time has passed.
    Tick,
    /// The coordinator shuts down.
    Shutdown,
}

/// Why a model cannot be started now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotReady {
    /// A later try may succeed.
    Retryable(String),
    /// No later try will succeed: the model file is missing, or the model does not fit.
    Permanent(String),
}

/// Why a server ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One sentence.
    pub why: String,
    /// Whether the same start may succeed next time.
    pub curable: bool,
    /// Whether a worker was the cause.
    pub worker: bool,
}

/// Something the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Let the running server answer this request. For a command: its model runs.
    Admit(Id),
    /// Refuse this request.
    Refuse(Id, Refused),
    /// Check the model: whether its file is complete and the model fits. [`Event::Checked`] follows.
    Check(Name),
    /// Lease all workers for this epoch, or none. Each epoch is higher than the one before. [`Event::Leased`] follows.
    Lease(u64, Name),
    /// Stop leasing. [`Event::Leased`] still follows, with success if the cancellation came too late.
    CancelLease(u64),
    /// Start the server. [`Event::Ready`] or [`Event::Died`] follows.
    Start(u64, Name),
    /// End the running answers.
    EndAnswers(Ended),
    /// End the server; kill it if it is broken. [`Event::Stopped`] follows.
    Stop {
        /// Its epoch.
        epoch: u64,
        /// Whether it will not end on request.
        broken: bool,
    },
    /// Return the leases, which frees their memory. [`Event::Freed`] follows.
    Free(u64),
    /// The last action after [`Event::Shutdown`].
    Exit,
}

/// Why an answer ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The server failed.
    #[error("{}; send the request again", .0.why)]
    Failed(Failure),
    /// A swap to this model began.
    #[error("the model `{0}` was asked for, and this answer took longer than `drain_seconds`")]
    Swapped(Name),
    /// The coordinator ends.
    #[error("the coordinator is being stopped")]
    Shutdown,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The config has no such model.
    #[error("there is no model `{asked}` in the config, but {models}")]
    Unknown {
        /// The model asked for.
        asked: Name,
        /// The models of the config.
        models: String,
    },
    /// Another model runs, and requests may not start a swap.
    #[error(
        "the model `{asked}` is not loaded, `{running}` is: ask for that, or load yours with `tightwad swap {asked}`"
    )]
    OtherRuns {
        /// The model asked for.
        asked: Name,
        /// The running model.
        running: Name,
    },
    /// It waited for `wait_seconds`.
    #[error("the model `{model}` is not ready yet{}: send the request again later", because(.why.as_deref()))]
    NotReady {
        /// The model it waited for.
        model: Name,
        /// Why the model is not ready, if known.
        why: Option<String>,
    },
    /// Too many requests wait already.
    #[error("{} already: send the request again later", count(*.0 as u64, "request waits", "requests wait"))]
    Full(usize),
    /// The model could not be started.
    #[error("the model `{model}` could not be started: {why}")]
    Failed {
        /// The model.
        model: Name,
        /// Why.
        why: String,
    },
    /// A later command wants another model.
    #[error("a later command asked for `{0}`")]
    Superseded(Name),
    /// The coordinator ends.
    #[error("the coordinator is being stopped")]
    Shutdown,
}

impl Refused {
    /// No such model; `models` are those of the config.
    pub fn unknown<'a>(asked: Name, models: impl IntoIterator<Item = &'a Name>) -> Self {
        let models: Vec<String> = models.into_iter().map(|model| format!("`{model}`")).collect();
        let models = models.join(", ");
        Self::Unknown { asked, models }
    }
}

fn because(why: Option<&str>) -> String {
    why.map_or_else(String::new, |why| format!(" ({why})"))
}
