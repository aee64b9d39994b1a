//! Questions in JSON to a server behind us, and its answers.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

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
        /// The innermost cause.
        cause: String,
    },
    /// An answer with an error status.
    #[error("{url} answered {status}: {message}")]
    Refused {
        /// What was asked.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The server's message.
        message: String,
    },
    /// An answer that is not what such a server sends.
    #[error("{url} sent something that such a server would not: {cause}")]
    Malformed {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        cause: String,
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
    /// To the server at `base` (without a path). Fails only when the system cannot set up TLS.
    pub(super) fn new(base: &str, key: Option<Secret>) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
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
    pub(super) fn url(&self) -> &str {
        &self.base
    }

    /// A GET that is answered soon.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, UpstreamError> {
        let request = self.http.get(format!("{}{path}", self.base)).timeout(PATIENCE);
        let response = self.send(path, request).await?;
        self.read(path, response).await
    }

    /// The models that a server of vLLM's kind lists, without those that adapt another one (`parent`: LoRA).
    pub(super) async fn own_models(&self) -> Result<Vec<String>, UpstreamError> {
        #[derive(serde::Deserialize)]
        struct Models {
            data: Vec<Model>,
        }
        #[derive(serde::Deserialize)]
        struct Model {
            id: String,
            #[serde(default)]
            parent: Option<String>,
        }
        let models: Models = self.get("/v1/models").await?;
        let own = models.data.into_iter().filter(|model| model.parent.is_none());
        Ok(own.map(|model| model.id).collect())
    }

    /// A POST; without a timeout it may take as long as it likes.
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
        self.http.post(format!("{}{path}", self.base)).json(body)
    }

    /// Sends a request and waits for the head of the answer.
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
        let url = || format!("{}{path}", self.base);
        let response = response.map_err(|error| unreachable(url(), &error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = response.text().await.unwrap_or_default();
        let message = serde_json::from_str::<serde_json::Value>(&body)
            .ok()
            .and_then(|body| body.pointer("/error/message")?.as_str().map(str::to_owned))
            .unwrap_or(body);
        Err(UpstreamError::Refused {
            url: url(),
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
        let url = || format!("{}{path}", self.base);
        let body = response.bytes().await.map_err(|error| unreachable(url(), &error))?;
        serde_json::from_slice(&body).map_err(|error| self.malformed(path, &error.to_string()))
    }

    /// An answer to `path` that is not what was expected.
    pub(super) fn malformed(&self, path: &str, cause: &str) -> UpstreamError {
        UpstreamError::Malformed {
            url: format!("{}{path}", self.base),
            cause: cause.to_owned(),
        }
    }
}

/// Names the innermost cause, which says more than reqwest's own words.
pub(super) fn unreachable(url: String, error: &reqwest::Error) -> UpstreamError {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    UpstreamError::Unreachable {
        url,
        cause: cause.to_string(),
    }
}
