//! Reports the state of this process to systemd (`Type=notify`, `WatchdogSec=`): readiness, a status line, and the watchdog.
//!
//! Sends nothing if `NOTIFY_SOCKET` is not set. Never sends READY after STOPPING.

use std::convert::Infallible;
use std::sync::Arc;

use futures_util::future::{pending, select_all};
use parking_lot::Mutex;
use sd_notify::NotifyState;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::service::State;

/// Variables by which systemd addresses this process, and not its children.
const NOTIFY_VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// Reports the state of this process to systemd.
#[derive(Debug, Clone, Default)]
pub struct Notifier(Arc<Mutex<Reported>>);

/// The last report.
#[derive(Debug, Default)]
struct Reported {
    ready: bool,
    stopping: bool,
    status: String,
}

/// Status lines for servers that are kept running.
#[derive(Debug, Clone)]
pub struct StatusLines {
    /// While they start: `loading qwen3-32b`.
    pub starting: String,
    /// While all of them serve: `qwen3-32b serves`.
    pub serving: String,
}

impl Notifier {
    /// Reports that this process is ready. Only the first call has an effect.
    pub fn ready(&self) {
        let mut reported = self.0.lock();
        if !reported.ready && !reported.stopping {
            reported.ready = true;
            send(&[NotifyState::Ready]);
        }
    }

    /// Reports a status line, if it has changed.
    pub fn status(&self, status: &str) {
        let mut reported = self.0.lock();
        if reported.status != status {
            status.clone_into(&mut reported.status);
            // A line break would begin another message.
            let line: Vec<&str> = status.lines().map(str::trim).collect();
            send(&[NotifyState::Status(&line.join("; "))]);
        }
    }

    /// Reports that this process is ending.
    pub fn stopping(&self) {
        let mut reported = self.0.lock();
        reported.stopping = true;
        send(&[NotifyState::Stopping]);
    }

    /// Feeds systemd's watchdog, if it is on. Call this inside of the runtime that does the work: a blocked runtime then stops
    /// feeding it.
    pub fn watch(&self) {
        let Some(patience) = sd_notify::watchdog_enabled().filter(|patience| !patience.is_zero()) else {
            return;
        };
        tokio::spawn(async move {
            let mut tick = interval(patience / 2);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                send(&[NotifyState::Watchdog]);
            }
        });
    }

    /// Reports the state of the servers, and that this process is ready as soon as all of them are.
    pub async fn follow(&self, lines: &StatusLines, mut servers: Vec<watch::Receiver<State>>) -> Infallible {
        let mut attempts = vec![1_u32; servers.len()];
        loop {
            let mut problem = None;
            for (server, attempt) in servers.iter_mut().zip(&mut attempts) {
                let sentence = match &*server.borrow_and_update() {
                    State::Ready { .. } => None,
                    State::Starting | State::Loading if *attempt == 1 => Some(lines.starting.clone()),
                    State::Starting | State::Loading => Some(format!("{}, attempt {attempt}", lines.starting)),
                    State::Waiting { death, pause } => {
                        *attempt = attempt.saturating_add(1);
                        let seconds = pause.as_secs_f32();
                        Some(match death.missing() {
                            Some(missing) => format!("{missing}; looking again in {seconds:.1} s"),
                            None => format!("restarting in {seconds:.1} s, attempt {attempt}: {death}"),
                        })
                    }
                    State::Stopped => Some("stopped".to_owned()),
                    State::GaveUp { death } => Some(format!("gave up: {death}")),
                };
                problem = problem.or(sentence);
            }
            if problem.is_none() {
                self.ready();
                attempts.fill(1);
            }
            self.status(problem.as_deref().unwrap_or(&lines.serving));
            let changes = servers.iter_mut().map(|server| Box::pin(server.changed()));
            if select_all(changes).await.0.is_err() {
                return pending().await;
            }
        }
    }
}

/// Removes systemd's variables from a child's environment: llama-server would use them itself.
pub fn hide_from(command: &mut Command) {
    for variable in NOTIFY_VARIABLES {
        command.env_remove(variable);
    }
}

fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("cannot report the state to systemd: {error}");
    }
}
