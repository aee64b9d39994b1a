//! The llama-servers of the sections `target` and `draft`, as `tightwad status` sees them.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};

use super::exit::{Exit, Failure};
use super::pid_file;
use super::status::MOST_BYTES;
use crate::config::{self, Config, Secret, Server};
use crate::http;
use crate::proxy::status::Status;
use crate::upstream::chat::{client, unreachable};

/// A llama-server to ask.
#[derive(Debug)]
pub struct Asked {
    role: &'static str,
    url: String,
    port: u16,
    model: Option<String>,
    key: Option<Secret>,
    elsewhere: bool,
}

/// A llama-server, and how it is.
#[derive(Debug, Serialize)]
pub struct SeenServer {
    /// `target` or `draft`.
    pub role: &'static str,
    /// Where it should listen.
    pub url: String,
    /// The model that the config gives it.
    pub model: Option<String>,
    /// Whether it was asked: the loopback address of another host cannot be reached from here.
    pub asked: bool,
    /// Whether its model answers.
    pub up: bool,
    /// Why it does not.
    pub problem: Option<String>,
    /// The exit code of that.
    #[serde(skip)]
    pub exit: Exit,
    /// Its slots, and how many of them are answering a request; `None` where it did not say in time.
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
    /// All of them.
    pub all: usize,
    /// Those that are answering a request.
    pub busy: usize,
}

/// Name of the pid file of a `tightwad run target` or `run draft`. A host may run several, but only one per port.
#[must_use]
pub fn pid_name(role: &str, port: u16) -> String {
    format!("{role}-{port}")
}

/// The llama-servers that the config declares, the target first.
#[must_use]
pub fn declared(config: &Config) -> Vec<Asked> {
    let sections = [("target", &config.target), ("draft", &config.draft)];
    let declared = sections
        .into_iter()
        .filter_map(|(role, server)| Some((role, server.as_ref()?)));
    declared.map(|(role, server)| Asked::of(config, role, server)).collect()
}

impl Asked {
    fn of(config: &Config, role: &'static str, server: &Server) -> Self {
        let model = config.model_for(server.model.as_deref()).ok();
        Self {
            role,
            url: config::local_url(&server.host, server.port),
            port: server.port,
            model: model.map(|(name, _)| name.to_owned()),
            // A host that lacks the key sees less; whether the server is up it sees without one.
            key: server.api_key().ok().flatten(),
            elsewhere: is_elsewhere(config, server),
        }
    }

    /// Asks it, for at most this long.
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
        let slots: Vec<Slot> = http::client::json(request.send().await.ok()?, MOST_BYTES).await.ok()?;
        Some(Slots {
            all: slots.len(),
            busy: slots.iter().filter(|slot| slot.is_processing).count(),
        })
    }
}

/// Whether a server listens on the loopback address of another host: that of the proxy, which it is there for.
fn is_elsewhere(config: &Config, server: &Server) -> bool {
    let proxy = config
        .proxy
        .as_ref()
        .and_then(|proxy| proxy.host.parse::<IpAddr>().ok());
    // An address that nothing can be bound to is not one of this host.
    let is_foreign = |address: IpAddr| !address.is_unspecified() && UdpSocket::bind((address, 0)).is_err();
    config::is_loopback(&server.host) && proxy.is_some_and(is_foreign)
}

impl SeenServer {
    /// How it is, in a line.
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

    /// Whether a proxy reaches it that this host does not: the proxy may run where the server listens on loopback.
    #[must_use]
    pub fn is_healthy_for(&self, proxy: &Status) -> bool {
        let drafts = proxy.drafts.iter().map(|draft| &draft.server);
        let mut known = drafts.chain([&proxy.target]);
        known.any(|server| server.healthy && server.url.trim_end_matches('/') == self.url)
    }
}
