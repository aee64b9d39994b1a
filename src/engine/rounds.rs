//! State that the engine shares with answers in rounds ([`crate::rounds`]): the target, the drafters, and what was measured of them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use tokio::sync::watch as channel;
use tokio::time::{Instant, timeout_at};

use super::prediction;
use super::probe::{PROBE_TEXT, ProbeError, probe};
use super::slots::SlotLease;
use super::verifier::{Verifier, VerifyContext};
use super::watch::{ClusterSnapshot, ConfiguredServer};
use super::{Counts, Engine, EngineState, Verification};
use crate::speculation::{AdaptivePolicy, ConcurrentLoad, Policy, Token, TokenClass};
use crate::upstream::{DraftPiece, LlamaServer, WrittenTokens};

/// Pause after a trial without an answer, and after one that showed a difference: that may go away with a restart only.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(120));
/// A drafter gets as long as so many steps of the target would take …
const STEPS: f64 = 2.0;
/// … within these bounds, and the second while no step was measured.
const DRAFTING: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Pause before an answer asks a drafter again that has failed.
const BACK_OFF: Duration = Duration::from_secs(2);
/// A draft is not extended if its next token would be accepted with a smaller probability.
const HOPELESS: f64 = 0.2;

/// Result of the test whether the target verifies drafts exactly.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Trial {
    /// The test has not run yet.
    #[default]
    Pending,
    /// It verifies drafts exactly.
    Passed {
        /// Which drafters split text into the same tokens.
        fits: Vec<bool>,
    },
    /// It does not, or did not answer; one sentence.
    Failed(String),
}

/// A target that is asked in rounds, and what came of trying it.
#[derive(Debug)]
pub(super) struct RoundsTarget {
    target: Arc<dyn Verifier>,
    trial: channel::Sender<Trial>,
}

impl RoundsTarget {
    /// Of a target that has not been tried yet.
    pub(super) fn new(target: Arc<dyn Verifier>) -> Self {
        Self {
            target,
            trial: channel::Sender::default(),
        }
    }

    /// Why it is not asked, if so.
    pub(super) fn reason(&self) -> Option<String> {
        match &*self.trial.borrow() {
            Trial::Pending => Some("it is being tried whether the target verifies drafts exactly".into()),
            Trial::Passed { .. } => None,
            Trial::Failed(reason) => Some(reason.clone()),
        }
    }

    /// Why the drafter is not used, if so.
    pub(super) fn drafter_reason(&self) -> Option<String> {
        let nobody_fits =
            matches!(&*self.trial.borrow(), Trial::Passed { fits } if !fits.is_empty() && !fits.contains(&true));
        nobody_fits.then(|| {
            "the drafter splits text into other tokens than the target, so only text that comes again is drafted; take a \
             drafter of the target's model family"
                .into()
        })
    }

    /// Tries the target whenever it comes up.
    pub(super) async fn watch(target: Arc<Self>, shared: Arc<EngineState>, drafts: Vec<LlamaServer>) {
        let mut snapshot = shared.snapshot.subscribe();
        loop {
            if snapshot
                .wait_for(|snapshot| snapshot.verification.is_in_rounds())
                .await
                .is_err()
            {
                return;
            }
            let model = snapshot.borrow().model.clone();
            let is_another =
                |snapshot: &ClusterSnapshot| !snapshot.verification.is_in_rounds() || snapshot.model != model;
            let fits = match target.try_out(&shared, &drafts).await {
                Ok(fits) => fits,
                Err(flaw) => {
                    tracing::warn!("drafting: {flaw}");
                    target.trial.send_replace(Trial::Failed(flaw.to_string()));
                    let pause = match flaw {
                        ProbeError::Failed(_) => TRY_AGAIN.0,
                        ProbeError::Differs { .. } => TRY_AGAIN.1,
                    };
                    let gone = snapshot.wait_for(is_another);
                    let _restarted = tokio::time::timeout(pause, gone).await;
                    continue;
                }
            };
            target.trial.send_replace(Trial::Passed { fits });
            // A drafter that comes up later is compared then.
            let could_draft = usable(&snapshot.borrow());
            let changed = |snapshot: &ClusterSnapshot| is_another(snapshot) || usable(snapshot) != could_draft;
            if snapshot.wait_for(changed).await.is_err() {
                return;
            }
            if is_another(&snapshot.borrow()) {
                target.trial.send_replace(Trial::Pending);
            }
        }
    }

    /// Tells which drafters split text into the same tokens.
    async fn try_out(&self, shared: &EngineState, drafts: &[LlamaServer]) -> Result<Vec<bool>, ProbeError> {
        let (costs, tokens) = probe(&*self.target).await?;
        shared.policy().calibrate(costs);
        Ok(join_all(drafts.iter().map(|draft| splits_alike(draft, &tokens))).await)
    }
}

/// Whether a drafter splits a text into the same tokens; one that does not answer is asked again when it does.
async fn splits_alike(draft: &LlamaServer, tokens: &[Token]) -> bool {
    draft.tokenize(PROBE_TEXT).await.map_or(true, |theirs| theirs == tokens)
}

/// Which drafters can be used.
fn usable(snapshot: &ClusterSnapshot) -> Vec<bool> {
    snapshot.drafts.iter().map(|draft| draft.protocol.is_some()).collect()
}

