//! The proxy's own endpoints: health, readiness, metrics, status.
//!
//! All are answered from memory, so they work while other servers are down.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use super::agreement::Measured;
use super::recent::Record;
use super::router::App;
use crate::engine::{self, Counts};
use crate::observe::metrics::CONTENT_TYPE;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `GET /health`: this process runs.
pub(super) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok", "version": VERSION }))
}

/// `GET /readyz`: whether the target answers. Only a client with the token sees why it does not.
pub(super) async fn ready(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let target = app.engine.target();
    if target.healthy {
        return Json(json!({ "status": "ready" })).into_response();
    }
    let mut body = json!({ "status": "not ready" });
    if app.admits(&headers) {
        let reason = target.problem.as_deref();
        body["reason"] = reason.unwrap_or("the target has not answered yet").into();
    }
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// `GET /metrics`
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    match app.observed.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// `GET /v1/tightwad/status`
pub(super) async fn status(State(app): State<Arc<App>>) -> Json<Status> {
    let engine::Status {
        drafts,
        target,
        verification,
        reason,
        measuring,
        step_ms,
        round_trip_ms,
        counts,
    } = app.engine.status();
    Json(Status {
        version: VERSION.to_owned(),
        uptime_seconds: Some(app.started.elapsed().as_secs_f64()),
        drafts,
        target,
        verification,
        reason,
        measuring,
        step_ms,
        round_trip_ms,
        counts: Sums::from(counts),
        agreement: app.agreement.as_ref().map(|agreement| agreement.measured()),
        in_flight: app.observed.metrics.in_flight.get(),
        requests: app.observed.recent.newest_first(),
    })
}

/// The answer of `GET /v1/tightwad/status`: written by the proxy, read by the command line and by bench.
///
/// Only `verification` is required, by which a reader knows that a proxy answers; a proxy of another version may lack any
/// other field, and send more.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the proxy.
    #[serde(default)]
    pub version: String,
    /// Seconds since the proxy was started; `None` from a proxy that does not say.
    pub uptime_seconds: Option<f64>,
    /// The drafters.
    #[serde(default)]
    pub drafts: Vec<engine::DraftStatus>,
    /// The target.
    #[serde(default)]
    pub target: engine::ServerStatus,
    /// How drafts are verified.
    pub verification: engine::Verification,
    /// Why drafts are not verified, and what would change that.
    pub reason: Option<String>,
    /// Whether the proxy still measures its servers.
    #[serde(default)]
    pub measuring: bool,
    /// Milliseconds of a step of the target, by the number of draft tokens.
    #[serde(default)]
    pub step_ms: BTreeMap<usize, f64>,
    /// Milliseconds from asking the target to its answer.
    #[serde(default)]
    pub round_trip_ms: f64,
    /// Counts since the start.
    #[serde(default)]
    pub counts: Sums,
    /// Agreement of the drafter with a target that cannot verify drafts; absent unless it is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<Measured>,
    /// Requests that are being answered.
    #[serde(default)]
    pub in_flight: i64,
    /// The last requests, newest first. Readers leave them out.
    #[serde(skip_deserializing)]
    requests: Vec<Record>,
}

/// Counts since the start, and their ratios; a ratio is absent while its divisor is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sums {
    /// Steps of the target.
    pub steps: u64,
    /// Draft tokens that the target verified.
    pub drafted: u64,
    /// Draft tokens that the target kept.
    pub accepted: u64,
    /// Tokens that the target generated.
    pub generated: u64,
    /// Accepted tokens that the client had predicted.
    pub accepted_prediction_tokens: u64,
    /// Predicted tokens that the target verified and did not keep.
    pub rejected_prediction_tokens: u64,
    /// `accepted` per `drafted`.
    pub acceptance_rate: Option<f64>,
    /// `generated` per step.
    pub tokens_per_step: Option<f64>,
}

impl From<Counts> for Sums {
    fn from(counts: Counts) -> Self {
        let ratio = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Self {
            steps: counts.steps,
            drafted: counts.drafted,
            accepted: counts.accepted,
            generated: counts.generated,
            accepted_prediction_tokens: counts.accepted_prediction_tokens,
            rejected_prediction_tokens: counts.rejected_prediction_tokens,
            acceptance_rate: ratio(counts.accepted, counts.drafted),
            tokens_per_step: ratio(counts.generated, counts.steps),
        }
    }
}
