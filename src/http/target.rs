//! Sends requests to the server behind and waits for the head of its answer.
//!
//! A request is sent a second time only if its pooled connection was closed before a byte of an answer came. The proxy and
//! the coordinator send every client's request through [`Target`]; `relay` takes the answer from there.

use std::cell::Cell;
use std::future::Future;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use bytes::Bytes;
use reqwest::{Client, RequestBuilder, Response, Url};
use tower::util::MapRequestLayer;

use super::client;
use super::refusal::Refusal;
use crate::config::Secret;
use crate::failure;

/// Timeout for connecting; a server that takes longer is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// llama-server closes idle connections after 5 s, and each holds one of its threads until then.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Most idle connections. With fewer, a busy proxy would open a connection for nearly every request.
const MOST_IDLE: usize = 1024;

/// A pooled connection that was closed already fails within this time; a later failure was caused by the request itself.
const AT_ONCE: Duration = Duration::from_secs(1);

tokio::task_local! {
    /// Whether a new connection was opened for the request that the task sends.
    static CONNECTS: Cell<bool>;
}

/// Notes that a new connection is opened.
fn connects<T>(connection: T) -> T {
    // A connection whose request was dropped is opened outside of a request's task.
    let _ = CONNECTS.try_with(|connects| connects.set(true));
    connection
}

/// The server that answers clients' requests.
#[derive(Debug)]
pub(crate) struct Target {
    base: Url,
    /// The base as it may be shown: without a password.
    shown: String,
    authorization: Option<HeaderValue>,
    pooled: Client,
    /// Opens a new connection for each request.
    fresh: Client,
}

/// Why there is no client for the target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// TLS or the resolver could not be set up.
    #[error("the HTTP client cannot be set up: {0}")]
    Client(#[from] reqwest::Error),
    /// The key cannot be sent.
    #[error("the target's API key has characters that no HTTP header may have")]
    Key,
}

/// A request as the server behind gets it.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Target {
    pub(crate) fn new(base: &Url, api_key: Option<&Secret>) -> Result<Self, TargetError> {
        let client = || {
            client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .tcp_keepalive(Duration::from_secs(20))
                .tcp_keepalive_interval(Duration::from_secs(10))
                .tcp_keepalive_retries(3)
                .pool_idle_timeout(IDLE_TIMEOUT)
        };
        let authorization = api_key.map(|key| {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", key.expose())).map_err(|_| TargetError::Key)?;
            value.set_sensitive(true);
            Ok::<_, TargetError>(value)
        });
        let mut shown = base.clone();
        // Fails for URLs that cannot have either, which then have nothing to hide.
        let _ = shown.set_username("").and_then(|()| shown.set_password(None));
        Ok(Self {
            base: base.clone(),
            shown: shown.as_str().trim_end_matches('/').to_owned(),
            authorization: authorization.transpose()?,
            pooled: client()
                .pool_max_idle_per_host(MOST_IDLE)
                .connector_layer(MapRequestLayer::new(connects))
                .build()?,
            fresh: client().pool_max_idle_per_host(0).build()?,
        })
    }

    /// The base URL as it may be shown.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    /// The `Authorization` header that the server asks for.
    pub(crate) fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    /// The URL of the target for a client's request.
    pub(crate) fn locate(&self, uri: &Uri) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{}", self.base.path().trim_end_matches('/'), uri.path()));
        url.set_query(uri.query());
        url
    }

    /// The path as the server sees it: without the base's prefix, dots resolved.
    pub(crate) fn path_of<'a>(&self, url: &'a Url) -> &'a str {
        let prefix = self.base.path().trim_end_matches('/');
        url.path().strip_prefix(prefix).unwrap_or(url.path())
    }

    /// Sends a request and waits for the answer's head, however long that takes. Dropping the future ends the request.
    pub(crate) fn send(&self, request: Outgoing) -> impl Future<Output = Result<Response, Refusal>> + Send + 'static {
        let (pooled, fresh, url) = (self.pooled.clone(), self.fresh.clone(), self.shown.clone());
        async move {
            let begun = Instant::now();
            let sent = request.clone().built(&pooled).send();
            let sent = async { (sent.await, !CONNECTS.with(Cell::get)) };
            let answer = match CONNECTS.scope(Cell::new(false), sent).await {
                (Err(error), true) if was_closed(&error) && begun.elapsed() < AT_ONCE => {
                    tracing::debug!(%error, "the connection was closed already, trying a fresh one");
                    match request.built(&fresh).send().await {
                        // The server took the request and is gone.
                        Err(again) if again.is_connect() => Err(error),
                        answer => answer,
                    }
                }
                (answer, _) => answer,
            };
            answer.map_err(|error| {
                let cause = failure::explain(&error);
                if error.is_connect() || error.is_timeout() {
                    Refusal::Unreachable { url, cause }
                } else {
                    Refusal::BrokeOff { url, cause }
                }
            })
        }
    }
}

impl Outgoing {
    fn built(self, client: &Client) -> RequestBuilder {
        let takes_body = !matches!(self.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let request = client.request(self.method, self.url).headers(self.headers);
        if !self.body.is_empty() {
            request.body(self.body)
        } else if takes_body {
            // Without a length some servers wait for a body until the connection ends.
            request.header(header::CONTENT_LENGTH, 0)
        } else {
            request
        }
    }
}

/// Whether the connection was closed before a byte of an answer came.
fn was_closed(error: &reqwest::Error) -> bool {
    if error.is_connect() {
        return false;
    }
    failure::causes(error).any(|cause| {
        if let Some(error) = cause.downcast_ref::<hyper::Error>() {
            return error.is_incomplete_message() || error.is_closed() || error.is_canceled();
        }
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| {
            matches!(
                error.kind(),
                ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_queries_reach_the_target_as_they_were_sent() {
        for (base, sent, url, path) in [
            (
                "http://h:1",
                "/v1/models?a=%20b&c",
                "http://h:1/v1/models?a=%20b&c",
                "/v1/models",
            ),
            ("http://h:1/", "/a%2Fb", "http://h:1/a%2Fb", "/a%2Fb"),
            (
                "http://h:1/llama/",
                "/v1/models",
                "http://h:1/llama/v1/models",
                "/v1/models",
            ),
            ("http://h:1/llama", "/x/../draft", "http://h:1/llama/draft", "/draft"),
            ("http://h:1/llama", "/../draft", "http://h:1/draft", "/draft"),
        ] {
            let target = Target::new(&base.parse().unwrap(), None).unwrap();
            let located = target.locate(&sent.parse().unwrap());
            assert_eq!((located.as_str(), target.path_of(&located)), (url, path));
        }
    }

    #[test]
    fn a_password_in_the_url_is_not_shown() {
        let target = Target::new(&"http://me:pw@h:1/".parse().unwrap(), None).unwrap();
        assert_eq!(target.shown(), "http://h:1");
    }
}
