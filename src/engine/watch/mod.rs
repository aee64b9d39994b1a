//! Watches the servers: which of them answer, what the target can verify, which drafters fit it.
//!
//! [`Watcher`] probes every server once a second and publishes a [`ClusterSnapshot`] when something changed. A server that
//! does not answer delays neither the probes of the others nor the snapshot. The rest of the engine reads the snapshot only
//! and probes nothing itself.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, SelectAll};
use tracing::Level;

use super::in_flight::InFlightRequests;
use super::slots::DraftSlots;
use super::vocabulary::{self, VocabularyComparison};
use super::{ServerStatus, Verification};
use crate::config::{Backend, Upstream, VerificationMode};
use crate::speculation::Token;
use crate::upstream::{LlamaServer, Props, TextServer, UpstreamError};
use changes::changes;
use probe::{Probe, probes, stalls};
use verification::{backend_name, verification};

mod changes;
mod probe;
mod verification;

/// Completions to draft for at once with a server that does not report its slots; Ollama queues the excess.
const TEXT_SLOTS: usize = 4;
/// Problem of a drafter while its vocabulary is compared with the target's.
const COMPARING: &str = "the vocabularies are being compared";

/// A configured server and its client.
#[derive(Debug, Clone)]
pub struct ConfiguredServer {
    /// The configuration.
    pub config: Upstream,
    /// The client.
    pub client: LlamaServer,
    /// The client that drafts as text; drafters only.
    pub text: Option<TextServer>,
}

/// How a drafter is asked for drafts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DraftProtocol {
    /// In token ids; both servers know the ids below `vocabulary`.
    Tokens {
        /// Size of the target's vocabulary.
        vocabulary: usize,
    },
    /// In text.
    Text {
        /// The text of the target's token that begins a sequence.
        bos: String,
    },
}

impl DraftProtocol {
    /// Whether a drafter's token can be offered to the target.
    #[must_use]
    pub fn knows(&self, token: Token) -> bool {
        match self {
            Self::Tokens { vocabulary } => usize::try_from(token).is_ok_and(|id| id < *vocabulary),
            // The target itself tokenised the text.
            Self::Text { .. } => true,
        }
    }
}

/// The state of all servers at the last probe.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterSnapshot {
    /// The drafters.
    pub drafts: Vec<DrafterSnapshot>,
    /// The target.
    pub target: ServerStatus,
    /// Properties of the target's model. When they change, measurements of the old model no longer hold, even if the target
    /// was never seen down. `None` while it does not answer or if it is not a llama-server.
    pub model: Option<Props>,
    /// How the target verifies.
    pub verification: Verification,
    /// Why it cannot verify, or why no drafter can be used; one sentence.
    pub reason: Option<String>,
    /// Most draft tokens of one step of the target.
    pub n_max: usize,
}

impl ClusterSnapshot {
    /// The protocol of a drafter; `None` while it cannot be used.
    #[must_use]
    pub fn protocol(&self, number: usize) -> Option<&DraftProtocol> {
        self.drafts.get(number)?.protocol.as_ref()
    }
}

/// The state of a drafter at the last probe.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DrafterSnapshot {
    /// Its health.
    pub status: ServerStatus,
    /// How to ask it for drafts; `None` while it cannot be used.
    pub protocol: Option<DraftProtocol>,
}

/// Probes the servers and keeps what does not change while they stay the same, such as the comparison of vocabularies.
#[derive(Debug)]
pub struct Watcher {
    drafts: Vec<WatchedDrafter>,
    target: Option<ConfiguredServer>,
    mode: VerificationMode,
    in_flight: InFlightRequests,
    stall_after: Duration,
}

#[derive(Debug)]
struct WatchedDrafter {
    server: ConfiguredServer,
    slots: DraftSlots,
    /// The last pair of servers whose vocabularies were compared, and the result.
    compared: Option<PairComparison>,
    /// The drafter was probed since then, so a failed comparison may succeed now.
    compare_again: bool,
    comparing: bool,
}

/// Properties of drafter and target: they change when one of them is replaced.
type ServerPair = (Props, Props);

type PairComparison = (ServerPair, Result<VocabularyComparison, UpstreamError>);

