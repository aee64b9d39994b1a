//! `tightwad status`: shows the coordinator, workers, servers and proxy of the config. Asks all at once, each with a time limit.

use std::io::{self, IsTerminal};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::coordinator::{Client, Description};
use super::exit::{Exit, Failure};
use super::output::{print, print_report};
use super::received::Received;
use super::server_status::{self, SeenServer};
use super::status::{ProxyReport, duration};
use super::wrap::fitted;
use super::{signals, status};
use crate::config::{self, Config, Coordinator, Proxy, Worker};
use crate::count::count;
use crate::engine::ServerStatus;
use crate::plan::amount;
use crate::pool::agent::{Endpoint, EndpointState, WorkerStatus};
use crate::pool::agent_client::AgentClient;
use crate::pool::coordinator::status::{Status, Step};
use crate::pool::swap::{FailedSwap, State};

pub const EXAMPLES: &str = "\
Examples:
  tightwad status --watch
  tightwad status --json | jq '.workers[] | {name, up}'
The exit code is that of the worst problem: 0 no problem, 6 a server or a worker cannot be reached or is not ready yet, 7 the
coordinator, the target or the proxy is not running, 13 only a draft is down, 14 a token is refused.";

/// Time limit for each answer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(150);
/// Interval with `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Options of `tightwad status`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Print everything as JSON; with --watch one line per second
    #[arg(long)]
    json: bool,
    /// Repeat every second until Ctrl-C
    #[arg(long)]
    watch: bool,
}

/// The state of everything in the config.
#[derive(Debug, Default, Serialize)]
struct Overview {
    /// `None` if the config has no such section.
    coordinator: Option<Seen<Received<Status>>>,
    /// The sections `target` and `draft`.
    servers: Vec<SeenServer>,
    workers: Vec<SeenWorker>,
    /// `None` if the config has no such section.
    proxy: Option<Seen<ProxyReport>>,
    /// The next things to do.
    hints: Vec<String>,
}

/// A server and its answer.
#[derive(Debug, Serialize)]
struct Seen<T> {
    url: String,
    up: bool,
    /// Why there is no answer.
    problem: Option<String>,
    /// Exit code of the problem.
    #[serde(skip)]
    exit: Exit,
    status: Option<T>,
}

#[derive(Debug, Serialize)]
struct SeenWorker {
    name: String,
    /// `None` for a worker without an agent.
    agent: Option<Seen<WorkerStatus>>,
}

/// Prints the state of everything.
pub async fn status(config: &Config, options: &Options) -> Result<(), Failure> {
    if !options.watch {
        let seen = look(config).await;
        print_report(&json(&seen)?, options.json, |_| fitted(&table(&seen), status::INDENT))?;
        return verdict(&seen);
    }
    let stop = signals::stop_token()?;
    let terminal = io::stdout().is_terminal() && !options.json;
    while !stop.is_cancelled() {
        let seen = look(config).await;
        let text = match (options.json, terminal) {
            (true, _) => format!("{}\n", json(&seen)?),
            // Moves to the top and clears the screen.
            (false, true) => format!("\x1b[H\x1b[2J{}", fitted(&table(&seen), status::INDENT)),
            (false, false) => format!("{}\n", table(&seen)),
        };
        print(text)?;
        tokio::select! {
            () = sleep(WATCH_INTERVAL) => {}
            () = stop.cancelled() => {}
        }
    }
    Ok(())
}

fn json(seen: &Overview) -> Result<Value, Failure> {
    serde_json::to_value(seen).map_err(|error| Failure::other("write JSON", error))
}

/// Asks all servers at once, each with the time limit.
async fn look(config: &Config) -> Overview {
    let give_up = Instant::now() + ANSWER_TIMEOUT;
    // Each in its own task, so that blocking work of one does not delay the others.
    let coordinator = config
        .coordinator
        .clone()
        .map(|section| tokio::spawn(see_coordinator(section, give_up)));
    let proxy = config
        .proxy
        .clone()
        .map(|section| tokio::spawn(see_proxy(section, give_up)));
    let servers: Vec<_> = server_status::declared(config)
        .into_iter()
        .map(|asked| tokio::spawn(asked.look(ANSWER_TIMEOUT)))
        .collect();
    let see = |worker: &Worker| tokio::spawn(see_worker(worker.clone(), give_up));
    let asked: Vec<_> = config.workers.iter().map(see).collect();
    let mut seen = Overview {
        coordinator: seen(coordinator).await,
        proxy: seen(proxy).await,
        ..Overview::default()
    };
    for asked in servers {
        seen.servers.extend(asked.await.ok());
    }
    for (worker, asked) in config.workers.iter().zip(asked) {
        seen.workers.push(SeenWorker {
            name: worker.name().to_owned(),
            agent: asked.await.ok().flatten(),
        });
    }
    seen.hints = hints(&seen);
    seen
}

