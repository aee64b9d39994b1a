//! The state of one drafted completion.
//!
//! There is one text that counts, the *committed* tokens, which the target has chosen, and there are several *drafts* of
//! what may follow them: one found in the text itself by [`Lookup`], and one per drafter, appended by its stream. As long
//! as a draft repeats what the target commits it stays; when the two differ it is dropped and a new one starts from the
//! committed tokens. Of the drafts that reach beyond the committed tokens the [`Policy`] chooses the one that is worth
//! most, how much of it is offered, and whether the target should wait.

use std::time::Duration;

use super::policy::{ConcurrentLoad, PendingDraft, StepContext, StepPlan, TokenClass};
use super::{Lookup, Token, micros, whole};

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionEvent {
    /// The target answered: it has committed `tokens`, the first of which stands at `pos`. With `followed`, this
    /// answers [`SessionAction::Follow`].
    Committed {
        /// Position of the first token, counted from the start of the prompt.
        pos: usize,
        /// Committed tokens from there on.
        tokens: Vec<Token>,
        /// Whether the outstanding follow was answered by this.
        followed: bool,
    },
    /// The target ended the completion, or will not take drafts for it.
    Ended,
    /// A stream of a drafter produced tokens.
    Drafted {
        /// As in [`SessionAction::Draft`].
        stream: u64,
        /// The next tokens of this stream, with what is known of each.
        tokens: Vec<(Token, TokenClass)>,
    },
    /// A stream of a drafter is over.
    DraftEnded {
        /// As in [`SessionAction::Draft`].
        stream: u64,
        /// The drafter thinks that the text ends here, so it has nothing to add.
        end_of_text: bool,
    },
    /// A drafter became usable, or ceased to be.
    Available {
        /// Its number.
        drafter: usize,
        /// Whether it is usable now.
        available: bool,
    },
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionAction {
    /// Offer `tokens` at `pos` and ask to be told when something is committed beyond `pos`.
    Follow(Offer),
    /// Offer `tokens` at `pos`; replaces an earlier offer that was not sent yet.
    Offer(Offer),
    /// Start a stream of a drafter that continues `prefix` by at most `n` tokens.
    Draft {
        /// The drafter's number.
        drafter: usize,
        /// Names the stream in the events.
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
    /// Nothing is left to do.
    Finish,
}

/// Tokens that may follow the committed ones.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Offer {
    /// Position of the first token: the number of committed tokens.
    pub pos: usize,
    /// The tokens.
    pub tokens: Vec<Token>,
    /// The target's next step may wait for this many tokens.
    pub n_min: usize,
    /// The longest time after its last step that it may wait, in microseconds.
    pub hold_us: u64,
}

/// What a session has to know of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SessionContext<'a> {
    /// Most draft tokens that the target can verify in one step.
    pub n_max: usize,
    /// The running streams.
    pub pending: &'a [PendingDraft],
    /// Time since the session began.
    pub now: Duration,
    /// From asking the target to its answer.
    pub round_trip: Duration,
    /// What else the target does.
    pub load: ConcurrentLoad,
}

/// Who decides; see [`super::AdaptivePolicy`].
pub trait Policy {
    /// Learns that a draft token was what the target chose itself, or was not. All tokens before it were.
    fn observe(&mut self, class: TokenClass, accepted: bool);

    /// How many tokens beyond the committed ones a drafter should draft now, at most; 0: none. It will.
    fn draft_limit(
        &mut self,
        drafter: usize,
        target_waits: bool,
        n_max: usize,
        load: ConcurrentLoad,
        round_trip: Duration,
    ) -> usize;

    /// The chance that all of `draft` is accepted.
    fn prefix_acceptance(&self, draft: &[TokenClass]) -> f64;

    /// How long a step over `n` draft tokens takes beside all else, in microseconds; `None` while nothing is known.
    fn step_us(&self, n: usize, load: ConcurrentLoad) -> Option<f64>;

    /// What the target should do with a draft.
    fn choose(&self, draft: &[TokenClass], context: &StepContext) -> StepPlan;
}

