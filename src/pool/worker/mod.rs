//! A worker: a host that lends its GPUs to a coordinator.
//!
//! With an agent, no `ggml-rpc-server` runs until a coordinator leases the worker. Each lease gets fresh servers, which end
//! with it. So the memory is free again soon after a coordinator fails, and no client connects to a server that has another
//! one. A server that dies is not restarted before the next lease: a fresh one would look healthy without its part of the
//! model. Without an agent the servers run all the time and restart when they die; they keep no model parts on disk, since
//! no check would find the part that a dying server left incomplete.
//!
//! | file | what it does |
//! | --- | --- |
//! | `local_worker` | finds the entry of `workers` that is this host |
//! | `launch` | the arguments of ggml-rpc-server (pure) |
//! | `lease` | the lease of the worker (pure) |
//! | `servers` | starts and ends the servers, one set after another |
//! | `survey` | measures the devices while no lease runs |
//! | `cache` | checks the model parts on disk and keeps them within the quota |
//! | `http` | the agent's HTTP server |

mod cache;
mod http;
mod launch;
mod lease;
mod local_worker;
mod servers;
mod survey;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, select_all};
use tokio_util::sync::CancellationToken;

use super::rpc_probe::RpcProbeError;
use crate::config::{Binaries, ConfigError, Secret, Worker};
use crate::supervise::command::{Launch, Role};
use crate::supervise::death::Death;
use crate::supervise::devices::Missing;
use crate::supervise::notify::{Notifier, StatusLines};
use crate::supervise::preflight::{self, PreflightError};
use crate::supervise::restart;
use crate::supervise::service::{GaveUp, Service};
pub use local_worker::{NotFound, local_worker};

/// A lease expires after this time without a renewal. Coordinators renew it every second.
const EXPIRY: Duration = Duration::from_secs(10);

/// Timeout for a server to listen. A GPU driver that wakes up takes seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for a listening server to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a worker ends.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The config has no entry for this host.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The file of the token cannot be read.
    #[error(transparent)]
    Token(#[from] ConfigError),
    /// A program is missing, or a port is taken.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The config does not say which GPU goes to which server.
    #[error(transparent)]
    Launch(#[from] launch::AmbiguousGpus),
    /// The servers do not start.
    #[error(transparent)]
    NoServer(#[from] NoServer),
    /// A server without an agent died too often.
    #[error(transparent)]
    GaveUp(#[from] GaveUp),
}

/// Why a `ggml-rpc-server` does not serve.
#[derive(Debug, thiserror::Error)]
pub enum NoServer {
    /// Its port is taken.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// It died.
    #[error("the ggml-rpc-server of port {port} does not start: {death}")]
    Died {
        /// Its port in the config.
        port: u16,
        /// Why.
        death: Death,
    },
    /// It does not listen in time.
    #[error(
        "the ggml-rpc-server of port {port} does not listen after {} s; see its last lines, and whether its GPU answers",
        START_TIMEOUT.as_secs()
    )]
    Slow {
        /// Its port in the config.
        port: u16,
    },
    /// It sees no GPU of the worker's `backend`.
    #[error("the ggml-rpc-server of port {port} is not lent: {missing}")]
    NoDevice {
        /// Its port in the config.
        port: u16,
        /// The missing device.
        missing: Missing,
    },
    /// It listens but does not answer.
    #[error(transparent)]
    Mute(#[from] RpcProbeError),
    /// The check of its cache is not finished.
    #[error(
        "the worker still checks the model parts on its disk ({:.1} of {:.1} GiB); ask again in a while",
        gib(.0.checked),
        gib(.0.of)
    )]
    Checking(cache::Progress),
    /// It was ended before it listened.
    #[error("the ggml-rpc-server was ended before it listened, since the lease is over or the worker stops")]
    Ended,
}

/// For people.
fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// The servers of a worker.
#[derive(Debug)]
struct Spec {
    name: String,
    host: Ipv4Addr,
    build: String,
    endpoints: Vec<EndpointSpec>,
    cache: cache::Cache,
}

/// One `ggml-rpc-server`.
#[derive(Debug)]
struct EndpointSpec {
    port: u16,
    launch: Launch,
}

