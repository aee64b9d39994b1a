//! What can be seen from outside: the log, the metrics, the problems that were logged.

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
    /// The client went away, or we were told to stop, before the answer was complete.
    Cancelled,
    /// It was refused, the target refused it, or the answer broke off.
    Failed,
}

impl Outcome {
    /// As it is written in the log, the metrics and the status.
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
