//! The workers of the pool: leased before a server starts, renewed while it runs, returned after it.
//!
//! Invariant: a llama-server runs only while every worker with an agent is leased to this coordinator.

use std::collections::BTreeSet;
use std::future::pending;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::{join_all, select_all};
use futures_util::stream::FuturesUnordered;
use tokio::net::lookup_host;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::driver::cancelled;
use super::pool::{Message, WorkerReport};
use crate::background::contained;
use crate::config::Worker;
use crate::pool::agent::{Endpoint, EndpointState, LeaseRequest};
use crate::pool::agent_client::{AgentClient, AgentError};
use crate::pool::build;
use crate::pool::devices::ProbedServers;
use crate::pool::rpc_probe::{self, RpcServer};
use crate::pool::swap::{Event, Failure, NotReady};

/// Interval for renewing leases and polling agents.
const BEAT: Duration = Duration::from_secs(1);
/// Timeout for one renewal or poll.
const BEAT_TIMEOUT: Duration = Duration::from_secs(1);
/// A worker that has not answered for this long is lost.
const LOST_AFTER: Duration = Duration::from_secs(4);
/// Timeout for a lost worker to return its lease; it still can if only its server hangs.
const LOST_RETURN_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for probing a worker without an agent.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// One worker of the pool.
#[derive(Debug, Clone)]
struct PoolWorker {
    name: String,
    /// `None`: its `ggml-rpc-server` is started by hand.
    agent: Option<AgentClient>,
    /// `host:port` of each of its `ggml-rpc-server`s.
    endpoints: Vec<String>,
}

/// All workers of the pool.
#[derive(Debug, Clone)]
pub(super) struct Workers {
    all: Vec<PoolWorker>,
    /// The name of this coordinator in leases.
    holder: String,
    /// The coordinator's own llama-server; all workers must run its build.
    llama_server: PathBuf,
    /// Logs the warning about an unknown build once.
    warned: Arc<Once>,
}

/// A worker's lease.
#[derive(Debug)]
struct WorkerLease {
    agent: AgentClient,
    id: String,
    /// Renews the lease from the start: other workers may take longer to start their servers than a lease lasts.
    beats: JoinSet<()>,
}

/// Leases of all workers. Dropped leases expire.
#[derive(Debug)]
pub(super) struct Leases {
    held: Vec<WorkerLease>,
}

impl Workers {
    pub(super) fn new(workers: &[Worker], holder: String, llama_server: PathBuf) -> Result<Self, AgentError> {
        let worker = |worker: &Worker| {
            let agent = worker.has_agent().then(|| AgentClient::new(worker)).transpose()?;
            let ports = worker.rpc_endpoints();
            Ok(PoolWorker {
                name: worker.name().to_owned(),
                agent,
                endpoints: ports.keys().map(|port| format!("{}:{port}", worker.host)).collect(),
            })
        };
        let all = workers.iter().map(worker).collect::<Result<_, AgentError>>()?;
        Ok(Self {
            all,
            holder,
            llama_server,
            warned: Arc::new(Once::new()),
        })
    }

    /// The reports before any worker was asked.
    pub(super) fn reports(&self) -> Vec<WorkerReport> {
        let report = |worker: &PoolWorker| WorkerReport {
            name: worker.name.clone(),
            ..WorkerReport::default()
        };
        self.all.iter().map(report).collect()
    }

    /// Asks whether all workers could be leased: each is reachable, free or leased to us, and of our build. Starts nothing.
    /// Returns what the servers without an agent reported.
    pub(super) async fn ask(&self) -> Result<ProbedServers, NotReady> {
        let own = build::build(&self.llama_server).await;
        let seen = join_all(self.all.iter().map(|worker| self.probe(worker))).await;
        let mut problems = Vec::new();
        let mut probes = Vec::new();
        for result in seen {
            match result {
                Ok(probe) => probes.push(probe),
                Err(problem) => problems.push(problem),
            }
        }
        problems.extend(differences(own.as_deref(), &probes));
        if !problems.is_empty() {
            return Err(NotReady::Retryable(problems.join("; ")));
        }
        let unknown = probes.iter().find(|probe| probe.build.is_none());
        let unknown = unknown.map(|probe| format!("worker {}", probe.name));
        let unknown = if own.is_none() {
            Some("this coordinator".to_owned())
        } else {
            unknown
        };
        if let Some(who) = unknown {
            self.warned.call_once(|| {
                tracing::warn!(
                    "nobody knows which build of llama.cpp {who} runs: make sure that all hosts run the same"
                );
            });
        }
        Ok(probes.into_iter().flat_map(|probe| probe.told).collect())
    }

