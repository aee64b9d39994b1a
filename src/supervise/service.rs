//! Keeps one server running.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::child::{Child, Tail};
use super::command::{Launch, Role};
use super::death::{Cause, Death};
use super::restart::{Decision, Restarts};
use super::stall::{self, Stalled, until_stalled};
use super::{devices, sockets};

/// Pause between two looks at a server that starts.
const POLL: Duration = Duration::from_millis(150);
/// Longest wait for the answer to such a look.
const POLL_PATIENCE: Duration = Duration::from_secs(2);
/// A load that takes longer than this says so, again and again.
const STILL_LOADING: Duration = Duration::from_secs(10);
/// How long a server that is asked to end may take.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// The same of one that hangs.
const BROKEN_PATIENCE: Duration = Duration::from_millis(200);
/// The same of a ggml-rpc-server, which has nothing to save.
pub const RPC_STOP_PATIENCE: Duration = Duration::from_secs(1);

/// How a server is.
#[derive(Debug, Clone)]
pub enum State {
    /// Its process starts; nothing answers yet.
    Starting,
    /// It answers that it still loads its model.
    Loading,
    /// It serves.
    Ready {
        /// Its process id.
        pid: u32,
    },
    /// It died and will be started again.
    Waiting {
        /// Why it died.
        death: Death,
        /// Pause before the next start.
        pause: Duration,
    },
    /// It was asked to end and has.
    Stopped,
    /// It died too often, or of something that a restart does not cure, or was to be started once.
    GaveUp {
        /// Why it died last.
        death: Death,
    },
}

/// A server that is kept running in the background. Dropping this ends it.
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
    /// What it died of last.
    pub death: Death,
}

impl Service {
    /// Starts it, and starts it again whenever it dies, until `stop` is cancelled.
    #[must_use]
    pub fn start(role: Role, launch: Launch, stop: &CancellationToken) -> Self {
        Self::begin(role, launch, After::StartAgain, stop)
    }

    /// Starts it once: when it dies it is given up.
    #[must_use]
    pub fn start_once(role: Role, launch: Launch, stop: &CancellationToken) -> Self {
        Self::begin(role, launch, After::GiveUp, stop)
    }

    fn begin(role: Role, launch: Launch, after: After, stop: &CancellationToken) -> Self {
        let stop = stop.child_token();
        let (report, state) = watch::channel(State::Starting);
        let (tails, tail) = watch::channel(Tail::default());
        let report = Report {
            state: report,
            tail: tails,
        };
        let task = tokio::spawn(keep_running(role, launch, after, report, stop.clone()));
        Self {
            role,
            state,
            tail,
            stop,
            task,
        }
    }

    /// How it is, and how that changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// What its latest process wrote last, now and later.
    #[must_use]
    pub fn tail(&self) -> watch::Receiver<Tail> {
        self.tail.clone()
    }

    /// Waits until it serves for the first time. A service that is stopped before that never does.
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

    /// The first state that is as wanted; `None` when none will come any more.
    async fn reached(&mut self, wanted: impl Fn(&State) -> bool) -> Option<State> {
        self.state
            .wait_for(|state| wanted(state))
            .await
            .ok()
            .map(|state| state.clone())
    }

    /// Ends it and waits for that.
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

/// What is told of a server while it is kept running.
struct Report {
    state: watch::Sender<State>,
    tail: watch::Sender<Tail>,
}

/// What follows a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    StartAgain,
    GiveUp,
}

