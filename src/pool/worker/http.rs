//! The agent's HTTP server; [`crate::pool::agent`] describes the protocol.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::lease::Leases;
use super::servers::{Servers, ServersView};
use super::{NoServer, Spec};
use crate::config::Secret;
use crate::http::Limits;
use crate::http::auth::{self, Auth};
use crate::http::body::is_json;
use crate::http::excerpt::excerpt;
use crate::http::origin::{self, Guard};
use crate::http::serve::{self as server, ServeOptions};
use crate::pool::agent::{Holder, Lease, LeaseRequest, Refusal, Renewal, WorkerStatus};
use crate::supervise::notify::Notifier;

/// Interval for checking whether the lease has expired.
const TICK: Duration = Duration::from_millis(250);
/// Interval for counting the bytes of the cache, which a load fills.
const COUNT: Duration = Duration::from_secs(30);
/// How long running answers may take once the servers have ended.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// How long running answers may take in all.
const DRAIN: Duration = Duration::from_secs(60);
/// Largest request body in bytes.
const MOST_BODY: usize = 16 * 1024;

/// State that all requests share.
#[derive(Debug)]
pub struct Agent {
    spec: Arc<Spec>,
    shown: ServersView,
    auth: Auth,
    expiry: Duration,
    /// One lock for both, so that the running servers always belong to the lease.
    rule: Mutex<(Leases, Servers)>,
}

impl Agent {
    pub fn new(servers: Servers, expiry: Duration, token: Option<Secret>) -> Self {
        Self {
            spec: Arc::clone(servers.spec()),
            shown: servers.shown(),
            auth: Auth::new(token, &[]),
            expiry,
            rule: Mutex::new((Leases::new(expiry), servers)),
        }
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Ends leases that expire, and notifies the service manager of the holder.
    async fn expire(&self, notifier: &Notifier) {
        let mut tick = tokio::time::interval(TICK);
        loop {
            tick.tick().await;
            let (leases, servers) = &mut *self.rule.lock();
            if let Some(silent) = leases.expire(Instant::now()) {
                tracing::warn!(
                    "the coordinator {} has not renewed its lease for {} s; ending its servers",
                    silent.holder,
                    self.expiry.as_secs()
                );
                servers.end();
            }
            notifier.status(&match leases.holder() {
                Some(Holder { holder, .. }) => format!("leased by {holder}"),
                None => "waits for a coordinator".to_owned(),
            });
        }
    }

    /// Counts the bytes of the cache, so that no answer waits for the disk.
    async fn count_cache(&self) {
        let mut tick = tokio::time::interval(COUNT);
        loop {
            tick.tick().await;
            let cache = self.spec.cache.clone();
            let _ = tokio::task::spawn_blocking(move || cache.count()).await;
        }
    }

    async fn shut_down(&self) {
        let ended = self.rule.lock().1.shut_down();
        if let Some(ended) = ended {
            ended.cancelled().await;
        }
    }
}

/// Serves until `stop`, then ends the servers.
pub async fn serve(listener: TcpListener, agent: Arc<Agent>, notifier: &Notifier, stop: CancellationToken) {
    let guard_pages = Guard::new(&agent.spec.host.to_string(), agent.auth.asks_for_token(), &[], None);
    let router = Router::new()
        .route("/v1/worker", get(status))
        .route("/v1/worker/lease", post(lease))
        .route("/v1/worker/lease/{id}/renew", post(renew))
        .route("/v1/worker/lease/{id}", delete(give_back))
        .fallback(|| async { refusal(StatusCode::NOT_FOUND, "this is a worker's agent; it has no such path") })
        .layer(DefaultBodyLimit::max(MOST_BODY))
        .with_state(Arc::clone(&agent));
    let router = auth::guarded(router, agent.auth.clone(), |_| {
        refusal(
            StatusCode::UNAUTHORIZED,
            "the token is missing or wrong; send the worker's agent_token as `Authorization: Bearer …`",
        )
    });
    let router = origin::guarded(router, guard_pages, |foreign, _| {
        refusal(StatusCode::FORBIDDEN, foreign.to_string())
    });
    let options = ServeOptions {
        limits: Limits::default(),
        drain: DRAIN,
        shutdown: stop.clone(),
        cut_off: CancellationToken::new(),
    };
    let served = CancellationToken::new();
    let mut serving = tokio::spawn({
        let served = served.clone().drop_guard();
        async move {
            let _served = served;
            server::serve(listener, router, options).await;
        }
    });
    notifier.ready();
    tokio::select! {
        () = served.cancelled() => {}
        () = agent.expire(notifier) => {}
        () = agent.count_cache() => {}
        () = stop.cancelled() => {}
    }
    agent.shut_down().await;
    match timeout(LAST_ANSWERS, &mut serving).await {
        Ok(Ok(())) => {}
        // A worker that nobody can reach ends.
        Ok(Err(error)) => {
            if let Ok(panic) = error.try_into_panic() {
                std::panic::resume_unwind(panic);
            }
        }
        Err(_) => {
            tracing::debug!("cutting off a request");
            serving.abort();
        }
    }
}

async fn status(State(agent): State<Arc<Agent>>) -> Response {
    let lease = {
        let (leases, servers) = &mut *agent.rule.lock();
        if leases.holder().is_none() {
            servers.refresh();
        }
        leases.holder().cloned()
    };
    Json(WorkerStatus {
        name: agent.spec.name.clone(),
        build: agent.spec.build.clone(),
        protocol: agent.shown.protocol(),
        endpoints: agent.shown.endpoints(),
        lease,
        cache_bytes: agent.spec.cache.bytes(),
        cache_quota_bytes: agent.spec.cache.quota_bytes(),
        last_lines: agent.shown.last_lines(),
    })
    .into_response()
}

async fn lease(State(agent): State<Arc<Agent>>, headers: HeaderMap, body: Bytes) -> Response {
    if !is_json(&headers) {
        return refusal(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "send it with `Content-Type: application/json`",
        );
    }
    let mut wanted: LeaseRequest = match serde_json::from_slice(&body) {
        Ok(wanted) => wanted,
        Err(error) => {
            let sentence = format!("the body is not {{\"holder\": …, \"epoch\": …}}: {error}");
            return refusal(StatusCode::BAD_REQUEST, sentence);
        }
    };
    wanted.holder = excerpt(&wanted.holder);
    let id = auth::unguessable();
    let listening = {
        let (leases, servers) = &mut *agent.rule.lock();
        if let Err(holder) = leases.ask(Instant::now(), &wanted, id.clone()) {
            return held(holder);
        }
        servers.start()
    };
    tracing::info!(
        "leased by the coordinator {} (epoch {}); starting its servers",
        wanted.holder,
        wanted.epoch
    );
    let tentative = Tentative { agent: &agent, id: &id };
    match listening.await.unwrap_or(Err(NoServer::Ended)) {
        Ok(()) => {
            let begun = agent.rule.lock().0.begin(Instant::now(), &id);
            if begun {
                std::mem::forget(tentative);
                let expires_seconds = agent.expiry.as_secs();
                return Json(Lease { id, expires_seconds }).into_response();
            }
            superseded(&agent)
        }
        Err(NoServer::Ended) => superseded(&agent),
        Err(error) => {
            if matches!(error, NoServer::Checking(_)) {
                tracing::info!("{error}");
            } else {
                tracing::error!("{error}");
            }
            refusal(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
        }
    }
}

/// A lease whose servers do not listen yet. Dropping it ends the lease, for example when the requester leaves.
struct Tentative<'a> {
    agent: &'a Agent,
    id: &'a str,
}

impl Drop for Tentative<'_> {
    fn drop(&mut self) {
        let (leases, servers) = &mut *self.agent.rule.lock();
        if leases.give_back(self.id) {
            servers.end();
        }
    }
}