impl Engine {
    /// The shared state for one answer in rounds; `None` if the target does not answer in rounds.
    #[must_use]
    pub fn rounds(&self) -> Option<Drafting> {
        let rounds = self.rounds.as_ref()?;
        let Trial::Passed { fits } = rounds.trial.borrow().clone() else {
            return None;
        };
        if self.shared.cap == 0 || !self.shared.snapshot.borrow().verification.is_in_rounds() {
            return None;
        }
        let drafter = |(server, fits): (&ConfiguredServer, bool)| Drafter {
            server: server.client.clone(),
            written: WrittenTokens::default(),
            fits,
            lease: None,
            tired_until: None,
        };
        Some(Drafting {
            shared: Arc::clone(&self.shared),
            target: Arc::clone(&rounds.target),
            drafters: self.drafts.iter().zip(fits).map(drafter).collect(),
            counts: channel::Sender::default(),
            url: self.shared.snapshot.borrow().target.url.clone(),
        })
    }
}

/// The drafting of one answer in rounds.
#[derive(Debug)]
pub struct Drafting {
    shared: Arc<EngineState>,
    target: Arc<dyn Verifier>,
    drafters: Vec<Drafter>,
    counts: channel::Sender<Counts>,
    url: String,
}

#[derive(Debug)]
struct Drafter {
    server: LlamaServer,
    /// As it was asked to continue them last.
    written: WrittenTokens,
    /// It splits text into the target's tokens.
    fits: bool,
    lease: Option<SlotLease>,
    /// When it is tried again after a failure.
    tired_until: Option<Instant>,
}

impl Drafting {
    pub(crate) fn target(&self) -> &Arc<dyn Verifier> {
        &self.target
    }

    pub(crate) fn target_url(&self) -> &str {
        &self.url
    }

    /// The tokens of what the client expects of the answer.
    pub(crate) async fn predicted(&self, text: String) -> Vec<Token> {
        let seen = self.shared.snapshot.borrow().clone();
        prediction::tokens(&seen, text, async |text| self.target.tokens(&text).await).await
    }

    pub(crate) fn policy(&self) -> parking_lot::MutexGuard<'_, AdaptivePolicy> {
        self.shared.policy()
    }

    pub(crate) fn counts(&self) -> channel::Receiver<Counts> {
        self.counts.subscribe()
    }

    /// Changes the counts of this answer, and the sum of all.
    pub(crate) fn count(&self, change: impl FnOnce(Counts) -> Counts) {
        let old = *self.counts.borrow();
        let new = change(old);
        self.shared.totals().add(old, new);
        self.counts.send_replace(new);
    }

    pub(crate) fn verify_context(&self) -> VerifyContext {
        let snapshot = self.shared.snapshot.borrow();
        let now = Instant::now();
        let usable = |(number, drafter): (usize, &Drafter)| {
            let rested = drafter.tired_until.is_none_or(|until| until <= now);
            let can_draft = snapshot.protocol(number).is_some();
            (drafter.fits && rested && can_draft).then_some(number)
        };
        VerifyContext {
            n_max: self.shared.cap.min(snapshot.n_max),
            drafters: self.drafters.iter().enumerate().filter_map(usable).collect(),
        }
    }

    /// At most `n` draft tokens of a drafter after `context`; what does not come in time is left out.
    pub(crate) async fn draft(&mut self, number: usize, context: &[Token], n: usize) -> Vec<(Token, TokenClass)> {
        let protocol = self.shared.snapshot.borrow().protocol(number).cloned();
        let (Some(protocol), Some(drafter)) = (protocol, self.drafters.get_mut(number)) else {
            return Vec::new();
        };
        if drafter.lease.is_none() {
            drafter.lease = self.shared.slots.get(number).and_then(|slots| slots.lease(context));
        }
        let Some(slot) = drafter.lease.as_ref().map(SlotLease::index) else {
            return Vec::new();
        };
        let begun = Instant::now();
        let step = self.shared.policy().step_us(0, ConcurrentLoad::default());
        let most = step.map_or(DRAFTING.1, |us| {
            Duration::from_secs_f64(STEPS * us / 1e6).clamp(DRAFTING.0, DRAFTING.1)
        });
        let class = |p: Option<f64>| {
            p.map_or_else(
                || TokenClass::of_drafter(number),
                |p| TokenClass::of_probability(number, p),
            )
        };
        let mut pieces = drafter
            .server
            .draft(context.to_vec(), &mut drafter.written, n, slot, false);
        let mut found: Vec<(Token, TokenClass)> = Vec::new();
        let mut last = begun;
        loop {
            let piece = match timeout_at(begun + most, pieces.next()).await {
                Ok(Some(Ok(DraftPiece::Tokens(tokens)))) => tokens,
                Ok(Some(Ok(DraftPiece::End { .. })) | None) => break,
                Ok(Some(Err(error))) => {
                    tracing::debug!("the drafter failed: {error}");
                    drafter.tired_until = Some(Instant::now() + BACK_OFF);
                    break;
                }
                Err(_) => {
                    if found.is_empty() {
                        self.shared.policy().record_silence(number, begun.elapsed(), true);
                        drafter.tired_until = Some(Instant::now() + BACK_OFF);
                    }
                    break;
                }
            };
            let (now, n_piece) = (Instant::now(), piece.len());
            if found.is_empty() {
                self.shared.policy().record_first_token(number, now - begun, true);
            } else {
                self.shared.policy().record_tokens(number, n_piece, now - last, true);
            }
            last = now;
            let known = piece.into_iter().take_while(|(token, _)| protocol.knows(*token));
            found.extend(known.map(|(token, p)| (token, class(p))));
            let classes: Vec<TokenClass> = found.iter().map(|(_, class)| *class).collect();
            if found.len() >= n || self.shared.policy().prefix_acceptance(&classes) < HOPELESS {
                break;
            }
        }
        found.truncate(n);
        found
    }
}

impl Verification {
    /// Whether the proxy drives it.
    #[must_use]
    pub fn is_in_rounds(self) -> bool {
        matches!(self, Self::FanOut | Self::Scored)
    }
}