async fn seen<T>(asked: Option<JoinHandle<Seen<T>>>) -> Option<Seen<T>> {
    asked?.await.ok()
}

async fn see_coordinator(section: Coordinator, give_up: Instant) -> Seen<Received<Status>> {
    let url = config::local_url(&section.host, section.port);
    let asking = async { Client::new(&section)?.status(ANSWER_TIMEOUT).await };
    Seen::of(url, timeout_at(give_up, asking).await.ok())
}

async fn see_proxy(section: Proxy, give_up: Instant) -> Seen<ProxyReport> {
    let url = config::local_url(&section.host, section.port);
    let token = match section.token() {
        Ok(token) => token,
        Err(error) => return Seen::of(url, Some(Err(error.into()))),
    };
    let asking = timeout_at(give_up, status::fetch(&url, token.as_ref()));
    let answer = match asking.await.ok() {
        // Asks a second time for the speed of running requests.
        Some(Ok(status)) if status.in_flight > 0 => Some(status::fetch_with_speed(&url, token.as_ref()).await),
        answer => answer.map(|answer| answer.map(ProxyReport::from)),
    };
    Seen::of(url, answer)
}

async fn see_worker(worker: Worker, give_up: Instant) -> Option<Seen<WorkerStatus>> {
    if !worker.has_agent() {
        return None;
    }
    let unknown = |error: crate::pool::agent_client::AgentError| Failure::new(Exit::Unreachable, error.to_string());
    let asking = async {
        let agent = AgentClient::new(&worker).map_err(unknown)?;
        agent.status().await.map_err(unknown)
    };
    let answer = timeout_at(give_up, asking).await.unwrap_or_else(|_| {
        let (url, name) = (worker.agent_url(), worker.name());
        let message = format!(
            "no answer from {url} within {} ms; see whether its host is up and runs `tightwad run worker {name}`",
            ANSWER_TIMEOUT.as_millis()
        );
        Err(Failure::new(Exit::Unreachable, message))
    });
    Some(Seen::of(worker.agent_url(), Some(answer)))
}

impl<T> Seen<T> {
    /// `answer` is `None` if the time limit has passed.
    fn of(url: String, answer: Option<Result<T, Failure>>) -> Self {
        let (problem, exit, status) = match answer {
            Some(Ok(status)) => (None, Exit::Ok, Some(status)),
            Some(Err(failure)) => (Some(failure.message), failure.exit, None),
            None => {
                let problem = format!("no answer from {url} within {} ms", ANSWER_TIMEOUT.as_millis());
                (Some(problem), Exit::Unreachable, None)
            }
        };
        Self {
            url,
            up: status.is_some(),
            problem,
            exit,
            status,
        }
    }

    /// Whether its URL is a loopback address.
    fn is_on_this_host(&self) -> bool {
        let url = reqwest::Url::parse(&self.url);
        url.is_ok_and(|url| url.host_str().is_some_and(config::is_loopback))
    }

    /// Whether no server is running there.
    fn absent(&self) -> bool {
        self.exit == Exit::NotRunning
    }
}

impl SeenWorker {
    /// The problem of the worker, if one is known.
    fn problem(&self) -> Option<String> {
        let agent = self.agent.as_ref()?;
        let failed = || Endpoint::problem(&agent.status.as_ref()?.endpoints);
        agent.problem.clone().or_else(failed)
    }
}

/// The exit code is that of the worst problem, in this order: coordinator, target, worker, proxy, draft. Without a draft, answers are
/// only slower.
fn verdict(seen: &Overview) -> Result<(), Failure> {
    let proxy = seen.proxy.as_ref();
    let has_pool = seen.coordinator.is_some() || !seen.workers.is_empty();
    let servers = |role: &'static str| seen.servers.iter().filter(move |server| server.role == role);
    let problems = seen
        .coordinator
        .iter()
        .filter_map(coordinator_problem)
        .chain(servers("target").filter_map(|server| server_problem(server, proxy)))
        .chain(worker_problem(&seen.workers))
        .chain(proxy.and_then(|proxy| proxy_problem(proxy, &seen.servers, has_pool)))
        .chain(servers("draft").filter_map(|server| server_problem(server, proxy)));
    // A draft that is down comes last, even if the proxy reports it.
    let (drafts, mut worst): (Vec<_>, Vec<_>) = problems.partition(|failure| failure.exit == Exit::DraftDown);
    worst.extend(drafts);
    worst.dedup_by(|a, b| a.message == b.message);
    let Some(exit) = worst.first().map(|failure| failure.exit) else {
        return Ok(());
    };
    let messages: Vec<String> = worst.into_iter().map(|failure| failure.message).collect();
    Err(Failure::new(exit, messages.join("; ")))
}

