//! How the program ends: one sentence and one number.

use std::io;
use std::process::ExitCode;

use reqwest::StatusCode;

use crate::bench::{OwnDraftError, PromptError, RelayError};
use crate::config::ConfigError;
use crate::gguf::ModelFileError;
use crate::plan::PlanError;
use crate::pool::coordinator::CoordinatorError;
use crate::pool::worker::{NoServer, WorkerError};
use crate::supervise::preflight::PreflightError;
use crate::supervise::service::GaveUp;
use crate::upstream::ChatError;

/// Exit codes. Scripts and systemd units may rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It did what it was asked.
    Ok = 0,
    /// Anything that has no number of its own.
    Other = 1,
    /// The command line is wrong (clap's own code).
    Usage = 2,
    /// The config is wrong.
    Config = 3,
    /// A file is missing or cannot be read: a model, a program, a key, prompts.
    File = 4,
    /// A port is in use.
    PortInUse = 5,
    /// A server does not answer, or answers with an error.
    Unreachable = 6,
    /// There is nothing to stop or to ask: it does not run.
    NotRunning = 7,
    /// A child process died too often, or of something that a restart does not cure.
    ChildGaveUp = 8,
    /// The model does not fit into the pool.
    DoesNotFit = 9,
    /// A worker runs another build of llama.cpp.
    OtherBuild = 10,
    /// A model file is there, and broken or of a kind that nobody knows.
    BrokenModel = 11,
    /// Nothing was drafted, so nothing was compared.
    NothingDrafted = 12,
    /// A drafter is down: answers come, without its drafts.
    DraftDown = 13,
    /// A server is up and refuses the token or the key.
    Refused = 14,
    /// Ctrl-C before the work was done.
    Interrupted = 130,
    /// Who read the output has gone: what a shell says of a program that SIGPIPE has ended.
    Unheard = 141,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why the program ends early: what happened and what to do next, in one sentence; no sentence where nobody needs one.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The sentence.
    pub message: String,
}

impl Failure {
    /// A failure with this code and sentence.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
        }
    }

    /// An end that needs no words.
    #[must_use]
    pub fn silent(exit: Exit) -> Self {
        Self::new(exit, "")
    }

    /// An error that has no exit code of its own, with what was being done.
    pub fn other(doing: &str, error: impl std::fmt::Display) -> Self {
        Self::new(Exit::Other, format!("cannot {doing}: {error}"))
    }
}

impl From<PreflightError> for Failure {
    fn from(unfit: PreflightError) -> Self {
        let exit = match unfit {
            PreflightError::NoProgram(_) | PreflightError::NoFile { .. } | PreflightError::Unreadable { .. } => {
                Exit::File
            }
            PreflightError::NotGguf(_) => Exit::BrokenModel,
            PreflightError::PortInUse { .. } => Exit::PortInUse,
            PreflightError::CannotListen { .. } => Exit::Config,
            PreflightError::Mute(_) => Exit::Other,
        };
        Self::new(exit, unfit.to_string())
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let exit = match error {
            ConfigError::Secret { .. } => Exit::File,
            _ => Exit::Config,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<GaveUp> for Failure {
    fn from(gave_up: GaveUp) -> Self {
        Self::new(Exit::ChildGaveUp, gave_up.to_string())
    }
}

impl From<WorkerError> for Failure {
    fn from(error: WorkerError) -> Self {
        match error {
            WorkerError::Token(error) => error.into(),
            WorkerError::PreflightError(error) | WorkerError::NoServer(NoServer::PreflightError(error)) => error.into(),
            WorkerError::GaveUp(error) => error.into(),
            WorkerError::NotFound(_) | WorkerError::Launch(_) => Self::new(Exit::Config, error.to_string()),
            WorkerError::NoServer(_) => Self::new(Exit::ChildGaveUp, error.to_string()),
        }
    }
}

impl From<CoordinatorError> for Failure {
    fn from(error: CoordinatorError) -> Self {
        match error {
            CoordinatorError::NoSection => Self::new(Exit::Config, error.to_string()),
            CoordinatorError::Config(error) => error.into(),
            CoordinatorError::Worker(_) => Self::new(Exit::File, error.to_string()),
        }
    }
}

impl From<ChatError> for Failure {
    fn from(error: ChatError) -> Self {
        match error {
            ChatError::Reader(error) => error.into(),
            ChatError::NoClient(_) => Self::new(Exit::Other, error.to_string()),
            ChatError::Refused {
                status: StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN,
                ..
            } => Self::new(Exit::Refused, error.to_string()),
            _ => Self::new(Exit::Unreachable, error.to_string()),
        }
    }
}

impl From<PromptError> for Failure {
    fn from(error: PromptError) -> Self {
        let exit = match error {
            PromptError::Unreadable { .. } | PromptError::Line { .. } | PromptError::Empty => Exit::File,
            PromptError::UnknownKind { .. } => Exit::Usage,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<RelayError> for Failure {
    fn from(error: RelayError) -> Self {
        let exit = match error {
            RelayError::Url(_) => Exit::Config,
            RelayError::Io { .. } => Exit::Unreachable,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<OwnDraftError> for Failure {
    fn from(error: OwnDraftError) -> Self {
        match error {
            OwnDraftError::PreflightError(error) => error.into(),
            OwnDraftError::GaveUp(error) => error.into(),
            OwnDraftError::Chat(error) => error.into(),
            OwnDraftError::Port(error) => error.into(),
        }
    }
}

impl From<ModelFileError> for Failure {
    fn from(error: ModelFileError) -> Self {
        let exit = match error {
            ModelFileError::Missing(_)
            | ModelFileError::MissingPart { .. }
            | ModelFileError::NotAFile { .. }
            | ModelFileError::Unreadable { .. } => Exit::File,
            _ => Exit::BrokenModel,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        Self::new(Exit::Config, error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::silent(Exit::Unheard),
            _ => Self::new(Exit::Other, error.to_string()),
        }
    }
}
