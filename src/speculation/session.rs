//! The state of one drafted completion.
//!
//! There is one text that counts, the *committed* tokens, which the target has chosen, and there are several *drafts* of
//! what may follow them: one found in the text itself by [`Lookup`], and one per drafter, appended by its stream. As long
//! as a draft repeats what the target commits it stays; when the two differ it is dropped and a new one starts from the
//! committed tokens. Of the drafts that reach beyond the committed tokens the [`Policy`] chooses the one that is worth
//! most, how much of it is offered, and whether the target should wait.

use std::time::Duration;

use super::policy::{Choice, Circumstances, Class, Growing, Load};
use super::{Lookup, Token, micros, whole};

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The target answered: it has committed `tokens`, the first of which stands at `pos`. With `followed`, this
    /// answers [`Action::Follow`].
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
        /// As in [`Action::Draft`].
        stream: u64,
        /// The next tokens of this stream, with what is known of each.
        tokens: Vec<(Token, Class)>,
    },
    /// A stream of a drafter is over.
    DraftEnded {
        /// As in [`Action::Draft`].
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
pub enum Action {
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
pub struct Moment<'a> {
    /// Most draft tokens that the target can verify in one step.
    pub n_max: usize,
    /// The running streams.
    pub growing: &'a [Growing],
    /// Time since the session began.
    pub now: Duration,
    /// From asking the target to its answer.
    pub round_trip: Duration,
    /// What else the target does.
    pub load: Load,
}

/// Who decides; see [`super::Pace`].
pub trait Policy {
    /// Learns that a draft token was what the target chose itself, or was not. All tokens before it were.
    fn observe(&mut self, class: Class, accepted: bool);

    /// How many tokens beyond the committed ones a drafter should draft now, at most; 0: none. It will.
    fn reach(&mut self, drafter: usize, target_waits: bool, n_max: usize, load: Load, round_trip: Duration) -> usize;

    /// The chance that all of `draft` is accepted.
    fn chance(&self, draft: &[Class]) -> f64;

    /// How long a step over `n` draft tokens takes beside all else, in microseconds; `None` while nothing is known.
    fn step_us(&self, n: usize, load: Load) -> Option<f64>;

    /// What the target should do with a draft.
    fn choose(&self, draft: &[Class], moment: &Circumstances) -> Choice;
}

/// The state machine of one completion.
#[derive(Debug, Default)]
pub struct Session {
    committed: Vec<Token>,
    lookup: Lookup,
    copied: Draft,
    drafters: Vec<Drafter>,
    /// What the target was told last, and what is known of each token of it.
    told: Offer,
    told_classes: Vec<Class>,
    /// When that arrived at the target, in microseconds since the session began.
    told_at_us: f64,
    target: Target,
    /// When its last step that we know of ended, in microseconds since the session began.
    stepped_us: f64,
    /// How long the target can do without further draft tokens, in microseconds.
    spare_us: f64,
    /// Streams started so far.
    streams: u64,
    ended: bool,
}

/// What may follow `committed[..base]`.
#[derive(Debug, Default)]
struct Draft {
    tokens: Vec<Token>,
    /// What is known of each token.
    classes: Vec<Class>,
    base: usize,
}

#[derive(Debug, Default)]
struct Drafter {
    draft: Draft,
    /// The running stream.
    running: Option<u64>,
    /// The draft ends with the end of the text.
    complete: bool,
    available: bool,
    /// The target waited when the stream was begun or its last token came.
    waited_for: bool,
}

/// What the target does; times are microseconds since the session began.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Target {
    /// It waits for an offer until then, and goes on with what is left of the last one.
    Waits { until_us: f64, left: usize },
    /// It has been in a step over `n` draft tokens since then.
    Steps { since_us: f64, n: usize },
}

impl Default for Target {
    fn default() -> Self {
        Self::Steps { since_us: 0.0, n: 0 }
    }
}

/// The draft that is worth most.
struct Best<'a> {
    choice: Choice,
    /// Its stream runs.
    grows: bool,
    /// Drafters that have to rest while the target goes on.
    rest: Vec<usize>,
    /// What of it is to be offered.
    tokens: &'a [Token],
    classes: &'a [Class],
}

