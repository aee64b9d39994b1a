//! State machine of one drafted completion.
//!
//! The *committed* tokens are the text so far, all of them chosen by the target. Several *drafts* may follow them: one found
//! in the text itself by [`Lookup`], and one per drafter, extended by its stream. Invariant: a draft agrees with the
//! committed tokens as far as both reach; a contradicted draft restarts after them. The engine turns messages of the servers
//! into [`SessionEvent`]s and carries out the [`SessionAction`]s; the [`Policy`] decides which draft to offer, how much of it,
//! and whether the target waits.

use std::time::Duration;

use super::draft_buffer::DraftBuffer;
use super::policy::{ConcurrentLoad, PendingDraft, StepContext, StepPlan};
use super::{Lookup, Policy, Token, TokenClass, micros, whole};

/// A message from the target or a drafter.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionEvent {
    /// The target has committed `tokens`, the first of them at position `pos`. With `followed`, this answers
    /// [`SessionAction::Follow`].
    Committed {
        /// Position of the first token, counted from the start of the prompt.
        pos: usize,
        /// Committed tokens from there on.
        tokens: Vec<Token>,
        /// Whether the outstanding follow was answered by this.
        followed: bool,
    },
    /// The target ended the completion or refuses drafts for it.
    Ended,
    /// A drafter's stream produced tokens.
    Drafted {
        /// As in [`SessionAction::Draft`].
        stream: u64,
        /// The next tokens of this stream and their classes.
        tokens: Vec<(Token, TokenClass)>,
    },
    /// A drafter's stream ended.
    DraftEnded {
        /// As in [`SessionAction::Draft`].
        stream: u64,
        /// The drafter ended the text and has nothing to add.
        end_of_text: bool,
    },
    /// A drafter became available or unavailable.
    Available {
        /// Its number.
        drafter: usize,
        /// Whether it can draft now.
        available: bool,
    },
}

/// A call for the engine to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionAction {
    /// Send an offer and wait until the target commits tokens beyond its position (a long poll).
    Follow(Offer),
    /// Send an offer; it replaces an earlier one that was not sent yet.
    Offer(Offer),
    /// Start a stream of a drafter that continues `prefix` by at most `n` tokens.
    Draft {
        /// The drafter's number.
        drafter: usize,
        /// Identifies the stream in events.
        stream: u64,
        /// All tokens before the stream's first.
        prefix: Vec<Token>,
        /// Most tokens to produce.
        n: usize,
    },
    /// End the running stream of this drafter.
    StopDraft {
        /// The drafter's number.
        drafter: usize,
    },
    /// The session is over.
    Finish,
}

/// Draft tokens for the target.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Offer {
    /// Position of the first token: the number of committed tokens.
    pub pos: usize,
    /// The tokens.
    pub tokens: Vec<Token>,
    /// Tokens that the target's next step may wait for; 0: it does not wait.
    pub n_min: usize,
    /// Longest wait after the target's last step, in microseconds.
    pub hold_us: u64,
}

/// The state around a session when an event is handled.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SessionContext<'a> {
    /// Most draft tokens that the target can verify in one step.
    pub n_max: usize,
    /// The running streams of all drafters.
    pub pending: &'a [PendingDraft],
    /// Time since the session started.
    pub now: Duration,
    /// Round trip to the target.
    pub round_trip: Duration,
    /// Other completions on the target.
    pub load: ConcurrentLoad,
}

/// The state machine of one completion.
#[derive(Debug, Default)]
pub struct Session {
    committed: Vec<Token>,
    lookup: Lookup,
    copied: DraftBuffer,
    drafters: Vec<DrafterState>,
    /// The last offer sent to the target.
    last_offer: Offer,
    /// The class of each of its tokens.
    last_offer_classes: Vec<TokenClass>,
    /// When it arrived at the target, in microseconds since the session started.
    last_offer_at_us: f64,
    target: TargetState,
    /// When the target's last known step ended, in microseconds since the session started.
    last_step_end_us: f64,
    /// Microseconds until the target needs the next draft tokens.
    slack_us: f64,
    /// Number of streams started.
    n_streams: u64,
    ended: bool,
}

/// A drafter in this session.
#[derive(Debug, Default)]
struct DrafterState {
    draft: DraftBuffer,
    /// The running stream.
    stream: Option<u64>,
    /// The draft reaches the end of the text.
    at_end: bool,
    available: bool,
    /// Whether the target waited when the stream started or its last token arrived.
    target_waited: bool,
}

