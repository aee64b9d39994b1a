//! The routes of the proxy: its own endpoints, and `forward` for every other path.
//!
//! Each request first passes the origin guard, gets an id, and is asked for the token.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::Request;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use tokio_util::sync::CancellationToken;

use super::agreement::Agreement;
use super::observed::Observed;
use super::settings::Settings;
use super::{forward, status};
use crate::engine::Engine;
use crate::http::auth::{self, Auth};
use crate::http::excerpt::excerpt;
use crate::http::headers::X_REQUEST_ID;
use crate::http::origin::{self, Guard};
use crate::http::paths::Dialect;
use crate::http::refusal::Refusal;
use crate::http::target::{Target, TargetError};
use crate::observe::problems::Problems;

/// Our own endpoints that are answered without a token: they show only whether the proxy and the target are up.
const OPEN: [&str; 2] = ["/health", "/readyz"];

/// State that all requests share.
#[derive(Debug)]
pub(super) struct App {
    pub(super) settings: Settings,
    auth: Auth,
    pub(super) engine: Arc<Engine>,
    pub(super) target: Target,
    pub(super) observed: Arc<Observed>,
    /// `None`: not measured.
    pub(super) agreement: Option<Arc<Agreement>>,
    pub(super) started: Instant,
    /// Reasons of refusals since the target last answered.
    pub(super) problems: Problems,
    /// Cancelled when the proxy ends and running answers have had their time.
    pub(super) cut_off: CancellationToken,
}

impl App {
    pub(super) fn new(settings: Settings, engine: Arc<Engine>) -> Result<Self, TargetError> {
        let target = Target::new(&settings.target, settings.target_api_key.as_ref())?;
        let observed = Arc::new(Observed::new(&engine));
        let drafter = settings.measure_agreement_with.clone();
        let agreement = drafter
            .map(|drafter| Agreement::new(drafter).map(Arc::new))
            .transpose()?;
        Ok(Self {
            auth: Auth::new(settings.auth_token.clone(), &OPEN),
            settings,
            engine,
            target,
            observed,
            agreement,
            started: Instant::now(),
            problems: Problems::default(),
            cut_off: CancellationToken::new(),
        })
    }

    /// Whether a request with these headers may see details.
    pub(super) fn admits(&self, headers: &HeaderMap) -> bool {
        self.auth.admits(headers)
    }
}

/// All endpoints.
pub(super) fn router(app: App) -> Router {
    let settings = &app.settings;
    let guard = Guard::new(
        &settings.host,
        app.auth.asks_for_token(),
        &settings.cors_origins,
        Some("proxy.cors_origins"),
    );
    let app = Arc::new(app);
    let router = Router::new()
        .route("/health", get(status::health))
        .route("/readyz", get(status::ready))
        .route("/metrics", get(status::metrics))
        .route("/v1/tightwad/status", get(status::status))
        .method_not_allowed_fallback(async || Refusal::MethodNotAllowed.response(Dialect::OpenAi))
        .fallback(forward::forward)
        .with_state(Arc::clone(&app));
    let router = auth::guarded(router, app.auth.clone(), move |request| unauthorized(&app, request));
    let router = router.layer(middleware::from_fn(with_id));
    origin::guarded(router, guard, |foreign, path| {
        Refusal::Foreign(foreign.clone()).response(Dialect::of(path))
    })
}

/// Gives a request and its answer an id.
async fn with_id(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    response.headers_mut().insert(X_REQUEST_ID, id.header());
    response
}

/// The answer to a request without the token.
fn unauthorized(app: &App, request: &Parts) -> Response {
    app.observed.metrics.unauthorized.inc();
    let id = request.extensions.get::<RequestId>().map(tracing::field::display);
    tracing::warn!(id, path = excerpt(request.uri.path()), "no or a wrong token");
    Refusal::Unauthorized.response(Dialect::of(request.uri.path()))
}

/// Id of a request in all logs.
#[derive(Debug, Clone)]
pub(super) struct RequestId(HeaderValue);

impl RequestId {
    const LONGEST: usize = 128;

    /// The client's id if that is harmless in a log, else a new one.
    fn of(headers: &HeaderMap) -> Self {
        let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
        let given = headers
            .get(X_REQUEST_ID)
            .filter(|id| (1..=Self::LONGEST).contains(&id.len()) && id.as_bytes().iter().all(harmless));
        Self(given.cloned().unwrap_or_else(Self::made))
    }

    fn made() -> HeaderValue {
        HeaderValue::from_str(&auth::unguessable()).unwrap_or(HeaderValue::from_static("none"))
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_str().unwrap_or_default())
    }
}
