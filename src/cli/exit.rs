//! Exit codes, and the failures that lead to them. Every error of the other modules becomes a [`Failure`] here: one sentence and one code.

use std::io;
use std::process::ExitCode;

use reqwest::StatusCode;

use crate::bench::{NativeDraftError, PromptError, RelayError};
use crate::config::{ConfigError, local_key};
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
    /// Success.
    Ok = 0,
    /// Any other failure.
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
    /// The program to stop or to query is not running.
    NotRunning = 7,
    /// A child process was given up: it died too often, or a restart does not help.
    ChildGaveUp = 8,
    /// The model does not fit into the pool.
    DoesNotFit = 9,
    /// A worker runs another build of llama.cpp.
    OtherBuild = 10,
    /// A model file is broken or of an unknown kind.
    BrokenModel = 11,
    /// Nothing was drafted, so nothing was compared.
    NothingDrafted = 12,
    /// A drafter is down; answers come without its drafts.
    DraftDown = 13,
    /// A server is up and refuses the token or the key.
    Refused = 14,
    /// Ctrl-C before the end.
    Interrupted = 130,
    /// The reader of the output has closed it. Shells use this number for a program that SIGPIPE has ended.
    OutputClosed = 141,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why the program ends early. The message says what happened and what to do next; it is empty if no message is needed.
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

    /// A failure without a message.
    #[must_use]
    pub fn silent(exit: Exit) -> Self {
        Self::new(exit, "")
    }

    /// Names the file of the refused key, if the server got the shared key of this host.
    #[must_use]
    pub fn with_local_key(mut self, is_local_key: bool) -> Self {
        if is_local_key
            && self.exit == Exit::Refused
            && let Ok(path) = local_key::path()
        {
            self.message = format!(
                "{}; the key sent is that of {}: a server that another user has started takes the key of that user's file, so \
                 start both as one user or set `api_key_file`",
                self.message,
                path.display()
            );
        }
        self
    }

    /// A failure without its own exit code. `doing` completes "cannot …".
    pub fn other(doing: &str, error: impl std::fmt::Display) -> Self {
        Self::new(Exit::Other, format!("cannot {doing}: {error}"))
    }
}

impl From<PreflightError> for Failure {
    fn from(error: PreflightError) -> Self {
        let exit = match error {
            PreflightError::NoProgram(_) | PreflightError::NoFile { .. } | PreflightError::Unreadable { .. } => {
                Exit::File
            }
            PreflightError::NotGguf(_) => Exit::BrokenModel,
            PreflightError::PortInUse { .. } => Exit::PortInUse,
            PreflightError::CannotListen { .. } => Exit::Config,
            PreflightError::HelpTimedOut(_) => Exit::Other,
        };
        Self::new(exit, error.to_string())
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
            WorkerError::Preflight(error) | WorkerError::NoServer(NoServer::Preflight(error)) => error.into(),
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

impl From<NativeDraftError> for Failure {
    fn from(error: NativeDraftError) -> Self {
        match error {
            NativeDraftError::Preflight(error) => error.into(),
            NativeDraftError::GaveUp(error) => error.into(),
            NativeDraftError::Chat(error) => error.into(),
            NativeDraftError::Port(error) => error.into(),
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
            io::ErrorKind::BrokenPipe => Self::silent(Exit::OutputClosed),
            _ => Self::new(Exit::Other, error.to_string()),
        }
    }
}
