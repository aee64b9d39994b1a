//! Attaches drafters to running completions: the I/O around [`crate::speculation`].
//!
//! Drafting is optional at every moment: no failure here delays or changes an answer. The proxy calls [`Engine::start`] to
//! watch the servers, [`Engine::attach`] for the drafting session of a completion, [`Engine::rounds`] for an answer whose
//! target no drafter can attach to, and [`Engine::status`] for the status page.

mod attach;
mod batch_load;
mod busy_clock;
mod calibrate;
mod draft_server;
mod draft_stream;
mod drafter;
mod in_flight;
mod prediction;
mod probe;
mod rounds;
mod slots;
mod step_timer;
mod verifier;
mod vocabulary;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::OptionFuture;
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use tokio::sync::watch as channel;
use tokio::task::AbortHandle;

use crate::background::{contained, kept_running};
use crate::config::{MaxDraftTokens, Secret, Upstream, VerificationMode};
use crate::speculation::{AdaptivePolicy, DrafterOutlook};
use crate::upstream::{LlamaServer, TextServer};
use batch_load::BatchLoad;
use busy_clock::BusyClock;
use calibrate::MeasuredServers;
use in_flight::InFlightRequests;
pub use in_flight::RequestGuard;
pub use rounds::Drafting;
use rounds::RoundsTarget;
use slots::DraftSlots;
pub use verifier::{Endpoint, Prompt, PromptContent, PromptRequest, Verdict, Verifier, VerifyContext, VerifyRequest};
use watch::{ClusterSnapshot, ConfiguredServer, Watcher};

/// The proxy's configuration as far as the engine needs it, with keys already read from their files.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The drafters and their API keys.
    pub drafts: Vec<(Upstream, Option<Secret>)>,
    /// The target and its API key.
    pub target: Option<(Upstream, Option<Secret>)>,
    /// Most draft tokens per step.
    pub max_draft_tokens: MaxDraftTokens,
    /// How the target is to verify.
    pub verification: VerificationMode,
    /// Verifies drafts where no drafter can attach to the target, see [`crate::rounds::verifier`].
    pub verifier: Option<Arc<dyn Verifier>>,
    /// A llama-server that takes no task for longer counts as stalled. It must exceed a pass over one batch of a prompt.
    pub stall_after: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            drafts: Vec::new(),
            target: None,
            max_draft_tokens: MaxDraftTokens::default(),
            verification: VerificationMode::default(),
            verifier: None,
            stall_after: Duration::from_secs(60),
        }
    }
}

/// Targets with shorter plain steps get no drafts: following them costs more than drafts save.
const FASTEST_STEP: Duration = Duration::from_micros(1500);

/// Draft servers and a target, watched.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<EngineState>,
    drafts: Vec<ConfiguredServer>,
    target: Option<LlamaServer>,
    /// The target, if it can be asked in rounds.
    rounds: Option<Arc<RoundsTarget>>,
    in_flight: InFlightRequests,
    watcher: AbortHandle,
}

/// State that all drafted completions of an engine share.
#[derive(Debug)]
struct EngineState {
    snapshot: channel::Sender<ClusterSnapshot>,
    /// Of each drafter.
    slots: Vec<DraftSlots>,
    batch_load: BatchLoad,
    /// Of each drafter.
    busy_clock: Vec<BusyClock>,
    policy: Mutex<AdaptivePolicy>,
    measured: Mutex<MeasuredServers>,
    totals: Mutex<Counts>,
    /// `max_draft_tokens`.
    cap: usize,
}

impl EngineState {
    fn policy(&self) -> MutexGuard<'_, AdaptivePolicy> {
        self.policy.lock()
    }

    fn measured(&self) -> MutexGuard<'_, MeasuredServers> {
        self.measured.lock()
    }

    fn totals(&self) -> MutexGuard<'_, Counts> {
        self.totals.lock()
    }
}