async fn renew(State(agent): State<Arc<Agent>>, Path(id): Path<String>) -> Response {
    let renewed = agent.rule.lock().0.renew(Instant::now(), &id);
    if renewed {
        let endpoints = agent.shown.endpoints();
        Json(Renewal { endpoints }).into_response()
    } else {
        over()
    }
}

async fn give_back(State(agent): State<Arc<Agent>>, Path(id): Path<String>) -> Response {
    let ended = {
        let (leases, servers) = &mut *agent.rule.lock();
        leases.give_back(&id).then(|| servers.end())
    };
    match ended {
        None => over(),
        Some(ended) => {
            ended.cancelled().await;
            tracing::info!("the lease is given back; the servers have ended");
            StatusCode::NO_CONTENT.into_response()
        }
    }
}

/// The answer to a lease that was replaced before its servers listened, or requested while the worker stops.
fn superseded(agent: &Agent) -> Response {
    let holder = agent.rule.lock().0.holder().cloned();
    match holder {
        Some(holder) => held(holder),
        None => refusal(StatusCode::SERVICE_UNAVAILABLE, NoServer::Ended.to_string()),
    }
}

fn held(holder: Holder) -> Response {
    let error = format!(
        "the coordinator {} has this worker (epoch {}); stop it, or wait until it gives the worker back",
        holder.holder, holder.epoch
    );
    let holder = Some(holder);
    (StatusCode::CONFLICT, Json(Refusal { error, holder })).into_response()
}

fn over() -> Response {
    refusal(StatusCode::NOT_FOUND, "this lease is over; take a new one")
}

fn refusal(status: StatusCode, sentence: impl Into<String>) -> Response {
    let refusal = Refusal {
        error: sentence.into(),
        holder: None,
    };
    (status, Json(refusal)).into_response()
}