impl Watcher {
    /// Watches these servers; `slots` has an entry per drafter. The target counts as stalled when it has requests and takes no
    /// task for `stall_after`.
    #[must_use]
    pub fn new(
        drafts: Vec<ConfiguredServer>,
        target: Option<ConfiguredServer>,
        slots: Vec<DraftSlots>,
        mode: VerificationMode,
        in_flight: InFlightRequests,
        stall_after: Duration,
    ) -> Self {
        let draft = |(server, slots)| WatchedDrafter {
            server,
            slots,
            compared: None,
            compare_again: false,
            comparing: false,
        };
        Self {
            drafts: drafts.into_iter().zip(slots).map(draft).collect(),
            target,
            mode,
            in_flight,
            stall_after,
        }
    }

    /// The snapshot before the first probe.
    #[must_use]
    pub fn initial_snapshot(&self) -> ClusterSnapshot {
        self.evaluate(&Probe::before(self.target.as_ref()), false, &self.initial_probes())
            .0
    }

    fn initial_probes(&self) -> Vec<Probe> {
        self.drafts
            .iter()
            .map(|draft| Probe::before(Some(&draft.server)))
            .collect()
    }

    /// Probes until it is dropped, and publishes each change.
    pub async fn run(mut self, snapshot: tokio::sync::watch::Sender<ClusterSnapshot>) {
        let mut target_probes = probes(self.target.clone());
        let mut draft_probes: SelectAll<_> = (self.drafts.iter().enumerate())
            .map(|(number, draft)| {
                probes(Some(draft.server.clone()))
                    .map(move |probe| (number, probe))
                    .boxed()
            })
            .collect();
        let mut stalls = stalls(self.target.clone(), self.in_flight.clone(), self.stall_after);
        let mut target = Probe::before(self.target.as_ref());
        let mut stalled = false;
        let mut drafts = self.initial_probes();
        let mut comparisons: FuturesUnordered<BoxFuture<'static, (usize, PairComparison)>> = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(probe) = target_probes.next() => target = probe,
                Some(now) = stalls.next() => stalled = now,
                Some((number, probe)) = draft_probes.next() => {
                    self.drafts[number].resize_slots(&probe);
                    self.drafts[number].compare_again = true;
                    drafts[number] = probe;
                }
                Some((number, compared)) = comparisons.next() => {
                    self.drafts[number].comparing = false;
                    self.drafts[number].compared = Some(compared);
                }
            }
            let (seen, missing) = self.evaluate(&target, stalled, &drafts);
            for (number, pair) in missing {
                comparisons.extend(self.compare(number, pair));
            }
            snapshot.send_if_modified(|old| {
                if *old == seen {
                    return false;
                }
                for (level, sentence) in changes(old, &seen) {
                    if level == Level::WARN {
                        tracing::warn!("{sentence}");
                    } else {
                        tracing::info!("{sentence}");
                    }
                }
                *old = seen;
                true
            });
        }
    }

    /// The snapshot that the last probes give, and the pairs of servers that have to be compared.
    fn evaluate(&self, target: &Probe, stalled: bool, probes: &[Probe]) -> (ClusterSnapshot, Vec<(usize, ServerPair)>) {
        let mut snapshot = ClusterSnapshot {
            target: target.status.clone(),
            model: target.props.clone(),
            ..ClusterSnapshot::default()
        };
        if stalled && target.status.healthy {
            snapshot.target.healthy = false;
            snapshot.target.problem = Some(format!(
                "it has taken no task for {} s, though it answers how it is: it hangs, or reads a very long prompt",
                self.stall_after.as_secs()
            ));
        }
        match verification(self.mode, self.target.as_ref(), target) {
            Ok((verification, n_max)) => {
                snapshot.verification = verification;
                snapshot.n_max = n_max;
            }
            Err(reason) => snapshot.reason = Some(reason),
        }
        let mut missing = Vec::new();
        for (number, (draft, probe)) in self.drafts.iter().zip(probes).enumerate() {
            let mut seen = DrafterSnapshot {
                status: probe.status.clone(),
                protocol: None,
            };
            if snapshot.verification != Verification::None && probe.status.problem.is_none() {
                match draft.fits(probe, snapshot.verification, target.props.as_ref()) {
                    DrafterFit::Fits { protocol, but } => {
                        seen.protocol = Some(protocol);
                        seen.status.problem = but;
                    }
                    DrafterFit::Not(why) => seen.status.problem = Some(why),
                    DrafterFit::Unknown { why, pair } => {
                        seen.status.problem = Some(why);
                        missing.extend(pair.map(|pair| (number, *pair)));
                    }
                }
            }
            snapshot.drafts.push(seen);
        }
        if snapshot.verification != Verification::None && !snapshot.drafts.iter().any(|draft| draft.protocol.is_some())
        {
            let mut problems = snapshot.drafts.iter().filter(|draft| draft.status.healthy);
            snapshot.reason = if self.drafts.is_empty() {
                Some("no drafter is configured (`proxy.draft`), so only text that comes again is drafted".into())
            } else {
                problems.find_map(|draft| draft.status.problem.clone())
            };
        }
        (snapshot, missing)
    }

    fn compare(&mut self, number: usize, pair: ServerPair) -> Option<BoxFuture<'static, (usize, PairComparison)>> {
        let target = self.target.as_ref()?.client.clone();
        let draft = &mut self.drafts[number];
        if draft.comparing {
            return None;
        }
        draft.comparing = true;
        draft.compare_again = false;
        let client = draft.server.client.clone();
        Some(async move { (number, (pair, vocabulary::compare(&client, &target).await)) }.boxed())
    }
}