impl Engine {
    /// Starts to watch the servers in the background and returns at once. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the system cannot set up an HTTP client.
    pub fn start(settings: Settings) -> Result<Arc<Self>, reqwest::Error> {
        let server = |(config, key): (Upstream, Option<Secret>)| {
            Ok(ConfiguredServer {
                client: LlamaServer::new(&config.url, key)?.with_draft_key(config.draft_key.clone()),
                config,
                text: None,
            })
        };
        let draft_server = |(config, key): (Upstream, Option<Secret>)| {
            let text = TextServer::new(&config.url, key.clone(), config.backend, config.model_name.clone())?;
            let text = Some(text);
            Ok(ConfiguredServer {
                text,
                ..server((config, key))?
            })
        };
        let target = settings.target.map(server).transpose()?;
        let drafts = settings
            .drafts
            .into_iter()
            .map(draft_server)
            .collect::<Result<Vec<_>, reqwest::Error>>()?;
        let slots: Vec<DraftSlots> = drafts.iter().map(|_| DraftSlots::default()).collect();
        let rounds = settings.verifier.map(|verifier| Arc::new(RoundsTarget::new(verifier)));
        let in_flight = InFlightRequests::default();
        let watcher = {
            let (drafts, target, slots, in_flight) = (drafts.clone(), target.clone(), slots.clone(), in_flight.clone());
            let (mode, stall_after) = (settings.verification, settings.stall_after);
            move || {
                let (drafts, target, slots) = (drafts.clone(), target.clone(), slots.clone());
                Watcher::new(drafts, target, slots, mode, in_flight.clone(), stall_after)
            }
        };
        let shared = Arc::new(EngineState {
            snapshot: channel::Sender::new(watcher().initial_snapshot()),
            slots,
            batch_load: BatchLoad::default(),
            busy_clock: drafts.iter().map(|_| BusyClock::default()).collect(),
            policy: Mutex::default(),
            measured: Mutex::default(),
            totals: Mutex::default(),
            cap: match settings.max_draft_tokens {
                MaxDraftTokens::Auto => usize::MAX,
                MaxDraftTokens::AtMost(n) => usize::from(n),
            },
        });
        let background = {
            let (shared, drafts, target, rounds) = (shared.clone(), drafts.clone(), target.clone(), rounds.clone());
            async move {
                let clients = || drafts.iter().map(|server| server.client.clone()).collect();
                let watching = kept_running("the watching of the servers", || watcher().run(shared.snapshot.clone()));
                let measuring = OptionFuture::from(target.as_ref().map(|target| {
                    let measure = || calibrate::run(shared.clone(), target.client.clone(), drafts.clone());
                    kept_running("the measuring of the servers", measure)
                }));
                let trying = OptionFuture::from(rounds.as_ref().map(|rounds| {
                    let try_out = || RoundsTarget::watch(rounds.clone(), shared.clone(), clients());
                    kept_running("the trying of the target", try_out)
                }));
                tokio::join!(watching, measuring, trying);
            }
        };
        Ok(Arc::new(Self {
            watcher: tokio::spawn(background).abort_handle(),
            shared,
            drafts,
            target: target.map(|server| server.client),
            rounds,
            in_flight,
        }))
    }

    /// Counts a request of the target until the guard is dropped.
    #[must_use]
    pub fn track_request(&self) -> RequestGuard {
        self.in_flight.begin()
    }

    /// A drafting session for a completion that is about to be sent to the target, or `None` when its target cannot verify
    /// drafts or there is nothing to draft with. The session begins by itself when the completion does, waits for a
    /// drafter that is down, and ends when the value is dropped.
    #[must_use]
    pub fn attach(&self, prediction: Option<String>) -> Option<Attachment> {
        let attached = self.shared.snapshot.borrow().verification == Verification::Attached;
        if self.shared.cap == 0 || !attached || self.too_fast() {
            return None;
        }
        let servers = attach::SessionServers {
            drafts: self.drafts.clone(),
            target: self.target.clone()?,
        };
        let key = new_key();
        let counts = channel::Sender::new(Counts::default());
        let progress = counts.subscribe();
        let run = attach::run(self.shared.clone(), servers, key.clone(), prediction, counts);
        Some(Attachment {
            key,
            progress,
            task: tokio::spawn(async { drop(contained("the drafting of an answer", run).await) }).abort_handle(),
        })
    }

    /// Whether a step of the target ends before a drafter can be asked.
    fn too_fast(&self) -> bool {
        let plain = self.shared.policy().plain_step();
        plain.is_some_and(|step| step < FASTEST_STEP)
    }

    /// The target as last seen.
    #[must_use]
    pub fn target(&self) -> ServerStatus {
        self.shared.snapshot.borrow().target.clone()
    }

    /// The drafters as last seen.
    #[must_use]
    pub fn drafters(&self) -> Vec<ServerStatus> {
        let snapshot = self.shared.snapshot.borrow();
        snapshot.drafts.iter().map(|draft| draft.status.clone()).collect()
    }

    /// How drafts are verified now.
    #[must_use]
    pub fn verification(&self) -> Verification {
        let verification = self.shared.snapshot.borrow().verification;
        let rounds = self.asked_in_rounds(verification);
        if rounds.is_some_and(|rounds| rounds.reason().is_some()) {
            return Verification::None;
        }
        verification
    }

    fn asked_in_rounds(&self, verification: Verification) -> Option<&RoundsTarget> {
        self.rounds.as_deref().filter(|_| verification.is_in_rounds())
    }

