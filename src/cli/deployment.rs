//! The servers of `bench` and `verify`: the target, and a proxy that runs already or is embedded in this process.

use std::time::Duration;

use clap::Args;
use tokio::net::TcpListener;

use super::embedded_proxy::{EmbeddedProxy, why_undrafted};
use super::exit::{Exit, Failure};
use crate::bench::{Contender, Mode, Relay};
use crate::config::{self, Config, Secret, Upstream, local_key};
use crate::http::auth::unguessable;
use crate::upstream::{ChatError, ChatServer, LlamaServer};

/// Time limit for a running proxy to probe its servers.
const RUNNING_PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// The same for an embedded proxy.
const EMBEDDED_PROBE_TIMEOUT: Duration = Duration::from_secs(15);

/// Servers that replace those of the config.
#[derive(Debug, Args)]
pub struct Servers {
    /// URL of the target for the plain answers. With this option, the command reads no config unless -c names one. A server that
    /// an option names gets no key, except this host's shared key on a loopback address
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
    /// URL of the proxy for the drafted answers. With --target or --draft and without this option, the command runs a proxy in
    /// its own process
    #[arg(long, value_name = "URL")]
    pub proxy: Option<String>,
    /// URL of a draft for the proxy in this process, instead of the config's; may be given several times
    #[arg(long, value_name = "URL", conflicts_with = "proxy")]
    pub draft: Vec<String>,
}

/// The target and the proxy in front of it.
#[derive(Debug)]
pub struct Deployment {
    /// The target.
    pub plain: Contender,
    /// The proxy.
    pub attached: Contender,
    /// Client of the target as a llama-server.
    pub target: LlamaServer,
    /// Whether the target is a llama-server.
    pub is_llama_server: bool,
    /// Why answers will not be drafted; `None` if they will be.
    pub undrafted: Option<String>,
    embedded_proxy: Option<EmbeddedProxy>,
    // Relays that add latency; dropping them closes the connections.
    _relays: Vec<Relay>,
}

impl Deployment {
    /// Finds the servers. With `delay`, runs a proxy in this process and adds that much to each round trip to the target and the
    /// draft.
    pub async fn find(servers: &Servers, config: Option<&Config>, delay: Option<Duration>) -> Result<Self, Failure> {
        let (drafts, target) = config.map(Config::proxy_upstreams).unwrap_or_default();
        let target = servers.target.as_deref().map(named).or(target).ok_or_else(|| {
            Failure::new(
                Exit::Config,
                "the config names no target; set `proxy.target`, or give --target",
            )
        })?;
        let drafts = if servers.draft.is_empty() {
            drafts
        } else {
            servers.draft.iter().map(String::as_str).map(named).collect()
        };
        let mut target = with_key(target)?;
        let mut drafts = drafts.into_iter().map(with_key).collect::<Result<Vec<_>, _>>()?;
        let mut relays = Vec::new();
        if let Some(delay) = delay {
            for upstream in std::iter::once(&mut target).chain(&mut drafts) {
                let relay = Relay::start(&upstream.url, delay).await?;
                relay.url().clone_into(&mut upstream.url);
                relays.push(relay);
            }
        }

        let asked = |upstream: &Upstream| {
            let (key, model) = (upstream.api_key.clone(), upstream.model_name.clone());
            ChatServer::new(upstream.url.trim_end_matches('/'), key, model)
        };
        let plain = asked(&target)?;
        let llama_server = LlamaServer::new(&target.url, target.api_key.clone())
            .map_err(|error| Failure::other("make an HTTP client", error))?;
        // Fails here with the target's name, before a proxy would wait for the target.
        let models = plain.get("/v1/models", EMBEDDED_PROBE_TIMEOUT).await;
        models.map_err(|error| Failure::from(error).with_local_key(target.asks_local_key))?;
        let is_llama_server = llama_server.props().await.is_ok();

        let section = config.and_then(|config| config.proxy.clone()).unwrap_or_default();
        let model = target.model_name.clone();
        let (proxy, embedded_proxy) = if let Some(url) = &servers.proxy {
            (ChatServer::new(url.trim_end_matches('/'), None, model)?, None)
        } else if delay.is_some() || servers.target.is_some() || !servers.draft.is_empty() {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
            let url = format!("http://{}", listener.local_addr()?);
            let token = Secret::new(unguessable());
            let section = config::Proxy {
                target: Some(target),
                draft: drafts,
                auth_token: Some(token.clone()),
                auth_token_file: None,
                ..section
            };
            let own = EmbeddedProxy::start(listener, section)?;
            (ChatServer::new(url, Some(token), model)?, Some(own))
        } else {
            let url = config::local_url(&section.host, section.port);
            (ChatServer::new(url, section.token()?, model)?, None)
        };
        let patience = if embedded_proxy.is_some() {
            EMBEDDED_PROBE_TIMEOUT
        } else {
            RUNNING_PROBE_TIMEOUT
        };
        let undrafted = match why_undrafted(&proxy, patience).await {
            Err(ChatError::Unreachable { url, .. }) => {
                let message = format!(
                    "no proxy answers at {url}; start it with `tightwad proxy start`, or give --target for one of its own"
                );
                return Err(Failure::new(Exit::Unreachable, message));
            }
            known => known?,
        };

        Ok(Self {
            attached: Contender {
                mode: Mode::Attached,
                server: proxy,
                verifier: Some(plain.clone()),
            },
            plain: Contender {
                mode: Mode::Plain,
                server: plain,
                verifier: None,
            },
            target: llama_server,
            is_llama_server,
            undrafted,
            embedded_proxy,
            _relays: relays,
        })
    }

    /// Ends the embedded proxy, if there is one.
    pub async fn close(self) -> Result<(), Failure> {
        match self.embedded_proxy {
            Some(proxy) => proxy.close().await,
            None => Ok(()),
        }
    }
}

/// A server that is known only by its URL.
fn named(url: &str) -> Upstream {
    let is_local = reqwest::Url::parse(url).is_ok_and(|url| url.host_str().is_some_and(config::is_loopback));
    Upstream {
        asks_local_key: is_local && matches!(local_key::existing(), Ok(Some(_))),
        ..Upstream::at(url)
    }
}

fn with_key(mut upstream: Upstream) -> Result<Upstream, Failure> {
    upstream.api_key = upstream.api_key()?;
    upstream.draft_key = upstream.draft_key()?;
    Ok(upstream)
}
