//! Keeps one server running: starts it, waits until it is ready, watches it, and starts it again after a death.
//!
//! At most one process of a service runs at a time. Dropping the [`Service`] ends it.

use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::child::{Child, Tail};
use super::command::{Launch, Role};
use super::death::{Cause, Death};
use super::restart::{Decision, Restarts};
use super::stall::{self, Stalled, until_load_stalled, until_stalled};
use super::{devices, sockets};
use crate::background::contained;

/// Interval between health checks of a server that starts.
const POLL_INTERVAL: Duration = Duration::from_millis(150);
/// Time limit of a health check.
const POLL_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between log lines about a load that takes long.
const LOADING_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Time limit for a server to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for a server that hangs.
const STALLED_STOP_TIMEOUT: Duration = Duration::from_millis(200);
/// The same for a ggml-rpc-server, which has nothing to save.
pub const RPC_STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// State of a server.
#[derive(Debug, Clone)]
pub enum State {
    /// Its process has started and does not answer yet.
    Starting,
    /// It answers, and still loads its model.
    Loading,
    /// It serves.
    Ready {
        /// Its process id.
        pid: u32,
    },
    /// It died, and will be started again after the pause.
    Waiting {
        /// Why it died.
        death: Death,
        /// Pause before the next start.
        pause: Duration,
    },
    /// It was stopped.
    Stopped,
    /// It died and is not started again.
    GaveUp {
        /// Why it died last.
        death: Death,
    },
}

/// Guard of a server that is kept running in the background. Dropping it ends the server.
#[derive(Debug)]
pub struct Service {
    role: Role,
    state: watch::Receiver<State>,
    tail: watch::Receiver<Tail>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// A server that was given up.
#[derive(Debug, Clone, thiserror::Error)]
#[error("gave up on the {role} server: {death}")]
pub struct GaveUp {
    /// Which one.
    pub role: Role,
    /// Its last death.
    pub death: Death,
}

impl Service {
    /// Starts it, and starts it again after each death, until `stop` is cancelled.
    #[must_use]
    pub fn start(role: Role, launch: Launch, stop: &CancellationToken) -> Self {
        Self::begin(role, launch, After::StartAgain, stop)
    }

    /// Starts it once. When it dies, it is given up.
    #[must_use]
    pub fn start_once(role: Role, launch: Launch, stop: &CancellationToken) -> Self {
        Self::begin(role, launch, After::GiveUp, stop)
    }

    fn begin(role: Role, launch: Launch, after: After, stop: &CancellationToken) -> Self {
        Self::supervised(role, stop, |report, stop| {
            keep_running(role, launch, after, report, stop)
        })
    }

    /// Runs `supervise` in the background. Its panic gives the server up.
    fn supervised<F: Future<Output = ()> + Send + 'static>(
        role: Role,
        stop: &CancellationToken,
        supervise: impl FnOnce(Arc<Report>, CancellationToken) -> F,
    ) -> Self {
        let stop = stop.child_token();
        let (report, state) = watch::channel(State::Starting);
        let (tails, tail) = watch::channel(Tail::default());
        let report = Arc::new(Report {
            state: report,
            tail: tails,
        });
        let supervision = supervise(Arc::clone(&report), stop.clone());
        let task = tokio::spawn(async move {
            if let Err(panic) = contained(&format!("the supervision of the {role} server"), supervision).await {
                let death = Cause::Unsupervised(panic.to_string()).into();
                report.state.send_replace(State::GaveUp { death });
            }
        });
        Self {
            role,
            state,
            tail,
            stop,
            task,
        }
    }

    /// Its state, kept up to date.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// The last lines of its latest process, kept up to date.
    #[must_use]
    pub fn tail(&self) -> watch::Receiver<Tail> {
        self.tail.clone()
    }

    /// Waits until it is ready for the first time. Never returns for a service that is stopped before that.
    pub async fn ready(&mut self) -> Result<(), GaveUp> {
        match self
            .reached(|state| matches!(state, State::Ready { .. } | State::GaveUp { .. }))
            .await
        {
            Some(State::GaveUp { death }) => Err(GaveUp { role: self.role, death }),
            Some(_) => Ok(()),
            None => std::future::pending().await,
        }
    }

