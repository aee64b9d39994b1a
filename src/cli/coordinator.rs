//! The coordinator of the config, as the commands that start, stop, swap and ask it see it.

use std::fmt;
use std::time::Duration;

use reqwest::{RequestBuilder, StatusCode};
use serde_json::Value;

use super::exit::{Exit, Failure};
use super::status::MOST_BYTES;
use crate::config::{self, Config, Coordinator, Secret};
use crate::http;
use crate::pool::coordinator::CoordinatorError;
use crate::upstream::chat::{client, refused, unreachable};

/// The section, which the pool's commands need.
pub fn section(config: &Config) -> Result<&Coordinator, Failure> {
    config
        .coordinator
        .as_ref()
        .ok_or_else(|| CoordinatorError::NoSection.into())
}

/// A host may run several coordinators, but only one per port.
pub fn pid_name(section: &Coordinator) -> String {
    format!("coordinator-{}", section.port)
}

/// Asks a coordinator that runs.
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

    /// What clients send.
    pub fn key(&self) -> Option<&Secret> {
        self.key.as_ref()
    }

    /// How it is.
    pub async fn status(&self, patience: Duration) -> Result<Value, Failure> {
        let url = format!("{}/v1/tightwad/status", self.url);
        let request = self.authorized(self.http.get(url)).timeout(patience);
        let response = request.send().await.map_err(|error| self.silent(&error))?;
        let status = response.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(refused(&self.url, response).await.into());
        }
        let told: Option<Value> = http::client::json(response, MOST_BYTES).await.ok();
        told.filter(|told| status.is_success() && told["state"].is_string())
            .ok_or_else(|| {
                let message = format!(
                    "{} answers ({}), but is no coordinator of Tightwad's; check `host` and `port` of the section \
                     `coordinator`, and what else listens there",
                    self.url,
                    status.as_u16()
                );
                Failure::new(Exit::Unreachable, message)
            })
    }

    /// A POST.
    pub fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.authorized(self.http.post(format!("{}{path}", self.url)).json(body))
    }

    /// Nobody answers.
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

/// A step on the way to a model that answers.
#[derive(Debug, PartialEq)]
pub struct Step {
    /// What is done, and why not more.
    pub doing: String,
    /// How far that is, from 0 to 1.
    pub progress: Option<f64>,
    /// What changes all the time.
    pub detail: String,
}

impl Step {
    /// The step that a status or a line of a swap tells.
    pub fn of(told: &Value) -> Self {
        let text = |name: &str| told[name].as_str();
        let model = text("model").unwrap_or("the model");
        let problem = text("problem")
            .map(|problem| format!(": {problem}"))
            .unwrap_or_default();
        let state = text("state").unwrap_or("unknown");
        let doing = match (state, text("checking")) {
            ("ready" | "down" | "gave-up", Some(checking)) => format!("checking `{checking}`"),
            ("leasing", _) => format!("taking the workers for `{model}`"),
            ("loading", _) => format!("loading `{model}`"),
            ("ready", _) => format!("`{model}` is ready"),
            ("draining", _) => match text("next") {
                Some(next) => format!("finishing the running answers of `{model}` before `{next}` comes"),
                None => format!("finishing the running answers of `{model}`"),
            },
            // The model is named after its successor by now.
            ("stopping", _) => "stopping the llama-server".to_owned(),
            ("freeing", _) => "freeing the workers' memory".to_owned(),
            ("down", _) if problem.is_empty() => format!("about to start `{model}`"),
            ("down", _) => format!("`{model}` cannot run yet, and is tried again{problem}"),
            ("gave-up", _) => format!("`{model}` is given up{problem}"),
            (other, _) => format!("`{model}` is {other}"),
        };
        let eta = told["eta_seconds"].as_u64();
        let running = told["running"].as_u64().filter(|_| state == "draining");
        let detail = match (eta, running) {
            (Some(eta), _) if state == "loading" => format!(", about {eta} s left"),
            (_, Some(running)) => format!(" ({running} left)"),
            _ => String::new(),
        };
        Self {
            doing,
            progress: told["progress"].as_f64().filter(|_| state == "loading"),
            detail,
        }
    }
}

impl fmt::Display for Step {
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
        let doing = |told: Value| Step::of(&told).doing;
        let loading = json!({ "state": "loading", "model": "big", "progress": 0.4, "eta_seconds": 9 });
        assert_eq!(
            Step::of(&loading),
            Step {
                doing: "loading `big`".to_owned(),
                progress: Some(0.4),
                detail: ", about 9 s left".to_owned(),
            }
        );
        assert_eq!(Step::of(&loading).to_string(), "loading `big`, 40%, about 9 s left");
        assert_eq!(
            doing(json!({ "state": "ready", "model": "big", "checking": "other" })),
            "checking `other`"
        );
        assert_eq!(
            doing(json!({ "state": "down", "model": "big", "problem": "worker one is away" })),
            "`big` cannot run yet, and is tried again: worker one is away"
        );
    }
}
