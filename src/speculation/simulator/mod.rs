//! Simulator of a target, a drafter and the network between them, in virtual time.
//!
//! [`World::speed`] runs one answer with a real [`Session`] and any policy; no I/O and no clock is involved, so a run is
//! reproducible. The tests hold [`super::AdaptivePolicy`] against the best of many fixed schedules and sweep [`Tuning`].

use std::collections::BTreeMap;
use std::time::Duration;

use super::{
    AdaptivePolicy, ConcurrentLoad, Offer, PendingDraft, Session, SessionAction, SessionContext, SessionEvent,
    StepSample, Token, TokenClass, Tuning,
};
use policies::{FixedPolicy, Learner};

mod policies;
mod tests;

/// Microseconds of a plain step of the target.
pub const PLAIN_US: f64 = 40_000.0;
/// Most draft tokens of a step.
const N_MAX: usize = 16;
/// Tokens of an answer.
const ANSWER: usize = 1500;
/// ... when comparing with the best of many fixed policies: over a short answer the best one is the luckiest.
const LONG_ANSWER: usize = 4 * ANSWER;

/// An answer has fewer events; more mean an endless exchange.
const MAX_EVENTS: u64 = 1_000_000;

/// Properties of the two servers and the network.
#[derive(Debug, Clone, Copy)]
pub struct World {
    /// Acceptance rate: probability that the drafter's next token is the target's, after the same text.
    pub acceptance: f64,
    /// Time of a draft token relative to a plain step.
    pub draft_cost: f64,
    /// Round trip to the target, and to the drafter, relative to a plain step.
    pub round_trip: f64,
    /// Time of a step by its number of draft tokens, relative to a plain step.
    pub step_cost: fn(usize) -> f64,
    /// Factor by which a step and a draft token take longer while both are made: 1 on two machines, 2 on one device.
    pub slowdown: f64,
    /// Tokens of an answer.
    pub answer: usize,
}

impl World {
    /// A world whose servers are close to each other.
    fn near(acceptance: f64, draft_cost: f64, step_cost: fn(usize) -> f64, slowdown: f64) -> Self {
        Self {
            acceptance,
            draft_cost,
            round_trip: 0.02,
            step_cost,
            slowdown,
            answer: ANSWER,
        }
    }

    fn step_us(self, n: usize) -> f64 {
        PLAIN_US * (self.step_cost)(n)
    }

    fn round_trip_us(self) -> f64 {
        PLAIN_US * self.round_trip
    }

    fn token_us(self) -> f64 {
        PLAIN_US * self.draft_cost
    }

    /// Tokens that a policy gets in the time of a plain step, over one answer.
    pub fn speed(self, policy: &mut impl Learner) -> f64 {
        Simulation::new(self).run(policy)
    }

    /// Speed of the adaptive policy after the calibration at startup.
    fn adaptive(self, tuning: &Tuning) -> f64 {
        self.speed(&mut self.calibrated(self.slowdown, tuning.clone()))
    }

    /// The adaptive policy after a calibration at startup that measured this slowdown.
    fn calibrated(self, slowdown: f64, tuning: Tuning) -> AdaptivePolicy {
        let mut policy = AdaptivePolicy::new(tuning);
        policy.calibrate((0..=N_MAX).map(|n| (n, us(self.step_us(n)))));
        policy.record_first_token(0, us(self.round_trip_us() + self.token_us()), true);
        policy.record_tokens(0, 1, us(self.token_us()), true);
        policy.calibrate_slowdown(0, slowdown);
        policy
    }

    /// The fastest fixed policy and its speed.
    fn best_fixed(self, sizes: &[usize]) -> (f64, FixedPolicy) {
        let ways = [(true, false), (true, true), (false, false)];
        let ways = if self.slowdown > 1.0 {
            &ways[..]
        } else {
            &[ways[0], ways[2]]
        };
        let fixed = sizes.iter().flat_map(|n| {
            ways.iter().map(|(waits, pauses)| FixedPolicy {
                n: *n,
                waits: *waits,
                pauses: *pauses,
            })
        });
        fixed
            .map(|mut fixed| (self.speed(&mut fixed), fixed))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .unwrap()
    }
}