/// Whether a drafter can draft for the target.
enum DrafterFit {
    Fits {
        protocol: DraftProtocol,
        but: Option<String>,
    },
    Not(String),
    Unknown {
        why: String,
        pair: Option<Box<ServerPair>>,
    },
}

impl WatchedDrafter {
    /// Sets the number of completions that the drafter can draft for at once, if it is known.
    fn resize_slots(&self, probe: &Probe) {
        match (&probe.props, self.server.config.backend) {
            (Some(props), _) => self.slots.resize(props.total_slots),
            (None, Backend::Llamacpp) => {}
            (None, _) => self.slots.resize(TEXT_SLOTS),
        }
    }

    fn fits(&self, probe: &Probe, verification: Verification, target: Option<&Props>) -> DrafterFit {
        let text = || match target {
            Some(target) if verification == Verification::Attached => Some(DraftProtocol::Text {
                bos: target.bos_token.clone(),
            }),
            _ => None,
        };
        if self.server.config.backend != Backend::Llamacpp {
            return match text() {
                Some(protocol) => DrafterFit::Fits { protocol, but: None },
                None => DrafterFit::Not(format!(
                    "a drafter with `backend: {}` drafts as text, and an answer in rounds ({}) takes token ids only; run the \
                     draft model with llama-server",
                    backend_name(self.server.config.backend),
                    verification.name()
                )),
            };
        }
        let Some(props) = &probe.props else {
            return DrafterFit::Unknown {
                why: COMPARING.into(),
                pair: None,
            };
        };
        let Some(target) = target else {
            // A scoring server does not report its vocabulary; the trial of the target compares a text instead.
            return DrafterFit::Fits {
                protocol: DraftProtocol::Tokens { vocabulary: usize::MAX },
                but: None,
            };
        };
        let pair = (props.clone(), target.clone());
        match &self.compared {
            Some((compared, outcome)) if *compared == pair => match outcome {
                Ok(VocabularyComparison::Same { target_size }) => DrafterFit::Fits {
                    protocol: DraftProtocol::Tokens {
                        vocabulary: *target_size,
                    },
                    but: None,
                },
                Ok(VocabularyComparison::Different(difference)) => match text() {
                    Some(protocol) => DrafterFit::Fits {
                        protocol,
                        but: Some(format!("it drafts as text: {difference}")),
                    },
                    None => DrafterFit::Not(format!(
                        "it could draft as text only, and an answer in rounds ({}) takes token ids only: {difference}",
                        verification.name()
                    )),
                },
                Err(error) => DrafterFit::Unknown {
                    why: format!("the vocabularies could not be compared: {error}"),
                    pair: self.compare_again.then(|| Box::new(pair)),
                },
            },
            _ => DrafterFit::Unknown {
                why: COMPARING.into(),
                pair: Some(Box::new(pair)),
            },
        }
    }
}
