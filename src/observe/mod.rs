//! Makes the program visible from outside: the log, the metrics and the most recent requests.
//!
//! Nothing here changes an answer. The proxy writes to [`Observed`]; `/metrics` and the status read it.

pub mod journal;
pub mod log;
pub mod metrics;
pub mod problems;
pub mod recent;

use std::fmt::Write as _;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};
use serde::Serialize;

use crate::engine::Engine;

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

/// All counts of a proxy.
#[derive(Debug)]
pub struct Observed {
    /// For Prometheus.
    pub metrics: metrics::Metrics,
    /// For people.
    pub recent: recent::Recent,
}

impl Observed {
    /// Starts at zero. The engine's own counts are read from `engine` at each scrape.
    #[must_use]
    pub fn new(engine: &Arc<Engine>) -> Self {
        Self {
            metrics: metrics::Metrics::new(engine),
            recent: recent::Recent::default(),
        }
    }
}
