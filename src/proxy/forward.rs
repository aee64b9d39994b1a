//! Checks a request, attaches a drafter to it, and relays the target's answer.
//!
//! `router` passes every request here that is not for one of the proxy's own endpoints; [`relay::respond`] relays the answer.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt, TryStreamExt};

use super::active_request::ActiveRequest;
use super::router::{App, RequestId};
use super::usage;
use crate::config::Backend;
use crate::engine::Verification;
use crate::failure;
use crate::http::events::WAITING;
use crate::http::headers::{self, Credentials, X_DRAFT_AUTHORIZATION, X_DRAFT_KEY, X_REQUEST_ID};
use crate::http::paths::{Access, Dialect, Route};
use crate::http::refusal::Refusal;
use crate::http::relay::{self, Exchange as _, ServerBytes};
use crate::http::target::Outgoing;
use crate::http::{admission, body, nesting};
use crate::rounds;

/// Answers a request to any path but our own endpoints.
pub(super) async fn forward(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    let url = app.target.locate(request.uri());
    let path = app.target.path_of(&url).to_owned();
    let dialect = Dialect::of(&path);
    let route = Route::of(request.method(), &path);
    let active = ActiveRequest::begin(&app.observed, id.to_string(), &path, route);
    let exchange = Exchange {
        app,
        id,
        dialect,
        route,
        active,
    };
    exchange.answer(url, request).await
}

/// One request on its way to its answer.
struct Exchange {
    app: Arc<App>,
    id: RequestId,
    dialect: Dialect,
    route: Route,
    active: ActiveRequest,
}

/// A request that passed the checks.
struct Prepared {
    outgoing: Outgoing,
    /// The client asked for an event stream.
    streamed: bool,
    /// Answers it in verification steps of our own; `None`: the target answers it.
    rounds: Option<rounds::Answer>,
}

impl Exchange {
    async fn answer(mut self, url: reqwest::Url, request: Request) -> Response {
        let method = request.method().clone();
        let Prepared {
            outgoing,
            streamed,
            rounds,
        } = match self.prepare(url, request).await {
            Ok(prepared) => prepared,
            Err(refusal) => return self.refuse(refusal),
        };
        let forwarded = self.app.target.send(outgoing);
        let answer = async move {
            if let Some(rounds) = rounds
                && let Some(response) = rounds.response().await
            {
                return Ok(((), response));
            }
            Ok(((), forwarded.await?))
        };
        let patience = self.app.settings.keepalive.filter(|_| streamed);
        relay::respond(self, &method, patience, answer).await
    }

    /// Checks the request and makes the one that the target gets.
    async fn prepare(&mut self, url: reqwest::Url, request: Request) -> Result<Prepared, Refusal> {
        let settings = &self.app.settings;
        let (parts, body) = request.into_parts();
        if let Err(refusal) = self.access(&parts.headers) {
            body::discard(body, &parts.headers);
            return Err(refusal);
        }
        let body = admission::read(body, &parts, settings.max_body_size).await?;
        admission::check_form(&parts.headers, &body)?;
        let mut headers = headers::to_target(parts.headers, self.credentials());
        headers.insert(X_REQUEST_ID, self.id.header());
        let (mut streamed, mut rounds) = (false, None);
        if self.route.completion {
            self.active.occupies(self.app.engine.track_request());
            let mut asked = admission::check(&body, settings.max_tokens_limit)?;
            self.check_model(asked.model.take())?;
            streamed = asked.streamed;
            if !settings.fallback_on_draft_failure {
                self.refuse_without_drafter()?;
            }
            let predicted = asked.prediction.is_some() && self.route.chat;
            rounds = self.in_rounds(&body, asked.prediction.as_ref());
            if let Some(rounds) = &rounds {
                self.active.counts_with(rounds.counts());
            } else if let Some(attachment) = self.app.engine.attach(asked.prediction)
                && let Ok(key) = HeaderValue::from_str(attachment.key())
            {
                headers.insert(X_DRAFT_KEY, key);
                self.may_draft(&mut headers);
                self.active.drafts_with(attachment);
                if predicted {
                    self.active.is_predicted();
                    // The usage cannot be completed in a compressed answer.
                    headers.remove(header::ACCEPT_ENCODING);
                }
            }
        } else {
            admission::check_bounds(&body)?;
            if self.route.names_model {
                // The target itself refuses a body that is no JSON.
                let asked = admission::check(&body, None);
                self.check_model(asked.ok().and_then(|asked| asked.model))?;
            }
        }
        if let Some(agreement) = &self.app.agreement
            && self.route.completion
            && self.app.engine.verification() == Verification::None
            && let Some(question) = agreement.question(self.route.label, &body)
        {
            self.active.is_compared(question);
        }
        if streamed {
            self.active.streams();
            // Comments cannot be put into a compressed stream.
            headers.remove(header::ACCEPT_ENCODING);
        }
        Ok(Prepared {
            outgoing: Outgoing {
                method: parts.method,
                url,
                headers,
                body,
            },
            streamed,
            rounds,
        })
    }