/// The state machine of one completion.
#[derive(Debug, Default)]
pub struct Session {
    committed: Vec<Token>,
    lookup: Lookup,
    copied: DraftBuffer,
    drafters: Vec<DrafterState>,
    /// What the target was told last, and what is known of each token of it.
    last_offer: Offer,
    last_offer_classes: Vec<TokenClass>,
    /// When that arrived at the target, in microseconds since the session began.
    last_offer_at_us: f64,
    target: TargetState,
    /// When its last step that we know of ended, in microseconds since the session began.
    last_step_end_us: f64,
    /// How long the target can do without further draft tokens, in microseconds.
    slack_us: f64,
    /// Streams started so far.
    streams: u64,
    ended: bool,
}

/// What may follow `committed[..base]`.
#[derive(Debug, Default)]
struct DraftBuffer {
    tokens: Vec<Token>,
    /// What is known of each token.
    classes: Vec<TokenClass>,
    base: usize,
}

#[derive(Debug, Default)]
struct DrafterState {
    draft: DraftBuffer,
    /// The running stream.
    running: Option<u64>,
    /// The draft ends with the end of the text.
    complete: bool,
    available: bool,
    /// The target waited when the stream was begun or its last token came.
    target_waited: bool,
}

/// What the target does; times are microseconds since the session began.
#[derive(Debug, Clone, Copy, PartialEq)]
enum TargetState {
    /// It waits for an offer until then, and goes on with what is left of the last one.
    Waiting { until_us: f64, left: usize },
    /// It has been in a step over `n` draft tokens since then.
    Stepping { since_us: f64, n: usize },
}

impl Default for TargetState {
    fn default() -> Self {
        Self::Stepping { since_us: 0.0, n: 0 }
    }
}

/// The draft that is worth most.
struct BestDraft<'a> {
    choice: StepPlan,
    /// Its stream runs.
    streaming: bool,
    /// Drafters that have to rest while the target goes on.
    rest: Vec<usize>,
    /// What of it is to be offered.
    tokens: &'a [Token],
    classes: &'a [TokenClass],
}

/// A draft of which the drafter's next token would be accepted with less chance is not continued.
const MIN_PREFIX_ACCEPTANCE: f64 = 0.05;
/// A stream that is behind by no more tokens than this may catch up: a new one would have to read these as well.
const MAX_STREAM_LAG: usize = 2;
/// Steps that the target may take unheard of; more are not reckoned with.
const MAX_UNSEEN_STEPS: usize = 4;

impl DraftBuffer {
    /// Number of tokens beyond the committed ones.
    fn beyond(&self, committed: usize) -> usize {
        (self.base + self.tokens.len()).saturating_sub(committed)
    }

    /// The tokens beyond the committed ones, and their classes.
    fn ahead(&self, committed: usize) -> (&[Token], &[TokenClass]) {
        let start = self.tokens.len() - self.beyond(committed);
        (&self.tokens[start..], &self.classes[start..])
    }

    /// Forgets what is confirmed. False: it is contradicted, or behind by more than `max_lag` tokens.
    fn reconcile(&mut self, committed: &[Token], max_lag: usize, policy: &mut impl Policy) -> bool {
        let unseen = &committed[self.base..];
        let compared = unseen.len().min(self.tokens.len());
        let agreed = unseen.iter().zip(&self.tokens).take_while(|(a, b)| a == b).count();
        for (i, class) in self.classes[..compared].iter().enumerate().take(agreed + 1) {
            policy.observe(*class, i < agreed);
        }
        if agreed < compared || unseen.len() - compared > max_lag {
            return false;
        }
        self.tokens.drain(..compared);
        self.classes.drain(..compared);
        self.base += compared;
        true
    }

    fn drop_at(&mut self, base: usize) {
        *self = Self {
            base,
            ..Self::default()
        };
    }
}

impl Session {
    /// A completion of which nothing is known yet but the client's prediction (perhaps empty), and this many drafters that
    /// are not usable yet.
    #[must_use]
    pub fn new(prediction: &[Token], drafters: usize) -> Self {
        Self {
            lookup: Lookup::new(prediction),
            drafters: std::iter::repeat_with(DrafterState::default).take(drafters).collect(),
            ..Self::default()
        }
    }

    /// The tokens that the target has committed, prompt included.
    #[must_use]
    pub fn committed(&self) -> &[Token] {
        &self.committed
    }

    /// What was known of the first `n` tokens that the target was offered after the committed ones.
    #[must_use]
    pub fn offered(&self, n: usize) -> &[TokenClass] {
        let classes = &self.last_offer_classes[self.last_offer_classes.len() - self.last_offer_remaining()..];
        &classes[..n.min(classes.len())]
    }