/// Whether the draft token at a position is right; the same for all policies.
fn coin(position: usize, acceptance: f64) -> bool {
    // Two rounds of a 64-bit mixer (SplitMix64's finaliser) make neighbouring positions independent.
    let mut x = (position as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
    for _ in 0..2 {
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^= x >> 31;
    }
    (x >> 11) as f64 / (1_u64 << 53) as f64 <= acceptance
}

#[derive(Debug)]
enum SimEvent {
    /// At the target.
    Call {
        offer: Offer,
        follow: bool,
    },
    /// At the proxy.
    Answer(SimAnswer),
    Drafted {
        stream: u64,
        token: Token,
    },
    DraftEnded {
        stream: u64,
    },
    /// At the drafter.
    DraftBegins(SimDraft),
    DraftStops {
        stream: u64,
    },
    /// At the target and at the drafter, unless the work has changed since.
    StepEnds {
        work: u64,
    },
    TokenEnds {
        work: u64,
    },
    HoldEnds {
        commit: usize,
    },
}

/// The draft that the drafter makes.
#[derive(Debug)]
struct SimDraft {
    stream: u64,
    position: usize,
    left: usize,
    /// It contains a token that the target will not choose.
    contradicted: bool,
    /// Microseconds left of its next token.
    left_us: f64,
}

/// The step that the target computes.
#[derive(Debug)]
struct SimStep {
    taken: Vec<Token>,
    since_us: f64,
    left_us: f64,
    /// Time of it during which the drafter was busy.
    shared_us: f64,
}

#[derive(Debug)]
struct SimAnswer {
    pos: usize,
    tokens: Vec<Token>,
    followed: bool,
    steps: usize,
    step: StepResult,
}

/// Drafted, accepted, microseconds, and the share of them during which the drafter was busy.
type StepResult = (usize, usize, f64, f64);

#[derive(Debug)]
struct Simulation {
    world: World,
    now_us: f64,
    /// By time, then in the order in which they were scheduled.
    events: BTreeMap<(Duration, u64), SimEvent>,
    n_scheduled: u64,
    // the target
    committed: usize,
    offer: Offer,
    stepping: Option<SimStep>,
    committed_at_us: f64,
    follow: Option<usize>,
    steps: usize,
    last_step: StepResult,
    // the drafter
    drafting: Option<SimDraft>,
    // both
    work: u64,
    worked_until_us: f64,
    // the proxy
    heard_steps: usize,
    heard_at_us: f64,
    round_trip_us: f64,
    stream: Option<SimStream>,
}

#[derive(Debug)]
struct SimStream {
    id: u64,
    since_us: f64,
    begun: bool,
}

const PROMPT: usize = 4;

impl Simulation {
    fn new(world: World) -> Self {
        Self {
            world,
            now_us: 0.0,
            events: BTreeMap::new(),
            n_scheduled: 0,
            committed: PROMPT,
            offer: Offer::default(),
            stepping: None,
            committed_at_us: 0.0,
            follow: None,
            steps: 0,
            last_step: (0, 0, 0.0, 0.0),
            drafting: None,
            work: 0,
            worked_until_us: 0.0,
            heard_steps: 0,
            heard_at_us: 0.0,
            round_trip_us: 0.0,
            stream: None,
        }
    }

    fn after(&mut self, us: f64, event: SimEvent) {
        self.n_scheduled += 1;
        let at = Duration::from_secs_f64((self.now_us + us) / 1e6);
        self.events.insert((at, self.n_scheduled), event);
    }

    fn run(mut self, policy: &mut impl Learner) -> f64 {
        let mut session = Session::new(&[], 1);
        let begin = session.begin();
        self.act(begin);
        self.event(
            &mut session,
            policy,
            SessionEvent::Available {
                drafter: 0,
                available: true,
            },
        );
        self.begin_step();
        while self.committed < PROMPT + self.world.answer {
            let ((at, _), event) = self.events.pop_first().unwrap();
            self.now_us = at.as_secs_f64() * 1e6;
            assert!(
                self.n_scheduled < MAX_EVENTS,
                "the exchange does not end: {:?}",
                self.world
            );
            match event {
                SimEvent::Call { offer, follow } => self.called(offer, follow),
                SimEvent::Answer(answer) => self.answered(answer, &mut session, policy),
                SimEvent::Drafted { stream, token } => self.drafted(stream, token, &mut session, policy),
                SimEvent::DraftEnded { stream } => {
                    if self.stream.as_ref().is_some_and(|it| it.id == stream) {
                        self.stream = None;
                        let end_of_text = false;
                        self.event(&mut session, policy, SessionEvent::DraftEnded { stream, end_of_text });
                    }
                }
                SimEvent::DraftBegins(drafting) => self.change_work(|it| it.drafting = Some(drafting)),
                SimEvent::DraftStops { stream } => {
                    // It finishes its current token.
                    if let Some(drafting) = self.drafting.as_mut().filter(|it| it.stream == stream) {
                        drafting.left = 1;
                    }
                }
                SimEvent::StepEnds { work } => {
                    if work == self.work {
                        self.step_ends();
                    }
                }
                SimEvent::TokenEnds { work } => {
                    if work == self.work {
                        self.change_work(Self::token_ends);
                    }
                }
                SimEvent::HoldEnds { commit } => {
                    if commit == self.committed && self.stepping.is_none() {
                        self.begin_step();
                    }
                }
            }
        }
        (self.committed - PROMPT) as f64 / (self.now_us / PLAIN_US)
    }

    fn called(&mut self, offer: Offer, follow: bool) {
        let pos = offer.pos;
        self.offer = offer;
        if follow && pos >= self.committed {
            self.follow = Some(pos);
        } else {
            self.answer(pos, follow);
        }
        if self.stepping.is_none() {
            self.begin_step();
        }
    }

    fn answer(&mut self, pos: usize, followed: bool) {
        let tokens = (pos..self.committed).map(|i| Token::try_from(i).unwrap()).collect();
        let answer = SimAnswer {
            pos,
            tokens,
            followed,
            steps: self.steps,
            step: self.last_step,
        };
        self.after(self.world.round_trip_us() / 2.0, SimEvent::Answer(answer));
    }

    fn begin_step(&mut self) {
        let passed = self
            .committed
            .saturating_sub(self.offer.pos)
            .min(self.offer.tokens.len());
        let fits = (self.offer.pos <= self.committed)
            && self.offer.tokens[..passed]
                .iter()
                .enumerate()
                .all(|(i, token)| *token == Token::try_from(self.offer.pos + i).unwrap());
        let left = if fits { &self.offer.tokens[passed..] } else { &[] };
        let waited = self.now_us - self.committed_at_us;
        if left.len() < self.offer.n_min.min(N_MAX) && waited + 0.5 < self.offer.hold_us as f64 {
            let hold = self.offer.hold_us as f64 - waited;
            self.after(hold, SimEvent::HoldEnds { commit: self.committed });
            return;
        }
        let taken: Vec<Token> = left.iter().take(N_MAX).copied().collect();
        let step_us = self.world.step_us(taken.len());
        self.change_work(|it| {
            it.stepping = Some(SimStep {
                taken,
                since_us: it.now_us,
                left_us: step_us,
                shared_us: 0.0,
            });
        });
    }

    /// Changes what the servers work at, after accounting for the work done until now.
    fn change_work(&mut self, change: impl FnOnce(&mut Self)) {
        let passed_us = self.now_us - self.worked_until_us;
        self.worked_until_us = self.now_us;
        let beside = self.stepping.is_some() && self.drafting.is_some();
        let done_us = passed_us / if beside { self.world.slowdown } else { 1.0 };
        if let Some(step) = &mut self.stepping {
            step.left_us -= done_us;
            step.shared_us += if beside { passed_us } else { 0.0 };
        }
        if let Some(draft) = &mut self.drafting {
            draft.left_us -= done_us;
        }
        change(self);
        self.work += 1;
        let work = self.work;
        let beside = self.stepping.is_some() && self.drafting.is_some();
        let slower = if beside { self.world.slowdown } else { 1.0 };
        if let Some(left_us) = self.stepping.as_ref().map(|step| step.left_us) {
            self.after(left_us.max(0.0) * slower, SimEvent::StepEnds { work });
        }
        if let Some(left_us) = self.drafting.as_ref().map(|draft| draft.left_us) {
            self.after(left_us.max(0.0) * slower, SimEvent::TokenEnds { work });
        }
    }

    fn token_ends(&mut self) {
        let Some(mut it) = self.drafting.take() else { return };
        it.contradicted |= !coin(it.position, self.world.acceptance);
        let token = Token::try_from(it.position).unwrap();
        let token = if it.contradicted { -1 - token } else { token };
        let stream = it.stream;
        let one_way = self.world.round_trip_us() / 2.0;
        self.after(one_way, SimEvent::Drafted { stream, token });
        it.position += 1;
        it.left -= 1;
        it.left_us = self.world.token_us();
        if it.left > 0 {
            self.drafting = Some(it);
        } else {
            self.after(one_way, SimEvent::DraftEnded { stream });
        }
    }

    fn step_ends(&mut self) {
        let mut done = None;
        self.change_work(|it| done = it.stepping.take());
        let SimStep {
            taken,
            since_us,
            shared_us,
            ..
        } = done.unwrap();
        let right = |(i, token): &(usize, &Token)| **token == Token::try_from(self.committed + i).unwrap();
        let accepted = taken.iter().enumerate().take_while(right).count();
        self.committed += accepted + 1;
        self.steps += 1;
        let step_us = self.now_us - since_us;
        self.last_step = (taken.len(), accepted, step_us, shared_us / step_us);
        self.committed_at_us = self.now_us;
        if let Some(pos) = self.follow.take() {
            self.answer(pos, true);
        }
        self.begin_step();
    }

    fn answered(&mut self, answer: SimAnswer, session: &mut Session, policy: &mut impl Learner) {
        if !answer.followed {
            self.round_trip_us = self.world.round_trip_us();
        }
        if answer.steps > self.heard_steps {
            let since_last = self.now_us - self.heard_at_us;
            self.heard_at_us = self.now_us;
            if answer.steps == self.heard_steps + 1 && answer.steps > 1 {
                let (drafted, accepted, step_us, busy_share) = answer.step;
                let step = StepSample {
                    drafted,
                    accepted,
                    duration: us(step_us),
                    since_last: us(since_last),
                    batch: 1 + drafted,
                };
                policy.stepped(&step, busy_share);
            }
            self.heard_steps = answer.steps;
        }
        let SimAnswer {
            pos, tokens, followed, ..
        } = answer;
        self.event(session, policy, SessionEvent::Committed { pos, tokens, followed });
    }

    fn drafted(&mut self, stream: u64, token: Token, session: &mut Session, policy: &mut impl Learner) {
        let Some(it) = self.stream.as_mut().filter(|it| it.id == stream) else {
            return;
        };
        let silent = us(self.now_us - it.since_us);
        let waits = session.target_waits_for(0, us(self.now_us));
        if std::mem::replace(&mut it.begun, true) {
            policy.token(silent, waits);
        } else {
            policy.first_token(silent, waits);
        }
        it.since_us = self.now_us;
        let tokens = vec![(token, TokenClass::of_drafter(0))];
        self.event(session, policy, SessionEvent::Drafted { stream, tokens });
    }

    fn event(&mut self, session: &mut Session, policy: &mut impl Learner, event: SessionEvent) {
        let pending: Vec<PendingDraft> = self
            .stream
            .iter()
            .map(|it| PendingDraft {
                drafter: 0,
                started: it.begun,
                silent_for: us(self.now_us - it.since_us),
            })
            .collect();
        let context = SessionContext {
            n_max: N_MAX,
            pending: &pending,
            now: us(self.now_us),
            round_trip: us(self.round_trip_us),
            load: ConcurrentLoad::default(),
        };
        for action in session.handle(event, policy, &context) {
            self.act(action);
        }
    }

    fn act(&mut self, action: SessionAction) {
        let one_way = self.world.round_trip_us() / 2.0;
        match action {
            SessionAction::Follow(offer) => self.after(one_way, SimEvent::Call { offer, follow: true }),
            SessionAction::Offer(offer) => self.after(one_way, SimEvent::Call { offer, follow: false }),
            SessionAction::Draft { stream, prefix, n, .. } => {
                self.stream = Some(SimStream {
                    id: stream,
                    since_us: self.now_us,
                    begun: false,
                });
                let drafting = SimDraft {
                    stream,
                    position: prefix.len(),
                    left: n,
                    contradicted: prefix
                        .iter()
                        .enumerate()
                        .any(|(i, token)| *token != Token::try_from(i).unwrap()),
                    left_us: self.world.token_us(),
                };
                self.after(one_way, SimEvent::DraftBegins(drafting));
            }
            SessionAction::StopDraft { .. } => {
                if let Some(stream) = self.stream.take() {
                    self.after(one_way, SimEvent::DraftStops { stream: stream.id });
                }
            }
            SessionAction::Finish => {}
        }
    }
}

fn us(us: f64) -> Duration {
    Duration::from_secs_f64(us / 1e6)
}