/// The target's assumed state; times are microseconds since the session started.
#[derive(Debug, Clone, Copy, PartialEq)]
enum TargetState {
    /// It waits for an offer until `until_us`, then verifies the `left` tokens that remain of the last one.
    Waiting { until_us: f64, left: usize },
    /// It has been in a step over `n` draft tokens since `since_us`.
    Stepping { since_us: f64, n: usize },
}

impl Default for TargetState {
    fn default() -> Self {
        Self::Stepping { since_us: 0.0, n: 0 }
    }
}

/// The draft with the most valuable plan.
struct BestDraft<'a> {
    plan: StepPlan,
    /// Whether its stream runs.
    streaming: bool,
    /// Drafters that have to pause during the step.
    paused: Vec<usize>,
    /// The tokens to offer.
    tokens: &'a [Token],
    classes: &'a [TokenClass],
}

impl Session {
    /// A completion whose prompt is not known yet. `prediction` is what the client expects of the answer, or empty;
    /// `drafters` is the number of drafters, none of them available yet.
    #[must_use]
    pub fn new(prediction: &[Token], drafters: usize) -> Self {
        Self {
            lookup: Lookup::new(prediction),
            drafters: std::iter::repeat_with(DrafterState::default).take(drafters).collect(),
            ..Self::default()
        }
    }

    /// The committed tokens, prompt included.
    #[must_use]
    pub fn committed(&self) -> &[Token] {
        &self.committed
    }

    /// Classes of the first `n` tokens of the last offer after the committed ones.
    #[must_use]
    pub fn offered(&self, n: usize) -> &[TokenClass] {
        let classes = &self.last_offer_classes[self.last_offer_classes.len() - self.last_offer_remaining()..];
        &classes[..n.min(classes.len())]
    }

    /// Time until the target needs the next draft tokens; until then it is in a step.
    #[must_use]
    pub fn slack(&self) -> Duration {
        Duration::from_secs_f64(self.slack_us.max(0.0) / 1e6)
    }

    /// Whether the target waits for this drafter's next token, or gave up waiting for it. The latency of such a token decides
    /// whether the target should wait.
    #[must_use]
    pub fn target_waits_for(&self, drafter: usize, now: Duration) -> bool {
        self.target_waits(now) || self.drafters.get(drafter).is_some_and(|it| it.target_waited)
    }

    /// Whether the target is assumed to wait for an offer at `now`.
    fn target_waits(&self, now: Duration) -> bool {
        matches!(self.target, TargetState::Waiting { until_us, .. } if micros(now) < until_us)
    }

    /// The first action: ask for the prompt.
    #[must_use]
    pub fn begin(&self) -> SessionAction {
        SessionAction::Follow(Offer::default())
    }

    /// Handles an event. Returns the actions in the order in which to carry them out.
    pub fn handle(
        &mut self,
        event: SessionEvent,
        policy: &mut impl Policy,
        context: &SessionContext<'_>,
    ) -> Vec<SessionAction> {
        let mut actions = Vec::new();
        if self.ended {
            return actions;
        }
        let mut follow = false;
        let mut heard_from = None;
        match event {
            SessionEvent::Committed { pos, tokens, followed } => {
                follow = followed;
                if !self.commit(pos, &tokens, context) && !followed {
                    // Only the arrival of an offer: answering it with another offer would never end.
                    return actions;
                }
            }
            SessionEvent::Ended => {
                self.ended = true;
                for drafter in 0..self.drafters.len() {
                    self.stop_stream(drafter, &mut actions);
                }
                actions.push(SessionAction::Finish);
                return actions;
            }
            SessionEvent::Drafted { stream, tokens } => {
                heard_from = Some(stream);
                if let Some(drafter) = self.drafter_of(stream) {
                    for (token, class) in tokens {
                        drafter.draft.tokens.push(token);
                        drafter.draft.classes.push(class);
                    }
                }
            }
            SessionEvent::DraftEnded { stream, end_of_text } => {
                if let Some(drafter) = self.drafter_of(stream) {
                    drafter.stream = None;
                    drafter.at_end = end_of_text;
                }
            }
            SessionEvent::Available { drafter, available } => {
                if let Some(it) = self.drafters.get_mut(drafter) {
                    it.available = available;
                }
                if !available {
                    self.stop_stream(drafter, &mut actions);
                }
            }
        }
        self.reconcile(policy, &mut actions);
        self.draft_from_text(context.n_max);
        let started: Vec<usize> = (0..self.drafters.len())
            .filter(|drafter| self.start_stream(*drafter, policy, context, &mut actions))
            .collect();
        self.offer(follow, &started, policy, context, &mut actions);
        let waits = self.target_waits(context.now);
        for (number, drafter) in self.drafters.iter_mut().enumerate() {
            if started.contains(&number) || heard_from.is_some() && drafter.stream == heard_from {
                drafter.target_waited = waits;
            }
        }
        actions
    }

