//! What goes into the machine, and what comes out.

use std::sync::Arc;

use crate::count::count;

/// A model's name in the config.
pub type Name = Arc<str>;

/// A request or a swap command, by a number that never comes again.
pub type Id = u64;

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// Somebody wants a model.
    Asked {
        /// Who.
        id: Id,
        /// Which; `None`: whatever runs.
        model: Option<Name>,
        /// A command of the user rather than a request for an answer.
        command: bool,
    },
    /// A request's answer is over, or nobody waits for it any more.
    Left(Id),
    /// What came of [`Action::Check`].
    Checked(Name, Result<(), String>),
    /// What came of [`Action::Lease`].
    Leased(u64, Result<(), Unready>),
    /// The server answers.
    Ready(u64),
    /// The server ended, and nobody had asked it to.
    Died(u64, Failure),
    /// A server that runs cannot go on: a worker is lost, or nothing moves any more.
    Broken(u64, Failure),
    /// What [`Action::Stop`] asked for has been done.
    Stopped(u64),
    /// What [`Action::Free`] asked for has been done.
    Freed(u64),
    /// A worker that was away is back.
    WorkerBack,
    /// Time has passed.
    Tick,
    /// The coordinator is to end.
    Shutdown,
}

/// Why workers could not be leased.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unready {
    /// They may be ready soon.
    Yet(String),
    /// Asking again would not help: the model file is missing, or does not fit.
    Ever(String),
}

/// Why a server ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// In a sentence.
    pub why: String,
    /// Whether the same start may go better next time.
    pub curable: bool,
    /// Whether a worker was the cause.
    pub worker: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Let the server that runs answer this request; to a command: its model runs.
    Admit(Id),
    /// Tell this one why not.
    Refuse(Id, Refused),
    /// See whether this model could be started: its file, and whether it fits. Answered by [`Event::Checked`].
    Check(Name),
    /// Take the workers that this model needs, for this epoch, which is higher than any before. All or nothing. Answered
    /// by [`Event::Leased`].
    Lease(u64, Name),
    /// Take them no further. Answered by [`Event::Leased`] all the same, with success if it came too late.
    CancelLease(u64),
    /// Start the server. Answered by [`Event::Ready`] or [`Event::Died`].
    Start(u64, Name),
    /// End the answers that still run.
    EndAnswers(Ended),
    /// End the server, at once if it is broken. Answered by [`Event::Stopped`].
    Stop {
        /// Which.
        epoch: u64,
        /// Whether it cannot be expected to end by itself.
        broken: bool,
    },
    /// Return the leases, whose memory is free after that. Answered by [`Event::Freed`].
    Free(u64),
    /// All is done after [`Event::Shutdown`].
    Exit,
}

/// Why an answer is not finished.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The server failed.
    #[error("{}; send the request again", .0.why)]
    Failed(Failure),
    /// Another model is to come.
    #[error("the model `{0}` was asked for, and this answer took longer than `drain_seconds`")]
    Swapped(Name),
    /// The coordinator ends.
    #[error("the coordinator is being stopped")]
    Shutdown,
}

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no such model.
    #[error("there is no model `{asked}` in the config, but {models}")]
    Unknown {
        /// The model asked for.
        asked: Name,
        /// Those that there are.
        models: String,
    },
    /// Another one runs, and requests may not change that.
    #[error(
        "the model `{asked}` is not loaded, `{running}` is: ask for that, or load yours with `tightwad swap {asked}`"
    )]
    OtherRuns {
        /// The model asked for.
        asked: Name,
        /// The one that runs.
        running: Name,
    },
    /// It waited for as long as it may.
    #[error("the model `{model}` is not ready yet{}: send the request again later", because(.why.as_deref()))]
    NotReady {
        /// The model waited for.
        model: Name,
        /// What is in the way, if anything is.
        why: Option<String>,
    },
    /// Too many wait already.
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
    /// There is no such model; these there are.
    pub fn unknown<'a>(asked: Name, models: impl IntoIterator<Item = &'a Name>) -> Self {
        let models: Vec<String> = models.into_iter().map(|model| format!("`{model}`")).collect();
        let models = models.join(", ");
        Self::Unknown { asked, models }
    }
}

fn because(why: Option<&str>) -> String {
    why.map_or_else(String::new, |why| format!(" ({why})"))
}