    /// The state of the servers and the drafting so far.
    #[must_use]
    pub fn status(&self) -> Status {
        let snapshot = self.shared.snapshot.borrow().clone();
        let measuring = *self.shared.measured() != MeasuredServers::all(&snapshot);
        let (mut verification, mut reason) = (snapshot.verification, snapshot.reason);
        if let Some(rounds) = self.asked_in_rounds(verification) {
            if let Some(flaw) = rounds.reason() {
                (verification, reason) = (Verification::None, Some(flaw));
            } else if reason.is_none() {
                reason = rounds.drafter_reason();
            }
        }
        if self.shared.cap == 0 {
            reason = Some("`max_draft_tokens` is 0".into());
        } else if verification == Verification::Attached && self.too_fast() {
            reason =
                Some("a step of the target takes less than the round trips of drafting, so nothing is drafted".into());
        }
        let n_max = self.shared.cap.min(snapshot.n_max);
        let policy = self.shared.policy().clone();
        let drafted = |(number, draft): (usize, watch::DrafterSnapshot)| DraftStatus {
            // A draft that is down promises nothing.
            outlook: policy.outlook(number, n_max).filter(|_| draft.status.healthy),
            server: draft.status,
        };
        Status {
            drafts: snapshot.drafts.into_iter().enumerate().map(drafted).collect(),
            target: snapshot.target,
            verification,
            reason,
            measuring,
            step_ms: policy.step_costs(),
            round_trip_ms: policy.round_trip().as_secs_f64() * 1e3,
            counts: *self.shared.totals(),
        }
    }
}

/// An unguessable key for a completion; whoever knows it can read the completion.
fn new_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// The drafting of one completion; dropping it ends it.
#[derive(Debug)]
pub struct Attachment {
    key: String,
    progress: channel::Receiver<Counts>,
    task: AbortHandle,
}

impl Attachment {
    /// The value of the request header `X-Draft-Key`. It is unguessable; whoever knows it can read the completion.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The counts so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        *self.progress.borrow()
    }

    /// The counts of a completion whose answer has come in full: waits a moment for the target's last word. The future
    /// does not keep the drafting alive.
    pub fn settled(&self) -> impl Future<Output = Counts> + Send + 'static {
        let mut progress = self.progress.clone();
        async move {
            let ended = async { while progress.changed().await.is_ok() {} };
            let _late = tokio::time::timeout(Duration::from_millis(250), ended).await;
            *progress.borrow()
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Counted by the target, but for the tokens of predictions, which it cannot tell from others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Passes of the target model in which it generated.
    pub steps: u64,
    /// Draft tokens that the target verified.
    pub drafted: u64,
    /// Draft tokens that the target kept.
    pub accepted: u64,
    /// Tokens that the target generated.
    pub generated: u64,
    /// Of the accepted tokens, those that the client had predicted (`prediction` of the request).
    pub accepted_prediction_tokens: u64,
    /// Tokens of the client's prediction that the target verified and did not keep.
    pub rejected_prediction_tokens: u64,
}

impl Counts {
    /// Adds what has come since `old`.
    fn add(&mut self, old: Self, new: Self) {
        self.steps += new.steps.saturating_sub(old.steps);
        self.drafted += new.drafted.saturating_sub(old.drafted);
        self.accepted += new.accepted.saturating_sub(old.accepted);
        self.generated += new.generated.saturating_sub(old.generated);
        self.accepted_prediction_tokens += new
            .accepted_prediction_tokens
            .saturating_sub(old.accepted_prediction_tokens);
        self.rejected_prediction_tokens += new
            .rejected_prediction_tokens
            .saturating_sub(old.rejected_prediction_tokens);
    }
}

/// How the target verifies drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verification {
    /// Drafts attach to the running completion: our patch of llama-server.
    Attached,
    /// The proxy asks in rounds, with a prompt for each length of the draft: a stock llama-server with several slots.
    FanOut,
    /// The proxy asks in rounds for the likeliest tokens of a prompt: vLLM, SGLang.
    Scored,
    /// The target cannot verify drafts, or there is no drafter; it is passed through.
    #[default]
    None,
    /// A kind that only another version of the proxy knows. This one reads it and never sets it.
    #[serde(other)]
    Unknown,
}

impl Verification {
    /// As the status and the metrics call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::FanOut => "fan-out",
            Self::Scored => "scored",
            Self::None => "none",
            Self::Unknown => "unknown",
        }
    }
}

/// Health of one server as last seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerStatus {
    /// Its base URL.
    pub url: String,
    /// The model's name as configured, else as the server tells it.
    pub model: Option<String>,
    /// Whether it answers.
    pub healthy: bool,
    /// Why not, or what is odd about it; one sentence.
    pub problem: Option<String>,
}

/// A drafter as last seen, and what it is worth.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DraftStatus {
    /// Its health.
    #[serde(flatten)]
    pub server: ServerStatus,
    /// Summary of its measurements; `None` before it drafted.
    pub outlook: Option<DrafterOutlook>,
}

/// The engine's part of `/v1/tightwad/status`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Status {
    /// The drafters.
    pub drafts: Vec<DraftStatus>,
    /// The target.
    pub target: ServerStatus,
    /// How drafts are verified.
    pub verification: Verification,
    /// Why there is no verification, and what would change that; one sentence.
    pub reason: Option<String>,
    /// Whether the target or a drafter has come up and is still to be measured.
    pub measuring: bool,
    /// Milliseconds of a step of the target by the number of draft tokens that it verifies.
    pub step_ms: BTreeMap<usize, f64>,
    /// Milliseconds from asking the target to its answer.
    pub round_trip_ms: f64,
    /// Sum over all ended and running completions.
    pub counts: Counts,
}
