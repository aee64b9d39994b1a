//! The coordinator's status and the steps of a swap as JSON: written by the endpoints, read by the command line.
//!
//! Only `state` and `model` are required: they show a reader that a coordinator answers. A coordinator of another version may
//! lack any other field, or send more.

use serde::{Deserialize, Serialize};

use super::load::Load;
use super::pool::{Report, WorkerReport};
use crate::pool::swap::{Name, Snapshot, State};

/// The answer of `GET /v1/tightwad/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// State of the coordinator.
    #[serde(flatten)]
    pub now: Snapshot,
    /// Progress of the load.
    #[serde(flatten)]
    pub load: Load,
    /// Process id of the llama-server.
    pub pid: Option<u32>,
    /// The workers, in the order of the config.
    #[serde(default)]
    pub workers: Vec<WorkerReport>,
    /// The devices that hold layers of the model, each as a line of text.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Servers started since the coordinator was.
    #[serde(default)]
    pub starts: u64,
    /// Last lines of the last server that died.
    #[serde(default)]
    pub last_lines: Vec<String>,
    /// Version of the coordinator.
    #[serde(default)]
    pub version: String,
    /// Seconds since `state` changed; `None` from a coordinator that does not say.
    pub state_seconds: Option<f64>,
}

impl Status {
    pub(super) fn of(report: Report) -> Self {
        Self {
            now: report.now,
            load: report.load,
            pid: report.pid,
            workers: report.workers,
            devices: report.devices,
            starts: report.starts,
            last_lines: report.last_lines,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state_seconds: Some(report.since.elapsed().as_secs_f64()),
        }
    }
}

/// A line of the answer to `POST /v1/tightwad/swap`. The last line is `Done` or `Failed`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SwapLine {
    /// The model is ready.
    Done {
        /// Always true.
        done: bool,
        /// The model.
        model: Name,
    },
    /// The swap failed.
    Failed {
        /// Why.
        error: SwapError,
    },
    /// The present step.
    Step(Step),
}

/// A step on the way to a model that answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// State of the coordinator in this step.
    pub state: State,
    /// The model that runs, or is on its way.
    pub model: Name,
    /// The model that is being checked beside it.
    pub checking: Option<Name>,
    /// The model that comes after it.
    pub next: Option<Name>,
    /// Answers that run.
    #[serde(default)]
    pub running: usize,
    /// Why nothing runs.
    pub problem: Option<String>,
    /// Progress of the load.
    #[serde(flatten)]
    pub load: Load,
}

impl Step {
    /// The step that a coordinator takes now.
    #[must_use]
    pub fn of(now: &Snapshot, load: Load) -> Self {
        Self {
            state: now.state,
            model: now.model.clone(),
            checking: now.checking.clone(),
            next: now.next.clone(),
            running: now.running,
            problem: now.problem.clone(),
            load,
        }
    }
}

/// Why a swap failed: an error object of the OpenAI API.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapError {
    /// In a sentence.
    pub message: String,
    /// Kind of error, as the API names it.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// For programs: `model_failed`, `shutting_down` and so on.
    #[serde(default)]
    pub code: String,
    /// Always null.
    pub param: Option<String>,
}
