//! The pool's public port: forwards to the llama-server that runs, byte for byte, and lets requests wait for one.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use futures_util::StreamExt;
use futures_util::stream;

use super::own;
use super::pool::{Granted, Life, Pool, Ticket};
use super::problem::Problem;
use super::stream::Events;
use crate::cluster::swap::Name;
use crate::config::Secret;
use crate::http::excerpt::excerpt;
use crate::http::origin::{self, Guard};
use crate::proxy::admission;
use crate::proxy::headers::{self, Credentials, X_ACCEL_BUFFERING, X_DRAFT_KEY};
use crate::proxy::paths::{Dialect, Route};
use crate::proxy::relay;
use crate::proxy::respond::Refusal;
use crate::proxy::target::Outgoing;
use crate::proxy::token;

/// A stream that waits longer than this, for its model or its slot, is begun with a comment.
const SILENCE: Duration = Duration::from_secs(1);
/// Largest request body in bytes: prompts with pictures.
pub(super) const MOST_BODY: u64 = 64 * 1024 * 1024;
/// Largest body of a request that is answered here.
const MOST_OWN_BODY: usize = 64 * 1024;
/// Other paths whose requests wait for a model as completions do.
const ALSO_WAIT: [&str; 7] = [
    "/v1/embeddings",
    "/embeddings",
    "/embedding",
    "/v1/rerank",
    "/rerank",
    "/v1/reranking",
    "/reranking",
];
/// What watchers may ask without a key. It tells nothing but whether a model is ready.
const OPEN: [&str; 2] = ["/health", "/v1/health"];

/// What all requests share.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) pool: Pool,
    /// The models of the config, the first one first.
    pub(super) models: Vec<Name>,
    /// What clients must send.
    pub(super) api_key: Option<Secret>,
}

impl Front {
    /// The model of this name. One that there is not goes into errors and the log by the beginning of its name.
    pub(super) fn named(&self, name: &str) -> Name {
        let known = self.models.iter().find(|model| ***model == *name);
        known.cloned().unwrap_or_else(|| Name::from(excerpt(name)))
    }

    /// The model that a request means by a name. Where there is only one, some clients have ideas of their own.
    fn meant(&self, name: &str) -> Option<Name> {
        (self.models.len() > 1).then(|| self.named(name))
    }

    /// Whether the sender of these headers may be told everything.
    pub(super) fn knows(&self, headers: &HeaderMap) -> bool {
        self.api_key.as_ref().is_none_or(|key| token::is_known(key, headers))
    }
}

/// All endpoints, for those that `guard` lets in.
pub(super) fn router(front: Front, guard: Guard) -> Router {
    let front = Arc::new(front);
    let router = Router::new()
        .route("/health", get(own::health))
        .route("/v1/health", get(own::health))
        .route("/v1/models", get(own::models))
        .route("/models", get(own::models))
        .route("/metrics", get(own::metrics))
        .route("/v1/tightwad/status", get(own::status))
        .route("/v1/tightwad/swap", post(own::swap))
        .method_not_allowed_fallback(async || Refusal::MethodNotAllowed.response(Dialect::OpenAi))
        .fallback(forward)
        .layer(middleware::from_fn_with_state(Arc::clone(&front), admit))
        .layer(DefaultBodyLimit::max(MOST_OWN_BODY))
        .with_state(front);
    origin::guarded(router, guard, |foreign, path| {
        Refusal::Foreign(foreign.clone()).response(Dialect::of(path))
    })
}

async fn admit(State(front): State<Arc<Front>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if OPEN.contains(&path) || front.knows(request.headers()) {
        return next.run(request).await;
    }
    let dialect = Dialect::of(path);
    let (parts, body) = request.into_parts();
    admission::discard(body, &parts.headers);
    Refusal::Unauthorized.response(dialect)
}

/// A request on its way.
struct Prepared {
    method: Method,
    uri: axum::http::Uri,
    headers: HeaderMap,
    body: bytes::Bytes,
}