    /// Refuses the name of a drafter's model.
    fn check_model(&self, name: Option<String>) -> Result<(), Refusal> {
        match name.filter(|name| self.app.settings.draft_models.contains(name)) {
            Some(name) => Err(Refusal::Drafter { name }),
            None => Ok(()),
        }
    }

    /// Adds the key by which a pool's coordinator admits drafters.
    fn may_draft(&self, headers: &mut HeaderMap) {
        let key = self.app.settings.target_draft_key.as_ref();
        if let Some(Ok(mut key)) = key.map(|key| HeaderValue::from_str(key.expose())) {
            key.set_sensitive(true);
            headers.insert(X_DRAFT_AUTHORIZATION, key);
        }
    }

    /// Whether clients may use this path.
    fn access(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        match self.route.access {
            Access::Draft => Err(Refusal::Hidden),
            Access::Owners => Err(Refusal::Owners),
            Access::Ollama if self.app.settings.backend != Backend::Ollama => Err(Refusal::not_ollama(headers)),
            Access::Ollama | Access::Open => Ok(()),
        }
    }

    /// An answer in rounds, if the target is asked so and the request allows it.
    fn in_rounds(&self, body: &[u8], prediction: Option<&String>) -> Option<rounds::Answer> {
        let drafting = self.app.engine.rounds()?;
        let body = nesting::without_bom(body);
        let request = rounds::Request::of(rounds::endpoint_at(self.route.label)?, body)?;
        Some(rounds::Answer::new(request, prediction.cloned(), drafting))
    }

    fn credentials(&self) -> Credentials<'_> {
        match (self.app.target.authorization(), &self.app.settings.auth_token) {
            (Some(key), _) => Credentials::Targets(key),
            (None, Some(_)) => Credentials::None,
            (None, None) => Credentials::Clients,
        }
    }

    fn refuse_without_drafter(&self) -> Result<(), Refusal> {
        let drafts = self.app.engine.drafters();
        if drafts.iter().any(|draft| draft.healthy) {
            return Ok(());
        }
        match drafts.into_iter().next() {
            Some(draft) => Err(Refusal::DrafterDown {
                url: draft.url,
                problem: draft.problem.unwrap_or_else(|| "it does not answer".to_owned()),
            }),
            None => Ok(()),
        }
    }
}

impl relay::Exchange for Exchange {
    type Guard = ();
    type Error = Refusal;

    fn dialect(&self) -> Dialect {
        self.dialect
    }

    fn url<'a>(&'a self, (): &'a ()) -> &'a str {
        self.app.target.shown()
    }

    fn silence(&self, _: bool) -> Option<Duration> {
        self.app.settings.keepalive
    }

    fn comment(&self) -> Bytes {
        Bytes::from_static(WAITING)
    }

    fn refuse(mut self, refusal: Refusal) -> Response {
        // A target that is down refuses many requests: the first one is a warning, until the target answers again.
        if !refusal.status().is_server_error() || self.app.problems.is_new(&refusal.to_string()) {
            tracing::warn!(id = %self.id, error = %refusal, "refused");
        } else {
            tracing::debug!(id = %self.id, error = %refusal, "refused");
        }
        self.active.answers(refusal.status());
        self.active.fails();
        refusal.response(self.dialect)
    }

    fn error_event(&self, refusal: &Refusal) -> Bytes {
        refusal.event(self.dialect)
    }

    async fn interrupted(&self) -> Refusal {
        self.app.cut_off.cancelled().await;
        Refusal::ShuttingDown
    }

    /// The body, with the counts of the request's prediction in its usage.
    fn body(&self, answer: reqwest::Response) -> (ServerBytes, bool) {
        let streamed = relay::is_event_stream(answer.headers());
        let open = answer.status().is_success() && !answer.headers().contains_key(header::CONTENT_ENCODING);
        match self.active.reported().filter(|_| open) {
            None => (answer.bytes_stream().boxed(), true),
            Some(counts) => (usage::completed(answer.bytes_stream(), streamed, counts), false),
        }
    }

    fn events(&self, (): (), bytes: ServerBytes) -> BoxStream<'static, Result<Bytes, Refusal>> {
        let app = Arc::clone(&self.app);
        let broke_off = move |error| Refusal::BrokeOff {
            url: app.target.shown().to_owned(),
            cause: failure::explain(&error),
        };
        bytes.map_err(broke_off).boxed()
    }

    fn reaches_server(&mut self) {
        self.app.problems.clear();
    }

    fn begins(&mut self, status: StatusCode) {
        self.active.answers(status);
    }

    fn passes(&mut self, bytes: &[u8]) {
        self.active.bytes_came(bytes);
    }

    fn finishes(&mut self) {
        self.active.finishes();
    }

    fn breaks_off(&mut self, error: &reqwest::Error) {
        tracing::warn!(error = failure::explain(error), "the target broke off");
        self.active.fails();
    }

    fn fails(&mut self, event: &Bytes) {
        tracing::warn!(event = %String::from_utf8_lossy(event).trim_end(), "the stream ends with an error");
        self.active.fails();
    }
}