    /// How long the target can do without further draft tokens, as far as is known: it is in a step, and the next offer is
    /// better made with more.
    #[must_use]
    pub fn slack(&self) -> Duration {
        Duration::from_secs_f64(self.slack_us.max(0.0) / 1e6)
    }

    /// Whether this drafter makes its next token for a target that waits, or waited until that took too long: it is how
    /// long such a token takes that decides whether the target is to wait.
    #[must_use]
    pub fn target_waits_for(&self, drafter: usize, now: Duration) -> bool {
        self.target_waits(now) || self.drafters.get(drafter).is_some_and(|it| it.target_waited)
    }

    /// Whether the target waits for an offer, as far as is known, at this time since the session began.
    fn target_waits(&self, now: Duration) -> bool {
        matches!(self.target, TargetState::Waiting { until_us, .. } if micros(now) < until_us)
    }

    /// The first thing to do: learn the prompt.
    #[must_use]
    pub fn begin(&self) -> SessionAction {
        SessionAction::Follow(Offer::default())
    }

    /// Takes in what happened and tells what to do, in this order.
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
        let mut heard = None;
        match event {
            SessionEvent::Committed { pos, tokens, followed } => {
                follow = followed;
                if !self.commit(pos, &tokens, context) && !followed {
                    // An offer arrived. If that were reason enough for another one the two would never end.
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
                heard = Some(stream);
                if let Some(drafter) = self.drafter_of(stream) {
                    for (token, class) in tokens {
                        drafter.draft.tokens.push(token);
                        drafter.draft.classes.push(class);
                    }
                }
            }
            SessionEvent::DraftEnded { stream, end_of_text } => {
                if let Some(drafter) = self.drafter_of(stream) {
                    drafter.running = None;
                    drafter.complete = end_of_text;
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
            if started.contains(&number) || heard.is_some() && drafter.running == heard {
                drafter.target_waited = waits;
            }
        }
        actions
    }

    fn drafter_of(&mut self, stream: u64) -> Option<&mut DrafterState> {
        self.drafters.iter_mut().find(|it| it.running == Some(stream))
    }

    fn stop_stream(&mut self, drafter: usize, actions: &mut Vec<SessionAction>) {
        if self
            .drafters
            .get_mut(drafter)
            .is_some_and(|it| it.running.take().is_some())
        {
            actions.push(SessionAction::StopDraft { drafter });
        }
    }

    /// Takes in committed tokens; false: they are known.
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

    /// What the target does after a step that ended at `at_us` with `passed` tokens beyond the committed ones, if they are
    /// those of the offer: what is left of that goes into the next step at once, or is waited for to grow.
    fn next_step(&self, at_us: f64, passed: usize, n_max: usize) -> TargetState {
        // An offer that came too late came after one that was alike but for the tokens.
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

    /// Tokens of the last offer that may still follow the committed ones.
    fn last_offer_remaining(&self) -> usize {
        let passed = self.committed.len().saturating_sub(self.last_offer.pos);
        if self.last_offer.tokens.len() <= passed
            || self.last_offer.tokens[..passed] != self.committed[self.last_offer.pos..]
        {
            return 0;
        }
        self.last_offer.tokens.len() - passed
    }

    /// Forgets what of the drafts is confirmed, and drafts that were contradicted or overtaken.
    fn reconcile(&mut self, policy: &mut impl Policy, actions: &mut Vec<SessionAction>) {
        if !self.copied.reconcile(&self.committed, 0, policy) {
            self.copied.drop_at(self.committed.len());
        }
        for (number, drafter) in self.drafters.iter_mut().enumerate() {
            let max_lag = if drafter.running.is_some() { MAX_STREAM_LAG } else { 0 };
            if !drafter.draft.reconcile(&self.committed, max_lag, policy) {
                if drafter.running.take().is_some() {
                    actions.push(SessionAction::StopDraft { drafter: number });
                }
                drafter.draft.drop_at(self.committed.len());
                drafter.complete = false;
            }
        }
    }

    /// Drafts from the text itself.
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

    /// Starts a stream of a drafter that has drafted too little and has none running; says whether it did.
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
        if drafter.running.is_some()
            || drafter.complete
            || !drafter.available
            || self.committed.is_empty()
            || context.n_max == 0
            || policy.prefix_acceptance(classes) < MIN_PREFIX_ACCEPTANCE
        {
            return false;
        }
        let (waits, round_trip) = (self.target_waits(context.now), context.round_trip);
        let limit = policy.draft_limit(number, waits, context.n_max, context.load, round_trip);
        if beyond >= limit {
            return false;
        }
        self.streams += 1;
        let prefix = [&self.committed[..], ahead].concat();
        let n = limit - beyond;
        self.drafters[number].running = Some(self.streams);
        actions.push(SessionAction::Draft {
            drafter: number,
            stream: self.streams,
            prefix,
            n,
        });
        true
    }

    /// Offers the part of the best draft that is worth it, with a new follow or when the target was told something else.
    /// The streams of `started` were just started.
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
            choice,
            streaming,
            rest,
            tokens,
            classes,
        } = best;
        let (n_min, hold_us) = if choice.wait_us > 0 {
            // Until we say that it is enough; counted from the last step, or from the one that goes on, which may
            // contradict the draft.
            let hold_us = match busy_us {
                None => choice.wait_us + whole(arrives_us - self.last_step_end_us),
                Some(_) => choice.wait_us.max(choice.hold_us),
            };
            (context.n_max, hold_us)
        } else if choice.hold_us > 0 && (busy_us.is_some() || choice.n > 0) {
            // These are enough. After the step that takes them the target waits until it has heard what comes next.
            (choice.n.max(1), choice.hold_us)
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
        for drafter in rest {
            self.stop_stream(drafter, actions);
        }
        let news = (offer.pos, &offer.tokens, offer.n_min)
            != (self.last_offer.pos, &self.last_offer.tokens, self.last_offer.n_min);
        // More is to come before the step ends. So it is told at shorter and shorter intervals, not token by token.
        let extends = offer.pos == self.last_offer.pos && offer.tokens.starts_with(&self.last_offer.tokens);
        let round_trip_us = micros(context.round_trip);
        let since_last_offer = (arrives_us - self.last_offer_at_us).max(round_trip_us);
        let busy = busy_us.unwrap_or_default();
        self.slack_us = busy - since_last_offer;
        if follow || news && !(streaming && extends && self.slack_us > 0.0) {
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

    /// What to do next, and the tokens and classes to offer: of the draft that is worth most. By the time that the offer is
    /// used the target will have chosen `passed` tokens more; what is offered reaches beyond them, for the case that they
    /// are the draft's.
    fn best(
        &self,
        busy_us: f64,
        passed: usize,
        started: &[usize],
        policy: &impl Policy,
        context: &SessionContext<'_>,
    ) -> BestDraft<'_> {
        let committed = self.committed.len();
        let weigh = |draft: &'_ DraftBuffer, pending: Option<PendingDraft>, rests: Option<usize>| {
            let circumstances = StepContext {
                n_max: context.n_max,
                pending,
                rests,
                busy_us,
                round_trip: context.round_trip,
                load: context.load,
            };
            let classes = draft.ahead(committed).1;
            policy.choose(classes.get(passed..).unwrap_or_default(), &circumstances)
        };
        // A step that goes on verifies the draft that was offered: another one is not what it will agree with.
        let goes_on = |draft: &DraftBuffer| {
            let verified = self.last_offer_remaining().min(passed.saturating_sub(1));
            let told =
                &self.last_offer.tokens[self.last_offer.tokens.len() - self.last_offer_remaining()..][..verified];
            draft.ahead(committed).0.starts_with(told)
        };
        let (mut best, mut choice, mut streaming) = (&self.copied, weigh(&self.copied, None, None), false);
        let mut fits = goes_on(&self.copied);
        let mut rest = Vec::new();
        for (number, drafter) in self.drafters.iter().enumerate() {
            let pending = if started.contains(&number) {
                Some(PendingDraft {
                    drafter: number,
                    ..PendingDraft::default()
                })
            } else {
                let running = context.pending.iter().find(|pending| pending.drafter == number);
                running.copied().filter(|_| drafter.running.is_some())
            };
            let rests = drafter.available && drafter.running.is_none() && !drafter.complete;
            if pending.is_none() && !rests && drafter.draft.beyond(committed) == 0 {
                continue;
            }
            let other = weigh(&drafter.draft, pending, rests.then_some(number));
            let agrees = goes_on(&drafter.draft);
            if other.rests && other.wait_us == 0 && drafter.running.is_some() {
                rest.push(number);
            }
            if (agrees, other.worth, other.n) >= (fits, choice.worth, choice.n) {
                (best, choice, fits, streaming) = (&drafter.draft, other, agrees, pending.is_some());
            }
        }
        let (tokens, classes) = best.ahead(committed);
        // What the target verifies now is offered again, in case that it does not do so yet.
        let n = if choice.n > 0 {
            passed + choice.n
        } else {
            passed.saturating_sub(1).min(tokens.len())
        };
        BestDraft {
            choice,
            streaming,
            rest,
            tokens: &tokens[..n],
            classes: &classes[..n],
        }
    }

    /// How long the target goes on with the step that it is in at `at_us`, and how many tokens it will have chosen then if
    /// they are those of the draft. `None`: it waits for an offer.
    fn busy(&self, at_us: f64, policy: &impl Policy, context: &SessionContext<'_>) -> (Option<f64>, usize) {
        let (mut target, mut passed) = (self.target, 0);
        for _ in 0..=MAX_UNSEEN_STEPS {
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

/// How far a draft goes at most: enough for a step, for the token that the target adds, and for the next step.
pub(super) fn max_lookahead(n_max: usize) -> usize {
    2 * n_max + 1
}

#[cfg(test)]
mod tests {
    use super::super::AdaptivePolicy;
    use super::*;
    use proptest::prelude::*;

    const CONTEXT: SessionContext<'_> = SessionContext {
        n_max: 4,
        pending: &[],
        now: Duration::ZERO,
        round_trip: Duration::from_micros(100),
        load: ConcurrentLoad {
            completions: 0,
            tokens: 0,
        },
    };

    /// A session with costs of which nothing is known.
    struct Tried {
        session: Session,
        policy: AdaptivePolicy,
    }

    impl Tried {
        fn handle(&mut self, event: SessionEvent) -> Vec<SessionAction> {
            self.session.handle(event, &mut self.policy, &CONTEXT)
        }
    }

    fn committed(pos: usize, tokens: &[Token]) -> SessionEvent {
        SessionEvent::Committed {
            pos,
            tokens: tokens.to_vec(),
            followed: true,
        }
    }

    fn drafted(stream: u64, tokens: &[Token]) -> SessionEvent {
        SessionEvent::Drafted {
            stream,
            tokens: tokens.iter().map(|token| (*token, TokenClass::untold(0))).collect(),
        }
    }

    fn available(available: bool) -> SessionEvent {
        SessionEvent::Available { drafter: 0, available }
    }

    fn started(actions: &[SessionAction]) -> Option<(u64, Vec<Token>, usize)> {
        actions.iter().find_map(|action| match action {
            SessionAction::Draft { stream, prefix, n, .. } => Some((*stream, prefix.clone(), *n)),
            _ => None,
        })
    }

    fn sent(actions: &[SessionAction]) -> Option<Offer> {
        actions.iter().rev().find_map(|action| match action {
            SessionAction::Follow(offer) | SessionAction::Offer(offer) => Some(offer.clone()),
            _ => None,
        })
    }

    /// A session that knows the prompt 1 2 3 and has drafted 4 5 6.
    fn drafting() -> Tried {
        let mut tried = Tried {
            session: Session::new(&[], 1),
            policy: AdaptivePolicy::default(),
        };
        tried.handle(available(true));
        let actions = tried.handle(committed(0, &[1, 2, 3]));
        assert_eq!(started(&actions), Some((1, vec![1, 2, 3], 9)));
        let actions = tried.handle(drafted(1, &[4, 5, 6]));
        let offer = sent(&actions).unwrap();
        assert_eq!((offer.pos, &offer.tokens[..]), (3, &[4, 5, 6][..]));
        tried
    }

    #[test]
    fn a_draft_that_agrees_is_kept_and_offered_again() {
        let mut session = drafting();
        let actions = session.handle(committed(3, &[4, 5]));
        assert_eq!(
            sent(&actions).map(|draft| (draft.pos, draft.tokens)),
            Some((5, vec![6]))
        );
        assert_eq!(started(&actions), None);
    }

    #[test]
    fn a_draft_that_was_contradicted_is_dropped_and_begun_again() {
        let mut session = drafting();
        let actions = session.handle(committed(3, &[4, 9]));
        assert!(actions.contains(&SessionAction::StopDraft { drafter: 0 }));
        assert_eq!(sent(&actions).map(|draft| (draft.pos, draft.tokens)), Some((5, vec![])));
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 9], 9)));
        let late = session.handle(drafted(1, &[7]));
        assert_eq!(late, vec![], "tokens of an ended stream count for nothing");
    }

    #[test]
    fn a_stream_at_its_end_is_continued() {
        let mut session = drafting();
        let actions = session.handle(SessionEvent::DraftEnded {
            stream: 1,
            end_of_text: false,
        });
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6], 6)));
    }

    #[test]
    fn a_drafter_that_sees_the_end_of_the_text_is_asked_again_only_when_the_target_goes_on() {
        let mut session = drafting();
        let actions = session.handle(SessionEvent::DraftEnded {
            stream: 1,
            end_of_text: true,
        });
        assert_eq!(started(&actions), None);
        let actions = session.handle(committed(3, &[4, 5, 6]));
        assert_eq!(started(&actions), None);
        assert_eq!(
            sent(&actions),
            Some(Offer {
                pos: 6,
                tokens: vec![],
                n_min: 0,
                hold_us: 0
            })
        );
        let actions = session.handle(committed(6, &[7]));
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6, 7], 9)));
    }

    #[test]
    fn that_an_offer_arrived_is_no_reason_for_another() {
        let mut session = drafting();
        for _ in 0..3 {
            let arrived = SessionEvent::Committed {
                pos: 3,
                tokens: vec![],
                followed: false,
            };
            assert_eq!(session.handle(arrived), vec![]);
        }
    }

    #[test]
    fn the_target_never_waits_for_a_drafter_that_is_gone() {
        let mut session = drafting();
        session.handle(available(false));
        let actions = session.handle(committed(3, &[9]));
        assert_eq!(
            sent(&actions),
            Some(Offer {
                pos: 4,
                tokens: vec![],
                n_min: 0,
                hold_us: 0
            })
        );
        assert_eq!(started(&actions), None);
        let actions = session.handle(available(true));
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 9], 9)));
    }

    #[test]
    fn text_that_comes_again_is_offered_without_a_drafter() {
        let mut tried = Tried {
            session: Session::new(&[], 1),
            policy: AdaptivePolicy::default(),
        };
        tried.policy.calibrate([(0, Duration::from_millis(40))]);
        let text: Vec<Token> = (1..20).chain(1..12).collect();
        let actions = tried.handle(committed(0, &text));
        assert_eq!(sent(&actions).map(|offer| offer.tokens), Some(vec![12, 13, 14, 15, 16]));
        let actions = tried.handle(committed(text.len(), &[12, 13]));
        assert_eq!(sent(&actions).map(|offer| offer.tokens), Some(vec![14, 15, 16, 17]));
    }

    #[test]
    fn after_the_end_nothing_is_done() {
        let mut session = drafting();
        assert_eq!(
            session.handle(SessionEvent::Ended),
            vec![SessionAction::StopDraft { drafter: 0 }, SessionAction::Finish]
        );
        assert_eq!(session.handle(committed(3, &[4])), vec![]);
    }

    /// One thing that may happen to a session, as the model below turns it into an event.
    #[derive(Debug, Clone)]
    enum Move {
        /// The target commits so many tokens of its text.
        Commit(usize),
        /// The answer repeats so many tokens that are known already.
        Repeat(usize),
        /// The drafter produces tokens, each right with the chance given by the flags.
        Draft(Vec<bool>),
        EndStream(bool),
        Available(bool),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        prop::collection::vec(
            prop_oneof![
                4 => (1_usize..6).prop_map(Move::Commit),
                1 => (0_usize..6).prop_map(Move::Repeat),
                6 => prop::collection::vec(prop::bool::weighted(0.8), 1..6).prop_map(Move::Draft),
                2 => any::<bool>().prop_map(Move::EndStream),
                1 => any::<bool>().prop_map(Move::Available),
            ],
            1..120,
        )
    }

    proptest! {
        /// The target's text is 0 1 2 3 …; a wrong draft token is negative.
        #[test]
        fn whatever_happens_the_session_follows_the_target(moves in moves(), n_max in 0_usize..6, measured: bool) {
            let mut policy = AdaptivePolicy::default();
            if measured {
                policy.calibrate([(0, Duration::from_millis(40))]);
                policy.record_first_token(0, Duration::from_millis(2), true);
                policy.record_tokens(0, 1, Duration::from_micros(300), true);
            }
            let text = |from: usize, to: usize| (from..to).map(|i| Token::try_from(i).unwrap()).collect::<Vec<_>>();
            let mut session = Session::new(&[], 1);
            let mut known = 0;
            let mut stream: Option<(u64, usize)> = None;
            let mut streams = 0;
            for step in moves {
                let event = match step {
                    Move::Commit(n) => {
                        known += n;
                        SessionEvent::Committed { pos: known - n, tokens: text(known - n, known), followed: true }
                    }
                    Move::Repeat(n) => {
                        let pos = known.saturating_sub(n);
                        SessionEvent::Committed { pos, tokens: text(pos, known), followed: false }
                    }
                    Move::Draft(right) => {
                        let Some((id, end)) = &mut stream else { continue };
                        let tokens = right
                            .iter()
                            .enumerate()
                            .map(|(i, right)| Token::try_from(*end + i).unwrap() * if *right { 1 } else { -1 } - Token::from(!right))
                            .map(|token| (token, TokenClass::untold(0)))
                            .collect::<Vec<_>>();
                        *end += tokens.len();
                        SessionEvent::Drafted { stream: *id, tokens }
                    }
                    Move::EndStream(end_of_text) => {
                        let Some((id, _)) = stream.take() else { continue };
                        SessionEvent::DraftEnded { stream: id, end_of_text }
                    }
                    Move::Available(it) => available(it),
                };
                let followed = matches!(event, SessionEvent::Committed { followed: true, .. });
                let pending = stream.map(|_| PendingDraft { drafter: 0, started: true, silent_for: Duration::ZERO });
                let context = SessionContext { n_max, pending: pending.as_slice(), ..CONTEXT };
                let actions = session.handle(event, &mut policy, &context);
                let follows = actions.iter().filter(|action| matches!(action, SessionAction::Follow(_))).count();
                prop_assert_eq!(follows, usize::from(followed), "one follow is always outstanding");
                for action in actions {
                    match action {
                        SessionAction::Follow(draft) | SessionAction::Offer(draft) => {
                            prop_assert_eq!(draft.pos, known, "offers begin where the committed tokens end");
                            prop_assert!((draft.n_min == 0) == (draft.hold_us == 0));
                        }
                        SessionAction::Draft { stream: id, prefix, n, .. } => {
                            prop_assert!(stream.is_none(), "one stream at a time");
                            prop_assert!(id > streams && n > 0);
                            prop_assert_eq!(&prefix[..known], &text(0, known)[..]);
                            streams = id;
                            stream = Some((id, prefix.len()));
                        }
                        SessionAction::StopDraft { .. } => stream = None,
                        SessionAction::Finish => prop_assert!(false, "it was not ended"),
                    }
                }
                prop_assert_eq!(session.committed(), &text(0, known)[..]);
                for draft in [&session.copied, &session.drafters[0].draft] {
                    prop_assert!(draft.tokens.len() == draft.beyond(known), "confirmed draft tokens are forgotten");
                    prop_assert!(draft.tokens.len() == draft.classes.len());
                }
            }
        }

        /// Few different tokens, so that the text repeats itself.
        #[test]
        fn what_is_looked_up_is_offered_where_it_belongs(
            prediction in prop::collection::vec(0..3, 0..20),
            commits in prop::collection::vec(prop::collection::vec(0..3, 1..5), 1..60),
        ) {
            let mut policy = AdaptivePolicy::default();
            policy.calibrate([(0, Duration::from_millis(40))]);
            let mut session = Session::new(&prediction, 0);
            let mut text = Vec::new();
            for tokens in commits {
                let pos = text.len();
                text.extend_from_slice(&tokens);
                let event = SessionEvent::Committed { pos, tokens, followed: true };
                for action in session.handle(event, &mut policy, &CONTEXT) {
                    match action {
                        SessionAction::Follow(offer) => {
                            prop_assert_eq!(offer.pos, text.len());
                            prop_assert!(offer.tokens.len() <= max_lookahead(CONTEXT.n_max));
                        }
                        other => prop_assert!(false, "{other:?} without a drafter"),
                    }
                }
                prop_assert_eq!(session.committed(), &text[..]);
            }
        }
    }
}