/// A draft of which the drafter's next token would be accepted with less chance is not continued.
const HOPELESS: f64 = 0.05;
/// A stream that is behind by no more tokens than this may catch up: a new one would have to read these as well.
const MAY_LAG: usize = 2;
/// Steps that the target may take unheard of; more are not reckoned with.
const MAY_PASS: usize = 4;

impl Draft {
    /// Number of tokens beyond the committed ones.
    fn beyond(&self, committed: usize) -> usize {
        (self.base + self.tokens.len()).saturating_sub(committed)
    }

    /// The tokens beyond the committed ones, and their classes.
    fn ahead(&self, committed: usize) -> (&[Token], &[Class]) {
        let start = self.tokens.len() - self.beyond(committed);
        (&self.tokens[start..], &self.classes[start..])
    }

    /// Forgets what is confirmed. False: it is contradicted, or behind by more than `may_lag` tokens.
    fn reconcile(&mut self, committed: &[Token], may_lag: usize, policy: &mut impl Policy) -> bool {
        let unseen = &committed[self.base..];
        let compared = unseen.len().min(self.tokens.len());
        let agreed = unseen.iter().zip(&self.tokens).take_while(|(a, b)| a == b).count();
        for (i, class) in self.classes[..compared].iter().enumerate().take(agreed + 1) {
            policy.observe(*class, i < agreed);
        }
        if agreed < compared || unseen.len() - compared > may_lag {
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
            drafters: std::iter::repeat_with(Drafter::default).take(drafters).collect(),
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
    pub fn offered(&self, n: usize) -> &[Class] {
        let classes = &self.told_classes[self.told_classes.len() - self.told_beyond()..];
        &classes[..n.min(classes.len())]
    }

    /// How long the target can do without further draft tokens, as far as is known: it is in a step, and the next offer is
    /// better made with more.
    #[must_use]
    pub fn spare(&self) -> Duration {
        Duration::from_secs_f64(self.spare_us.max(0.0) / 1e6)
    }

    /// Whether this drafter makes its next token for a target that waits, or waited until that took too long: it is how
    /// long such a token takes that decides whether the target is to wait.
    #[must_use]
    pub fn is_waited_for(&self, drafter: usize, now: Duration) -> bool {
        self.target_waits(now) || self.drafters.get(drafter).is_some_and(|it| it.waited_for)
    }

    /// Whether the target waits for an offer, as far as is known, at this time since the session began.
    fn target_waits(&self, now: Duration) -> bool {
        matches!(self.target, Target::Waits { until_us, .. } if micros(now) < until_us)
    }

    /// The first thing to do: learn the prompt.
    #[must_use]
    pub fn begin(&self) -> Action {
        Action::Follow(Offer::default())
    }

    /// Takes in what happened and tells what to do, in this order.
    pub fn handle(&mut self, event: Event, policy: &mut impl Policy, moment: &Moment<'_>) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.ended {
            return actions;
        }
        let mut follow = false;
        let mut heard = None;
        match event {
            Event::Committed { pos, tokens, followed } => {
                follow = followed;
                if !self.commit(pos, &tokens, moment) && !followed {
                    // An offer arrived. If that were reason enough for another one the two would never end.
                    return actions;
                }
            }
            Event::Ended => {
                self.ended = true;
                for drafter in 0..self.drafters.len() {
                    self.stop_stream(drafter, &mut actions);
                }
                actions.push(Action::Finish);
                return actions;
            }
            Event::Drafted { stream, tokens } => {
                heard = Some(stream);
                if let Some(drafter) = self.drafter_of(stream) {
                    for (token, class) in tokens {
                        drafter.draft.tokens.push(token);
                        drafter.draft.classes.push(class);
                    }
                }
            }
            Event::DraftEnded { stream, end_of_text } => {
                if let Some(drafter) = self.drafter_of(stream) {
                    drafter.running = None;
                    drafter.complete = end_of_text;
                }
            }
            Event::Available { drafter, available } => {
                if let Some(it) = self.drafters.get_mut(drafter) {
                    it.available = available;
                }
                if !available {
                    self.stop_stream(drafter, &mut actions);
                }
            }
        }
        self.reconcile(policy, &mut actions);
        self.look_up(moment.n_max);
        let begun: Vec<usize> = (0..self.drafters.len())
            .filter(|drafter| self.draft_on(*drafter, policy, moment, &mut actions))
            .collect();
        self.offer(follow, &begun, policy, moment, &mut actions);
        let waits = self.target_waits(moment.now);
        for (number, drafter) in self.drafters.iter_mut().enumerate() {
            if begun.contains(&number) || heard.is_some() && drafter.running == heard {
                drafter.waited_for = waits;
            }
        }
        actions
    }

    fn drafter_of(&mut self, stream: u64) -> Option<&mut Drafter> {
        self.drafters.iter_mut().find(|it| it.running == Some(stream))
    }

    fn stop_stream(&mut self, drafter: usize, actions: &mut Vec<Action>) {
        if self
            .drafters
            .get_mut(drafter)
            .is_some_and(|it| it.running.take().is_some())
        {
            actions.push(Action::StopDraft { drafter });
        }
    }

    /// Takes in committed tokens; false: they are known.
    fn commit(&mut self, pos: usize, tokens: &[Token], moment: &Moment<'_>) -> bool {
        let known = self.committed.len().saturating_sub(pos);
        if pos > self.committed.len() || known >= tokens.len() {
            return false;
        }
        self.committed.extend_from_slice(&tokens[known..]);
        self.lookup.extend(&tokens[known..]);
        let at_us = micros(moment.now) - micros(moment.round_trip) / 2.0;
        self.stepped_us = at_us;
        self.target = self.next_step(at_us, 0, moment.n_max);
        true
    }

    /// What the target does after a step that ended at `at_us` with `passed` tokens beyond the committed ones, if they are
    /// those of the offer: what is left of that goes into the next step at once, or is waited for to grow.
    fn next_step(&self, at_us: f64, passed: usize, n_max: usize) -> Target {
        // An offer that came too late came after one that was alike but for the tokens.
        let arrived = self.told_at_us <= at_us;
        let left = if arrived {
            self.told_beyond().saturating_sub(passed).min(n_max)
        } else {
            0
        };
        if left < self.told.n_min.min(n_max) {
            let until_us = at_us + self.told.hold_us as f64;
            Target::Waits { until_us, left }
        } else {
            Target::Steps {
                since_us: at_us,
                n: left,
            }
        }
    }

    /// Tokens of the last offer that may still follow the committed ones.
    fn told_beyond(&self) -> usize {
        let passed = self.committed.len().saturating_sub(self.told.pos);
        if self.told.tokens.len() <= passed || self.told.tokens[..passed] != self.committed[self.told.pos..] {
            return 0;
        }
        self.told.tokens.len() - passed
    }

    /// Forgets what of the drafts is confirmed, and drafts that were contradicted or overtaken.
    fn reconcile(&mut self, policy: &mut impl Policy, actions: &mut Vec<Action>) {
        if !self.copied.reconcile(&self.committed, 0, policy) {
            self.copied.drop_at(self.committed.len());
        }
        for (number, drafter) in self.drafters.iter_mut().enumerate() {
            let may_lag = if drafter.running.is_some() { MAY_LAG } else { 0 };
            if !drafter.draft.reconcile(&self.committed, may_lag, policy) {
                if drafter.running.take().is_some() {
                    actions.push(Action::StopDraft { drafter: number });
                }
                drafter.draft.drop_at(self.committed.len());
                drafter.complete = false;
            }
        }
    }

    /// Drafts from the text itself.
    fn look_up(&mut self, n_max: usize) {
        let beyond = self.copied.beyond(self.committed.len());
        if self.committed.is_empty() || n_max == 0 || beyond >= far(n_max) {
            return;
        }
        let (ahead, _) = self.copied.ahead(self.committed.len());
        if let Some(proposal) = self.lookup.propose(ahead, far(n_max) - beyond) {
            self.copied.classes.extend(proposal.classes());
            self.copied.tokens.extend(proposal.tokens);
        }
    }

    /// Starts a stream of a drafter that has drafted too little and has none running; says whether it did.
    fn draft_on(
        &mut self,
        number: usize,
        policy: &mut impl Policy,
        moment: &Moment<'_>,
        actions: &mut Vec<Action>,
    ) -> bool {
        let drafter = &self.drafters[number];
        let beyond = drafter.draft.beyond(self.committed.len());
        let (ahead, classes) = drafter.draft.ahead(self.committed.len());
        if drafter.running.is_some()
            || drafter.complete
            || !drafter.available
            || self.committed.is_empty()
            || moment.n_max == 0
            || policy.chance(classes) < HOPELESS
        {
            return false;
        }
        let (waits, round_trip) = (self.target_waits(moment.now), moment.round_trip);
        let reach = policy.reach(number, waits, moment.n_max, moment.load, round_trip);
        if beyond >= reach {
            return false;
        }
        self.streams += 1;
        let prefix = [&self.committed[..], ahead].concat();
        let n = reach - beyond;
        self.drafters[number].running = Some(self.streams);
        actions.push(Action::Draft {
            drafter: number,
            stream: self.streams,
            prefix,
            n,
        });
        true
    }

    /// Offers the part of the best draft that is worth it, with a new follow or when the target was told something else.
    /// The streams of `begun` were just started.
    fn offer(
        &mut self,
        follow: bool,
        begun: &[usize],
        policy: &impl Policy,
        moment: &Moment<'_>,
        actions: &mut Vec<Action>,
    ) {
        if self.committed.is_empty() {
            if follow {
                actions.push(Action::Follow(Offer::default()));
            }
            return;
        }
        let arrives_us = micros(moment.now) + micros(moment.round_trip) / 2.0;
        let (busy_us, passed) = self.busy(arrives_us, policy, moment);
        let best = self.best(busy_us.unwrap_or(0.0), passed, begun, policy, moment);
        let Best {
            choice,
            grows,
            rest,
            tokens,
            classes,
        } = best;
        let (n_min, hold_us) = if choice.wait_us > 0 {
            // Until we say that it is enough; counted from the last step, or from the one that goes on, which may
            // contradict the draft.
            let hold_us = match busy_us {
                None => choice.wait_us + whole(arrives_us - self.stepped_us),
                Some(_) => choice.wait_us.max(choice.hold_us),
            };
            (moment.n_max, hold_us)
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
        let news = (offer.pos, &offer.tokens, offer.n_min) != (self.told.pos, &self.told.tokens, self.told.n_min);
        // More is to come before the step ends. So it is told at shorter and shorter intervals, not token by token.
        let extends = offer.pos == self.told.pos && offer.tokens.starts_with(&self.told.tokens);
        let round_trip_us = micros(moment.round_trip);
        let since_told = (arrives_us - self.told_at_us).max(round_trip_us);
        let busy = busy_us.unwrap_or_default();
        self.spare_us = busy - since_told;
        if follow || news && !(grows && extends && self.spare_us > 0.0) {
            self.spare_us = busy - round_trip_us;
            self.told = offer.clone();
            self.told_classes = classes;
            self.told_at_us = arrives_us;
            if busy_us.is_none() {
                self.target = if self.told.tokens.len() < self.told.n_min {
                    Target::Waits {
                        until_us: self.stepped_us + self.told.hold_us as f64,
                        left: self.told.tokens.len(),
                    }
                } else {
                    Target::Steps {
                        since_us: arrives_us,
                        n: self.told.tokens.len(),
                    }
                };
            }
            actions.push(if follow {
                Action::Follow(offer)
            } else {
                Action::Offer(offer)
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
        begun: &[usize],
        policy: &impl Policy,
        moment: &Moment<'_>,
    ) -> Best<'_> {
        let committed = self.committed.len();
        let weigh = |draft: &'_ Draft, growing: Option<Growing>, rests: Option<usize>| {
            let circumstances = Circumstances {
                n_max: moment.n_max,
                growing,
                rests,
                busy_us,
                round_trip: moment.round_trip,
                load: moment.load,
            };
            let classes = draft.ahead(committed).1;
            policy.choose(classes.get(passed..).unwrap_or_default(), &circumstances)
        };
        // A step that goes on verifies the draft that was offered: another one is not what it will agree with.
        let goes_on = |draft: &Draft| {
            let verified = self.told_beyond().min(passed.saturating_sub(1));
            let told = &self.told.tokens[self.told.tokens.len() - self.told_beyond()..][..verified];
            draft.ahead(committed).0.starts_with(told)
        };
        let (mut best, mut choice, mut grows) = (&self.copied, weigh(&self.copied, None, None), false);
        let mut fits = goes_on(&self.copied);
        let mut rest = Vec::new();
        for (number, drafter) in self.drafters.iter().enumerate() {
            let growing = if begun.contains(&number) {
                Some(Growing {
                    drafter: number,
                    ..Growing::default()
                })
            } else {
                let running = moment.growing.iter().find(|growing| growing.drafter == number);
                running.copied().filter(|_| drafter.running.is_some())
            };
            let rests = drafter.available && drafter.running.is_none() && !drafter.complete;
            if growing.is_none() && !rests && drafter.draft.beyond(committed) == 0 {
                continue;
            }
            let other = weigh(&drafter.draft, growing, rests.then_some(number));
            let agrees = goes_on(&drafter.draft);
            if other.rests && other.wait_us == 0 && drafter.running.is_some() {
                rest.push(number);
            }
            if (agrees, other.worth, other.n) >= (fits, choice.worth, choice.n) {
                (best, choice, fits, grows) = (&drafter.draft, other, agrees, growing.is_some());
            }
        }
        let (tokens, classes) = best.ahead(committed);
        // What the target verifies now is offered again, in case that it does not do so yet.
        let n = if choice.n > 0 {
            passed + choice.n
        } else {
            passed.saturating_sub(1).min(tokens.len())
        };
        Best {
            choice,
            grows,
            rest,
            tokens: &tokens[..n],
            classes: &classes[..n],
        }
    }

    /// How long the target goes on with the step that it is in at `at_us`, and how many tokens it will have chosen then if
    /// they are those of the draft. `None`: it waits for an offer.
    fn busy(&self, at_us: f64, policy: &impl Policy, moment: &Moment<'_>) -> (Option<f64>, usize) {
        let (mut target, mut passed) = (self.target, 0);
        for _ in 0..=MAY_PASS {
            let (since_us, n) = match target {
                Target::Waits { until_us, .. } if at_us < until_us => {
                    return (if passed == 0 { None } else { Some(0.0) }, passed);
                }
                Target::Waits { until_us, left } => (until_us, left),
                Target::Steps { since_us, n } => (since_us, n),
            };
            let Some(step_us) = policy.step_us(n, moment.load) else {
                return (None, 0);
            };
            let end_us = since_us + step_us;
            passed += n + 1;
            if end_us >= at_us {
                return (Some(end_us - at_us), passed);
            }
            target = self.next_step(end_us, passed, moment.n_max);
        }
        (Some(0.0), passed)
    }
}

/// How far a draft goes at most: enough for a step, for the token that the target adds, and for the next step.
pub(super) fn far(n_max: usize) -> usize {
    2 * n_max + 1
}

#[cfg(test)]
mod tests {
    use super::super::Pace;
    use super::*;
    use proptest::prelude::*;

    const MOMENT: Moment<'_> = Moment {
        n_max: 4,
        growing: &[],
        now: Duration::ZERO,
        round_trip: Duration::from_micros(100),
        load: Load { others: 0, tokens: 0 },
    };

    /// A session with costs of which nothing is known.
    struct Tried {
        session: Session,
        pace: Pace,
    }

    impl Tried {
        fn handle(&mut self, event: Event) -> Vec<Action> {
            self.session.handle(event, &mut self.pace, &MOMENT)
        }
    }

    fn committed(pos: usize, tokens: &[Token]) -> Event {
        Event::Committed {
            pos,
            tokens: tokens.to_vec(),
            followed: true,
        }
    }

    fn drafted(stream: u64, tokens: &[Token]) -> Event {
        Event::Drafted {
            stream,
            tokens: tokens.iter().map(|token| (*token, Class::untold(0))).collect(),
        }
    }

    fn available(available: bool) -> Event {
        Event::Available { drafter: 0, available }
    }

    fn started(actions: &[Action]) -> Option<(u64, Vec<Token>, usize)> {
        actions.iter().find_map(|action| match action {
            Action::Draft { stream, prefix, n, .. } => Some((*stream, prefix.clone(), *n)),
            _ => None,
        })
    }

    fn sent(actions: &[Action]) -> Option<Offer> {
        actions.iter().rev().find_map(|action| match action {
            Action::Follow(offer) | Action::Offer(offer) => Some(offer.clone()),
            _ => None,
        })
    }

    /// A session that knows the prompt 1 2 3 and has drafted 4 5 6.
    fn drafting() -> Tried {
        let mut tried = Tried {
            session: Session::new(&[], 1),
            pace: Pace::default(),
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
        assert!(actions.contains(&Action::StopDraft { drafter: 0 }));
        assert_eq!(sent(&actions).map(|draft| (draft.pos, draft.tokens)), Some((5, vec![])));
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 9], 9)));
        let late = session.handle(drafted(1, &[7]));
        assert_eq!(late, vec![], "tokens of an ended stream count for nothing");
    }

    #[test]
    fn a_stream_at_its_end_is_continued() {
        let mut session = drafting();
        let actions = session.handle(Event::DraftEnded {
            stream: 1,
            end_of_text: false,
        });
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6], 6)));
    }

    #[test]
    fn a_drafter_that_sees_the_end_of_the_text_is_asked_again_only_when_the_target_goes_on() {
        let mut session = drafting();
        let actions = session.handle(Event::DraftEnded {
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
            let arrived = Event::Committed {
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
            pace: Pace::default(),
        };
        tried.pace.calibrate([(0, Duration::from_millis(40))]);
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
            session.handle(Event::Ended),
            vec![Action::StopDraft { drafter: 0 }, Action::Finish]
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
            let mut pace = Pace::default();
            if measured {
                pace.calibrate([(0, Duration::from_millis(40))]);
                pace.record_first_token(0, Duration::from_millis(2), true);
                pace.record_tokens(0, 1, Duration::from_micros(300), true);
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
                        Event::Committed { pos: known - n, tokens: text(known - n, known), followed: true }
                    }
                    Move::Repeat(n) => {
                        let pos = known.saturating_sub(n);
                        Event::Committed { pos, tokens: text(pos, known), followed: false }
                    }
                    Move::Draft(right) => {
                        let Some((id, end)) = &mut stream else { continue };
                        let tokens = right
                            .iter()
                            .enumerate()
                            .map(|(i, right)| Token::try_from(*end + i).unwrap() * if *right { 1 } else { -1 } - Token::from(!right))
                            .map(|token| (token, Class::untold(0)))
                            .collect::<Vec<_>>();
                        *end += tokens.len();
                        Event::Drafted { stream: *id, tokens }
                    }
                    Move::EndStream(end_of_text) => {
                        let Some((id, _)) = stream.take() else { continue };
                        Event::DraftEnded { stream: id, end_of_text }
                    }
                    Move::Available(it) => available(it),
                };
                let followed = matches!(event, Event::Committed { followed: true, .. });
                let growing = stream.map(|_| Growing { drafter: 0, begun: true, silent: Duration::ZERO });
                let moment = Moment { n_max, growing: growing.as_slice(), ..MOMENT };
                let actions = session.handle(event, &mut pace, &moment);
                let follows = actions.iter().filter(|action| matches!(action, Action::Follow(_))).count();
                prop_assert_eq!(follows, usize::from(followed), "one follow is always outstanding");
                for action in actions {
                    match action {
                        Action::Follow(draft) | Action::Offer(draft) => {
                            prop_assert_eq!(draft.pos, known, "offers begin where the committed tokens end");
                            prop_assert!((draft.n_min == 0) == (draft.hold_us == 0));
                        }
                        Action::Draft { stream: id, prefix, n, .. } => {
                            prop_assert!(stream.is_none(), "one stream at a time");
                            prop_assert!(id > streams && n > 0);
                            prop_assert_eq!(&prefix[..known], &text(0, known)[..]);
                            streams = id;
                            stream = Some((id, prefix.len()));
                        }
                        Action::StopDraft { .. } => stream = None,
                        Action::Finish => prop_assert!(false, "it was not ended"),
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
            let mut pace = Pace::default();
            pace.calibrate([(0, Duration::from_millis(40))]);
            let mut session = Session::new(&prediction, 0);
            let mut text = Vec::new();
            for tokens in commits {
                let pos = text.len();
                text.extend_from_slice(&tokens);
                let event = Event::Committed { pos, tokens, followed: true };
                for action in session.handle(event, &mut pace, &MOMENT) {
                    match action {
                        Action::Follow(offer) => {
                            prop_assert_eq!(offer.pos, text.len());
                            prop_assert!(offer.tokens.len() <= far(MOMENT.n_max));
                        }
                        other => prop_assert!(false, "{other:?} without a drafter"),
                    }
                }
                prop_assert_eq!(session.committed(), &text[..]);
            }
        }
    }
}
