//! Requests to one server behind this process, and every error that such a request can have.
//!
//! These requests do not change the server, so a request that broke off is sent once more, except by
//! [`Connection::post_once`].

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream::BoxStream};
use reqwest::header::{CONTENT_TYPE, LOCATION};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::Secret;
use crate::failure;
use crate::http::client::{self, ReadError};
use crate::http::headers::X_DRAFT_AUTHORIZATION;

/// Timeout for metadata requests.
pub(super) const METADATA_TIMEOUT: Duration = Duration::from_secs(5);

/// Most bytes of an answer with metadata or a few tokens.
pub(super) const SHORT: usize = 4 << 20;
/// Most bytes of an answer that repeats a prompt as token ids.
pub(super) const LONG: usize = 16 << 20;
/// Most bytes of a line of a stream: a few tokens.
const LINE: usize = 256 << 10;
/// Most pieces of an answer that are read after its last event.
const REST: usize = 16;
/// Most bytes of an error that are read …
const ERROR: usize = 64 << 10;
/// … and most characters of it that are shown.
const SHOWN: usize = 300;

/// Why a server gave no usable answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UpstreamError {
    /// No answer within the timeout.
    #[error("{url} does not answer in time")]
    TimedOut {
        /// URL of the request.
        url: String,
    },
    /// No connection, or it broke.
    #[error("{url} is unreachable: {cause}")]
    Unreachable {
        /// URL of the request.
        url: String,
        /// Why, in plain words.
        cause: String,
    },
    /// An answer with an error status, or an error in a stream.
    #[error("{}", failure::refused(.url, *.status, .message))]
    Refused {
        /// URL of the request.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The server's message.
        message: String,
    },
    /// An answer that such a server does not send.
    #[error("{url} sent something else than it should: {cause}")]
    Malformed {
        /// URL of the request.
        url: String,
        /// The difference from the expected answer.
        cause: String,
    },
    /// No model is configured, and the server has not exactly one.
    #[error("{url} lists {count} models; name one of them with `model_name`")]
    WhichModel {
        /// URL of the request.
        url: String,
        /// Models listed.
        count: usize,
    },
}

/// A server's address, its key, and open connections to it.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    base: String,
    http: reqwest::Client,
    key: Option<Secret>,
    draft_key: Option<Secret>,
}

impl Connection {
    /// A connection to the server at `base` (without a path). Fails only if the system cannot set up TLS.
    pub(super) fn new(base: &str, key: Option<Secret>) -> Result<Self, reqwest::Error> {
        let http = client::builder()
            .http1_only()
            .connect_timeout(Duration::from_secs(3))
            .pool_max_idle_per_host(32)
            .pool_idle_timeout(Duration::from_secs(4))
            .build()?;
        Ok(Self {
            base: base.trim_end_matches('/').to_owned(),
            http,
            key,
            draft_key: None,
        })
    }

    /// Sends `draft_key` too, which a pool's coordinator asks of drafters.
    pub(super) fn with_draft_key(self, draft_key: Option<Secret>) -> Self {
        Self { draft_key, ..self }
    }

    /// The base URL.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// The URL of a path.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// A GET of JSON within [`METADATA_TIMEOUT`].
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, UpstreamError> {
        self.get_within(path, METADATA_TIMEOUT).await
    }

    /// A GET of JSON within `time`.
    pub(super) async fn get_within<T: DeserializeOwned>(&self, path: &str, time: Duration) -> Result<T, UpstreamError> {
        let request = self.http.get(self.url(path)).timeout(time);
        let response = self.send(path, request).await?;
        self.read(path, response, SHORT).await
    }

