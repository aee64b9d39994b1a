//! The state that the HTTP front and the driver share.
//!
//! Requests enter the queue as a [`Ticket`] and hold an [`Admission`] while they use a server. Invariant: dropping either
//! tells the swap machine that the request has left.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::http::HeaderValue;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use super::load::Load;
use crate::config::Secret;
use crate::http::target::{Target, TargetError};
use crate::observe::problems::Problems;
use crate::pool::swap::{Ended, Event, Id, Name, Refused, Snapshot};

/// A message to the driver.
pub(super) enum Message {
    /// An event for the swap machine.
    Event(Event),
    /// A request or command asks for a model.
    Ask {
        id: Id,
        model: Option<Name>,
        command: bool,
        answer: oneshot::Sender<Result<Arc<ServerInstance>, Refused>>,
    },
    /// The share of its model that the server of this epoch has loaded, from 0 to 1.
    Loaded(u64, f32),
    /// The state of a worker.
    Worker(usize, WorkerReport),
}

/// A handle of the pool.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    messages: mpsc::UnboundedSender<Message>,
    report: watch::Receiver<Report>,
    last_id: Arc<AtomicU64>,
    problems: Arc<Problems>,
}

impl Pool {
    pub(super) fn new(messages: mpsc::UnboundedSender<Message>, report: watch::Receiver<Report>) -> Self {
        Self {
            messages,
            report,
            last_id: Arc::default(),
            problems: Arc::default(),
        }
    }

    /// Enters the queue.
    pub(super) fn ask(&self, model: Option<Name>, command: bool) -> Ticket {
        let id = self.last_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        // A driver that has ended drops the sender, which refuses.
        let _ = self.messages.send(Message::Ask {
            id,
            model,
            command,
            answer,
        });
        Ticket {
            entry: QueueEntry {
                id,
                messages: self.messages.clone(),
            },
            answered,
        }
    }

    /// The reasons for refusals since the last answer.
    pub(super) fn problems(&self) -> &Problems {
        &self.problems
    }

    /// The present state.
    pub(super) fn report(&self) -> Report {
        self.report.borrow().clone()
    }

    /// The refusal while no model is ready.
    pub(super) fn not_ready(&self) -> Refused {
        let now = self.report().now;
        Refused::NotReady {
            model: now.model,
            why: now.problem,
        }
    }

    /// The present state and its changes.
    pub(super) fn reports(&self) -> watch::Receiver<Report> {
        self.report.clone()
    }

    /// The server that takes requests now.
    pub(super) fn instance(&self) -> Option<Arc<ServerInstance>> {
        self.report.borrow().instance.clone()
    }
}

/// A request that waits in the queue; dropping it leaves the queue.
#[derive(Debug)]
pub(super) struct Ticket {
    entry: QueueEntry,
    answered: oneshot::Receiver<Result<Arc<ServerInstance>, Refused>>,
}

impl Ticket {
    /// Waits until the request is admitted or refused.
    pub(super) async fn admitted(self) -> Result<Admission, Refused> {
        let instance = self.answered.await.unwrap_or(Err(Refused::Shutdown))?;
        Ok(Admission {
            instance,
            _entry: Some(self.entry),
        })
    }
}

/// Permission to use a server. The request counts as running until this is dropped.
#[derive(Debug)]
pub(super) struct Admission {
    pub(super) instance: Arc<ServerInstance>,
    _entry: Option<QueueEntry>,
}

impl Admission {
    /// An admission that does not count, for a drafter's requests.
    pub(super) fn uncounted(instance: Arc<ServerInstance>) -> Self {
        Self { instance, _entry: None }
    }
}

/// A request as the swap machine counts it.
struct QueueEntry {
    id: Id,
    messages: mpsc::UnboundedSender<Message>,
}

impl fmt::Debug for QueueEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QueueEntry").field(&self.id).finish()
    }
}

impl Drop for QueueEntry {
    fn drop(&mut self) {
        let _ = self.messages.send(Message::Event(Event::Left(self.id)));
    }
}

/// One llama-server, from its start to its end.
#[derive(Debug)]
pub(super) struct ServerInstance {
    pub(super) target: Target,
    key: HeaderValue,
    ended: watch::Sender<Option<Ended>>,
}

impl ServerInstance {
    pub(super) fn new(url: &reqwest::Url, key: &Secret) -> Result<Self, TargetError> {
        let target = Target::new(url, Some(key))?;
        let key = target.authorization().cloned().ok_or(TargetError::Key)?;
        Ok(Self {
            target,
            key,
            ended: watch::Sender::new(None),
        })
    }

    /// The value of `Authorization` that the server expects.
    pub(super) fn key(&self) -> &HeaderValue {
        &self.key
    }

    /// Ends all answers of this server; the first reason counts.
    pub(super) fn end(&self, why: Ended) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(why);
            first
        });
    }

    /// Waits until the answers of this server are ended.
    pub(super) async fn ended(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        let why = ended.wait_for(Option::is_some).await;
        why.ok().and_then(|why| why.clone()).unwrap_or(Ended::Shutdown)
    }
}

/// State of the pool, as the status shows it.
#[derive(Debug, Clone)]
pub(super) struct Report {
    /// State of the swap machine.
    pub(super) now: Snapshot,
    /// Progress of the load.
    pub(super) load: Load,
    /// Process id of the server.
    pub(super) pid: Option<u32>,
    /// When `state` last changed.
    pub(super) since: Instant,
    /// The server that takes requests.
    pub(super) instance: Option<Arc<ServerInstance>>,
    /// The workers, in the order of the config.
    pub(super) workers: Vec<WorkerReport>,
    /// One line per device: the layers it holds of the model that runs or is being loaded.
    pub(super) devices: Vec<String>,
    /// Servers started by this coordinator process.
    pub(super) starts: u64,
    /// Last log lines of the last server that died.
    pub(super) last_lines: Vec<String>,
}

/// State of a worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReport {
    /// Its name in the cluster file.
    pub name: String,
    /// Whether its agent answers; `None` if it has no agent.
    pub up: Option<bool>,
    /// Its build of llama.cpp.
    pub build: Option<String>,
    /// The holder of its lease.
    pub leased_by: Option<String>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}
