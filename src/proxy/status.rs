//! Our own endpoints: health, readiness, metrics, status.
//!
//! All are answered from memory, whatever is down.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use super::agreement::Measured;
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
        version: VERSION,
        uptime_seconds: app.started.elapsed().as_secs_f64(),
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

/// The status, as `tightwad proxy status` reads it.
#[derive(Debug, Serialize)]
pub(super) struct Status {
    version: &'static str,
    uptime_seconds: f64,
    drafts: Vec<engine::DraftStatus>,
    target: engine::ServerStatus,
    verification: engine::Verification,
    reason: Option<String>,
    measuring: bool,
    /// By the number of draft tokens.
    step_ms: BTreeMap<usize, f64>,
    round_trip_ms: f64,
    counts: Sums,
    /// Of the drafter with a target that cannot verify drafts; absent unless it is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    agreement: Option<Measured>,
    in_flight: i64,
    /// Newest first.
    requests: Vec<Record>,
}

/// Counts since the start, and what they come to; ratios are absent while there is nothing to divide by.
#[derive(Debug, Serialize)]
struct Sums {
    /// Steps of the target, by the name that the status has always had for them.
    rounds: u64,
    drafted: u64,
    accepted: u64,
    generated: u64,
    accepted_prediction_tokens: u64,
    rejected_prediction_tokens: u64,
    acceptance_rate: Option<f64>,
    tokens_per_step: Option<f64>,
}

impl From<Counts> for Sums {
    fn from(counts: Counts) -> Self {
        let ratio = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Self {
            rounds: counts.steps,
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