    fn drafter_of(&mut self, stream: u64) -> Option<&mut DrafterState> {
        self.drafters.iter_mut().find(|it| it.stream == Some(stream))
    }

    fn stop_stream(&mut self, drafter: usize, actions: &mut Vec<SessionAction>) {
        if self
            .drafters
            .get_mut(drafter)
            .is_some_and(|it| it.stream.take().is_some())
        {
            actions.push(SessionAction::StopDraft { drafter });
        }
    }

    /// Appends committed tokens. Returns false when all of them were known.
    fn commit(&mut self, pos: usize, tokens: &[Token], context: &SessionContext<'_>) -> bool {
        let known = self.committed.len().saturating_sub(pos);
        if pos > self.committed.len() || known >= tokens.len() {
            return false;
        }
        self.committed.extend_from_slice(&tokens[known..]);
        self.lookup.extend(&tokens[known..]);
        let at_us = micros(context.now) - micros(context.round_trip) / 2.0;
        self.last_step_end_us = at_us;
        self.target = self.next_step(at_us, 0, context.n_max);
        true
    }

    /// The target's state after a step that ended at `at_us`, `passed` tokens beyond the committed ones, if these are the
    /// tokens of the offer. The rest of the offer goes into the next step, or the target waits for more.
    fn next_step(&self, at_us: f64, passed: usize, n_max: usize) -> TargetState {
        // An offer that arrived too late followed one with the same wait but other tokens.
        let arrived = self.last_offer_at_us <= at_us;
        let left = if arrived {
            self.last_offer_remaining().saturating_sub(passed).min(n_max)
        } else {
            0
        };
        if left < self.last_offer.n_min.min(n_max) {
            let until_us = at_us + self.last_offer.hold_us as f64;
            TargetState::Waiting { until_us, left }
        } else {
            TargetState::Stepping {
                since_us: at_us,
                n: left,
            }
        }
    }

    /// Number of tokens of the last offer that may still follow the committed ones.
    fn last_offer_remaining(&self) -> usize {
        let passed = self.committed.len().saturating_sub(self.last_offer.pos);
        if self.last_offer.tokens.len() <= passed
            || self.last_offer.tokens[..passed] != self.committed[self.last_offer.pos..]
        {
            return 0;
        }
        self.last_offer.tokens.len() - passed
    }

    /// Removes confirmed tokens from the drafts and restarts drafts that are contradicted or too far behind.
    fn reconcile(&mut self, policy: &mut impl Policy, actions: &mut Vec<SessionAction>) {
        let max_stream_lag = policy.tuning().max_stream_lag;
        if !self.copied.reconcile(&self.committed, 0, policy) {
            self.copied.restart(self.committed.len());
        }
        for (number, drafter) in self.drafters.iter_mut().enumerate() {
            let max_lag = if drafter.stream.is_some() { max_stream_lag } else { 0 };
            if !drafter.draft.reconcile(&self.committed, max_lag, policy) {
                if drafter.stream.take().is_some() {
                    actions.push(SessionAction::StopDraft { drafter: number });
                }
                drafter.draft.restart(self.committed.len());
                drafter.at_end = false;
            }
        }
    }

    /// Extends the draft from the text itself.
    fn draft_from_text(&mut self, n_max: usize) {
        let beyond = self.copied.beyond(self.committed.len());
        if self.committed.is_empty() || n_max == 0 || beyond >= max_lookahead(n_max) {
            return;
        }
        let (ahead, _) = self.copied.ahead(self.committed.len());
        if let Some(proposal) = self.lookup.propose(ahead, max_lookahead(n_max) - beyond) {
            self.copied.classes.extend(proposal.classes());
            self.copied.tokens.extend(proposal.tokens);
        }
    }