    /// The models that `GET /v1/models` lists, without those that adapt another one (`parent`: LoRA, in servers of vLLM's
    /// kind).
    pub(super) async fn own_models(&self) -> Result<Vec<String>, UpstreamError> {
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Model>,
        }
        #[derive(Deserialize)]
        struct Model {
            id: String,
            #[serde(default)]
            parent: Option<String>,
        }
        let models: Models = self.get("/v1/models").await?;
        let own = models.data.into_iter().filter(|model| model.parent.is_none());
        Ok(own.map(|model| model.id).collect())
    }

    /// A POST that is answered with JSON of at most `limit` bytes; without a timeout it may take any time.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        timeout: Option<Duration>,
        limit: usize,
    ) -> Result<T, UpstreamError> {
        let mut request = self.request(path, body);
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        let response = self.send(path, request).await?;
        self.read(path, response, limit).await
    }

    /// As [`Self::post`] without a timeout, but never sent twice.
    pub(super) async fn post_once<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: usize,
    ) -> Result<T, UpstreamError> {
        let request = self.with_key(self.request(path, body));
        let response = self.accepted(path, request.send().await).await?;
        self.read(path, response, limit).await
    }

    /// A POST that is not sent yet.
    pub(super) fn request(&self, path: &str, body: &impl Serialize) -> reqwest::RequestBuilder {
        self.http.post(self.url(path)).json(body)
    }

    /// As [`Self::request`], with a body that is JSON text.
    pub(super) fn request_written(&self, path: &str, json: String) -> reqwest::RequestBuilder {
        let request = self.http.post(self.url(path));
        request.header(CONTENT_TYPE, "application/json").body(json)
    }

    /// Sends a request to `path` and waits for the head of the answer; an error status is an error.
    pub(super) async fn send(
        &self,
        path: &str,
        request: reqwest::RequestBuilder,
    ) -> Result<reqwest::Response, UpstreamError> {
        let request = self.with_key(request);
        let again = request.try_clone();
        let response = match (request.send().await, again) {
            // llama-server may close a kept-alive connection at any time, perhaps just now.
            (Err(error), Some(again)) if !error.is_connect() && !error.is_timeout() => again.send().await,
            (outcome, _) => outcome,
        };
        self.accepted(path, response).await
    }

    fn with_key(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key.expose()),
            None => request,
        };
        match &self.draft_key {
            Some(key) => request.header(X_DRAFT_AUTHORIZATION, key.expose()),
            None => request,
        }
    }

    async fn accepted(
        &self,
        path: &str,
        response: reqwest::Result<reqwest::Response>,
    ) -> Result<reqwest::Response, UpstreamError> {
        let response = response.map_err(|error| unreachable(self.url(path), &error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let location = response.headers().get(LOCATION).filter(|_| status.is_redirection());
        let message = if let Some(location) = location {
            let location = String::from_utf8_lossy(location.as_bytes());
            format!("it redirects to {location}, and redirects are not followed; correct the URL in the config")
        } else {
            let body = client::beginning(response, ERROR).await;
            serde_json::from_str::<serde_json::Value>(&body)
                .ok()
                .and_then(|body| error_message(body.get("error")?))
                .unwrap_or(body)
        };
        Err(UpstreamError::Refused {
            url: self.url(path),
            status: status.as_u16(),
            message: excerpt(&message),
        })
    }

    /// The JSON of an answer.
    pub(super) async fn read<T: DeserializeOwned>(
        &self,
        path: &str,
        response: reqwest::Response,
        limit: usize,
    ) -> Result<T, UpstreamError> {
        let answer = client::json(response, limit).await;
        answer.map_err(|error| unread(self.url(path), error))
    }

    /// The lines of an answer as they come, without their ends.
    pub(super) fn lines(
        &self,
        path: &str,
        response: reqwest::Response,
    ) -> BoxStream<'static, Result<Bytes, UpstreamError>> {
        let url = self.url(path);
        client::lines(response, LINE)
            .map(move |line| line.map_err(|error| unread(url.clone(), error)))
            .boxed()
    }

    /// Reads the rest of an answer whose last event has come. Dropping an answer before its end closes its connection, and
    /// the next request would have to open a new one.
    pub(super) fn read_out(rest: impl Stream + Send + 'static) {
        tokio::spawn(tokio::time::timeout(
            METADATA_TIMEOUT,
            rest.take(REST).for_each(|_| std::future::ready(())),
        ));
    }

    /// An answer to `path` that is not what was expected.
    pub(super) fn malformed(&self, path: &str, cause: &str) -> UpstreamError {
        UpstreamError::Malformed {
            url: self.url(path),
            cause: excerpt(cause),
        }
    }

    /// The error of a stream from `path` that ended too early.
    pub(super) fn broke_off(&self, path: &str) -> UpstreamError {
        UpstreamError::Unreachable {
            url: self.url(path),
            cause: "the stream broke off".to_owned(),
        }
    }
}

/// The message of an `error`: OpenAI and llama-server send an object, Ollama a string.
pub(super) fn error_message(error: &serde_json::Value) -> Option<String> {
    let message = error.get("message").unwrap_or(error);
    message.as_str().map(str::to_owned)
}

/// The beginning of a message, which may have any length.
fn excerpt(message: &str) -> String {
    let mut characters = message.trim().chars();
    let mut excerpt: String = characters.by_ref().take(SHOWN).collect();
    if characters.next().is_some() {
        excerpt.push('…');
    }
    excerpt
}

/// Why an answer could not be read.
fn unread(url: String, error: ReadError) -> UpstreamError {
    match error {
        ReadError::Broken(error) => unreachable(url, &error),
        error => UpstreamError::Malformed {
            url,
            cause: excerpt(&error.to_string()),
        },
    }
}

/// A timeout, or no connection.
fn unreachable(url: String, error: &reqwest::Error) -> UpstreamError {
    if error.is_timeout() && !error.is_connect() {
        return UpstreamError::TimedOut { url };
    }
    let cause = failure::explain(error);
    UpstreamError::Unreachable { url, cause }
}