/// Runs this worker until `stop` and notifies the service manager. `address` is that of `worker.host`.
pub async fn run(
    worker: &Worker,
    address: Ipv4Addr,
    binaries: &Binaries,
    notifier: &Notifier,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let token = worker.agent_token()?;
    let program = preflight::program(&binaries.rpc_server)?;
    let cache = if worker.has_agent() {
        cache::Cache::of(worker)
    } else {
        cache::Cache::none()
    };
    if worker.has_agent() && worker.cache_gb > 0.0 && cache.folder().is_none() {
        tracing::warn!(
            "worker {} keeps no model parts on disk, since its user has no home; set `cache_dir`, or XDG_CACHE_HOME",
            worker.name()
        );
    }
    let mut endpoints = Vec::new();
    for (port, gpus) in worker.rpc_endpoints() {
        let launch = launch::rpc_server(&program, worker, address, port, &gpus, cache.folder())?;
        preflight::port_free(&address.to_string(), port)?;
        endpoints.push(EndpointSpec { port, launch });
    }
    notifier.status("looking at its devices");
    let Some(build) = stop.run_until_cancelled(build(&program, binaries)).await else {
        return Ok(());
    };
    let spec = Spec {
        name: worker.name().to_owned(),
        host: address,
        build,
        endpoints,
        cache,
    };
    if worker.has_agent() {
        with_agent(spec, worker.agent_port, token, notifier, stop).await
    } else {
        let how = match worker.agent_port {
            0 => "agent_port is 0",
            _ => "it has no token: give it an agent_token_file to get one",
        };
        tracing::warn!(
            "worker {} runs without an agent ({how}); it keeps no model parts on disk, and its server takes whoever comes",
            spec.name
        );
        without_agent(spec, notifier, &stop).await
    }
}

/// The build of the programs. `llama-server` reports it; `ggml-rpc-server` cannot.
async fn build(rpc_server: &std::path::Path, binaries: &Binaries) -> String {
    let beside = rpc_server.with_file_name("llama-server");
    let candidates: [PathBuf; 2] = [beside, binaries.llama_server.clone()];
    for llama_server in candidates.iter().filter_map(|name| which::which(name).ok()) {
        if let Some(build) = super::build::build(&llama_server).await {
            return build;
        }
    }
    super::build::UNKNOWN.to_owned()
}

async fn with_agent(
    spec: Spec,
    port: u16,
    token: Option<Secret>,
    notifier: &Notifier,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let listener = preflight::listen(&spec.host.to_string(), port).await?;
    let servers = servers::Servers::new(Arc::new(spec));
    match once_there_are_gpus(notifier, &stop, async || servers.first_look(&stop).await).await {
        Err(NoServer::Ended) => return Ok(()),
        looked => looked?,
    }
    tracing::info!("worker {} lends {}", servers.spec().name, servers.shown().lent());
    let agent = Arc::new(http::Agent::new(servers, EXPIRY, token));
    tracing::info!(
        "worker {} is ready: its agent answers at {}",
        agent.name(),
        listener
            .local_addr()
            .map_or_else(|_| port.to_string(), |address| address.to_string())
    );
    http::serve(listener, agent, notifier, stop).await;
    Ok(())
}

/// Repeats `look` until each server sees a GPU of the worker's `backend`, and returns its result.
async fn once_there_are_gpus<T>(
    notifier: &Notifier,
    stop: &CancellationToken,
    look: impl AsyncFn() -> Result<T, NoServer>,
) -> Result<T, NoServer> {
    let mut said = None;
    for attempt in 1.. {
        let missing = match look().await {
            Err(error @ NoServer::NoDevice { .. }) => error.to_string(),
            looked => return looked,
        };
        let pause = restart::pause(attempt, rand::random());
        notifier.status(&format!("{missing}; looking again in {:.1} s", pause.as_secs_f32()));
        if said.as_ref() != Some(&missing) {
            tracing::error!("{missing}; looking again until there is one");
            said = Some(missing);
        }
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            break;
        }
    }
    Err(NoServer::Ended)
}

async fn without_agent(mut spec: Spec, notifier: &Notifier, stop: &CancellationToken) -> Result<(), WorkerError> {
    for endpoint in &mut spec.endpoints {
        let look = once_there_are_gpus(notifier, stop, async || survey::look(endpoint, stop).await).await;
        let devices = match look {
            Err(NoServer::Ended) => return Ok(()),
            look => look?.devices,
        };
        tracing::info!("worker {} lends {}", spec.name, servers::list(&devices));
        endpoint.launch = survey::bound(endpoint, &devices)?;
    }
    let name = format!("the ggml-rpc-server of worker {}", spec.name);
    let words = StatusLines {
        starting: format!("starting {name}"),
        serving: format!("{name} listens"),
    };
    let endpoints = spec.endpoints.into_iter();
    let mut services: Vec<Service> = endpoints
        .map(|endpoint| Service::start(Role::Rpc, endpoint.launch, stop))
        .collect();
    let states = services.iter().map(Service::state).collect();
    // One server that fails for good ends them all: a plan cannot use a host that serves half of its GPUs.
    let (ended, ..) = tokio::select! {
        ended = select_all(services.iter_mut().map(|service| Box::pin(service.ended()))) => ended,
        never = notifier.follow(&words, states) => match never {},
    };
    join_all(services.into_iter().map(Service::stop)).await;
    Ok(ended?)
}
