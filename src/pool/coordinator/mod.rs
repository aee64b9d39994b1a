//! The coordinator: keeps one llama-server running over the workers, swaps its model, and forwards requests to it.
//!
//! A request enters at `front`, waits in the queue of `pool`, and is admitted by `driver` once its model is ready.
//!
//! | file | what it does |
//! | --- | --- |
//! | `front`, `stream` | the public port: forwards byte for byte; lets requests wait |
//! | `admin` | the endpoints that the coordinator answers itself |
//! | `status` | the status and the steps of a swap as JSON |
//! | `problem` | the errors, as HTTP |
//! | `pool` | the state that the front and the driver share |
//! | `driver` | carries out the actions of the machine in [`super::swap`] |
//! | `prepare` | plans a model and makes its command line |
//! | `workers` | leases the workers, and finds the lost one |
//! | `server` | runs one llama-server from start to end |
//! | `load` | progress of a load (pure) |

mod admin;
mod driver;
mod front;
mod load;
mod pool;
mod prepare;
mod problem;
mod server;
pub mod status;
mod stream;
mod workers;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::driver::Driver;
use self::front::Front;
use self::pool::Pool;
use self::status::Status;
use self::workers::Workers;
use super::agent_client::AgentError;
use super::swap::{Rules, Swap};
use crate::config::{Config, ConfigError, Coordinator, is_loopback, is_wildcard};
use crate::http::Limits;
use crate::http::auth::Auth;
use crate::http::origin::Guard;
use crate::http::serve::{self, ServeOptions};

/// Most waiting requests per slot.
const WAITING_PER_SLOT: usize = 32;
/// How long connections may linger after everything else has ended.
const LINGER: Duration = Duration::from_secs(2);

/// Why the coordinator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The config has no section `coordinator`.
    #[error("the config has no section `coordinator`; add one, and `workers` beside it")]
    NoSection,
    /// The model does not exist, or the file of a key cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The token of a worker cannot be read.
    #[error(transparent)]
    Worker(#[from] AgentError),
}

/// Serves on `listener` until `stop`; then finishes running answers within `drain_seconds`, ends the server and returns
/// the leases. Starts with `model`, or with the config's default. Calls `tell` with the status of `/v1/tightwad/status` as
/// soon as requests are taken, and whenever it changes.
pub async fn serve(
    listener: TcpListener,
    config: Config,
    model: Option<&str>,
    tell: impl Fn(&Status),
    stop: CancellationToken,
) -> Result<(), CoordinatorError> {
    let coordinator = config.coordinator.clone().ok_or(CoordinatorError::NoSection)?;
    let (api_key, draft_key) = (coordinator.api_key()?, coordinator.draft_key()?);
    let (first, _) = config.model_for(model)?;
    let names = prepare::names(&config, first);
    let drafters = front::drafters(&config, &names);
    let rules = Rules {
        models: names.iter().cloned().collect(),
        swap_on_request: coordinator.swap_on_request,
        drain: Duration::from_secs(coordinator.drain_seconds),
        wait: Duration::from_secs(coordinator.wait_seconds),
        most_waiting: usize::from(coordinator.slots.max(1)) * WAITING_PER_SLOT,
    };
    let swap = Swap::new(rules, first.into(), first_epoch(), Instant::now());
    let workers = Workers::new(
        &config.workers,
        holder(&coordinator),
        config.binaries.llama_server.clone(),
    )?;
    let drain = Duration::from_secs(coordinator.drain_seconds) + LINGER;
    let (messages, told) = mpsc::unbounded_channel();
    let guard = Guard::new(
        &coordinator.host,
        api_key.is_some(),
        &coordinator.cors_origins,
        Some("coordinator.cors_origins"),
    );
    let (config, coordinator) = (Arc::new(config), Arc::new(coordinator));
    let (driver, reports) = Driver::new(config, coordinator, workers, swap, (messages.clone(), told));
    let pool = Pool::new(messages, reports);
    let front = Front {
        pool: pool.clone(),
        models: names,
        drafters,
        auth: Auth::new(api_key, &front::OPEN),
        draft_key,
    };
    let options = ServeOptions {
        limits: Limits::default().for_bodies_of(front::MOST_BODY),
        drain,
        shutdown: stop.clone(),
        // Its streams are told by the pool.
        cut_off: CancellationToken::new(),
    };
    let serving = serve::serve(listener, front::router(front, guard), options);
    let served = async { tokio::join!(driver.run(stop), serving) };
    tokio::select! {
        biased;
        _ = served => {}
        () = tell_all(&pool, tell) => {}
    }
    Ok(())
}

/// Reports the status whenever it changes, for ever.
async fn tell_all(pool: &Pool, tell: impl Fn(&Status)) {
    let mut reports = pool.reports();
    loop {
        reports.mark_unchanged();
        tell(&Status::of(pool.report()));
        if reports.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// An epoch higher than any of an earlier process: taking leases lasts longer than a millisecond.
fn first_epoch() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX / 2)
}

/// The name of this coordinator in leases: `HOST:PORT#INSTANCE`. A restarted coordinator has the same name, so it takes over
/// its own leases. Two coordinators never share a name, even if their hosts do.
fn holder(coordinator: &Coordinator) -> String {
    let host = coordinator.host.as_str();
    let own_name = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = Some(())
        .filter(|()| is_wildcard(host) || is_loopback(host))
        .and_then(|()| own_name());
    let name = name.as_deref().map_or(host, str::trim);
    let port = coordinator.port;
    format!("{name}:{port}#{:08x}", instance(host, place().as_deref()))
}

/// The boot id of the kernel and the network namespace of this process. They differ on every machine and in every container
/// with its own network, even in copies of one image with the same host name and machine id.
fn place() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let network = std::fs::read_link("/proc/self/ns/net").ok()?;
    Some(format!("{} {}", boot.trim(), network.display()))
}

/// A number that tells coordinators of one name apart. Without a known place it is random, and a restarted coordinator waits
/// until its leases expire.
fn instance(listens_on: &str, place: Option<&str>) -> u32 {
    let Some(place) = place else { return rand::random() };
    let digest = Sha256::digest(format!("{place} {listens_on}"));
    digest
        .iter()
        .take(4)
        .fold(0, |number, byte| number << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_keeps_its_name_and_shares_it_with_no_other() {
        let coordinator = |host: &str| Coordinator {
            host: host.to_owned(),
            ..Coordinator::default()
        };
        let name = holder(&coordinator("0.0.0.0"));
        assert_eq!(name, holder(&coordinator("0.0.0.0")), "after a restart");
        assert_ne!(
            name,
            holder(&coordinator("127.0.0.1")),
            "on another address of one host"
        );
        assert!(name.contains(":8080#"), "{name}");

        let here = instance("0.0.0.0", Some("boot-1 net:[1]"));
        assert_eq!(here, instance("0.0.0.0", Some("boot-1 net:[1]")));
        for place in [Some("boot-2 net:[1]"), Some("boot-1 net:[2]"), None] {
            assert_ne!(here, instance("0.0.0.0", place), "{place:?}");
        }
    }
}