fn coordinator_problem(coordinator: &Seen<Received<Status>>) -> Option<Failure> {
    match (&coordinator.problem, &coordinator.status) {
        (Some(problem), _) => Some(Failure::new(coordinator.exit, problem)),
        (None, Some(status)) if !matches!(status.now.state, State::Ready | State::Draining) => Some(Failure::new(
            Exit::Unreachable,
            format!("not ready: {}", Description::of_status(status).doing),
        )),
        _ => None,
    }
}

fn server_problem(server: &SeenServer, proxy: Option<&Seen<ProxyReport>>) -> Option<Failure> {
    // Trusts only a proxy on another host: a proxy on this host reaches no more, and notices a dead server later.
    let reached = proxy.filter(|proxy| !proxy.is_on_this_host());
    let reached = reached.and_then(|proxy| proxy.status.as_ref());
    if reached.is_some_and(|proxy| server.is_healthy_for(&proxy.status)) {
        return None;
    }
    let exit = if server.role == "draft" {
        Exit::DraftDown
    } else {
        server.exit
    };
    server.problem.as_ref().map(|problem| Failure::new(exit, problem))
}

fn worker_problem(workers: &[SeenWorker]) -> Option<Failure> {
    let down: Vec<&str> = workers
        .iter()
        .filter(|worker| worker.problem().is_some())
        .map(|worker| worker.name.as_str())
        .collect();
    (!down.is_empty()).then(|| Failure::new(Exit::Unreachable, format!("down: {}", down.join(", "))))
}

fn proxy_problem(proxy: &Seen<ProxyReport>, servers: &[SeenServer], has_pool: bool) -> Option<Failure> {
    match (&proxy.problem, &proxy.status) {
        // A host of the pool may lack the proxy's token.
        (Some(_), _) if has_pool && proxy.exit == Exit::File => None,
        (Some(problem), _) => Some(Failure::new(proxy.exit, problem)),
        (None, Some(ProxyReport { status, .. })) => {
            let failed: Vec<&str> = servers
                .iter()
                .filter(|server| server.problem.is_some())
                .map(|server| server.url.as_str())
                .collect();
            // Names a server that is down once, by its own section if it has one.
            let is_named = |failure: &Failure| {
                failure.exit == Exit::DraftDown
                    && status::drafts_down(status)
                        .iter()
                        .all(|url| failed.contains(&url.trim_end_matches('/')))
            };
            status::verdict(status).err().filter(|failure| !is_named(failure))
        }
        (None, None) => None,
    }
}

fn hints(seen: &Overview) -> Vec<String> {
    let mut hints = Vec::new();
    let coordinator = seen.coordinator.as_ref();
    if coordinator.is_some_and(Seen::absent) {
        hints.push("start the coordinator with `tightwad start`".to_owned());
    }
    if seen.proxy.as_ref().is_some_and(Seen::absent) {
        hints.push("start the proxy with `tightwad proxy start`".to_owned());
    }
    let status = coordinator.and_then(|coordinator| coordinator.status.as_ref());
    if let Some(status) = status.filter(|status| status.now.state == State::GaveUp) {
        let model = &status.now.model;
        hints.push(format!("once the cause is gone, `tightwad swap {model}` tries again"));
    }
    let mut builds: Vec<&str> = seen
        .workers
        .iter()
        .filter_map(known)
        .map(|worker| &*worker.build)
        .collect();
    builds.sort_unstable();
    builds.dedup();
    if builds.len() > 1 {
        let builds = builds.join(", ");
        hints.push(format!(
            "the workers run several builds of llama.cpp ({builds}): install one on all hosts"
        ));
    }
    hints
}

fn known(worker: &SeenWorker) -> Option<&WorkerStatus> {
    worker.agent.as_ref()?.status.as_ref()
}

