//! The workers, as the coordinator sees them: taken before a server starts, kept while it runs, returned after it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::net::lookup_host;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::pool::{Message, WorkerReport};
use crate::cluster::agent::{EndpointState, LeaseRequest, WorkerStatus};
use crate::cluster::agent_client::{AgentClient, AgentError};
use crate::cluster::rpc_probe;
use crate::cluster::swap::{Event, Failure, Unready};
use crate::config::Worker;

/// Leases are renewed, and agents looked at, so often.
const BEAT: Duration = Duration::from_secs(1);
/// Longest wait for an agent in this.
const BEAT_PATIENCE: Duration = Duration::from_secs(2);
/// A worker that was silent for so long is lost.
const LOST_AFTER: Duration = Duration::from_secs(4);
/// Longest wait for a worker without an agent.
const PROBE_PATIENCE: Duration = Duration::from_secs(3);
/// The build of a program that does not tell it.
const UNKNOWN_BUILD: &str = "unknown";

/// One worker.
#[derive(Debug, Clone)]
struct Member {
    name: String,
    /// `None`: its `ggml-rpc-server` is run by hand.
    agent: Option<AgentClient>,
    /// `host:port` of each of its `ggml-rpc-server`s.
    endpoints: Vec<String>,
}

/// All workers.
#[derive(Debug, Clone)]
pub(super) struct Workers {
    members: Vec<Member>,
    /// Who we are to them.
    holder: String,
    /// The build of our own llama-server.
    build: Option<String>,
}

/// A worker's lease.
#[derive(Debug)]
struct Held {
    agent: AgentClient,
    id: String,
}

/// The workers are ours. Dropping this leaves them to expire.
#[derive(Debug)]
pub(super) struct Leases {
    held: Vec<Held>,
    /// Renews them.
    beats: JoinSet<()>,
}

impl Workers {
    pub(super) fn new(workers: &[Worker], holder: String, build: Option<String>) -> Result<Self, AgentError> {
        let member = |worker: &Worker| {
            let agent = worker.has_agent().then(|| AgentClient::new(worker)).transpose()?;
            let ports = worker.rpc_endpoints();
            Ok(Member {
                name: worker.name().to_owned(),
                agent,
                endpoints: ports.keys().map(|port| format!("{}:{port}", worker.host)).collect(),
            })
        };
        let members = workers.iter().map(member).collect::<Result<_, AgentError>>()?;
        Ok(Self { members, holder, build })
    }

    /// What is known before anybody was asked.
    pub(super) fn reports(&self) -> Vec<WorkerReport> {
        let report = |member: &Member| WorkerReport {
            name: member.name.clone(),
            ..WorkerReport::default()
        };
        self.members.iter().map(report).collect()
    }

