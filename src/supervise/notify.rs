//! What systemd is told of this process (`Type=notify`, `WatchdogSec=`): that it serves, what goes on, that it lives.
//!
//! Where `NOTIFY_SOCKET` is not set nobody has asked, and nothing is told.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::{pending, select_all};
use sd_notify::NotifyState;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::service::State;

/// What systemd asks of this process alone.
const OF_THIS_PROCESS: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// Tells systemd how this process is.
#[derive(Debug, Clone, Default)]
pub struct Notifier(Arc<Mutex<Told>>);

/// What was told last.
#[derive(Debug, Default)]
struct Told {
    ready: bool,
    stopping: bool,
    status: String,
}

/// What servers that are kept running are about.
#[derive(Debug, Clone)]
pub struct Words {
    /// While they start: `loading qwen3-32b`.
    pub starting: String,
    /// When all of them do: `qwen3-32b serves`.
    pub serving: String,
}

impl Notifier {
    /// It serves. Only the first time is told.
    pub fn ready(&self) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !told.ready && !told.stopping {
            told.ready = true;
            tell(&[NotifyState::Ready]);
        }
    }

    /// What it does, or waits for. Only changes are told.
    pub fn status(&self, status: &str) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.status != status {
            status.clone_into(&mut told.status);
            // A second line would be another message.
            let line: Vec<&str> = status.lines().map(str::trim).collect();
            tell(&[NotifyState::Status(&line.join("; "))]);
        }
    }

    /// It was asked to end.
    pub fn stopping(&self) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.stopping = true;
        tell(&[NotifyState::Stopping]);
    }

    /// Tells systemd that this process lives, for as long as its runtime gets round to it, where it wants to hear that. To
    /// be called within the runtime that does the work.
    pub fn watch(&self) {
        let Some(patience) = sd_notify::watchdog_enabled().filter(|patience| !patience.is_zero()) else {
            return;
        };
        tokio::spawn(async move {
            let mut tick = interval(patience / 2);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                tell(&[NotifyState::Watchdog]);
            }
        });
    }

    /// Tells how servers are, and that this process is ready as soon as all of them are.
    pub async fn follow(&self, words: &Words, mut servers: Vec<watch::Receiver<State>>) -> Infallible {
        let mut attempts = vec![1_u32; servers.len()];
        loop {
            let mut hitch = None;
            for (server, attempt) in servers.iter_mut().zip(&mut attempts) {
                let sentence = match &*server.borrow_and_update() {
                    State::Ready { .. } => None,
                    State::Starting | State::Loading if *attempt == 1 => Some(words.starting.clone()),
                    State::Starting | State::Loading => Some(format!("{}, attempt {attempt}", words.starting)),
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
                hitch = hitch.or(sentence);
            }
            if hitch.is_none() {
                self.ready();
                attempts.fill(1);
            }
            self.status(hitch.as_deref().unwrap_or(&words.serving));
            let changes = servers.iter_mut().map(|server| Box::pin(server.changed()));
            if select_all(changes).await.0.is_err() {
                return pending().await;
            }
        }
    }
}

/// Keeps what systemd asks of this process from a child: llama-server would take it for meant for itself.
pub fn hide_from(command: &mut Command) {
    for variable in OF_THIS_PROCESS {
        command.env_remove(variable);
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("systemd cannot be told how this is: {error}");
    }
}
