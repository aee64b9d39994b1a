//! `tightwad proxy start`, `stop` and `status`, and the parts of a proxy that other commands embed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::exit::{Exit, Failure};
use super::output::{print_line, print_report};
use super::pid_file::{self, Stopped};
use super::status;
use super::wrap::fitted;
use crate::config::{self, Config, Loaded, Upstream};
use crate::engine::{self, Engine};
use crate::proxy::{Settings, serve};
use crate::rounds;
use crate::supervise::notify::Notifier;
use crate::supervise::preflight;

pub const STATUS_EXAMPLES: &str = "\
Example: tightwad proxy status --json | jq .counts
Exit codes: 0 the target and all drafts answer, 6 the target does not (or the proxy itself does not), 7 no proxy runs,
13 a draft does not answer, 14 the proxy refuses the token.";

/// Time limit of `proxy stop`, longer than the proxy's limit for running answers.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Interval between updates of the status for systemd.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// `tightwad run proxy`, `tightwad proxy start`.
pub async fn run(loaded: &Loaded, notifier: &Notifier, stop: CancellationToken) -> Result<(), Failure> {
    loaded.check_listener("proxy")?;
    let proxy = resolved(&loaded.config)?;
    let what = format!("proxy on port {}", proxy.port);
    let _claim = pid_file::claim(&name(&proxy), &what, "tightwad proxy stop")?;
    let listener = listen(&proxy).await?;
    let address = listener.local_addr()?;
    let engine = start_engine(&proxy)?;
    tracing::info!(
        "the proxy serves at {}/v1",
        config::local_url(&address.ip().to_string(), address.port())
    );
    tokio::select! {
        biased;
        served = serve_on(listener, &proxy, Arc::clone(&engine), stop) => served,
        never = report(notifier, &engine) => match never {},
    }
}

/// Reports to systemd that the proxy is ready, whatever the state of its servers, and the server that it waits for.
async fn report(notifier: &Notifier, engine: &Engine) -> Infallible {
    loop {
        notifier.status(&sentence(&engine.status()));
        notifier.ready();
        tokio::time::sleep(REPORT_INTERVAL).await;
    }
}

/// The state of a proxy in one line.
fn sentence(status: &engine::Status) -> String {
    let waits = |what: &str, server: &engine::ServerStatus| {
        let problem = server.problem.as_ref().map(|problem| format!(": {problem}"));
        format!("waits for the {what} at {}{}", server.url, problem.unwrap_or_default())
    };
    let target = &status.target;
    if !target.healthy {
        return waits("target", target);
    }
    let serves = format!("serves {}", target.model.as_deref().unwrap_or(&target.url));
    let down = status.drafts.iter().find(|draft| !draft.server.healthy);
    match (down, &status.reason) {
        (Some(draft), _) => format!("{serves}; {}", waits("draft", &draft.server)),
        (None, Some(reason)) => format!("{serves} undrafted: {reason}"),
        (None, None) => format!("{serves} with drafts"),
    }
}

/// Starts the engine, which watches the proxy's servers.
pub fn start_engine(proxy: &config::Proxy) -> Result<Arc<Engine>, Failure> {
    let with_key = |upstream: &Upstream| (upstream.clone(), upstream.api_key.clone());
    let no_client = |error| Failure::other("make an HTTP client", error);
    let target = proxy.target.as_ref();
    let verifier = target
        .map(|target| rounds::verifier(target, target.api_key.clone()))
        .transpose();
    let settings = engine::Settings {
        drafts: proxy.draft.iter().map(with_key).collect(),
        target: target.map(with_key),
        max_draft_tokens: proxy.max_draft_tokens,
        verification: proxy.verification,
        verifier: verifier.map_err(no_client)?.flatten(),
        ..engine::Settings::default()
    };
    Engine::start(settings).map_err(no_client)
}

/// Serves until `stop`, then finishes running answers within a time limit.
pub async fn serve_on(
    listener: TcpListener,
    proxy: &config::Proxy,
    engine: Arc<Engine>,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let settings = Settings::try_from(proxy).map_err(|error| Failure::new(Exit::Config, error.to_string()))?;
    serve(listener, settings, engine, stop)
        .await
        .map_err(|error| Failure::new(Exit::Other, error.to_string()))
}