    async fn probe(&self, worker: &PoolWorker) -> Result<WorkerProbe, String> {
        let mut probe = WorkerProbe {
            name: worker.name.clone(),
            build: None,
            protocol: None,
            told: ProbedServers::new(),
        };
        let Some(agent) = &worker.agent else {
            for endpoint in &worker.endpoints {
                let told = listens(endpoint).await;
                let told = told.map_err(|why| format!("worker {}: {why}", worker.name))?;
                probe.protocol = Some(told.protocol.to_string());
                probe.told.insert(endpoint.clone(), told);
            }
            return Ok(probe);
        };
        let status = agent.status().await.map_err(|error| error.to_string())?;
        if let Some(holder) = status.lease.filter(|lease| lease.holder != self.holder) {
            let worker = worker.name.clone();
            return Err(AgentError::Held { worker, holder }.to_string());
        }
        probe.build = Some(status.build).filter(|build| build != build::UNKNOWN);
        probe.protocol = status.protocol;
        Ok(probe)
    }

    /// Leases all workers, or none.
    pub(super) async fn lease(
        &self,
        epoch: u64,
        tell: &mpsc::UnboundedSender<Message>,
        cancel: &CancellationToken,
    ) -> Result<Leases, NotReady> {
        let agents = self.all.iter().filter_map(|worker| worker.agent.as_ref());
        let mut taking: FuturesUnordered<_> = agents.map(|agent| self.take(agent, epoch, tell)).collect();
        let mut leases = Leases { held: Vec::new() };
        let mut problems = Vec::new();
        loop {
            tokio::select! {
                taken = taking.next() => match taken {
                    Some(Ok(held)) => leases.held.push(held),
                    Some(Err(problem)) => problems.push(problem),
                    None => break,
                },
                () = cancel.cancelled() => {
                    // A request for a lease that is dropped does not get it.
                    drop(taking);
                    leases.give_back().await;
                    return Err(cancelled());
                }
            }
        }
        if !problems.is_empty() {
            leases.give_back().await;
            problems.sort();
            return Err(NotReady::Retryable(problems.join("; ")));
        }
        Ok(leases)
    }

    async fn take(
        &self,
        agent: &AgentClient,
        epoch: u64,
        tell: &mpsc::UnboundedSender<Message>,
    ) -> Result<WorkerLease, String> {
        let wanted = LeaseRequest {
            holder: self.holder.clone(),
            epoch,
        };
        // Servers may take a minute to start. The agent answers other requests meanwhile; a host that is gone does not.
        let lease = tokio::select! {
            lease = agent.lease(&wanted) => lease.map_err(|error| error.to_string())?,
            why = until_silent(agent) => return Err(format!("worker {} was lost ({why})", agent.worker())),
        };
        let mut beats = JoinSet::new();
        let (kept, id, tell) = (agent.clone(), lease.id.clone(), tell.clone());
        beats.spawn(async move {
            let lost = contained("the renewal of a lease", keep(&kept, &id)).await;
            let why = lost.unwrap_or_else(|panic| panic.to_string());
            let failure = Failure {
                why: format!("worker {} was lost ({why})", kept.worker()),
                curable: true,
                worker: true,
            };
            let _ = tell.send(Message::Event(Event::Broken(epoch, failure)));
        });
        Ok(WorkerLease {
            agent: agent.clone(),
            id: lease.id,
            beats,
        })
    }

    /// The workers that cannot be reached or do not work, each with its problem; `None` if no problem is known. A worker
    /// without an agent can be asked only while no server uses it (`used`).
    pub(super) async fn who_is_lost(&self, used: bool) -> Option<String> {
        let looks = self.all.iter().map(|worker| async move {
            let wrong = match &worker.agent {
                Some(agent) => match timeout(BEAT_TIMEOUT, agent.status()).await {
                    Ok(Ok(status)) => Endpoint::problem(&status.endpoints),
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(_) => Some("its agent does not answer".to_owned()),
                },
                None if used => None,
                None => join_all(worker.endpoints.iter().map(|endpoint| listens(endpoint)))
                    .await
                    .into_iter()
                    .find_map(Result::err),
            };
            wrong.map(|why| (worker.name.clone(), why))
        });
        let lost: Vec<_> = join_all(looks).await.into_iter().flatten().collect();
        let each: Vec<_> = lost
            .iter()
            .map(|(name, why)| format!("worker {name} was lost ({why})"))
            .collect();
        (!each.is_empty()).then(|| each.join("; "))
    }