    /// Starts a stream if the drafter has none and has drafted too little. Returns whether it did.
    fn start_stream(
        &mut self,
        number: usize,
        policy: &mut impl Policy,
        context: &SessionContext<'_>,
        actions: &mut Vec<SessionAction>,
    ) -> bool {
        let drafter = &self.drafters[number];
        let beyond = drafter.draft.beyond(self.committed.len());
        let (ahead, classes) = drafter.draft.ahead(self.committed.len());
        if drafter.stream.is_some()
            || drafter.at_end
            || !drafter.available
            || self.committed.is_empty()
            || context.n_max == 0
            || policy.prefix_acceptance(classes) < policy.tuning().min_prefix_acceptance
        {
            return false;
        }
        let (waits, round_trip) = (self.target_waits(context.now), context.round_trip);
        let limit = policy.draft_limit(number, waits, context.n_max, context.load, round_trip);
        if beyond >= limit {
            return false;
        }
        self.n_streams += 1;
        let prefix = [&self.committed[..], ahead].concat();
        let n = limit - beyond;
        self.drafters[number].stream = Some(self.n_streams);
        actions.push(SessionAction::Draft {
            drafter: number,
            stream: self.n_streams,
            prefix,
            n,
        });
        true
    }

    /// Sends the best offer, with a follow or when it differs from the last one. The streams of the drafters `started` were
    /// just started.
    fn offer(
        &mut self,
        follow: bool,
        started: &[usize],
        policy: &impl Policy,
        context: &SessionContext<'_>,
        actions: &mut Vec<SessionAction>,
    ) {
        if self.committed.is_empty() {
            if follow {
                actions.push(SessionAction::Follow(Offer::default()));
            }
            return;
        }
        let arrives_us = micros(context.now) + micros(context.round_trip) / 2.0;
        let (busy_us, passed) = self.busy(arrives_us, policy, context);
        let best = self.best(busy_us.unwrap_or(0.0), passed, started, policy, context);
        let BestDraft {
            plan,
            streaming,
            paused,
            tokens,
            classes,
        } = best;
        let (n_min, hold_us) = if plan.wait_us > 0 {
            // Until a later offer ends the wait. It counts from the last step, or from the end of the current one, which may
            // contradict the draft.
            let hold_us = match busy_us {
                None => plan.wait_us + whole(arrives_us - self.last_step_end_us),
                Some(_) => plan.wait_us.max(plan.hold_us),
            };
            (context.n_max, hold_us)
        } else if plan.hold_us > 0 && (busy_us.is_some() || plan.n > 0) {
            // These are enough. After the step that verifies them the target waits for the next offer.
            (plan.n.max(1), plan.hold_us)
        } else {
            (0, 0)
        };
        let offer = Offer {
            pos: self.committed.len(),
            tokens: tokens.to_vec(),
            n_min,
            hold_us,
        };
        let classes = classes.to_vec();
        for drafter in paused {
            self.stop_stream(drafter, actions);
        }
        let differs = (offer.pos, &offer.tokens, offer.n_min)
            != (self.last_offer.pos, &self.last_offer.tokens, self.last_offer.n_min);
        // More tokens arrive before the step ends, so they are sent at shrinking intervals and not one by one.
        let extends = offer.pos == self.last_offer.pos && offer.tokens.starts_with(&self.last_offer.tokens);
        let round_trip_us = micros(context.round_trip);
        let since_last_offer = (arrives_us - self.last_offer_at_us).max(round_trip_us);
        let busy = busy_us.unwrap_or_default();
        self.slack_us = busy - since_last_offer;
        if follow || differs && !(streaming && extends && self.slack_us > 0.0) {
            self.slack_us = busy - round_trip_us;
            self.last_offer = offer.clone();
            self.last_offer_classes = classes;
            self.last_offer_at_us = arrives_us;
            if busy_us.is_none() {
                self.target = if self.last_offer.tokens.len() < self.last_offer.n_min {
                    TargetState::Waiting {
                        until_us: self.last_step_end_us + self.last_offer.hold_us as f64,
                        left: self.last_offer.tokens.len(),
                    }
                } else {
                    TargetState::Stepping {
                        since_us: arrives_us,
                        n: self.last_offer.tokens.len(),
                    }
                };
            }
            actions.push(if follow {
                SessionAction::Follow(offer)
            } else {
                SessionAction::Offer(offer)
            });
        }
    }