/// Listens on the proxy's address.
pub async fn listen(proxy: &config::Proxy) -> Result<TcpListener, Failure> {
    listen_at(&proxy.host, proxy.port).await
}

/// Listens on an address.
pub async fn listen_at(host: &str, port: u16) -> Result<TcpListener, Failure> {
    Ok(preflight::listen(host, port).await?)
}

/// The section `proxy` with the servers of the other sections and with all secrets.
fn resolved(config: &Config) -> Result<config::Proxy, Failure> {
    let mut proxy = config.proxy.clone().unwrap_or_default();
    let (drafts, target) = config.proxy_upstreams();
    proxy.draft = drafts.into_iter().map(with_key).collect::<Result<_, _>>()?;
    proxy.target = target.map(with_key).transpose()?;
    proxy.auth_token = proxy.token()?;
    Ok(proxy)
}

fn with_key(mut upstream: Upstream) -> Result<Upstream, Failure> {
    upstream.api_key = upstream.api_key()?;
    upstream.draft_key = upstream.draft_key()?;
    Ok(upstream)
}

/// Name of the pid file. A host may run several proxies, but only one per port.
fn name(proxy: &config::Proxy) -> String {
    format!("proxy-{}", proxy.port)
}

/// `tightwad proxy stop`.
pub fn stop(config: &Config) -> Result<(), Failure> {
    let proxy = config.proxy.clone().unwrap_or_default();
    match pid_file::stop(&name(&proxy), STOP_TIMEOUT).map_err(|error| Failure::other("stop the proxy", error))? {
        Stopped::Yes(pid) => print_line(format_args!("stopped the proxy (process {pid})")),
        Stopped::NotRunning => Err(Failure::new(
            Exit::NotRunning,
            format!(
                "no proxy of this user runs on port {}; one that systemd runs is stopped with `systemctl stop tightwad-proxy`",
                proxy.port
            ),
        )),
        Stopped::StillRunning(pid) => Err(Failure::new(
            Exit::Other,
            format!(
                "process {pid} was asked to end and has not after {} s",
                STOP_TIMEOUT.as_secs()
            ),
        )),
    }
}

/// `tightwad proxy status`.
pub async fn status(config: &Config, json: bool) -> Result<(), Failure> {
    let proxy = config.proxy.clone().unwrap_or_default();
    let url = config::local_url(&proxy.host, proxy.port);
    let answer = status::fetch_with_speed(&url, proxy.token()?.as_ref()).await?;
    print_report(&answer, json, |answer| {
        fitted(&status::table(&url, answer), status::INDENT)
    })?;
    status::verdict(&answer.status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(url: &str, healthy: bool) -> engine::ServerStatus {
        engine::ServerStatus {
            url: url.to_owned(),
            model: Some("qwen3-32b".to_owned()),
            healthy,
            problem: (!healthy).then(|| "connection refused".to_owned()),
        }
    }

    #[test]
    fn what_a_proxy_waits_for_comes_before_what_it_serves() {
        let draft = |healthy| engine::DraftStatus {
            server: server("http://draft", healthy),
            outlook: None,
        };
        let of = |target, drafts: &[bool], reason: Option<&str>| {
            sentence(&engine::Status {
                target: server("http://target", target),
                drafts: drafts.iter().copied().map(draft).collect(),
                reason: reason.map(str::to_owned),
                ..engine::Status::default()
            })
        };
        assert_eq!(
            of(false, &[false], None),
            "waits for the target at http://target: connection refused"
        );
        assert_eq!(
            of(true, &[true, false], None),
            "serves qwen3-32b; waits for the draft at http://draft: connection refused"
        );
        assert_eq!(of(true, &[], Some("no draft")), "serves qwen3-32b undrafted: no draft");
        assert_eq!(of(true, &[true], None), "serves qwen3-32b with drafts");
    }
}