    /// Waits until a server loses its connection to our llama-server, and says which: it died and was started again,
    /// without our model. llama-server would notice that only with the next request, and lose it.
    pub(super) async fn until_disconnected(&self) -> String {
        let workers = self.all.iter().filter_map(|worker| {
            let agent = worker.agent.as_ref()?;
            Some(Box::pin(async move { (worker, until_one_is_free(agent).await) }))
        });
        let workers: Vec<_> = workers.collect();
        if workers.is_empty() {
            return pending().await;
        }
        let ((worker, port), ..) = select_all(workers).await;
        format!(
            "worker {} was lost (its ggml-rpc-server on port {port} was started again, without the model)",
            worker.name
        )
    }

    /// The name of the worker, if the pool has only one.
    pub(super) fn only(&self) -> Option<&str> {
        match &self.all[..] {
            [only] => Some(&only.name),
            _ => None,
        }
    }

    /// Polls all agents for ever; reports their state, and each worker that comes back.
    pub(super) async fn watch(self, tell: mpsc::UnboundedSender<Message>) {
        let watches = self.all.iter().enumerate().map(|(index, worker)| {
            let tell = tell.clone();
            async move {
                let mut was_up = true;
                while !tell.is_closed() {
                    let report = worker.report().await;
                    let up = report.up != Some(false);
                    let _ = tell.send(Message::Worker(index, report));
                    if up && !was_up {
                        tracing::info!("worker {} is back", worker.name);
                        let _ = tell.send(Message::Event(Event::WorkerBack));
                    }
                    was_up = up;
                    sleep(BEAT).await;
                }
            }
        });
        join_all(watches).await;
    }
}

impl PoolWorker {
    async fn report(&self) -> WorkerReport {
        let mut report = WorkerReport {
            name: self.name.clone(),
            ..WorkerReport::default()
        };
        let Some(agent) = &self.agent else { return report };
        match timeout(BEAT_TIMEOUT, agent.status()).await {
            Ok(Ok(status)) => {
                report.up = Some(true);
                report.problem = Endpoint::problem(&status.endpoints);
                report.build = Some(status.build);
                report.leased_by = status.lease.map(|lease| lease.holder);
            }
            Ok(Err(error)) => {
                report.up = Some(false);
                report.problem = Some(error.to_string());
            }
            Err(_) => {
                report.up = Some(false);
                report.problem = Some(format!("worker {} does not answer", self.name));
            }
        }
        report
    }
}

impl Leases {
    /// Returns the leases, which frees the memory of all workers that can be reached.
    pub(super) async fn give_back(self) {
        join_all(self.held.into_iter().map(|mut held| async move {
            // The renewal task ends only when the lease is lost.
            let lost = held.beats.try_join_next().is_some();
            held.beats.abort_all();
            let returned = held.agent.give_back(&held.id);
            let returned = if lost {
                timeout(LOST_RETURN_TIMEOUT, returned).await.unwrap_or(Ok(()))
            } else {
                returned.await
            };
            match returned {
                Ok(()) | Err(AgentError::Over { .. }) => {}
                Err(error) => tracing::warn!("a lease was not returned and will expire: {error}"),
            }
        }))
        .await;
    }
}

/// Waits until a server that was connected is not so twice in a row; once may mean that llama-server itself is ending.
async fn until_one_is_free(agent: &AgentClient) -> u16 {
    let (mut connected, mut suspects) = (BTreeSet::new(), BTreeSet::new());
    loop {
        if let Ok(Ok(status)) = timeout(BEAT_TIMEOUT, agent.status()).await {
            let ports_that = |are: EndpointState| {
                let endpoints = status.endpoints.iter().filter(move |endpoint| endpoint.state == are);
                endpoints.map(|endpoint| endpoint.port)
            };
            connected.extend(ports_that(EndpointState::Connected));
            let free: BTreeSet<u16> = ports_that(EndpointState::Listening)
                .filter(|port| connected.contains(port))
                .collect();
            if let Some(port) = free.intersection(&suspects).next() {
                return *port;
            }
            suspects = free;
        }
        sleep(BEAT).await;
    }
}

/// Time since the last answer of an agent, and the polls that it missed.
struct Silence {
    since: Instant,
    missed: u32,
}

impl Silence {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            missed: 0,
        }
    }

    fn broken(&mut self) {
        *self = Self::new();
    }

    /// Counts another missed answer. Returns whether the worker is lost; a single miss may be due to a busy disk or network.
    fn goes_on(&mut self) -> bool {
        self.missed += 1;
        self.missed >= 2 && self.since.elapsed() + BEAT >= LOST_AFTER
    }
}

