//! What the front and the driver share.

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

/// What the driver is told.
pub(super) enum Message {
    /// Something happened.
    Event(Event),
    /// Somebody wants a model.
    Ask {
        id: Id,
        model: Option<Name>,
        command: bool,
        answer: oneshot::Sender<Result<Arc<Life>, Refused>>,
    },
    /// The server of this epoch has read so much of its model, from 0 to 1.
    Loaded(u64, f32),
    /// What is known of a worker.
    Worker(usize, WorkerReport),
}

/// The pool, for whoever asks it.
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

    /// Gets in line.
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
            place: Place {
                id,
                messages: self.messages.clone(),
            },
            answered,
        }
    }

    /// What requests were refused for since the last answer.
    pub(super) fn problems(&self) -> &Problems {
        &self.problems
    }

    /// How it is.
    pub(super) fn report(&self) -> Report {
        self.report.borrow().clone()
    }

    /// Why nobody is answered now.
    pub(super) fn not_ready(&self) -> Refused {
        let now = self.report().now;
        Refused::NotReady {
            model: now.model,
            why: now.problem,
        }
    }

    /// How it is, and how that changes.
    pub(super) fn reports(&self) -> watch::Receiver<Report> {
        self.report.clone()
    }

    /// The server that answers now.
    pub(super) fn life(&self) -> Option<Arc<Life>> {
        self.report.borrow().life.clone()
    }
}

/// A place in the queue; leaving it takes effect by dropping it.
#[derive(Debug)]
pub(super) struct Ticket {
    place: Place,
    answered: oneshot::Receiver<Result<Arc<Life>, Refused>>,
}

impl Ticket {
    /// Waits for its turn.
    pub(super) async fn admitted(self) -> Result<Granted, Refused> {
        let life = self.answered.await.unwrap_or(Err(Refused::Shutdown))?;
        Ok(Granted {
            life,
            _place: Some(self.place),
        })
    }
}

/// Leave to use a server, counted until it is dropped.
#[derive(Debug)]
pub(super) struct Granted {
    pub(super) life: Arc<Life>,
    _place: Option<Place>,
}

impl Granted {
    /// Of someone who is not counted.
    pub(super) fn uncounted(life: Arc<Life>) -> Self {
        Self { life, _place: None }
    }
}

/// A number in the swap machine's books.
struct Place {
    id: Id,
    messages: mpsc::UnboundedSender<Message>,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Place").field(&self.id).finish()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.messages.send(Message::Event(Event::Left(self.id)));
    }
}

/// One llama-server, from its start to its end.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) target: Target,
    key: HeaderValue,
    ended: watch::Sender<Option<Ended>>,
}

impl Life {
    pub(super) fn new(url: &reqwest::Url, key: &Secret) -> Result<Self, TargetError> {
        let target = Target::new(url, Some(key))?;
        let key = target.authorization().cloned().ok_or(TargetError::Key)?;
        Ok(Self {
            target,
            key,
            ended: watch::Sender::new(None),
        })
    }

    /// What the server wants as `Authorization`.
    pub(super) fn key(&self) -> &HeaderValue {
        &self.key
    }

    /// Ends the answers of this server.
    pub(super) fn end(&self, why: Ended) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(why);
            first
        });
    }

    /// Waits until its answers are ended.
    pub(super) async fn ended(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        let why = ended.wait_for(Option::is_some).await;
        why.ok().and_then(|why| why.clone()).unwrap_or(Ended::Shutdown)
    }
}

/// All that is told, from memory.
#[derive(Debug, Clone)]
pub(super) struct Report {
    /// The machine's own words.
    pub(super) now: Snapshot,
    /// How far the load is.
    pub(super) load: Load,
    /// The server's process.
    pub(super) pid: Option<u32>,
    /// Since when `state` is as it is.
    pub(super) since: Instant,
    /// The server that takes requests.
    pub(super) life: Option<Arc<Life>>,
    /// In the order of the config.
    pub(super) workers: Vec<WorkerReport>,
    /// Where the layers are, of the model that runs or is being loaded.
    pub(super) devices: Vec<String>,
    /// Servers started since the coordinator was.
    pub(super) starts: u64,
    /// Last lines of the last server that died.
    pub(super) last_lines: Vec<String>,
}

/// What is known of a worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReport {
    /// Its name in the cluster file.
    pub name: String,
    /// Whether its agent answers; `None` for a worker without an agent.
    pub up: Option<bool>,
    /// Its build of llama.cpp.
    pub build: Option<String>,
    /// The coordinator that holds its lease.
    pub leased_by: Option<String>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}