    /// Waits until it is stopped or given up.
    pub async fn ended(&mut self) -> Result<(), GaveUp> {
        match self
            .reached(|state| matches!(state, State::Stopped | State::GaveUp { .. }))
            .await
        {
            Some(State::GaveUp { death }) => Err(GaveUp { role: self.role, death }),
            _ => Ok(()),
        }
    }

    /// Waits for a wanted state. `None` if the service has ended without one.
    async fn reached(&mut self, wanted: impl Fn(&State) -> bool) -> Option<State> {
        self.state
            .wait_for(|state| wanted(state))
            .await
            .ok()
            .map(|state| state.clone())
    }

    /// Ends it, and waits until it has ended.
    pub async fn stop(mut self) {
        self.stop.cancel();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Channels that publish the state and the output of a server.
struct Report {
    state: watch::Sender<State>,
    tail: watch::Sender<Tail>,
}

/// Action after a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    StartAgain,
    GiveUp,
}

async fn keep_running(role: Role, launch: Launch, after: After, report: Arc<Report>, stop: CancellationToken) {
    let mut restarts = Restarts::default();
    let mut last_missing = None;
    loop {
        let (death, ready) = match run_once(role, &launch, &report, &stop).await {
            RunEnd::Stopped => break,
            RunEnd::Died { death, ready } => (death, ready),
        };
        show_last_lines(role, &death);
        if after == After::GiveUp {
            tracing::error!("the {role} server died: {death}");
            report.state.send_replace(State::GaveUp { death });
            return;
        }
        match restarts.died(ready, death.prospect(), rand::random()) {
            Decision::GiveUp => {
                report.state.send_replace(State::GaveUp { death });
                return;
            }
            Decision::Again(pause) => {
                let missing = death.missing().cloned();
                if missing.is_none() {
                    tracing::error!(
                        "the {role} server died: {death}; starting it again in {:.1} s",
                        pause.as_secs_f32()
                    );
                } else if missing != last_missing {
                    tracing::error!("the {role} server is not started: {death}; looking again until there is one");
                }
                last_missing = missing;
                report.state.send_replace(State::Waiting { death, pause });
                tokio::select! {
                    () = sleep(pause) => {}
                    () = stop.cancelled() => break,
                }
            }
        }
    }
    report.state.send_replace(State::Stopped);
}

/// Logs the last lines of a dead server, unless the log filter has shown them already.
fn show_last_lines(role: Role, death: &Death) {
    if !tracing::enabled!(target: "tightwad::child", tracing::Level::DEBUG) {
        for line in &death.last_lines {
            tracing::error!("last lines of the {role} server: {line}");
        }
    }
}

/// End of one process of the server.
enum RunEnd {
    Stopped,
    Died { death: Death, ready: Option<Duration> },
}

/// A started process, and the client for its health checks.
struct Started {
    child: Child,
    http: reqwest::Client,
}

/// Starts the process if its devices are there.
async fn begin(role: Role, launch: &Launch) -> Result<Started, Death> {
    let launch = match role {
        // The worker asks its ggml-rpc-server for the devices itself.
        Role::Rpc => launch.clone(),
        _ => devices::choose(role, launch).await.map_err(Cause::NoDevice)?,
    };
    let http = stall::client().map_err(|error| Death::not_started(&error))?;
    let child = Child::spawn(role, &launch).await;
    let child = child.map_err(|error| Death::not_started(&error))?;
    Ok(Started { child, http })
}

/// Runs the server until it is stopped or dies.
async fn run_once(role: Role, launch: &Launch, report: &Report, stop: &CancellationToken) -> RunEnd {
    let Started { mut child, http } = match stop.run_until_cancelled(begin(role, launch)).await {
        None => return RunEnd::Stopped,
        Some(Ok(begun)) => begun,
        Some(Err(death)) => return RunEnd::Died { death, ready: None },
    };
    report.state.send_replace(State::Starting);
    report.tail.send_replace(child.tail());
    let pid = child.pid();
    let began = Instant::now();
    let place = match role {
        Role::Rpc => launch.url().trim_start_matches("http://").to_owned(),
        Role::Target | Role::Draft | Role::Coordinator => launch.url(),
    };
    tracing::info!(pid, "the {role} server starts at {place}");
    let mut ready = None;
    let end = {
        let watch_it = async {
            match role {
                Role::Rpc => until_listening(launch).await,
                Role::Target | Role::Draft | Role::Coordinator => {
                    let url = launch.url();
                    tokio::select! {
                        () = until_ready(role, &http, &url, &report.state) => {}
                        stalled = until_load_stalled(pid, launch.stall) => return stalled,
                    }
                }
            }
            ready = Some(Instant::now());
            tracing::info!(
                pid,
                "the {role} server is ready after {:.1} s",
                began.elapsed().as_secs_f32()
            );
            report.state.send_replace(State::Ready { pid });
            until_stalled(&http, &launch.url(), launch.api_key().as_ref(), pid, launch.stall).await
        };
        tokio::select! {
            status = child.wait() => WatchEnd::Exited(status),
            () = stop.cancelled() => WatchEnd::Stopped,
            stalled = watch_it => WatchEnd::Stalled(stalled),
        }
    };
    let patience = match (&end, role) {
        (WatchEnd::Stalled(_), _) => STALLED_STOP_TIMEOUT,
        (_, Role::Rpc) => RPC_STOP_TIMEOUT,
        _ => STOP_TIMEOUT,
    };
    let mut stop_it = async || {
        if let Err(error) = child.stop(patience).await {
            tracing::warn!(pid, "could not wait for the {role} server: {error}");
        }
    };
    let death = match end {
        WatchEnd::Stopped => {
            stop_it().await;
            tracing::info!(pid, "the {role} server is stopped");
            return RunEnd::Stopped;
        }
        WatchEnd::Stalled(stalled) => {
            tracing::error!(pid, "the {role} server hangs: {stalled}; ending it");
            stop_it().await;
            Cause::Stalled(stalled).into()
        }
        WatchEnd::Exited(Err(error)) => Death::not_started(&error),
        WatchEnd::Exited(Ok(status)) => Death::explain(status, child.last_lines().await),
    };
    RunEnd::Died {
        death,
        ready: ready.map(|since| since.elapsed()),
    }
}

/// Why the watch over a process ended.
enum WatchEnd {
    /// The process has exited.
    Exited(std::io::Result<ExitStatus>),
    /// The service is being stopped.
    Stopped,
    /// The process makes no progress.
    Stalled(Stalled),
}

/// Waits until the server listens. Does not connect, because a ggml-rpc-server serves only one client.
async fn until_listening(launch: &Launch) {
    match launch.ipv4_address() {
        Some(address) => sockets::until_listening(address).await,
        None => std::future::pending().await,
    }
}

/// Waits until `/health` answers 200. There is no time limit, because a model of 100 GB takes minutes to load from a slow disk. The
/// state and the log show that it loads.
async fn until_ready(role: Role, http: &reqwest::Client, url: &str, report: &watch::Sender<State>) {
    let health = format!("{url}/health");
    let began = Instant::now();
    let mut logged = began;
    loop {
        match http.get(&health).timeout(POLL_TIMEOUT).send().await {
            Ok(answer) if answer.status().is_success() => return,
            Ok(_) => {
                report.send_if_modified(|state| {
                    let changed = !matches!(state, State::Loading);
                    *state = State::Loading;
                    changed
                });
            }
            Err(_) => {}
        }
        if logged.elapsed() >= LOADING_LOG_INTERVAL {
            logged = Instant::now();
            tracing::info!(
                "the {role} server still loads its model ({:.0} s)",
                began.elapsed().as_secs_f32()
            );
        }
        sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_server_whose_supervision_panics_is_given_up() {
        let service = || {
            let supervise = |report: Arc<Report>, _| async move {
                report.state.send_replace(State::Loading);
                tokio::task::yield_now().await;
                panic!("on purpose");
            };
            Service::supervised(Role::Target, &CancellationToken::new(), supervise)
        };
        let ended = timeout(SOON, async { service().ended().await }).await.unwrap();
        let words = ended.unwrap_err().to_string();
        assert!(words.contains("on purpose"), "{words}");
        let ready = timeout(SOON, async { service().ready().await }).await.unwrap();
        assert!(ready.is_err());
    }
}
