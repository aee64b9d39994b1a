//! Questions over HTTP to one server behind us, and its answers.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream::BoxStream};
use reqwest::header::CONTENT_TYPE;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::failure;
use crate::config::Secret;

/// What a server knows by itself it tells within this time, or not at all.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Why a server behind us gave no answer that can be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UpstreamError {
    /// No connection, or it broke.
    #[error("{url} is unreachable: {cause}")]
    Unreachable {
        /// What was asked.
        url: String,
        /// Why, in plain words.
        cause: String,
    },
    /// An answer with an error status, or an error in a stream.
    #[error("{}", failure::refused(.url, *.status, .message))]
    Refused {
        /// What was asked.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The server's message.
        message: String,
    },
    /// An answer that is not what such a server sends.
    #[error("{url} sent something else than it should: {cause}")]
    Malformed {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        cause: String,
    },
    /// No model is configured, and the server has not exactly one.
    #[error("{url} lists {count} models; name one of them with `model_name`")]
    WhichModel {
        /// What was asked.
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
}

impl Connection {
    /// To the server at `base` (without a path), never through a proxy of the environment. Fails only when the system
    /// cannot set up TLS.
    pub(super) fn new(base: &str, key: Option<Secret>) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .http1_only()
            .connect_timeout(Duration::from_secs(3))
            .pool_max_idle_per_host(32)
            .pool_idle_timeout(Duration::from_secs(4))
            .build()?;
        Ok(Self {
            base: base.trim_end_matches('/').to_owned(),
            http,
            key,
        })
    }

    /// The base URL.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// The URL of a path.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// A GET that is answered soon, in JSON.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, UpstreamError> {
        let request = self.http.get(self.url(path)).timeout(PATIENCE);
        let response = self.send(path, request).await?;
        self.read(path, response).await
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

    /// A POST that is answered in JSON; without a timeout it may take as long as it likes.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        timeout: Option<Duration>,
    ) -> Result<T, UpstreamError> {
        let mut request = self.request(path, body);
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        let response = self.send(path, request).await?;
        self.read(path, response).await
    }

    /// As [`Self::post`] without a timeout, and never sent twice.
    pub(super) async fn post_once<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, UpstreamError> {
        let request = self.with_key(self.request(path, body));
        let response = self.accepted(path, request.send().await).await?;
        self.read(path, response).await
    }

    /// A POST that is not sent yet.
    pub(super) fn request(&self, path: &str, body: &impl Serialize) -> reqwest::RequestBuilder {
        self.http.post(self.url(path)).json(body)
    }

    /// As [`Self::request`], of JSON that is written already.
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
            // llama-server closes a kept-alive connection when it likes, perhaps just now. Nothing that we ask changes
            // anything, so it can be asked again.
            (Err(error), Some(again)) if !error.is_connect() && !error.is_timeout() => again.send().await,
            (outcome, _) => outcome,
        };
        self.accepted(path, response).await
    }

    fn with_key(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key.expose()),
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
        let status = response.status().as_u16();
        let body = response.text().await.unwrap_or_default();
        let message = serde_json::from_str::<serde_json::Value>(&body)
            .ok()
            .and_then(|body| error_message(body.get("error")?))
            .unwrap_or(body);
        Err(UpstreamError::Refused {
            url: self.url(path),
            status,
            message,
        })
    }

    /// The JSON of an answer.
    pub(super) async fn read<T: DeserializeOwned>(
        &self,
        path: &str,
        response: reqwest::Response,
    ) -> Result<T, UpstreamError> {
        let body = response
            .bytes()
            .await
            .map_err(|error| unreachable(self.url(path), &error))?;
        serde_json::from_slice(&body).map_err(|error| self.malformed(path, &error.to_string()))
    }

    /// The lines of an answer as they come, without their ends.
    pub(super) fn lines(
        &self,
        path: &str,
        response: reqwest::Response,
    ) -> BoxStream<'static, Result<BytesMut, UpstreamError>> {
        let url = self.url(path);
        let lines = Lines {
            bytes: response.bytes_stream().boxed(),
            buffer: BytesMut::new(),
        };
        futures_util::stream::unfold(lines, |mut lines| async move { Some((lines.next().await?, lines)) })
            .map(move |line| line.map_err(|error| unreachable(url.clone(), &error)))
            .boxed()
    }

    /// Reads the rest of an answer whose last word has come. One that is dropped before its end takes its connection with
    /// it, and the next request waits for a new one.
    pub(super) fn read_out(rest: impl Stream + Send + 'static) {
        tokio::spawn(tokio::time::timeout(
            PATIENCE,
            rest.for_each(|_| std::future::ready(())),
        ));
    }

    /// An answer to `path` that is not what was expected.
    pub(super) fn malformed(&self, path: &str, cause: &str) -> UpstreamError {
        UpstreamError::Malformed {
            url: self.url(path),
            cause: cause.to_owned(),
        }
    }

    /// A stream from `path` without its end.
    pub(super) fn broke_off(&self, path: &str) -> UpstreamError {
        UpstreamError::Unreachable {
            url: self.url(path),
            cause: "the stream broke off".to_owned(),
        }
    }
}

/// The words of an `error`: OpenAI and llama-server send an object, Ollama a string.
pub(super) fn error_message(error: &serde_json::Value) -> Option<String> {
    let message = error.get("message").unwrap_or(error);
    message.as_str().map(str::to_owned)
}

fn unreachable(url: String, error: &reqwest::Error) -> UpstreamError {
    let cause = failure::explain(error);
    UpstreamError::Unreachable { url, cause }
}

/// Splits a body into lines.
struct Lines<S> {
    bytes: S,
    buffer: BytesMut,
}

impl<S: Stream<Item = reqwest::Result<Bytes>> + Unpin> Lines<S> {
    async fn next(&mut self) -> Option<reqwest::Result<BytesMut>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end);
                self.buffer.advance(1);
                return Some(Ok(line));
            }
            match self.bytes.next().await? {
                Ok(chunk) => self.buffer.extend_from_slice(&chunk),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