fn table(seen: &Overview) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| text.push_str(&status::line(name, value));
    if let Some(coordinator) = &seen.coordinator {
        line("coordinator", &coordinator.url);
        match &coordinator.status {
            Some(status) => of_coordinator(status, &seen.workers, &mut line),
            None if coordinator.absent() => line("", "not running"),
            None => line("", coordinator.problem.as_deref().unwrap_or("no answer")),
        }
    }
    for worker in &seen.workers {
        line("worker", &worker.name);
        match (&worker.agent, known(worker)) {
            (_, Some(status)) => of_worker(status, &mut line),
            (Some(agent), None) => line(
                "",
                &format!("down: {}", agent.problem.as_deref().unwrap_or("no answer")),
            ),
            (None, None) => line("", "no agent, so it is not asked"),
        }
    }
    for server in &seen.servers {
        line(server.role, &server.describe());
    }
    if let Some(proxy) = &seen.proxy {
        match &proxy.status {
            Some(report) => of_proxy(&proxy.url, report, &mut line),
            None if proxy.absent() => line("proxy", &format!("{}: not running", proxy.url)),
            None => line("proxy", proxy.problem.as_deref().unwrap_or("no answer")),
        }
    }
    for hint in &seen.hints {
        line("hint", hint);
    }
    text
}

fn of_proxy(url: &str, report: &ProxyReport, line: &mut impl FnMut(&str, &str)) {
    let status = &report.status;
    let activity = status::activity(status, report.tokens_per_second);
    line("proxy", &format!("{url}{activity}"));
    let well = |server: &ServerStatus| if server.healthy { "healthy" } else { "down" };
    let drafts = status.drafts.iter().map(|draft| &draft.server);
    let mut servers = vec![format!("target {}", well(&status.target))];
    servers.extend(drafts.map(|draft| format!("draft {}", well(draft))));
    servers.push(format!("verification {}", status::verification(status)));
    line("", &servers.join(", "));
    if let Some(counts) = status::Counts::of(&status.counts).describe() {
        line("", &counts);
    }
}

fn of_coordinator(status: &Status, workers: &[SeenWorker], line: &mut impl FnMut(&str, &str)) {
    let mut step = Step::of(&status.now, status.load);
    let problem = step.problem.as_deref().unwrap_or_default();
    let mut down = workers.iter().filter(|worker| worker.problem().is_some());
    // The worker's own line below shows the problem.
    if down.any(|worker| problem.contains(&format!("worker {} ", worker.name))) {
        step.problem = Some("a worker is down".to_owned());
    }
    let Description {
        doing,
        progress,
        detail,
    } = Description::of(&step);
    let percent = progress.map(|progress| format!(" {:.0} %", progress * 100.0));
    let since = status
        .state_seconds
        .map(|seconds| format!(", for {}", duration(seconds)));
    let (percent, since) = (percent.unwrap_or_default(), since.unwrap_or_default());
    line("", &format!("{doing}{percent}{detail}{since}"));
    let running = count(status.now.running as u64, "answer runs", "answers run");
    let waiting = count(status.now.waiting as u64, "request waits", "requests wait");
    line("", &format!("{running}, {waiting}"));
    for device in &status.devices {
        line("", device);
    }
    if let Some(FailedSwap { model, why }) = &status.now.last_failure {
        line("", &format!("the last swap failed: `{model}`: {why}"));
    }
}

fn of_worker(status: &WorkerStatus, line: &mut impl FnMut(&str, &str)) {
    let lease = match &status.lease {
        Some(holder) => format!("leased by {}", holder.holder),
        None => "free".to_owned(),
    };
    let cache = match status.cache_quota_bytes {
        0 => "no cache".to_owned(),
        quota => format!("cache {} of {}", amount(status.cache_bytes), amount(quota)),
    };
    line("", &format!("{lease}, llama.cpp {}, {cache}", status.build));
    for endpoint in &status.endpoints {
        let state = match endpoint.state {
            EndpointState::Idle => "idle",
            EndpointState::Starting => "starting",
            EndpointState::Listening => "listening",
            EndpointState::Connected => "connected",
            EndpointState::Failed => "FAILED",
        };
        line("", &format!("port {}: {state}", endpoint.port));
        for device in &endpoint.devices {
            let (free, total) = (amount(device.free_bytes), amount(device.total_bytes));
            // A server that is in use does not report its free memory.
            let when = match endpoint.state {
                EndpointState::Connected => " before the pool took it",
                _ => "",
            };
            line(
                "",
                &format!("  {} {}: {free} of {total} free{when}", device.name, device.description),
            );
        }
    }
}
