//! The endpoints that the coordinator answers itself: health, status, models, metrics, swap.
//!
//! All but the swap and the list of models are answered from memory, so they work while workers are down.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::front::Front;
use super::load::Load;
use super::pool::{Pool, ServerInstance};
use super::problem::Problem;
use super::status::{Status, Step, SwapLine};
use crate::http::paths::Dialect;
use crate::http::refusal;
use crate::http::target::Outgoing;
use crate::http::{body, client};
use crate::pool::swap::{self, Refused};

/// Interval for repeating a step of a swap, so that the client sees that the connection lives.
const STEP_INTERVAL: Duration = Duration::from_secs(2);
/// Timeout for the server's metadata of its model.
const MODEL_TIMEOUT: Duration = Duration::from_millis(500);
/// Longest answer with metadata in bytes.
const MOST_BODY: usize = 1 << 20;
/// Resolution of the reported progress of a load.
const PROGRESS: f32 = 0.01;

/// `GET /health`: whether a model answers. Only clients with the key see which model, and why none answers.
pub(super) async fn health(State(front): State<Arc<Front>>, headers: HeaderMap) -> Response {
    if front.pool.instance().is_some() {
        return Json(json!({ "status": "ok" })).into_response();
    }
    if front.auth.admits(&headers) {
        return Problem::refused(front.pool.not_ready(), &front.pool).response(Dialect::OpenAi, &front.pool);
    }
    let error = json!({ "error": {
        "message": "no model is ready: ask again later",
        "type": "model_loading", "code": "model_loading", "param": null,
    }});
    refusal::error_response(StatusCode::SERVICE_UNAVAILABLE, &error, Some("5"))
}

/// `GET /v1/tightwad/status`
pub(super) async fn status(State(front): State<Arc<Front>>) -> Json<Status> {
    Json(Status::of(front.pool.report()))
}

/// `GET /v1/models`: all models of the config. The running one comes first, with its server's metadata.
pub(super) async fn models(State(front): State<Arc<Front>>) -> Json<Value> {
    let report = front.pool.report();
    let entry = |name: &swap::Name| {
        let value = match (*name == report.now.model, report.instance.is_some()) {
            (true, true) => "loaded",
            (true, false) => "loading",
            (false, _) => "unloaded",
        };
        json!({
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "tightwad",
            "status": { "value": value },
        })
    };
    let mut first = entry(&report.now.model);
    if let (Some(instance), Some(first)) = (&report.instance, first.as_object_mut()) {
        let told = timeout(MODEL_TIMEOUT, model_metadata(instance)).await;
        first.extend(told.ok().flatten().unwrap_or_default());
    }
    let others = front.models.iter().filter(|name| **name != report.now.model);
    let models: Vec<Value> = [first].into_iter().chain(others.map(entry)).collect();
    Json(json!({ "object": "list", "data": models }))
}

/// A server's metadata of its model: vocabulary, context, size.
async fn model_metadata(instance: &ServerInstance) -> Option<serde_json::Map<String, Value>> {
    let uri = Uri::from_static("/v1/models");
    let headers = HeaderMap::from_iter([(header::AUTHORIZATION, instance.key().clone())]);
    let outgoing = Outgoing {
        method: Method::GET,
        url: instance.target.locate(&uri),
        headers,
        body: Bytes::new(),
    };
    let answer = instance.target.send(outgoing).await.ok()?;
    let mut told: Value = client::json(answer, MOST_BODY).await.ok()?;
    let meta = told.pointer_mut("/data/0/meta")?.take();
    Some([("meta".to_owned(), meta)].into_iter().collect())
}

/// `GET /metrics`
pub(super) async fn metrics(State(front): State<Arc<Front>>) -> Response {
    let report = front.pool.report();
    let up = report.workers.iter().filter(|worker| worker.up == Some(true)).count();
    let mut registry = Registry::default();
    let state = Family::<_, Gauge>::default();
    let labels = [
        ("model", report.now.model.to_string()),
        ("state", report.now.state.to_string()),
    ];
    state.get_or_create(&labels).set(1);
    registry.register("tightwad_pool_state", "The state that the model is in", state);
    for (name, help, value) in [
        ("tightwad_pool_running", "Answers that run", report.now.running),
        ("tightwad_pool_waiting", "Requests that wait", report.now.waiting),
        ("tightwad_pool_workers_up", "Workers whose agent answers", up),
    ] {
        registry.register(name, help, ConstGauge::new(value));
    }
    let starts = ConstCounter::new(report.starts);
    registry.register("tightwad_pool_starts", "Starts of a server", starts);
    let mut text = String::new();
    match prometheus_text::encode(&mut text, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, prometheus_text::CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct SwapRequest {
    model: String,
}

/// `POST /v1/tightwad/swap`: loads another model, and reports each step as a line of JSON. The last line has `done` or
/// `error`.
pub(super) async fn swap(State(front): State<Arc<Front>>, headers: HeaderMap, body: Bytes) -> Response {
    if !body::is_json(&headers) {
        let error = json!({ "error": {
            "message": "send it with `Content-Type: application/json`",
            "type": "invalid_request_error", "code": "unsupported_media_type", "param": null,
        }});
        return (StatusCode::UNSUPPORTED_MEDIA_TYPE, Json(error)).into_response();
    }
    let model = match serde_json::from_slice::<SwapRequest>(&body) {
        Ok(wanted) => front.named(&wanted.model),
        Err(error) => {
            let error = json!({ "error": {
                "message": format!("the body must be {{\"model\": \"NAME\"}}: {error}"),
                "type": "invalid_request_error", "code": "invalid_json", "param": null,
            }});
            return (StatusCode::BAD_REQUEST, Json(error)).into_response();
        }
    };
    if !front.models.contains(&model) {
        let refused = Refused::unknown(model, &front.models);
        return Problem::refused(refused, &front.pool).response(Dialect::OpenAi, &front.pool);
    }
    let (lines, told) = mpsc::unbounded_channel();
    tokio::spawn(report_swap(front.pool.clone(), model, lines));
    let lines = stream::unfold(told, |mut told| async move {
        Some((Ok::<_, Infallible>(told.recv().await?), told))
    });
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

async fn report_swap(pool: Pool, model: swap::Name, lines: mpsc::UnboundedSender<Bytes>) {
    let tell = |line: &SwapLine| drop(lines.send(format!("{}\n", json!(line)).into()));
    let mut reports = pool.reports();
    let mut outcome = Box::pin(pool.ask(Some(model.clone()), true).admitted());
    let mut last = None;
    loop {
        let report = reports.borrow_and_update().clone();
        let progress = report.load.progress;
        let load = Load {
            progress: progress.map(|progress| (progress / PROGRESS).floor() * PROGRESS),
            ..report.load
        };
        let step = SwapLine::Step(Step::of(&report.now, load));
        if last.as_ref() != Some(&step) {
            tell(&step);
            last = Some(step);
        }
        tokio::select! {
            biased;
            outcome = &mut outcome => {
                return match outcome {
                    Ok(_) => tell(&SwapLine::Done { done: true, model }),
                    Err(refused) => tell(&SwapLine::Failed {
                        error: Problem::refused(refused, &pool).error(),
                    }),
                };
            }
            // A client that hangs up cancels the command, unless it has taken effect.
            () = lines.closed() => return,
            _ = reports.changed() => {}
            () = tokio::time::sleep(STEP_INTERVAL) => last = None,
        }
    }
}
