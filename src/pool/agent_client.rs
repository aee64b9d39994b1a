//! HTTP client of a worker's agent; [`super::agent`] describes the protocol.

use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;

use super::agent::{Holder, Lease, LeaseRequest, Refusal, Renewal, WorkerStatus};
use crate::config::{ConfigError, Secret, Worker};
use crate::failure;
use crate::http::client::{self, ReadError};

/// A host that is up answers the first packet in milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for requests that an agent answers at once.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout for a lease, which is answered once fresh servers listen. A GPU driver that wakes up takes seconds per server.
const LEASE_TIMEOUT: Duration = Duration::from_secs(120);
/// Timeout for returning a lease: a server is killed after a second, and its GPU takes a while to be free.
const RETURN_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest answer in bytes. A status with the last log lines of several servers has some ten thousand.
const MOST_BODY: usize = 1 << 20;

/// A client of one worker's agent.
#[derive(Debug, Clone)]
pub struct AgentClient {
    worker: String,
    url: String,
    token: Option<Secret>,
    http: reqwest::Client,
}

/// Why a request to an agent failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    /// The agent does not answer, or not in time.
    #[error("worker {worker} does not answer at {url} ({reason}); start `tightwad run worker {worker}` on its host")]
    Unreachable {
        /// Its name.
        worker: String,
        /// Its agent's URL.
        url: String,
        /// The cause.
        reason: String,
    },
    /// The token is wrong or missing.
    #[error("worker {worker} is up at {url} and refuses our token; give it the same `agent_token_file` on both hosts")]
    Unauthorized {
        /// Its name.
        worker: String,
        /// Its agent's URL.
        url: String,
    },
    /// Another coordinator holds the lease, or this one with a later epoch.
    #[error(
        "worker {worker} is leased by the coordinator {} (epoch {}); stop that one first",
        .holder.holder,
        .holder.epoch
    )]
    Held {
        /// Its name.
        worker: String,
        /// The holder of the lease.
        holder: Holder,
    },
    /// The lease is over: it expired, or was taken over.
    #[error("the lease of worker {worker} is over; take a new one")]
    Over {
        /// Its name.
        worker: String,
    },
    /// The agent cannot: its servers do not start.
    #[error("worker {worker}: {reason}")]
    Refused {
        /// Its name.
        worker: String,
        /// The reason that it gives.
        reason: String,
    },
    /// Something other than an agent answers there.
    #[error("{url} is not the agent of worker {worker} ({reason}); check `agent_port`")]
    NotAnAgent {
        /// Its name.
        worker: String,
        /// The URL.
        url: String,
        /// Description of the answer.
        reason: String,
    },
    /// This host cannot set up TLS or its resolver.
    #[error("worker {worker} cannot be asked: this host's HTTP client cannot be set up: {reason}")]
    NoClient {
        /// Its name.
        worker: String,
        /// Why.
        reason: String,
    },
    /// The token's file cannot be read.
    #[error("worker {worker}: {reason}")]
    Token {
        /// Its name.
        worker: String,
        /// Why.
        reason: String,
    },
}

impl AgentClient {
    /// A client of this worker's agent; reads the token's file now.
    pub fn new(worker: &Worker) -> Result<Self, AgentError> {
        let token = worker.agent_token().map_err(|error: ConfigError| AgentError::Token {
            worker: worker.name().to_owned(),
            reason: error.to_string(),
        })?;
        Self::at(worker.name(), worker.agent_url(), token)
    }

    /// A client of the agent at a base URL.
    pub fn at(worker: impl Into<String>, url: impl Into<String>, token: Option<Secret>) -> Result<Self, AgentError> {
        let worker = worker.into();
        // The agent may close an idle connection just as the next request is sent on it, so none is kept.
        let http = client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_max_idle_per_host(0)
            .build();
        Ok(Self {
            http: http.map_err(|error| AgentError::NoClient {
                worker: worker.clone(),
                reason: error.to_string(),
            })?,
            worker,
            url: url.into(),
            token,
        })
    }

    /// Name of the worker.
    #[must_use]
    pub fn worker(&self) -> &str {
        &self.worker
    }

    /// The status of the worker. Answered at once, whoever holds the lease.
    pub async fn status(&self) -> Result<WorkerStatus, AgentError> {
        let request = self.request(Method::GET, "/v1/worker", TIMEOUT);
        self.json(self.send(request).await?).await
    }

    /// Leases the worker. Answered once fresh servers listen; a request that is dropped gets no lease.
    pub async fn lease(&self, wanted: &LeaseRequest) -> Result<Lease, AgentError> {
        let request = self
            .request(Method::POST, "/v1/worker/lease", LEASE_TIMEOUT)
            .json(wanted);
        self.json(self.send(request).await?).await
    }

    /// Renews a lease; the answer tells the state of its servers.
    pub async fn renew(&self, id: &str) -> Result<Renewal, AgentError> {
        let request = self.request(Method::POST, &format!("/v1/worker/lease/{id}/renew"), TIMEOUT);
        self.json(self.send(request).await?).await
    }

    /// Returns a lease. Answered once the servers have ended and their memory is free.
    pub async fn give_back(&self, id: &str) -> Result<(), AgentError> {
        let request = self.request(Method::DELETE, &format!("/v1/worker/lease/{id}"), RETURN_TIMEOUT);
        self.send(request).await.map(drop)
    }

    fn request(&self, method: Method, path: &str, patience: Duration) -> RequestBuilder {
        let request = self
            .http
            .request(method, format!("{}{path}", self.url))
            .timeout(patience);
        match &self.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    /// Sends a request; an error status becomes an error.
    async fn send(&self, request: RequestBuilder) -> Result<Response, AgentError> {
        let answer = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let worker = self.worker.clone();
        if status == StatusCode::UNAUTHORIZED {
            let url = self.url.clone();
            return Err(AgentError::Unauthorized { worker, url });
        }
        let refusal: Refusal = self.json(answer).await?;
        Err(match (status, refusal.holder) {
            (StatusCode::NOT_FOUND, _) => AgentError::Over { worker },
            (StatusCode::CONFLICT, Some(holder)) => AgentError::Held { worker, holder },
            _ => AgentError::Refused {
                worker,
                reason: refusal.error,
            },
        })
    }

    async fn json<T: DeserializeOwned>(&self, answer: Response) -> Result<T, AgentError> {
        let status = answer.status();
        let stranger = |reason: String| AgentError::NotAnAgent {
            worker: self.worker.clone(),
            url: self.url.clone(),
            reason,
        };
        client::json(answer, MOST_BODY).await.map_err(|error| match error {
            ReadError::Broken(error) => self.unreachable(&error),
            ReadError::Json(_) => stranger(format!("it answers {status} with something else")),
            error => stranger(error.to_string()),
        })
    }

    fn unreachable(&self, error: &reqwest::Error) -> AgentError {
        AgentError::Unreachable {
            worker: self.worker.clone(),
            url: self.url.clone(),
            reason: failure::explain(error),
        }
    }

    /// The error for an agent that did not answer in time.
    pub(super) fn silent(&self) -> AgentError {
        AgentError::Unreachable {
            worker: self.worker.clone(),
            url: self.url.clone(),
            reason: "no answer in time".to_owned(),
        }
    }
}
