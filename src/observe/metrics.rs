//! The metrics, in the `OpenMetrics` text format of Prometheus.
//!
//! A metric that vLLM has too uses vLLM's name, so that dashboards for vLLM work. All other names begin with `tightwad_`. Values of labels
//! come from fixed lists and never from clients.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::Outcome;
use crate::engine::{Engine, Verification};

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
    /// Seconds to the first byte of the target's answer.
    pub first_byte: Histogram,
    /// Seconds to the end of the answer.
    pub duration: Histogram,
}

impl Metrics {
    /// Starts with all values at zero.
    #[must_use]
    pub fn new(engine: &Arc<Engine>) -> Self {
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
        let first_byte = Histogram::new(SECONDS);
        registry.register(
            "tightwad_time_to_first_byte_seconds",
            "From a completion's arrival to the first byte of the target's answer",
            first_byte.clone(),
        );
        let duration = Histogram::new(SECONDS);
        registry.register(
            "tightwad_request_duration_seconds",
            "From a completion's arrival to the end of its answer",
            duration.clone(),
        );
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("tightwad_build", "The running version", version);
        registry.register_collector(Box::new(Drafting(Arc::clone(engine))));
        Self {
            registry,
            requests,
            in_flight,
            unauthorized,
            first_byte,
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

/// The engine's counts, read at each scrape.
struct Drafting(Arc<Engine>);

impl fmt::Debug for Drafting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drafting").finish_non_exhaustive()
    }
}

impl Collector for Drafting {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let status = self.0.status();
        for (name, help, value) in [
            (
                "vllm:spec_decode_num_draft_tokens",
                "Draft tokens that the target verified",
                status.counts.drafted,
            ),
            (
                "vllm:spec_decode_num_accepted_tokens",
                "Draft tokens that the target kept",
                status.counts.accepted,
            ),
            (
                "tightwad_steps",
                "Passes of the target model in which it generated",
                status.counts.steps,
            ),
            (
                "tightwad_generated_tokens",
                "Tokens that the target generated",
                status.counts.generated,
            ),
            (
                "tightwad_accepted_prediction_tokens",
                "Tokens of the clients' predictions that the target kept",
                status.counts.accepted_prediction_tokens,
            ),
            (
                "tightwad_rejected_prediction_tokens",
                "Tokens of the clients' predictions that the target verified and did not keep",
                status.counts.rejected_prediction_tokens,
            ),
        ] {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(metric)?;
        }
        let metric = encoder.encode_descriptor(
            "tightwad_verification",
            "1 for the way in which the target verifies drafts",
            None,
            MetricType::Gauge,
        )?;
        self::verification(metric, status.verification)?;
        let help = "Whether the drafter answers";
        let mut metric = encoder.encode_descriptor("tightwad_draft_up", help, None, MetricType::Gauge)?;
        for draft in &status.drafts {
            let labels = [("url", draft.server.url.as_str())];
            ConstGauge::new(i64::from(draft.server.healthy)).encode(metric.encode_family(&labels)?)?;
        }
        let help = "Whether the target answers";
        let metric = encoder.encode_descriptor("tightwad_target_up", help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::from(status.target.healthy)).encode(metric)?;
        Ok(())
    }
}

fn verification(mut metric: MetricEncoder<'_>, how: Verification) -> fmt::Result {
    let labels = [("how", how.name())];
    ConstGauge::new(1_i64).encode(metric.encode_family(&labels)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn counts_appear_under_their_names() {
        let metrics = Metrics::new(&Engine::start(crate::engine::Settings::default()).unwrap());
        metrics
            .requests
            .get_or_create(&Ended {
                path: "/v1/models",
                outcome: Outcome::Finished,
            })
            .inc();
        let text = metrics.text().unwrap();
        for line in [
            r#"tightwad_requests_total{path="/v1/models",outcome="finished"} 1"#,
            "tightwad_requests_in_flight 0",
            "vllm:spec_decode_num_draft_tokens_total 0",
            "tightwad_target_up 0",
            r#"tightwad_verification{how="none"} 1"#,
            concat!(r#"tightwad_build_info{version=""#, env!("CARGO_PKG_VERSION"), r#""} 1"#),
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
        }
    }
}
