//! Sends a request to the target and makes the answer.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::Response;

use super::admission;
use super::headers::{self, Credentials, X_ACCEL_BUFFERING, X_DRAFT_AUTHORIZATION, X_DRAFT_KEY, X_REQUEST_ID};
use super::nesting;
use super::paths::{Access, Dialect, Route};
use super::relay::{self, Events};
use super::respond::Refusal;
use super::router::{App, RequestId};
use super::running::Running;
use super::target::Outgoing;
use crate::config::Backend;
use crate::engine::Verification;
use crate::rounds;

/// Answers a request that is none of our own endpoints'.
pub(super) async fn forward(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    let url = app.target.locate(request.uri());
    let path = app.target.path_of(&url).to_owned();
    let dialect = Dialect::of(&path);
    let route = Route::of(request.method(), &path);
    let running = Running::begin(&app.observed, id.to_string(), &path, route);
    let exchange = Exchange {
        app: &app,
        id: &id,
        dialect,
        route,
        running,
    };
    exchange.answer(url, request).await
}

/// One request on its way to its answer.
struct Exchange<'a> {
    app: &'a App,
    id: &'a RequestId,
    dialect: Dialect,
    route: Route,
    running: Running,
}

/// A request that may be answered.
struct Prepared {
    outgoing: Outgoing,
    /// An event stream is asked for.
    streamed: bool,
    /// How it is answered, unless by the target itself.
    rounds: Option<rounds::Answer>,
}

impl Exchange<'_> {
    async fn answer(mut self, url: reqwest::Url, request: Request) -> Response {
        let method = request.method().clone();
        let Prepared {
            outgoing,
            streamed,
            rounds,
        } = match self.prepare(url, request).await {
            Ok(prepared) => prepared,
            Err(refusal) => return self.refuse(&refusal),
        };
        let forwarded = self.app.target.send(outgoing);
        let dialect = self.dialect;
        let mut answer = Box::pin(async move {
            if let Some(rounds) = rounds
                && let Some(response) = rounds.response().await
            {
                return Ok(response);
            }
            Ok(relay::explained(dialect, forwarded.await?).await)
        });
        let answered = match self.app.settings.keepalive.filter(|_| streamed) {
            None => answer.await,
            Some(keepalive) => match tokio::time::timeout(keepalive, &mut answer).await {
                Ok(answered) => answered,
                Err(_) => return self.keep_waiting(answer),
            },
        };
        match answered {
            Ok(answered) => self.pass_on(&method, answered),
            Err(refusal) => self.refuse(&refusal),
        }
    }

    /// Checks the request and makes what the target gets of it.
    async fn prepare(&mut self, url: reqwest::Url, request: Request) -> Result<Prepared, Refusal> {
        let settings = &self.app.settings;
        let (parts, body) = request.into_parts();
        if let Err(refusal) = self.access(&parts.headers) {
            admission::discard(body, &parts.headers);
            return Err(refusal);
        }
        let body = admission::read(body, &parts, settings.max_body_size).await?;
        admission::check_form(&parts.headers, &body)?;
        let mut headers = headers::to_target(parts.headers, self.credentials());
        headers.insert(X_REQUEST_ID, self.id.header());
        let (mut streamed, mut rounds) = (false, None);
        if self.route.completion {
            self.running.occupies(self.app.engine.track_request());
            let asked = admission::check(&body, settings.max_tokens_limit)?;
            if let Some(name) = asked.model.filter(|name| settings.draft_models.contains(name)) {
                return Err(Refusal::Drafter { name });
            }
            streamed = asked.streamed;
            if !settings.fallback_on_draft_failure {
                self.refuse_without_drafter()?;
            }
            let predicted = asked.prediction.is_some() && self.route.chat;
            rounds = self.in_rounds(&body, asked.prediction.as_ref());
            if let Some(rounds) = &rounds {
                self.running.counts_with(rounds.counts());
            } else if let Some(attachment) = self.app.engine.attach(asked.prediction)
                && let Ok(key) = HeaderValue::from_str(attachment.key())
            {
                headers.insert(X_DRAFT_KEY, key);
                self.may_draft(&mut headers);
                self.running.drafts_with(attachment);
                if predicted {
                    self.running.is_predicted();
                    // Nothing can be put into a compressed answer.
                    headers.remove(header::ACCEPT_ENCODING);
                }
            }
        } else {
            admission::check_bounds(&body)?;
        }
        if let Some(agreement) = &self.app.agreement
            && self.route.completion
            && self.app.engine.verification() == Verification::None
            && let Some(question) = agreement.question(self.route.label, &body)
        {
            self.running.is_compared(question);
        }
        if streamed {
            self.running.streams();
            // Nothing can be put into a compressed stream.
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

    /// Shows the target that its drafter may draft.
    fn may_draft(&self, headers: &mut HeaderMap) {
        let key = self.app.settings.target_draft_key.as_ref();
        if let Some(Ok(mut key)) = key.map(|key| HeaderValue::from_str(key.expose())) {
            key.set_sensitive(true);
            headers.insert(X_DRAFT_AUTHORIZATION, key);
        }
    }

    /// Whether clients get at this path.
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
        let request = rounds::Request::of(rounds::Endpoint::at(self.route.label)?, body)?;
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

    fn refuse(mut self, refusal: &Refusal) -> Response {
        // Many requests meet a target that is down: that is a warning once, until it answers again.
        if !refusal.status().is_server_error() || self.app.problems.is_new(&refusal.to_string()) {
            tracing::warn!(id = %self.id, error = %refusal, "refused");
        } else {
            tracing::debug!(id = %self.id, error = %refusal, "refused");
        }
        self.running.answers(refusal.status());
        self.running.fails();
        refusal.response(self.dialect)
    }

    /// Tells a client that wants a stream that it has one, before the target says so.
    fn keep_waiting(
        mut self,
        answer: impl Future<Output = Result<reqwest::Response, Refusal>> + Send + 'static,
    ) -> Response {
        self.running.answers(StatusCode::OK);
        let mut response = Response::new(self.events().awaiting(answer));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
        response
    }

    /// Gives the target's answer to the client as it comes.
    fn pass_on(mut self, method: &Method, answer: reqwest::Response) -> Response {
        self.app.problems.clear();
        let status = answer.status();
        self.running.answers(status);
        let mut headers = headers::to_client(answer.headers().clone());
        if relay::is_event_stream(&headers) {
            headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
        }
        let body = if method == Method::HEAD || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
            self.running.finishes();
            Body::empty()
        } else if relay::is_open_event_stream(&headers) {
            self.events().of(answer)
        } else {
            let (body, sized) = relay::whole(answer, self.running);
            if !sized {
                headers.remove(header::CONTENT_LENGTH);
            }
            body
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    fn events(self) -> Events {
        Events::new(
            self.dialect,
            self.app.settings.keepalive,
            self.app.target.shown(),
            self.app.cut_off.clone(),
            self.running,
        )
    }
}
