//! The pool's public port: forwards requests to the running llama-server byte for byte, and lets them wait until one runs.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, header};
use axum::response::Response;
use axum::routing::{get, post};

use super::admin;
use super::pool::{Admission, Pool, ServerInstance, Ticket};
use super::problem::Problem;
use super::stream::Exchange;
use crate::config::{Config, Secret};
use crate::http::admission::{self, Asked};
use crate::http::auth::{self, Auth};
use crate::http::body;
use crate::http::excerpt::excerpt;
use crate::http::headers::{self, Credentials, MEASURING, X_DRAFT_AUTHORIZATION, X_DRAFT_KEY};
use crate::http::members::Members;
use crate::http::origin::{self, Guard};
use crate::http::paths::{Access, Dialect, Route};
use crate::http::peer::Peer;
use crate::http::refusal::Refusal;
use crate::http::relay::{self, Exchange as _};
use crate::http::target::Outgoing;
use crate::pool::swap::Name;

/// A stream that waits longer than this, for its model or its slot, is begun with a comment.
const SILENCE: Duration = Duration::from_secs(1);
/// Largest request body in bytes: prompts with pictures.
pub(super) const MOST_BODY: u64 = 64 * 1024 * 1024;
/// Largest body of a request that is answered here.
const MOST_OWN_BODY: usize = 64 * 1024;
/// Paths for health checks, which need no key. The answers say only whether a model is ready.
pub(super) const OPEN: [&str; 2] = ["/health", "/v1/health"];

/// State that all requests share.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) pool: Pool,
    /// The models of the config, the first one first.
    pub(super) models: Vec<Name>,
    /// The models of the config that only draft.
    pub(super) drafters: Vec<String>,
    pub(super) auth: Auth,
    /// Key that drafters must send. `None`: only drafters on this host are allowed.
    pub(super) draft_key: Option<Secret>,
}

/// Why a drafter without the key is refused.
const WRONG_DRAFT_KEY: &str = "the coordinator takes drafts only with its `coordinator.draft_key`: let the proxy's \
    `proxy.target.draft_key_file` name a file with the same key";
/// Why a drafter on another host is refused where there is no key.
const NO_DRAFT_KEY: &str = "the coordinator takes drafts only from its own host, because it has no `coordinator.draft_key`: \
    let its `coordinator.draft_key_file` and the proxy's `proxy.target.draft_key_file` name files with the same key";
/// Largest answer to `GET /props` that is looked into; it has the chat template.
const MOST_PROPS: usize = 16 * 1024 * 1024;

impl Front {
    /// Why the sender of a request may not draft. A drafter reads and slows down what others ask for.
    fn refuses_drafts_of(&self, request: &Parts) -> Option<&'static str> {
        let (may_draft, reason) = if let Some(key) = &self.draft_key {
            let given = request.headers.get(X_DRAFT_AUTHORIZATION);
            let knows_key = given.is_some_and(|given| auth::is_equal(key, given));
            (knows_key, WRONG_DRAFT_KEY)
        } else {
            let peer = request.extensions.get::<Peer>().copied().unwrap_or_default();
            (peer.is_this_host(&request.headers), NO_DRAFT_KEY)
        };
        (!may_draft).then_some(reason)
    }

    /// The model of this name. One that there is not goes into errors and the log by the beginning of its name.
    pub(super) fn named(&self, name: &str) -> Name {
        let known = self.models.iter().find(|model| ***model == *name);
        known.cloned().unwrap_or_else(|| Name::from(excerpt(name)))
    }

    /// The model that a request asks for by `name`. `None`: the one that runs, because a pool of one model accepts any name.
    fn requested(&self, name: String) -> Result<Option<Name>, Refusal> {
        if self.drafters.contains(&name) {
            return Err(Refusal::Drafter { name });
        }
        Ok((self.models.len() > 1).then(|| self.named(&name)))
    }
}

/// The models of the drafters of `config` that are none of `models`.
pub(super) fn drafters(config: &Config, models: &[Name]) -> Vec<String> {
    let own = config.draft.iter().filter_map(|draft| draft.model.clone());
    let proxied = config.proxy.iter().flat_map(|proxy| &proxy.draft);
    let names = own.chain(proxied.filter_map(|draft| draft.model_name.clone()));
    names
        .filter(|name| !models.iter().any(|model| **model == **name))
        .collect()
}

/// All endpoints, for those that `guard` lets in.
pub(super) fn router(front: Front, guard: Guard) -> Router {
    let auth = front.auth.clone();
    let router = Router::new()
        .route("/health", get(admin::health))
        .route("/v1/health", get(admin::health))
        .route("/v1/models", get(admin::models))
        .route("/models", get(admin::models))
        .route("/metrics", get(admin::metrics))
        .route("/v1/tightwad/status", get(admin::status))
        .route("/v1/tightwad/swap", post(admin::swap))
        .method_not_allowed_fallback(async || Refusal::MethodNotAllowed.response(Dialect::OpenAi))
        .fallback(forward)
        .layer(DefaultBodyLimit::max(MOST_OWN_BODY))
        .with_state(Arc::new(front));
    let router = auth::guarded(router, auth, |request| {
        Refusal::Unauthorized.response(Dialect::of(request.uri.path()))
    });
    origin::guarded(router, guard, |foreign, path| {
        Refusal::Foreign(foreign.clone()).response(Dialect::of(path))
    })
}