async fn forward(State(front): State<Arc<Front>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let dialect = Dialect::of(parts.uri.path());
    let body = match admission::read(body, &parts, MOST_BODY).await {
        Ok(body) => body,
        Err(refusal) => return refusal.response(dialect),
    };
    let path = parts.uri.path();
    let waits =
        Route::of(&parts.method, path).completion || (parts.method == Method::POST && ALSO_WAIT.contains(&path));
    let asked = waits.then(|| admission::check(&body, None).ok()).flatten();
    let prepared = Prepared {
        method: parts.method,
        uri: parts.uri,
        headers: parts.headers,
        body,
    };
    if !waits {
        return match front.pool.life() {
            Some(life) => {
                let answer = prepared.send(Granted::uncounted(life)).await;
                conclude(&front.pool, dialect, answer)
            }
            None => Problem::refused(front.pool.not_ready(), &front.pool).response(dialect, &front.pool),
        };
    }
    let (model, streamed) = asked.map_or((None, false), |asked| (asked.model, asked.streamed));
    let ticket = front.pool.ask(model.and_then(|model| front.meant(&model)), false);
    let admitted = admitted(ticket, front.pool.clone());
    let mut answer = Box::pin(async move { prepared.send(admitted.await?).await });
    let answer = if streamed {
        // llama-server sends no head before a slot is free.
        let Ok(answer) = tokio::time::timeout(SILENCE, &mut answer).await else {
            return keep_waiting(Events::awaiting(dialect, front.pool.clone(), answer));
        };
        answer
    } else {
        answer.await
    };
    conclude(&front.pool, dialect, answer)
}

async fn admitted(ticket: Ticket, pool: Pool) -> Result<Granted, Problem> {
    ticket
        .admitted()
        .await
        .map_err(|refused| Problem::refused(refused, &pool))
}

impl Prepared {
    /// Sends it, and waits for the head of its answer or the end of the server.
    async fn send(self, granted: Granted) -> Result<(Granted, reqwest::Response), Problem> {
        let life = Arc::clone(&granted.life);
        let outgoing = self.outgoing(&life);
        tokio::select! {
            answer = life.target.send(outgoing) => match answer {
                Ok(answer) => Ok((granted, answer)),
                Err(refusal) => Err(Problem::broke(refusal, &life).await),
            },
            ended = life.ended() => Err(Problem::Ended(ended)),
        }
    }

    fn outgoing(self, life: &Life) -> Outgoing {
        let draft_key = self.headers.get(X_DRAFT_KEY).cloned();
        let mut headers = headers::to_target(self.headers, Credentials::Targets(life.key()));
        if let Some(key) = draft_key {
            headers.insert(X_DRAFT_KEY, key);
        }
        Outgoing {
            url: life.target.locate(&self.uri),
            method: self.method,
            headers,
            body: self.body,
        }
    }
}

/// The answer for the client.
fn conclude(pool: &Pool, dialect: Dialect, answer: Result<(Granted, reqwest::Response), Problem>) -> Response {
    let (granted, answer) = match answer {
        Ok(answer) => answer,
        Err(problem) => return problem.response(dialect, pool),
    };
    pool.problems().clear();
    let status = answer.status();
    let mut headers = headers::to_client(answer.headers().clone());
    let body = if relay::is_open_event_stream(&headers) {
        headers.insert(X_ACCEL_BUFFERING, header::HeaderValue::from_static("no"));
        Events::of(dialect, pool.clone(), granted, answer).body()
    } else {
        // The request counts until its answer is over.
        let bytes = answer.bytes_stream().map(Some).chain(stream::once(async { None }));
        Body::from_stream(bytes.filter_map(move |chunk| {
            let _ = &granted;
            std::future::ready(chunk)
        }))
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Tells a client that wants a stream that it has one, before there is a model.
fn keep_waiting(events: Events) -> Response {
    let mut response = Response::new(events.body());
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        (X_ACCEL_BUFFERING, "no"),
    ] {
        headers.insert(name, header::HeaderValue::from_static(value));
    }
    response
}
