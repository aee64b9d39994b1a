//! The state of the llama-servers of the sections `target` and `draft`, for `tightwad status`.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};

use super::exit::{Exit, Failure};
use super::pid_file;
use super::status::MAX_BYTES;
use crate::config::{self, Config, Secret, Server};
use crate::http;
use crate::proxy::status::Status;
use crate::upstream::chat::{client, unreachable};

/// A llama-server to ask.
#[derive(Debug)]
pub struct ServerQuery {
    role: &'static str,
    url: String,
    port: u16,
    model: Option<String>,
    key: Option<Secret>,
    elsewhere: bool,
}

/// The state of a llama-server.
#[derive(Debug, Serialize)]
pub struct SeenServer {
    /// `target` or `draft`.
    pub role: &'static str,
    /// Its URL by the config.
    pub url: String,
    /// Name of its model in the config.
    pub model: Option<String>,
    /// Whether it was asked. A server on the loopback address of another host is not.
    pub asked: bool,
    /// Whether its model answers.
    pub up: bool,
    /// Why the model does not answer.
    pub problem: Option<String>,
    /// Exit code of the problem.
    #[serde(skip)]
    pub exit: Exit,
    /// Its slots; `None` if it did not list them in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slots: Option<Slots>,
}

/// A slot, as llama-server lists it.
#[derive(Debug, Deserialize)]
struct Slot {
    #[serde(default)]
    is_processing: bool,
}

/// The slots of a llama-server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Slots {
    /// Number of slots.
    pub all: usize,
    /// Number of slots that answer a request.
    pub busy: usize,
}

/// Name of the pid file of a `tightwad run target` or `run draft`. A host may run several, but only one per port.
#[must_use]
pub fn pid_name(role: &str, port: u16) -> String {
    format!("{role}-{port}")
}

/// The llama-servers that the config declares, the target first.
#[must_use]
pub fn declared(config: &Config) -> Vec<ServerQuery> {
    let sections = [("target", &config.target), ("draft", &config.draft)];
    let declared = sections
        .into_iter()
        .filter_map(|(role, server)| Some((role, server.as_ref()?)));
    declared
        .map(|(role, server)| ServerQuery::of(config, role, server))
        .collect()
}

impl ServerQuery {
    fn of(config: &Config, role: &'static str, server: &Server) -> Self {
        let model = config.model_for(server.model.as_deref()).ok();
        Self {
            role,
            url: config::local_url(&server.host, server.port),
            port: server.port,
            model: model.map(|(name, _)| name.to_owned()),
            // Without the key, only the health can be asked.
            key: server.api_key().ok().flatten(),
            elsewhere: is_elsewhere(config, server),
        }
    }

    /// Asks the server, for at most `bound`.
    pub async fn look(self, bound: Duration) -> SeenServer {
        let began = tokio::time::Instant::now();
        if self.elsewhere {
            return SeenServer {
                role: self.role,
                url: self.url,
                model: self.model,
                asked: false,
                up: false,
                problem: None,
                exit: Exit::Ok,
                slots: None,
            };
        }
        let health = match tokio::time::timeout(bound, self.health()).await {
            Ok(health) => health,
            Err(_) => Err(Failure::new(
                Exit::Unreachable,
                format!(
                    "the {} at {} does not answer within {} ms",
                    self.role,
                    self.url,
                    bound.as_millis()
                ),
            )),
        };
        let slots = match health {
            Ok(()) => tokio::time::timeout_at(began + bound, self.slots())
                .await
                .ok()
                .flatten(),
            Err(_) => None,
        };
        let (problem, exit) = match health {
            Ok(()) => (None, Exit::Ok),
            Err(failure) => (Some(failure.message), failure.exit),
        };
        SeenServer {
            role: self.role,
            url: self.url,
            model: self.model,
            asked: true,
            up: problem.is_none(),
            problem,
            exit,
            slots,
        }
    }

    async fn health(&self) -> Result<(), Failure> {
        let (role, url) = (self.role, &self.url);
        let answer = client()?.get(format!("{url}/health")).send().await.map_err(|error| {
            if error.is_connect() && !error.is_timeout() {
                if let Some(pid) = pid_file::holder(&pid_name(role, self.port)) {
                    let message = format!(
                        "the {role} at {url} is being started or restarted by `tightwad run {role}` (process {pid}), whose log \
                         says why"
                    );
                    return Failure::new(Exit::Unreachable, message);
                }
                let message = format!("no {role} runs at {url}; start it with `tightwad run {role}`");
                return Failure::new(Exit::NotRunning, message);
            }
            unreachable(url, &error).into()
        })?;
        match answer.status() {
            StatusCode::OK => Ok(()),
            StatusCode::SERVICE_UNAVAILABLE => {
                let message = format!("the {role} at {url} loads its model");
                Err(Failure::new(Exit::Unreachable, message))
            }
            status => {
                let message = format!(
                    "{url} answers ({}), but is no llama-server; check `host` and `port` of the section `{role}`",
                    status.as_u16()
                );
                Err(Failure::new(Exit::Unreachable, message))
            }
        }
    }

    async fn slots(&self) -> Option<Slots> {
        let mut request = Client::get(&client().ok()?, format!("{}/slots", self.url));
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose());
        }
        let slots: Vec<Slot> = http::client::json(request.send().await.ok()?, MAX_BYTES).await.ok()?;
        Some(Slots {
            all: slots.len(),
            busy: slots.iter().filter(|slot| slot.is_processing).count(),
        })
    }
}

/// Whether a server listens on the loopback address of another host, which runs the proxy.
fn is_elsewhere(config: &Config, server: &Server) -> bool {
    let proxy = config
        .proxy
        .as_ref()
        .and_then(|proxy| proxy.host.parse::<IpAddr>().ok());
    // This host cannot bind to an address of another host.
    let is_foreign = |address: IpAddr| !address.is_unspecified() && UdpSocket::bind((address, 0)).is_err();
    config::is_loopback(&server.host) && proxy.is_some_and(is_foreign)
}

impl SeenServer {
    /// The state in one line.
    #[must_use]
    pub fn describe(&self) -> String {
        let model = self
            .model
            .as_ref()
            .map(|model| format!(", {model}"))
            .unwrap_or_default();
        let state = match (&self.problem, self.slots) {
            (Some(problem), _) => format!("down: {problem}"),
            (None, _) if !self.asked => "on the proxy's host, so it is not asked from here".to_owned(),
            (None, Some(Slots { all, busy })) => format!("ready, {busy} of {all} slots busy"),
            (None, None) => "ready".to_owned(),
        };
        format!("{}{model}: {state}", self.url)
    }

    /// Whether the proxy reports the server as healthy. A proxy on another host may reach a server that this host cannot reach.
    #[must_use]
    pub fn is_healthy_for(&self, proxy: &Status) -> bool {
        let drafts = proxy.drafts.iter().map(|draft| &draft.server);
        let mut known = drafts.chain([&proxy.target]);
        known.any(|server| server.healthy && server.url.trim_end_matches('/') == self.url)
    }
}