/// A request on its way.
struct Prepared {
    method: Method,
    uri: axum::http::Uri,
    headers: HeaderMap,
    body: bytes::Bytes,
}

async fn forward(State(front): State<Arc<Front>>, request: Request) -> Response {
    let (mut parts, body) = request.into_parts();
    let dialect = Dialect::of(parts.uri.path());
    let route = Route::of(&parts.method, parts.uri.path());
    let refuses_drafts = front.refuses_drafts_of(&parts);
    if let Some(refusal) = refused(route.access, refuses_drafts, &parts.headers) {
        body::discard(body, &parts.headers);
        return refusal.response(dialect);
    }
    if refuses_drafts.is_some() {
        parts.headers.remove(X_DRAFT_KEY);
        parts.headers.remove(MEASURING); // only a proxy measures
    }
    let (body, asked) = match admitted_body(&parts, route, body).await {
        Ok(admitted) => admitted,
        Err(refusal) => return refusal.response(dialect),
    };
    let tells_props = parts.method == Method::GET && route.label == "/props";
    let method = parts.method.clone();
    let prepared = Prepared {
        method: parts.method,
        uri: parts.uri,
        headers: parts.headers,
        body,
    };
    let exchange = Exchange {
        pool: front.pool.clone(),
        dialect,
    };
    let Some(asked) = asked else {
        let answer = match front.pool.instance() {
            Some(instance) => {
                let answer = prepared.send(Admission::uncounted(instance));
                relay::respond(exchange, &method, None, answer).await
            }
            None => exchange.refuse(Problem::refused(front.pool.not_ready(), &front.pool)),
        };
        return match refuses_drafts.filter(|_| tells_props) {
            Some(reason) => with_refusal(answer, reason).await,
            None => answer,
        };
    };
    let Asked { model, streamed, .. } = asked;
    let model = match model.map(|name| front.requested(name)).transpose() {
        Ok(model) => model.flatten(),
        Err(refusal) => return refusal.response(dialect),
    };
    let ticket = front.pool.ask(model, false);
    let admitted = admitted(ticket, front.pool.clone());
    let answer = async move { prepared.send(admitted.await?).await };
    // llama-server sends no head before a slot is free.
    relay::respond(exchange, &method, streamed.then_some(SILENCE), answer).await
}

/// Why a request has no answer here, from what its path is for.
fn refused(access: Access, refuses_drafts: Option<&'static str>, headers: &HeaderMap) -> Option<Refusal> {
    match access {
        Access::Open => None,
        Access::Draft => refuses_drafts.map(|reason| Refusal::NotADrafter { reason }),
        Access::Owners => Some(Refusal::Owners),
        Access::Ollama => Some(Refusal::not_ollama(headers)),
    }
}

/// The body of a request, and what it asks for if it waits for a model.
async fn admitted_body(parts: &Parts, route: Route, body: Body) -> Result<(bytes::Bytes, Option<Asked>), Refusal> {
    let body = admission::read(body, parts, MOST_BODY).await?;
    admission::check_form(&parts.headers, &body)?;
    let asked = if route.names_model && !parts.headers.contains_key(MEASURING) {
        Some(admission::check(&body, None)?)
    } else {
        admission::check_bounds(&body)?;
        None
    };
    Ok((body, asked))
}

/// The answer to `GET /props` of a client that may not draft: it says why, so that a proxy can.
async fn with_refusal(answer: Response, reason: &str) -> Response {
    let (mut parts, body) = answer.into_parts();
    let Ok(bytes) = axum::body::to_bytes(body, MOST_PROPS).await else {
        return Refusal::BodyCut("the server's answer is not whole".to_owned()).response(Dialect::OpenAi);
    };
    let reason = serde_json::Value::from(reason).to_string();
    let props = std::str::from_utf8(&bytes).ok();
    let told = props.and_then(|props| Some(Members::of(props)?.with("draft_refused", &reason)));
    let body = told.map_or(bytes, bytes::Bytes::from);
    parts.headers.insert(header::CONTENT_LENGTH, body.len().into());
    Response::from_parts(parts, Body::from(body))
}

async fn admitted(ticket: Ticket, pool: Pool) -> Result<Admission, Problem> {
    ticket
        .admitted()
        .await
        .map_err(|refused| Problem::refused(refused, &pool))
}

impl Prepared {
    /// Sends it, and waits for the head of its answer or the end of the server.
    async fn send(self, admission: Admission) -> Result<(Admission, reqwest::Response), Problem> {
        let instance = Arc::clone(&admission.instance);
        let outgoing = self.outgoing(&instance);
        tokio::select! {
            answer = instance.target.send(outgoing) => match answer {
                Ok(answer) => Ok((admission, answer)),
                Err(refusal) => Err(Problem::broke(refusal, &instance).await),
            },
            ended = instance.ended() => Err(Problem::Ended(ended)),
        }
    }

    fn outgoing(self, instance: &ServerInstance) -> Outgoing {
        let draft_key = self.headers.get(X_DRAFT_KEY).cloned();
        let mut headers = headers::to_target(self.headers, Credentials::Targets(instance.key()));
        if let Some(key) = draft_key {
            headers.insert(X_DRAFT_KEY, key);
        }
        Outgoing {
            url: instance.target.locate(&self.uri),
            method: self.method,
            headers,
            body: self.body,
        }
    }
}
