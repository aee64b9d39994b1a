//! The metrics, in the `OpenMetrics` text format of Prometheus.
//!
//! A metric that vLLM has too uses vLLM's name, so that dashboards for vLLM work. All other names begin with `tightwad_`. Values of labels
//! come from fixed lists and never from clients.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::Outcome;

/// The content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the histograms' buckets in seconds, from a warm prompt cache to a long answer of a big pool.
const SECONDS: [f64; 16] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 1200.0,
];

/// Labels of a request that ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Ended {
    /// A known path, or `other`.
    pub path: &'static str,
    /// How it ended.
    pub outcome: Outcome,
}

/// The metrics.
pub struct Metrics {
    registry: Registry,
    /// Requests that ended.
    pub requests: Family<Ended, Counter>,
    /// Requests that are being answered.
    pub in_flight: Gauge,
    /// Requests that came without the token.
    pub unauthorized: Counter,
    /// Seconds to the first token of a streamed answer.
    pub first_token: Histogram,
    /// Seconds to the end of the answer.
    pub duration: Histogram,
}

impl Metrics {
    /// Starts with all values at zero. Each scrape also reads `collector`.
    #[must_use]
    pub fn new(collector: Box<dyn Collector>) -> Self {
        let mut registry = Registry::default();
        let requests = Family::default();
        registry.register(
            "tightwad_requests",
            "Requests that ended, by path and outcome",
            requests.clone(),
        );
        let in_flight = Gauge::default();
        registry.register(
            "tightwad_requests_in_flight",
            "Requests that are being answered",
            in_flight.clone(),
        );
        let unauthorized = Counter::default();
        registry.register(
            "tightwad_unauthorized",
            "Requests that came without the token",
            unauthorized.clone(),
        );
        let first_token = Histogram::new(SECONDS);
        registry.register(
            "tightwad_time_to_first_token_seconds",
            "From the arrival of a streamed completion to its first token",
            first_token.clone(),
        );
        let duration = Histogram::new(SECONDS);
        registry.register(
            "tightwad_request_duration_seconds",
            "From a completion's arrival to the end of its answer",
            duration.clone(),
        );
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("tightwad_build", "The running version", version);
        registry.register_collector(collector);
        Self {
            registry,
            requests,
            in_flight,
            unauthorized,
            first_token,
            duration,
        }
    }

    /// The current values.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}