async fn keep_running(role: Role, launch: Launch, after: After, report: Report, stop: CancellationToken) {
    let mut restarts = Restarts::default();
    let mut awaited = None;
    loop {
        let (death, ready) = match one_life(role, &launch, &report, &stop).await {
            Life::Stopped => break,
            Life::Died { death, ready } => (death, ready),
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
                } else if missing != awaited {
                    tracing::error!("the {role} server is not started: {death}; looking again until there is one");
                }
                awaited = missing;
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

/// Its lines went to the log as they came; here they are for those who filter them out.
fn show_last_lines(role: Role, death: &Death) {
    if !tracing::enabled!(target: "tightwad::child", tracing::Level::DEBUG) {
        for line in &death.last_lines {
            tracing::error!("last lines of the {role} server: {line}");
        }
    }
}

/// How one life of the server ended.
enum Life {
    Stopped,
    Died { death: Death, ready: Option<Duration> },
}

/// What a life is watched with.
struct Watched {
    child: Child,
    http: reqwest::Client,
}

/// Starts the server once its devices are there.
async fn begin(role: Role, launch: &Launch) -> Result<Watched, Death> {
    let launch = match role {
        // It says itself what it computes on, and is asked for that.
        Role::Rpc => launch.clone(),
        _ => devices::choose(role, launch).await.map_err(Cause::NoDevice)?,
    };
    let http = stall::client().map_err(|error| Death::not_started(&error))?;
    let child = Child::spawn(role, &launch).await;
    let child = child.map_err(|error| Death::not_started(&error))?;
    Ok(Watched { child, http })
}

async fn one_life(role: Role, launch: &Launch, report: &Report, stop: &CancellationToken) -> Life {
    let Watched { mut child, http } = match stop.run_until_cancelled(begin(role, launch)).await {
        None => return Life::Stopped,
        Some(Ok(begun)) => begun,
        Some(Err(death)) => return Life::Died { death, ready: None },
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
                    until_ready(role, &http, &launch.url(), &report.state).await;
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
            status = child.wait() => End::Itself(status),
            () = stop.cancelled() => End::Asked,
            stalled = watch_it => End::Stalled(stalled),
        }
    };
    let patience = match (&end, role) {
        (End::Stalled(_), _) => BROKEN_PATIENCE,
        (_, Role::Rpc) => RPC_STOP_PATIENCE,
        _ => STOP_PATIENCE,
    };
    let mut stop_it = async || {
        if let Err(error) = child.stop(patience).await {
            tracing::warn!(pid, "could not wait for the {role} server: {error}");
        }
    };
    let death = match end {
        End::Asked => {
            stop_it().await;
            tracing::info!(pid, "the {role} server is stopped");
            return Life::Stopped;
        }
        End::Stalled(stalled) => {
            tracing::error!(pid, "the {role} server hangs: {stalled}; ending it");
            stop_it().await;
            Cause::Stalled(stalled).into()
        }
        End::Itself(Err(error)) => Death::not_started(&error),
        End::Itself(Ok(status)) => Death::explain(status, child.last_lines().await),
    };
    Life::Died {
        death,
        ready: ready.map(|since| since.elapsed()),
    }
}

/// Why a life is over.
enum End {
    /// Its process has ended.
    Itself(std::io::Result<ExitStatus>),
    /// It is to end.
    Asked,
    /// It does nothing any more.
    Stalled(Stalled),
}

/// Returns once it listens. Connecting to a ggml-rpc-server would make us its only client.
async fn until_listening(launch: &Launch) {
    match launch.ipv4_address() {
        Some(address) => sockets::until_listening(address).await,
        None => std::future::pending().await,
    }
}

/// Returns once `/health` says 200. A model of 100 GB from a slow disk loads for minutes, so there is no bound: the
/// process is alive, and whoever waits sees it in the state and the log.
async fn until_ready(role: Role, http: &reqwest::Client, url: &str, report: &watch::Sender<State>) {
    let health = format!("{url}/health");
    let began = Instant::now();
    let mut told = began;
    loop {
        match http.get(&health).timeout(POLL_PATIENCE).send().await {
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
        if told.elapsed() >= STILL_LOADING {
            told = Instant::now();
            tracing::info!(
                "the {role} server still loads its model ({:.0} s)",
                began.elapsed().as_secs_f32()
            );
        }
        sleep(POLL).await;
    }
}
