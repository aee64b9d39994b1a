//! Makes the program visible from outside: the log, the metrics, and the problems that were logged.
//!
//! Nothing here changes an answer, and nothing here knows the modules that it observes.

pub mod journal;
pub mod log;
pub mod metrics;
pub mod problems;

use std::fmt::Write as _;

use prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};
use serde::Serialize;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The whole answer went out.
    Finished,
    /// The client left, or the proxy was stopped, before the answer was complete.
    Cancelled,
    /// It was refused, the target refused it, or the answer broke off.
    Failed,
}

impl Outcome {
    /// Name in the log, the metrics and the status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(self.name())
    }
}