    /// The draft with the most valuable plan. When the target uses the offer it will have chosen `passed` more tokens; the
    /// offer reaches beyond them, in case they are the tokens of the draft.
    fn best(
        &self,
        busy_us: f64,
        passed: usize,
        started: &[usize],
        policy: &impl Policy,
        context: &SessionContext<'_>,
    ) -> BestDraft<'_> {
        let committed = self.committed.len();
        let plan_for = |draft: &'_ DraftBuffer, pending: Option<PendingDraft>, idle_drafter: Option<usize>| {
            let step_context = StepContext {
                n_max: context.n_max,
                pending,
                idle_drafter,
                busy_us,
                round_trip: context.round_trip,
                load: context.load,
            };
            let classes = draft.ahead(committed).1;
            policy.choose(classes.get(passed..).unwrap_or_default(), &step_context)
        };
        // The current step verifies the last offer, so a draft that differs from it will be contradicted.
        let continues_offer = |draft: &DraftBuffer| {
            let n_verified = self.last_offer_remaining().min(passed.saturating_sub(1));
            let verified =
                &self.last_offer.tokens[self.last_offer.tokens.len() - self.last_offer_remaining()..][..n_verified];
            draft.ahead(committed).0.starts_with(verified)
        };
        let (mut best, mut plan, mut streaming) = (&self.copied, plan_for(&self.copied, None, None), false);
        let mut fits = continues_offer(&self.copied);
        let mut to_pause = Vec::new();
        for (number, drafter) in self.drafters.iter().enumerate() {
            let pending = if started.contains(&number) {
                Some(PendingDraft {
                    drafter: number,
                    ..PendingDraft::default()
                })
            } else {
                let running = context.pending.iter().find(|pending| pending.drafter == number);
                running.copied().filter(|_| drafter.stream.is_some())
            };
            let is_idle = drafter.available && drafter.stream.is_none() && !drafter.at_end;
            if pending.is_none() && !is_idle && drafter.draft.beyond(committed) == 0 {
                continue;
            }
            let other = plan_for(&drafter.draft, pending, is_idle.then_some(number));
            let agrees = continues_offer(&drafter.draft);
            if other.pause_drafter && other.wait_us == 0 && drafter.stream.is_some() {
                to_pause.push(number);
            }
            if (agrees, other.value, other.n) >= (fits, plan.value, plan.n) {
                (best, plan, fits, streaming) = (&drafter.draft, other, agrees, pending.is_some());
            }
        }
        let (tokens, classes) = best.ahead(committed);
        // Offer again what the target probably verifies now, in case its step has not begun.
        let n = if plan.n > 0 {
            passed + plan.n
        } else {
            passed.saturating_sub(1).min(tokens.len())
        };
        BestDraft {
            plan,
            streaming,
            paused: to_pause,
            tokens: &tokens[..n],
            classes: &classes[..n],
        }
    }

    /// Microseconds until the step that the target is in at `at_us` ends, and how many tokens it will have chosen then if they
    /// are those of the draft. `None`: it waits for an offer.
    fn busy(&self, at_us: f64, policy: &impl Policy, context: &SessionContext<'_>) -> (Option<f64>, usize) {
        let (mut target, mut passed) = (self.target, 0);
        for _ in 0..=policy.tuning().max_unseen_steps {
            let (since_us, n) = match target {
                TargetState::Waiting { until_us, .. } if at_us < until_us => {
                    return (if passed == 0 { None } else { Some(0.0) }, passed);
                }
                TargetState::Waiting { until_us, left } => (until_us, left),
                TargetState::Stepping { since_us, n } => (since_us, n),
            };
            let Some(step_us) = policy.step_us(n, context.load) else {
                return (None, 0);
            };
            let end_us = since_us + step_us;
            passed += n + 1;
            if end_us >= at_us {
                return (Some(end_us - at_us), passed);
            }
            target = self.next_step(end_us, passed, context.n_max);
        }
        (Some(0.0), passed)
    }
}

/// Longest draft: enough for a step, for the token that the target adds, and for the next step.
pub(super) fn max_lookahead(n_max: usize) -> usize {
    2 * n_max + 1
}

#[cfg(test)]
mod tests;