/// Waits until an agent has been silent so long that its worker is lost; returns the last error.
async fn until_silent(agent: &AgentClient) -> String {
    let mut silence = Silence::new();
    loop {
        sleep(BEAT).await;
        let problem = match timeout(BEAT_TIMEOUT, agent.status()).await {
            Ok(Ok(_)) => {
                silence.broken();
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "its agent does not answer".to_owned(),
        };
        if silence.goes_on() {
            return problem;
        }
    }
}

/// Renews a lease until it is lost; returns why.
async fn keep(agent: &AgentClient, id: &str) -> String {
    let mut silence = Silence::new();
    loop {
        sleep(BEAT).await;
        let problem = match timeout(BEAT_TIMEOUT, beat(agent, id)).await {
            Ok(Ok(None)) => {
                silence.broken();
                continue;
            }
            Ok(Ok(Some(failed))) => break failed,
            Ok(Err(error @ AgentError::Over { .. })) => break error.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "its agent does not answer".to_owned(),
        };
        if silence.goes_on() {
            break problem;
        }
    }
}

async fn beat(agent: &AgentClient, id: &str) -> Result<Option<String>, AgentError> {
    Ok(Endpoint::problem(&agent.renew(id).await?.endpoints))
}

/// The llama.cpp of a worker.
#[derive(Debug)]
struct WorkerProbe {
    name: String,
    build: Option<String>,
    /// Version of the RPC protocol.
    protocol: Option<String>,
    /// Reports of its servers without an agent.
    told: ProbedServers,
}

/// Differences that keep the workers from working together. Where a build is unknown, the protocol decides: a client
/// refuses a server of another major version or of a newer minor one.
fn differences(own: Option<&str>, probes: &[WorkerProbe]) -> Vec<String> {
    let Some(own) = own else { return Vec::new() };
    // A worker of our build speaks our protocol.
    let same = |probe: &&WorkerProbe| probe.build.as_deref() == Some(own);
    let ours = probes
        .iter()
        .filter(same)
        .find_map(|probe| version(probe.protocol.as_deref()?));
    let difference = |probe: &WorkerProbe| {
        let name = &probe.name;
        match (&probe.build, &probe.protocol) {
            (Some(build), _) => build::difference(name, build, own),
            (None, Some(protocol)) => {
                let (major, minor) = ours?;
                let theirs = version(protocol)?;
                (theirs.0 != major || theirs.1 > minor).then(|| {
                    format!(
                        "worker {name} speaks version {protocol} of llama.cpp's RPC protocol, this coordinator \
                         {major}.{minor}: install the same build on both"
                    )
                })
            }
            (None, None) => None,
        }
    };
    probes.iter().filter_map(difference).collect()
}

/// Major and minor.
fn version(protocol: &str) -> Option<(u32, u32)> {
    let mut parts = protocol.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Probes a `ggml-rpc-server`. Allowed only while no client uses it.
async fn listens(endpoint: &str) -> Result<RpcServer, String> {
    let resolved = timeout(PROBE_TIMEOUT, lookup_host(endpoint)).await;
    let address = resolved.ok().and_then(|all| all.ok()?.find(SocketAddr::is_ipv4));
    let address = address.ok_or_else(|| format!("{endpoint} has no IPv4 address"))?;
    rpc_probe::probe(address, PROBE_TIMEOUT)
        .await
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(name: &str, build: Option<&str>, protocol: &str) -> WorkerProbe {
        WorkerProbe {
            name: name.to_owned(),
            build: build.map(str::to_owned),
            protocol: Some(protocol.to_owned()),
            told: ProbedServers::new(),
        }
    }

    #[test]
    fn a_worker_of_another_build_is_refused_with_both() {
        let seen = [probe("a", Some("b1"), "7.0.0"), probe("b", Some("b2"), "7.0.0")];
        let found = differences(Some("b1"), &seen);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].contains("worker b") && found[0].contains("b2") && found[0].contains("b1"),
            "{found:?}"
        );
        assert!(differences(None, &seen).is_empty());
    }

    #[test]
    fn without_a_build_the_protocols_must_fit() {
        for (protocol, fits) in [("7.1.9", true), ("7.0.0", true), ("7.2.0", false), ("6.1.0", false)] {
            let seen = [probe("a", Some("b1"), "7.1.0"), probe("by-hand", None, protocol)];
            let found = differences(Some("b1"), &seen);
            assert_eq!(found.is_empty(), fits, "{protocol}: {found:?}");
        }
        // Nobody knows what we speak ourselves.
        assert!(differences(Some("b1"), &[probe("by-hand", None, "6.0.0")]).is_empty());
    }

    #[test]
    fn one_missed_answer_is_not_the_end() {
        let mut silence = Silence::new();
        silence.since = Instant::now().checked_sub(LOST_AFTER).unwrap_or_else(Instant::now);
        assert!(!silence.goes_on());
        assert!(silence.goes_on());
        silence.broken();
        assert!(!silence.goes_on() && !silence.goes_on(), "that was too soon");
    }
}