    /// Takes all workers, or none.
    pub(super) async fn lease(&self, epoch: u64, tell: &mpsc::UnboundedSender<Message>) -> Result<Leases, Unready> {
        let taken = join_all(self.members.iter().map(|member| self.take(member, epoch))).await;
        let mut leases = Leases {
            held: Vec::new(),
            beats: JoinSet::new(),
        };
        let mut problems = Vec::new();
        for result in taken {
            match result {
                Ok(held) => leases.held.extend(held),
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            leases.give_back().await;
            return Err(Unready::Yet(problems.join("; ")));
        }
        for held in &leases.held {
            let (agent, id) = (held.agent.clone(), held.id.clone());
            leases.beats.spawn(keep(agent, id, epoch, tell.clone()));
        }
        Ok(leases)
    }

    async fn take(&self, member: &Member, epoch: u64) -> Result<Option<Held>, String> {
        let Some(agent) = &member.agent else {
            for endpoint in &member.endpoints {
                listens(endpoint)
                    .await
                    .map_err(|why| format!("worker {}: {why}", member.name))?;
            }
            return Ok(None);
        };
        let status = agent.status().await.map_err(|error| error.to_string())?;
        self.same_build(&member.name, &status)?;
        let wanted = LeaseRequest {
            holder: self.holder.clone(),
            epoch,
        };
        let lease = agent.lease(&wanted).await.map_err(|error| error.to_string())?;
        Ok(Some(Held {
            agent: agent.clone(),
            id: lease.id,
        }))
    }

    fn same_build(&self, name: &str, status: &WorkerStatus) -> Result<(), String> {
        match &self.build {
            Some(own) if status.build != UNKNOWN_BUILD && status.build != *own => Err(format!(
                "worker {name} runs llama.cpp {}, this coordinator {own}: install the same build on both",
                status.build
            )),
            _ => Ok(()),
        }
    }

    /// The workers that cannot be reached or do not work, and what is wrong with them; `None`: all are well, as far as can
    /// be told. One without an agent can only be asked while no server uses it.
    pub(super) async fn who_is_lost(&self, used: bool) -> Option<String> {
        let looks = self.members.iter().map(|member| async move {
            let wrong = match &member.agent {
                Some(agent) => match timeout(BEAT_PATIENCE, agent.status()).await {
                    Ok(Ok(status)) => failed_endpoint(&status),
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(_) => Some("its agent does not answer".to_owned()),
                },
                None if used => None,
                None => join_all(member.endpoints.iter().map(|endpoint| listens(endpoint)))
                    .await
                    .into_iter()
                    .find_map(Result::err),
            };
            wrong.map(|why| (member.name.clone(), why))
        });
        let lost: Vec<_> = join_all(looks).await.into_iter().flatten().collect();
        let each: Vec<_> = lost
            .iter()
            .map(|(name, why)| format!("worker {name} was lost ({why})"))
            .collect();
        (!each.is_empty()).then(|| each.join("; "))
    }

    /// The one that is meant when nothing else is known.
    pub(super) fn only(&self) -> Option<&str> {
        match &self.members[..] {
            [only] => Some(&only.name),
            _ => None,
        }
    }

    /// Looks at all agents for ever, for the status, and tells of those that come back.
    pub(super) async fn watch(self, tell: mpsc::UnboundedSender<Message>) {
        let watches = self.members.iter().enumerate().map(|(index, member)| {
            let tell = tell.clone();
            async move {
                let mut was_up = true;
                while !tell.is_closed() {
                    let report = member.report().await;
                    let up = report.up != Some(false);
                    let _ = tell.send(Message::Worker(index, report));
                    if up && !was_up {
                        tracing::info!("worker {} is back", member.name);
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

impl Member {
    async fn report(&self) -> WorkerReport {
        let mut report = WorkerReport {
            name: self.name.clone(),
            ..WorkerReport::default()
        };
        let Some(agent) = &self.agent else { return report };
        match timeout(BEAT_PATIENCE, agent.status()).await {
            Ok(Ok(status)) => {
                report.up = Some(true);
                report.problem = failed_endpoint(&status);
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
    /// Returns them; their memory is free after that, as far as the workers can be reached.
    pub(super) async fn give_back(mut self) {
        self.beats.abort_all();
        join_all(self.held.drain(..).map(|held| async move {
            match held.agent.give_back(&held.id).await {
                Ok(()) | Err(AgentError::Over { .. }) => {}
                Err(error) => tracing::warn!("a lease was not returned and will expire: {error}"),
            }
        }))
        .await;
    }
}

/// Renews a lease until it is lost.
async fn keep(agent: AgentClient, id: String, epoch: u64, tell: mpsc::UnboundedSender<Message>) {
    let mut last = Instant::now();
    let why = loop {
        sleep(BEAT).await;
        let problem = match timeout(BEAT_PATIENCE, beat(&agent, &id)).await {
            Ok(Ok(None)) => {
                last = Instant::now();
                continue;
            }
            Ok(Ok(Some(failed))) => break failed,
            Ok(Err(error @ AgentError::Over { .. })) => break error.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "its agent does not answer".to_owned(),
        };
        if last.elapsed() + BEAT_PATIENCE / 2 >= LOST_AFTER {
            break problem;
        }
    };
    let why = format!("worker {} was lost ({why})", agent.worker());
    let failure = Failure {
        why,
        curable: true,
        worker: true,
    };
    let _ = tell.send(Message::Event(Event::Broken(epoch, failure)));
}

async fn beat(agent: &AgentClient, id: &str) -> Result<Option<String>, AgentError> {
    agent.renew(id).await?;
    Ok(failed_endpoint(&agent.status().await?))
}

/// What is wrong with a worker's servers, if anything is.
fn failed_endpoint(status: &WorkerStatus) -> Option<String> {
    let failed = status
        .endpoints
        .iter()
        .find(|endpoint| endpoint.state == EndpointState::Failed)?;
    Some(format!("its ggml-rpc-server on port {} does not work", failed.port))
}

/// What a `ggml-rpc-server` tells there; to be asked only while nobody uses it.
async fn listens(endpoint: &str) -> Result<rpc_probe::Told, String> {
    let resolved = timeout(PROBE_PATIENCE, lookup_host(endpoint)).await;
    let address = resolved.ok().and_then(|all| all.ok()?.find(SocketAddr::is_ipv4));
    let address = address.ok_or_else(|| format!("{endpoint} has no IPv4 address"))?;
    rpc_probe::probe(address, PROBE_PATIENCE)
        .await
        .map_err(|error| error.to_string())
}
