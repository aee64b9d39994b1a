//! Counters of the proxy: metrics for Prometheus, and the last requests for the status.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::recent::Recent;
use crate::engine::Engine;
use crate::observe::metrics::Metrics;

/// Everything that is counted.
#[derive(Debug)]
pub(super) struct Observed {
    /// For Prometheus.
    pub(super) metrics: Metrics,
    /// For people.
    pub(super) recent: Recent,
}

impl Observed {
    /// Begins to count; each scrape reads what the engine counts from the engine.
    pub(super) fn new(engine: &Arc<Engine>) -> Self {
        Self {
            metrics: metrics(engine),
            recent: Recent::default(),
        }
    }
}

/// The metrics of a proxy, all at zero but for what the engine counts.
fn metrics(engine: &Arc<Engine>) -> Metrics {
    Metrics::new(Box::new(DraftingMetrics(Arc::clone(engine))))
}

/// Counts of the engine, read at each scrape.
struct DraftingMetrics(Arc<Engine>);

impl fmt::Debug for DraftingMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DraftingMetrics").finish_non_exhaustive()
    }
}

impl Collector for DraftingMetrics {
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
        let mut metric = encoder.encode_descriptor(
            "tightwad_verification",
            "1 for the way in which the target verifies drafts",
            None,
            MetricType::Gauge,
        )?;
        let labels = [("how", status.verification.name())];
        ConstGauge::new(1_i64).encode(metric.encode_family(&labels)?)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Outcome;
    use crate::observe::metrics::Ended;

    #[tokio::test]
    async fn counts_appear_under_their_names() {
        let metrics = metrics(&Engine::start(crate::engine::Settings::default()).unwrap());
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
