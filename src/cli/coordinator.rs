//! Client of the coordinator, for the commands `start`, `stop`, `status`, `swap` and `benchmark`, and its steps in words.

use std::fmt;
use std::time::Duration;

use reqwest::{RequestBuilder, StatusCode};
use serde_json::Value;

use super::exit::{Exit, Failure};
use super::received::Received;
use super::status::MAX_BYTES;
use crate::config::{self, Config, Coordinator, Secret};
use crate::http;
use crate::pool::coordinator::CoordinatorError;
use crate::pool::coordinator::status::{Status, Step};
use crate::pool::swap::State;
use crate::upstream::chat::{client, refused, unreachable};

/// The section `coordinator`, or a failure that names it.
pub fn section(config: &Config) -> Result<&Coordinator, Failure> {
    config
        .coordinator
        .as_ref()
        .ok_or_else(|| CoordinatorError::NoSection.into())
}

/// Name of the pid file. A host may run several coordinators, but only one per port.
pub fn pid_name(section: &Coordinator) -> String {
    format!("coordinator-{}", section.port)
}

/// Client of a running coordinator.
#[derive(Debug, Clone)]
pub struct Client {
    url: String,
    key: Option<Secret>,
    http: reqwest::Client,
}

impl Client {
    /// A client of the coordinator that the section describes.
    pub fn new(section: &Coordinator) -> Result<Self, Failure> {
        Ok(Self {
            url: config::local_url(&section.host, section.port),
            key: section.api_key()?,
            http: client()?,
        })
    }

    /// Its base URL, without `/v1`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The key that clients send.
    pub fn key(&self) -> Option<&Secret> {
        self.key.as_ref()
    }

    /// Its status.
    pub async fn status(&self, patience: Duration) -> Result<Received<Status>, Failure> {
        let url = format!("{}/v1/tightwad/status", self.url);
        let request = self.authorized(self.http.get(url)).timeout(patience);
        let response = request.send().await.map_err(|error| self.silent(&error))?;
        let status = response.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(refused(&self.url, response).await.into());
        }
        let answer: Option<Value> = http::client::json(response, MAX_BYTES).await.ok();
        let report = answer.filter(|_| status.is_success()).and_then(Received::read);
        report.ok_or_else(|| {
            let message = format!(
                "{} answers ({}), but is no coordinator of Tightwad's; check `host` and `port` of the section \
                 `coordinator`, and what else listens there",
                self.url,
                status.as_u16()
            );
            Failure::new(Exit::Unreachable, message)
        })
    }

    /// A POST request.
    pub fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.authorized(self.http.post(format!("{}{path}", self.url)).json(body))
    }

    /// The failure for a request without an answer.
    pub fn silent(&self, error: &reqwest::Error) -> Failure {
        if error.is_connect() && !error.is_timeout() {
            let message = format!("no coordinator runs at {}; start it with `tightwad start`", self.url);
            return Failure::new(Exit::NotRunning, message);
        }
        unreachable(&self.url, error).into()
    }

    fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key.expose()),
            None => request,
        }
    }
}

/// A step of the coordinator in words.
#[derive(Debug, PartialEq)]
pub struct Description {
    /// The current action of the coordinator, with the problem if there is one.
    pub doing: String,
    /// Progress of that, from 0 to 1.
    pub progress: Option<f64>,
    /// The part that changes all the time.
    pub detail: String,
}

impl Description {
    /// Describes the current step.
    pub fn of_status(status: &Status) -> Self {
        Self::of(&Step::of(&status.now, status.load))
    }

    /// Describes a step.
    pub fn of(step: &Step) -> Self {
        let (state, model) = (step.state, &step.model);
        let problem = step.problem.as_ref().map(|problem| format!(": {problem}"));
        let problem = problem.unwrap_or_default();
        let doing = match (state, &step.checking) {
            (State::Ready | State::Down | State::GaveUp, Some(checking)) => format!("checking `{checking}`"),
            (State::Leasing, _) => format!("taking the workers for `{model}`"),
            (State::Loading, _) => format!("loading `{model}`"),
            (State::Ready, _) => format!("`{model}` is ready"),
            (State::Draining, _) => match &step.next {
                Some(next) => format!("finishing the running answers of `{model}` before `{next}` comes"),
                None => format!("finishing the running answers of `{model}`"),
            },
            // `model` is the next model by now, so it is not named.
            (State::Stopping, _) => "stopping the llama-server".to_owned(),
            (State::Freeing, _) => "freeing the workers' memory".to_owned(),
            (State::Down, _) if problem.is_empty() => format!("about to start `{model}`"),
            (State::Down, _) => format!("`{model}` cannot run yet, and is tried again{problem}"),
            (State::GaveUp, _) => format!("`{model}` is given up{problem}"),
            (State::Stopped | State::Unknown, _) => format!("`{model}` is {state}"),
        };
        let detail = match (state, step.load.eta_seconds) {
            (State::Loading, Some(eta)) => format!(", about {eta} s left"),
            (State::Draining, _) => format!(" ({} left)", step.running),
            _ => String::new(),
        };
        let progress = step.load.progress.filter(|_| state == State::Loading);
        Self {
            doing,
            progress: progress.map(f64::from),
            detail,
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.doing)?;
        if let Some(progress) = self.progress {
            write!(f, ", {:.0}%", (progress * 100.0).floor())?;
        }
        f.write_str(&self.detail)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_step_says_what_is_done_and_what_is_in_the_way() {
        let described = |step: Value| Description::of(&serde_json::from_value(step).unwrap());
        let doing = |step: Value| described(step).doing;
        let loading = described(json!({ "state": "loading", "model": "big", "progress": 0.5, "eta_seconds": 9 }));
        assert_eq!(
            loading,
            Description {
                doing: "loading `big`".to_owned(),
                progress: Some(0.5),
                detail: ", about 9 s left".to_owned(),
            }
        );
        assert_eq!(loading.to_string(), "loading `big`, 50%, about 9 s left");
        assert_eq!(
            doing(json!({ "state": "ready", "model": "big", "checking": "other" })),
            "checking `other`"
        );
        assert_eq!(
            doing(json!({ "state": "down", "model": "big", "problem": "worker one is away" })),
            "`big` cannot run yet, and is tried again: worker one is away"
        );
        assert_eq!(
            doing(json!({ "state": "dancing", "model": "big" })),
            "`big` is unknown",
            "of a newer coordinator"
        );
    }

    #[test]
    fn a_status_may_lack_what_another_version_does_not_send() {
        let status: Status = serde_json::from_value(json!({ "state": "ready", "model": "big" })).unwrap();
        assert_eq!(Description::of_status(&status).doing, "`big` is ready");
        assert!(serde_json::from_value::<Status>(json!({ "hello": 1 })).is_err());
    }
}
