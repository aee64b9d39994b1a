//! What a target and its drafters cost, and how many draft tokens the target should verify next.
//!
//! A draft token has a *class*: how sure its drafter was, or how well the text matched that it was copied from. From what
//! the target chose itself, each class gets a chance of acceptance `a`. A step over the first `k` tokens of a draft yields
//! `E(k) = 1 + a_1 + a_1 a_2 + … + a_1…a_k` tokens (Leviathan et al. 2023, section 3.1, with a chance per token) and takes
//! `T(k)`, measured for each `k`: on some machines two tokens cost as much as two steps, and eight less than seven.
//!
//! With `r` tokens per microsecond as they come now, a step is worth `E(k) - r T(k)`: what it yields less what the target
//! would yield in that time anyway (fractional programming, Dinkelbach 1967). The best `k` is offered. The threshold form
//! of such rules is optimal (`SpecDec++`, arXiv 2405.19715, section 3).
//!
//! Whether the target should wait for drafts at all follows from three cycles (renewal-reward theorem), each from one
//! contradicted draft to the next. With a usual chance `a` a draft of `n` is followed by another one without a pause with
//! the chance `p = a^(n+1)`: all of it is accepted, and the token that the target adds is the next of the draft. So
//! `1 / (1 - p)` steps of `E(n)` tokens and the time `T(n)` come in a row, and then
//!
//! - a target that waits stands still until the next draft is there: for `A = round trip + first token + (n - 1) token`;
//! - a target that does not goes on with what is there: with plain steps until the drafter is ahead, and then over as many
//!   of its tokens as are worth their time. Summed up step by step: after `j` steps that together brought `m` tokens forward
//!   the draft is still the target's own with the chance `a^m`;
//! - where both are on one device each takes longer while the other is at work. So they may take turns: the target waits, and
//!   the drafter, which is asked for `n` tokens and no more, rests while they are verified. Nothing comes in a row then:
//!   `E(n)` tokens in the time `A + T(n)`.
//!
//! By how much they slow each other down is measured (`slowdown.rs`); on two machines the third cycle is never the best.
//! The best of them, over all `n`, against a plain step with no drafter at work says whether a drafter pays. One that does
//! not is asked again now and then, less and less often, for a few tokens that are only compared with what the target says,
//! which costs the target next to nothing. Where waiting pays, waiting for a draft to grow to `m` tokens is worth
//! `E(m) - r (T(m) + w)`, where `w` is how long its last token comes after the target is done with the step that it is in.
//!
//! Other completions in the same pass make it longer for all of them: `T` is taken beyond their tokens, and `r` is what
//! all of them yield; the cycles are those of a crowd that does the same. A pass waits for all of them at once, so with `m`
//! completions it waits if any of them begins anew, with the chance `1 - p^m`.
//!
//! Costs that keep drafts from being verified would never be measured again. So they are doubted now and then: a draft that
//! should yield two tokens or more is verified all the same.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::cost_model::{CostModel, DraftLatency, DraftSchedule, DrafterProfile, ScheduleEstimate, WaitCandidate};
use super::session::{Policy, max_lookahead};
use super::slowdown::{PassSample, ReprobeKind, Slowdown};
use super::step_cost::StepCost;
use super::{micros, whole};

/// What is known of a draft token before the target sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenClass {
    source: TokenSource,
    /// Index into the source's grades.
    grade: usize,
}

/// Where a draft token comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenSource {
    /// The drafter of that number.
    Drafter(usize),
    /// The text itself.
    Copy,
    /// The client, who predicted the answer.
    Prediction,
}

/// Bounds of a drafter's doubt, `1 - p`, and the chance that a token of that grade starts with.
const DOUBT: [(f64, f64); 10] = [
    (0.001, 0.99),
    (0.003, 0.98),
    (0.01, 0.97),
    (0.03, 0.95),
    (0.1, 0.9),
    (0.2, 0.8),
    (0.35, 0.7),
    (0.5, 0.55),
    (0.7, 0.4),
    (1.1, 0.2),
];
/// The grade of a drafter's token whose doubt is not told, which comes after [`DOUBT`], and its chance.
const UNTOLD: (usize, f64) = (DOUBT.len(), 0.7);
/// Fewest matching tokens of each grade of copies, and the chance that a token of that grade starts with.
const MATCHED: [(usize, f64); 6] = [(0, 0.4), (1, 0.5), (3, 0.6), (5, 0.7), (9, 0.8), (17, 0.9)];
/// The chance of a token that a drafter of which nothing is known has yet to draft.
const USUAL: f64 = 0.85;

impl TokenClass {
    /// A token that the drafter of this number gives the probability `p`.
    #[must_use]
    pub fn of_probability(drafter: usize, p: f64) -> Self {
        let grade = DOUBT.iter().position(|(doubt, _)| 1.0 - p < *doubt);
        Self {
            source: TokenSource::Drafter(drafter),
            grade: grade.unwrap_or(DOUBT.len() - 1),
        }
    }

    /// A token of the drafter of this number, which does not tell how sure it is.
    #[must_use]
    pub fn untold(drafter: usize) -> Self {
        Self {
            source: TokenSource::Drafter(drafter),
            grade: UNTOLD.0,
        }
    }

    /// A token that is copied from a place where the `matched` tokens before it are the same.
    #[must_use]
    pub fn of_match(matched: usize) -> Self {
        let grade = MATCHED.iter().rposition(|(fewest, _)| *fewest <= matched);
        Self {
            source: TokenSource::Copy,
            grade: grade.unwrap_or_default(),
        }
    }

    /// A token that is copied from the client's prediction of the answer, as in [`Self::of_match`].
    #[must_use]
    pub fn of_prediction(matched: usize) -> Self {
        Self {
            source: TokenSource::Prediction,
            ..Self::of_match(matched)
        }
    }

    /// Whether the client predicted this token.
    #[must_use]
    pub fn is_predicted(self) -> bool {
        self.source == TokenSource::Prediction
    }
}

/// One step of the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSample {
    /// Draft tokens that it verified.
    pub drafted: usize,
    /// Of these, the ones that it kept.
    pub accepted: usize,
    /// How long the pass took.
    pub duration: Duration,
    /// Since the step before, waiting included.
    pub since_last: Duration,
    /// Tokens that the pass brought forward, of all completions and prompts.
    pub batch: usize,
}

/// What other completions do at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ConcurrentLoad {
    /// Other completions that run.
    pub completions: usize,
    /// Tokens that they bring into a pass, all together.
    pub tokens: usize,
}

/// More draft tokens are on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PendingDraft {
    /// The drafter that makes them.
    pub drafter: usize,
    /// Whether the stream has given tokens already.
    pub started: bool,
    /// Time since its last token, or since it was asked for.
    pub silent_for: Duration,
}

/// The moment at which a step is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepContext {
    /// Most draft tokens of a step.
    pub n_max: usize,
    /// Whether the draft grows.
    pub pending: Option<PendingDraft>,
    /// The drafter that does not work now, and can after the step.
    pub rests: Option<usize>,
    /// How long the target will go on with the step that it is in, in microseconds; 0: it waits for us.
    pub busy_us: f64,
    /// From asking the target to its answer.
    pub round_trip: Duration,
    /// What else the target does.
    pub load: ConcurrentLoad,
}

/// What the target should do next.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepPlan {
    /// Draft tokens to verify.
    pub n: usize,
    /// How long the target should wait for more before its next step, in microseconds; 0: go on with these.
    pub wait_us: u64,
    /// How long the target should wait after that step for the word of what comes next, in microseconds.
    pub hold_us: u64,
    /// Whether the drafter should rest during that step, which it would slow down.
    pub rests: bool,
    /// What the step is worth, in tokens; only differences mean something.
    pub worth: f64,
}

/// What is known of a target and its drafters.
#[derive(Debug, Clone)]
pub struct AdaptivePolicy {
    /// With no drafter at work.
    step: StepCost,
    /// The last step of the target.
    last: Option<PassSample>,
    /// What the last two steps took over what was expected.
    late: [f64; 2],
    copies: [AcceptanceRate; MATCHED.len()],
    predicted: [AcceptanceRate; MATCHED.len()],
    drafters: Vec<DrafterStats>,
    /// Microseconds from asking the target to its answer.
    round_trip_us: MovingAverage,
    /// Tokens and microseconds of the last steps, fading.
    tokens: f64,
    us: f64,
    /// Steps since one verified a draft, and after how many the next one does although it does not pay.
    undrafted: u32,
    trust: u32,
}

impl Default for AdaptivePolicy {
    fn default() -> Self {
        Self {
            step: StepCost::default(),
            last: None,
            late: [1.0; 2],
            copies: Default::default(),
            predicted: Default::default(),
            drafters: Vec::new(),
            round_trip_us: MovingAverage::default(),
            tokens: 0.0,
            us: 0.0,
            undrafted: 0,
            trust: TRUST.0,
        }
    }
}

/// What a drafter is worth on the whole.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DrafterOutlook {
    /// Share of its tokens that were the target's own, after the same text.
    pub agreement: Option<f64>,
    /// Milliseconds from asking it to its first token.
    pub first_token_ms: Option<f64>,
    /// Milliseconds per further token.
    pub token_ms: Option<f64>,
    /// A step of the target takes so many times longer while a drafter is at work: above 1 they share a device.
    pub slowdown: f64,
    /// Speed over that of plain steps with no drafter at work, as the formula of the cycles has it for that agreement and
    /// one completion at a time.
    pub expected_speed_up: Option<f64>,
    /// Whether the target waits for its drafts at that.
    pub target_waits: bool,
    /// Whether it rests while the target is in a step.
    pub drafter_rests: bool,
    /// Whether it is asked for drafts now; if not it is only tried now and then.
    pub pays: bool,
}

/// What is known of one drafter.
#[derive(Debug, Clone)]
struct DrafterStats {
    /// By doubt.
    acceptance: [AcceptanceRate; DOUBT.len() + 1],
    /// Of its tokens of any grade.
    usual: AcceptanceRate,
    /// Of all its tokens that were ever compared with the target's: how many, and how many were the same.
    compared: u32,
    agreed: u32,
    /// While the target waits.
    undisturbed: DrafterTiming,
    /// While the target is in a step, perhaps on the same device.
    beside_step: DrafterTiming,
    /// How much it slows the target down.
    slowdown: Slowdown,
    /// Steps of the target since it was asked last, and after how many it is asked again although it does not pay.
    idle: u32,
    patience: u32,
}

impl Default for DrafterStats {
    fn default() -> Self {
        Self {
            acceptance: [AcceptanceRate::default(); DOUBT.len() + 1],
            usual: AcceptanceRate::default(),
            compared: 0,
            agreed: 0,
            undisturbed: DrafterTiming::default(),
            beside_step: DrafterTiming::default(),
            slowdown: Slowdown::default(),
            idle: 0,
            patience: PATIENCE.0,
        }
    }
}

/// How long a drafter takes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DrafterTiming {
    /// Microseconds from the start of a stream to its first token.
    pub(super) first_us: MovingAverage,
    /// Microseconds per further token.
    pub(super) token_us: MovingAverage,
}

/// Steps until a drafter that does not pay is asked again: at first, and at most; it doubles in between.
const PATIENCE: (u32, u32) = (16, 512);
/// Tokens that a drafter that does not pay is asked for, to compare them.
const TRIED: usize = 8;
/// Steps until the costs of steps are doubted if they keep drafts from being verified: at first, and at most; it doubles.
const TRUST: (u32, u32) = (64, 1024);
/// Tokens that a draft should yield on average for the costs to be doubted.
const DOUBTED: f64 = 2.0;
/// Passes over more tokens process a prompt.
const LARGEST_BATCH: usize = 256;
/// After so many times its duration a step has little to do with the one before.
const PAUSE: u32 = 4;
/// Where nothing was measured, drafts are this long.
const FIRST_GUESS: usize = 8;
/// Microseconds by which things may come later than expected.
pub(super) const SLACK_US: f64 = 500.0;
/// ... and those that much depends on: a share of a plain step.
const LENIENT: f64 = 0.25;

impl AdaptivePolicy {
    /// Takes in a step of the target, and for what share of it, 0 to 1, each drafter was at work.
    pub fn record_step(&mut self, step: &StepSample, beside: &[f64]) {
        // A token costs the same whoever brings it.
        let others = step.batch.max(1 + step.drafted) - 1;
        if others < LARGEST_BATCH {
            self.record_pass(others, step, beside);
        }
        // A pause of the client or of the machine is no cost of the step.
        let since_last = micros(step.since_last).min(4.0 * micros(step.duration));
        self.tokens = 0.95 * self.tokens + 1.0 + step.accepted as f64;
        self.us = 0.95 * self.us + since_last.max(micros(step.duration));
        if step.drafted == 0 {
            self.undrafted = self.undrafted.saturating_add(1);
        } else if std::mem::take(&mut self.undrafted) >= self.trust {
            self.trust = (2 * self.trust).min(TRUST.1);
        } else {
            self.trust = TRUST.0;
        }
        for drafter in &mut self.drafters {
            drafter.idle = drafter.idle.saturating_add(1);
        }
    }

    fn record_pass(&mut self, others: usize, step: &StepSample, beside: &[f64]) {
        let us = micros(step.duration);
        let expected_us = self.step.us(others).map(|us| self.slowed_now() * us);
        self.late = [self.late[1], expected_us.map_or(1.0, |expected_us| us / expected_us)];
        // A pause in between, and it is another time.
        let soon = step.since_last < PAUSE * step.duration;
        let before = self.last.take().filter(|_| soon);
        self.last = self.step.measured_us(others).map(|expected_us| PassSample {
            deviation: us / expected_us,
            beside: beside.to_vec(),
        });
        if let Some(pass) = self.last.clone() {
            for drafter in 0..beside.len() {
                self.drafter(drafter).slowdown.record(drafter, before.as_ref(), &pass);
            }
        }
        let slowdowns = self.drafters.iter().zip(beside);
        let slowed: f64 = slowdowns.map(|(it, share)| it.slowdown.of(*share)).product();
        if slowed <= 1.0 || self.last.as_ref().is_none_or(PassSample::is_alone) {
            self.step.record(others, us / slowed);
        } else {
            self.step.record_scale(others, us / slowed);
        }
    }

    /// How many times longer a step takes while all drafters are at work as much as lately.
    fn slowed_now(&self) -> f64 {
        self.drafters.iter().map(|it| it.slowdown.now()).product()
    }

    /// Replaces what is known of the cost of steps by measurements: draft tokens and duration.
    pub fn calibrate(&mut self, costs: impl IntoIterator<Item = (usize, Duration)>) {
        self.step = StepCost::default();
        self.last = None;
        self.late = [1.0; 2];
        for (n, duration) in costs {
            self.step.record(n, micros(duration));
        }
    }

    /// Takes in that steps beside this drafter were measured to take so many times longer than without.
    pub fn calibrate_slowdown(&mut self, drafter: usize, factor: f64) {
        self.drafter(drafter).slowdown.measured(factor);
    }

    /// Takes in how long the target took to answer a call.
    pub fn record_round_trip(&mut self, duration: Duration) {
        self.round_trip_us.record(micros(duration));
    }

    /// How long the target takes to answer a call.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        Duration::from_secs_f64(self.round_trip_us.get().unwrap_or_default() / 1e6)
    }

    /// Takes in how long a stream of a drafter took to its first token, and whether the target waited meanwhile.
    pub fn record_first_token(&mut self, drafter: usize, latency: Duration, target_waits: bool) {
        let timing = self.drafter(drafter).timing_mut(target_waits);
        timing.first_us.record(micros(latency));
    }

    /// Takes in that a stream was given up before its first token: it would have taken at least this long.
    pub fn record_silence(&mut self, drafter: usize, silent_for: Duration, target_waits: bool) {
        let first_us = &mut self.drafter(drafter).timing_mut(target_waits).first_us;
        if first_us.get().is_none_or(|usual| micros(silent_for) > usual) {
            first_us.record(micros(silent_for));
        }
    }

    /// Takes in the time between tokens of one stream, and whether the target waited meanwhile.
    pub fn record_tokens(&mut self, drafter: usize, n: usize, duration: Duration, target_waits: bool) {
        if n > 0 {
            let timing = self.drafter(drafter).timing_mut(target_waits);
            timing.token_us.record(micros(duration) / n as f64);
        }
    }

    /// How long a drafter takes for the token that it is at, beside a step of the target.
    #[must_use]
    pub fn token_time(&self, drafter: usize) -> Duration {
        let drafter = self.drafters.get(drafter);
        let us = drafter.and_then(|drafter| drafter.timing(false).token_us.get());
        Duration::from_secs_f64(us.unwrap_or_default() / 1e6)
    }

    /// How long a drafter takes for a draft of `n` tokens beside a step of the target; `None` before that is known.
    #[must_use]
    pub fn draft_time(&self, drafter: usize, n: usize) -> Option<Duration> {
        let timing = self.drafters.get(drafter)?.timing(false);
        let us = timing.first_us.get()? + n.saturating_sub(1) as f64 * timing.token_us.get()?;
        Duration::try_from_secs_f64(us / 1e6).ok()
    }

    /// Whether this drafter makes the target faster.
    #[must_use]
    pub fn pays(&self, drafter: usize, n_max: usize, load: ConcurrentLoad, round_trip: Duration) -> bool {
        let cycle = self.best_schedule(drafter, n_max, load, round_trip);
        cycle.is_none_or(|cycle| cycle.speed_up() > 1.0)
    }

    /// The best way to use a drafter; `None` while nothing is known of the target.
    fn best_schedule(
        &self,
        drafter: usize,
        n_max: usize,
        load: ConcurrentLoad,
        round_trip: Duration,
    ) -> Option<ScheduleEstimate> {
        let market = self.market(load)?;
        let unknown = DrafterStats::default();
        let drafter = self.drafters.get(drafter).unwrap_or(&unknown);
        Some(market.best_schedule(drafter.supply(round_trip), n_max))
    }

    /// What is known of a drafter on the whole; `None` before anything is.
    #[must_use]
    pub fn outlook(&self, number: usize, n_max: usize) -> Option<DrafterOutlook> {
        let drafter = self.drafters.get(number)?;
        let market = self.market(ConcurrentLoad::default())?;
        let agreement = (drafter.compared > 0).then(|| f64::from(drafter.agreed) / f64::from(drafter.compared));
        let usual = drafter.supply(self.round_trip());
        let cycle = agreement.map(|chance| market.best_schedule(DrafterProfile { chance, ..usual }, n_max));
        let schedule = cycle.map(|cycle| cycle.schedule);
        let timing = if schedule.is_some_and(|schedule| schedule.waits_for().is_some()) {
            [drafter.undisturbed, drafter.beside_step]
        } else {
            [drafter.beside_step, drafter.undisturbed]
        };
        let ms = |us: fn(&DrafterTiming) -> MovingAverage| {
            timing.iter().find_map(|timing| us(timing).get()).map(|us| us / 1e3)
        };
        Some(DrafterOutlook {
            agreement,
            first_token_ms: ms(|timing| timing.first_us),
            token_ms: ms(|timing| timing.token_us),
            slowdown: drafter.slowdown.factor(),
            expected_speed_up: cycle.map(ScheduleEstimate::speed_up),
            target_waits: schedule.is_some_and(|schedule| schedule.waits_for().is_some()),
            drafter_rests: matches!(schedule, Some(DraftSchedule::Alternate { .. })),
            pays: self.pays(number, n_max, ConcurrentLoad::default(), self.round_trip()),
        })
    }

    /// How long a step without a draft takes with nothing beside it; `None` before any was seen.
    #[must_use]
    pub fn plain_step(&self) -> Option<Duration> {
        Duration::try_from_secs_f64(self.step.us(0)? / 1e6).ok()
    }

    /// What steps cost, in milliseconds by the number of draft tokens; only sizes that were measured.
    #[must_use]
    pub fn step_costs(&self) -> BTreeMap<usize, f64> {
        self.step.measured().map(|(n, us)| (n, us / 1e3)).collect()
    }

    fn drafter(&mut self, number: usize) -> &mut DrafterStats {
        if self.drafters.len() <= number {
            self.drafters.resize_with(number + 1, DrafterStats::default);
        }
        &mut self.drafters[number]
    }

    /// What comes after a draft: more of it, or another one of the same source, or of a drafter that rests.
    fn supply(&self, draft: &[TokenClass], context: &StepContext) -> Option<DrafterProfile> {
        let grows = context.pending.map(|pending| TokenSource::Drafter(pending.drafter));
        let is_there = draft.first().map(|class| class.source);
        match grows.or(is_there).or(context.rests.map(TokenSource::Drafter))? {
            TokenSource::Drafter(number) => {
                let drafter = self.drafters.get(number)?;
                Some(drafter.supply(context.round_trip))
            }
            TokenSource::Copy | TokenSource::Prediction => {
                let at_once = DraftLatency {
                    first_us: micros(context.round_trip),
                    token_us: 0.0,
                };
                Some(DrafterProfile {
                    chance: draft.first().map_or(0.0, |class| self.acceptance(*class)),
                    undisturbed: at_once,
                    beside_step: at_once,
                    slowdown: 1.0,
                })
            }
        }
    }

    fn acceptance(&self, class: TokenClass) -> f64 {
        match class.source {
            TokenSource::Copy => self.copies[class.grade].of(MATCHED[class.grade].1),
            TokenSource::Prediction => self.predicted[class.grade].of(MATCHED[class.grade].1),
            TokenSource::Drafter(number) => {
                let prior = DOUBT.get(class.grade).map_or(UNTOLD.1, |(_, chance)| *chance);
                let known = self.drafters.get(number).map(|drafter| drafter.acceptance[class.grade]);
                known.unwrap_or_default().of(prior)
            }
        }
    }

    fn market(&self, load: ConcurrentLoad) -> Option<CostModel<'_>> {
        let slowed = self.slowed_now();
        let plain_us = slowed * self.step.us(load.tokens)?;
        // What others draft is no reason to draft: at least this is had if nobody does.
        let undrafted_us = self.step.us(load.completions)?;
        let now = if self.us > 0.0 { self.tokens / self.us } else { 0.0 };
        Some(CostModel {
            step: &self.step,
            slowed,
            load,
            plain_us,
            rate: now.max(1.0 / undrafted_us) * (load.completions + 1) as f64,
        })
    }
}

impl DrafterStats {
    fn timing_mut(&mut self, target_waits: bool) -> &mut DrafterTiming {
        if target_waits {
            &mut self.undisturbed
        } else {
            &mut self.beside_step
        }
    }

    /// How long it takes while the target waits or is in a step. Where that was not measured it is taken from the other: who
    /// slows down the target by so much is slowed down as much.
    fn timing(&self, target_waits: bool) -> DrafterTiming {
        let slowdown = self.slowdown.factor();
        let (known, other, factor) = if target_waits {
            (self.undisturbed, self.beside_step, 1.0 / slowdown)
        } else {
            (self.beside_step, self.undisturbed, slowdown)
        };
        let us = |known: MovingAverage, other: MovingAverage| {
            MovingAverage(known.get().or(other.get().map(|us| us * factor)))
        };
        DrafterTiming {
            first_us: us(known.first_us, other.first_us),
            token_us: us(known.token_us, other.token_us),
        }
    }

    /// What it makes; what is not known yet is taken to cost nothing.
    fn supply(&self, round_trip: Duration) -> DrafterProfile {
        let arrival = |target_waits| {
            let timing = self.timing(target_waits);
            DraftLatency {
                first_us: micros(round_trip) + timing.first_us.get().unwrap_or(0.0),
                token_us: timing.token_us.get().unwrap_or(0.0),
            }
        };
        DrafterProfile {
            chance: self.usual.of(USUAL),
            undisturbed: arrival(true),
            beside_step: arrival(false),
            slowdown: self.slowdown.factor(),
        }
    }
}

impl Policy for AdaptivePolicy {
    fn observe(&mut self, class: TokenClass, accepted: bool) {
        match class.source {
            TokenSource::Copy => self.copies[class.grade].record(accepted),
            TokenSource::Prediction => self.predicted[class.grade].record(accepted),
            TokenSource::Drafter(number) => {
                let drafter = self.drafter(number);
                drafter.acceptance[class.grade].record(accepted);
                drafter.usual.record(accepted);
                drafter.compared = drafter.compared.saturating_add(1);
                drafter.agreed = drafter.agreed.saturating_add(u32::from(accepted));
            }
        }
    }

    fn draft_limit(
        &mut self,
        drafter: usize,
        target_waits: bool,
        n_max: usize,
        load: ConcurrentLoad,
        round_trip: Duration,
    ) -> usize {
        let cycle = self.best_schedule(drafter, n_max, load, round_trip);
        let drafter = self.drafter(drafter);
        let far = max_lookahead(n_max);
        let doubt = drafter.slowdown.reprobe();
        let reach = match cycle.filter(|cycle| cycle.speed_up() > 1.0).map(|cycle| cycle.schedule) {
            Some(_) if doubt == Some(ReprobeKind::Alone) => return 0,
            Some(DraftSchedule::Alternate { n }) if doubt.is_none() => usize::from(target_waits) * n,
            Some(_) => far,
            None if cycle.is_none() => far,
            None if drafter.idle >= drafter.patience => {
                drafter.patience = (2 * drafter.patience).min(PATIENCE.1);
                drafter.idle = 0;
                return TRIED.min(far);
            }
            None => return 0,
        };
        drafter.patience = PATIENCE.0;
        drafter.idle = 0;
        reach
    }

    fn prefix_acceptance(&self, draft: &[TokenClass]) -> f64 {
        draft.iter().map(|class| self.acceptance(*class)).product()
    }

    fn step_us(&self, n: usize, load: ConcurrentLoad) -> Option<f64> {
        // Costs are learnt slowly. If two steps were late or early, the next one will be as well.
        let [before, last] = self.late;
        let late = before.min(last).max(before.max(last).min(1.0));
        Some(late * self.slowed_now() * self.step.us(load.tokens + n)?)
    }

    fn choose(&self, draft: &[TokenClass], context: &StepContext) -> StepPlan {
        let draft = &draft[..draft.len().min(context.n_max)];
        let Some(market) = self.market(context.load) else {
            return StepPlan {
                n: draft.len().min(FIRST_GUESS),
                ..StepPlan::default()
            };
        };
        let supply = self.supply(draft, context);
        let schedule = supply.map_or(DraftSchedule::Plain, |supply| {
            market.best_schedule(supply, context.n_max).schedule
        });
        let drafter = context.pending.map(|pending| pending.drafter).or(context.rests);
        let doubt = drafter.and_then(|number| self.drafters.get(number)?.slowdown.reprobe());
        let rests =
            doubt == Some(ReprobeKind::Alone) || doubt.is_none() && matches!(schedule, DraftSchedule::Alternate { .. });
        let step_us = |n| market.step_us(n, rests);
        let worth = |expected: f64, n| expected - market.rate * step_us(n);
        if doubt == Some(ReprobeKind::Alone) && schedule != DraftSchedule::Plain {
            return StepPlan {
                worth: worth(1.0, 0),
                rests,
                ..StepPlan::default()
            };
        }
        let (mut reach, mut expected) = (1.0, 1.0);
        let mut choice = StepPlan {
            worth: worth(expected, 0),
            rests,
            ..StepPlan::default()
        };
        let mut doubtful = (0, 0.0);
        for (i, class) in draft.iter().enumerate() {
            reach *= self.acceptance(*class);
            expected += reach;
            let worth = worth(expected, i + 1);
            if worth > choice.worth {
                (choice.n, choice.worth) = (i + 1, worth);
            }
            let rate = expected / step_us(i + 1);
            if rate > doubtful.1 {
                doubtful = (i + 1, rate);
            }
        }
        if choice.n == 0 && self.undrafted >= self.trust && expected >= DOUBTED {
            // What no step verifies is not measured any more.
            choice.n = doubtful.0;
            return choice;
        }
        if let Some(enough) = schedule.waits_for() {
            // A drafter that rests has nothing for a target that goes on.
            let slack_us = if rests {
                SLACK_US.max(LENIENT * market.plain_us)
            } else {
                SLACK_US
            };
            choice.hold_us = whole(2.0 * micros(context.round_trip) + slack_us);
            if let Some(pending) = context.pending
                && let Some(drafter) = self.drafters.get(pending.drafter)
            {
                let growth = WaitCandidate {
                    timing: drafter.timing(context.busy_us <= 0.0),
                    chance: drafter.usual.of(USUAL),
                    started: pending.started,
                    silent_us: micros(pending.silent_for),
                    lengths: draft.len()..enough,
                    rests,
                };
                market.weigh_growth(&growth, (reach, expected), context.busy_us, &mut choice);
            }
        }
        choice
    }
}

/// A chance, over about the last hundred tries.
#[derive(Debug, Clone, Copy, Default)]
struct AcceptanceRate {
    tries: f64,
    hits: f64,
}

impl AcceptanceRate {
    /// Tries that the prior counts for.
    const WEIGHT: f64 = 3.0;

    fn record(&mut self, hit: bool) {
        self.tries = self.tries * 0.99 + 1.0;
        self.hits = self.hits * 0.99 + f64::from(u8::from(hit));
    }

    fn of(self, prior: f64) -> f64 {
        (self.hits + Self::WEIGHT * prior) / (self.tries + Self::WEIGHT)
    }
}

/// A running average that forgets.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MovingAverage(Option<f64>);

impl MovingAverage {
    const NEW: f64 = 0.15;

    fn record(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |old| old + Self::NEW * (value - old)));
    }

    pub(super) fn get(self) -> Option<f64> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SURE: f64 = 0.995;
    const UNSURE: f64 = 0.6;

    fn us(us: f64) -> Duration {
        Duration::from_secs_f64(us / 1e6)
    }

    fn step(drafted: usize, accepted: usize, us: f64) -> StepSample {
        let duration = Duration::from_secs_f64(us / 1e6);
        StepSample {
            drafted,
            accepted,
            duration,
            since_last: duration,
            batch: 1 + drafted,
        }
    }

    /// A pair whose steps cost `step_us(n)`, whose sure tokens are right and whose unsure ones seldom.
    fn measured(step_us: impl Fn(usize) -> f64, first_us: f64, token_us: f64) -> AdaptivePolicy {
        let mut policy = AdaptivePolicy::default();
        policy.calibrate((0..=16).map(|n| (n, us(step_us(n)))));
        for i in 0..300_usize {
            let n = 4 * (i % 3);
            policy.record_step(&step(n, n, step_us(n)), &[]);
            for _ in 0..8 {
                policy.observe(TokenClass::of_probability(0, SURE), true);
            }
            policy.observe(TokenClass::of_probability(0, UNSURE), i % 10 == 0);
            policy.record_first_token(0, us(first_us), true);
            policy.record_tokens(0, 4, us(4.0 * token_us), true);
        }
        policy
    }

    fn linear(n: usize) -> f64 {
        40_000.0 * (1.0 + 0.1 * n as f64)
    }

    fn sure(n: usize) -> Vec<TokenClass> {
        vec![TokenClass::of_probability(0, SURE); n]
    }

    fn unsure(n: usize) -> Vec<TokenClass> {
        vec![TokenClass::of_probability(0, UNSURE); n]
    }

    fn choose(policy: &AdaptivePolicy, draft: &[TokenClass], pending: Option<PendingDraft>) -> StepPlan {
        let context = StepContext {
            n_max: 16,
            pending,
            ..StepContext::default()
        };
        policy.choose(draft, &context)
    }

    const FRESH: PendingDraft = PendingDraft {
        drafter: 0,
        started: false,
        silent_for: Duration::ZERO,
    };

    fn pays(policy: &AdaptivePolicy) -> bool {
        policy.pays(0, 16, ConcurrentLoad::default(), Duration::ZERO)
    }

    #[test]
    fn sure_tokens_are_offered_and_unsure_ones_are_not() {
        let policy = measured(linear, 2_000.0, 200.0);
        assert_eq!(choose(&policy, &sure(8), None).n, 8);
        assert_eq!(choose(&policy, &unsure(8), None).n, 0);
        let mixed = [sure(5), unsure(5)].concat();
        assert_eq!(choose(&policy, &mixed, None).n, 5);
    }

    #[test]
    fn sizes_that_cost_too_much_are_left_out() {
        // One to three tokens cost as much as two steps, as on some CPUs.
        let steep = |n: usize| {
            if n == 0 {
                35_000.0
            } else {
                90_000.0 + 5_000.0 * n as f64
            }
        };
        let policy = measured(steep, 2_000.0, 200.0);
        assert_eq!(choose(&policy, &sure(1), None).n, 0);
        assert_eq!(choose(&policy, &sure(12), None).n, 12);
    }

    #[test]
    fn a_fast_drafter_is_waited_for_and_a_slow_or_silent_one_is_not() {
        let fast = measured(linear, 2_000.0, 200.0);
        let choice = choose(&fast, &[], Some(FRESH));
        assert!(choice.wait_us > 2_000 && choice.wait_us < 40_000, "{choice:?}");
        let silent_for = PendingDraft {
            silent_for: Duration::from_millis(500),
            ..FRESH
        };
        assert_eq!(choose(&fast, &[], Some(silent_for)).wait_us, 0);
        let slow = measured(linear, 90_000.0, 90_000.0);
        assert_eq!(choose(&slow, &[], Some(FRESH)).wait_us, 0);
    }

    #[test]
    fn drafting_during_a_step_is_not_waited_for() {
        let policy = measured(linear, 2_000.0, 200.0);
        let context = StepContext {
            n_max: 16,
            pending: Some(FRESH),
            busy_us: 30_000.0,
            ..StepContext::default()
        };
        assert_eq!(policy.choose(&[], &context).wait_us, 0);
    }

    #[test]
    fn once_enough_is_drafted_the_target_goes_on() {
        let policy = measured(linear, 2_000.0, 200.0);
        let started = PendingDraft { started: true, ..FRESH };
        assert!(choose(&policy, &sure(2), Some(started)).wait_us > 0);
        assert_eq!(choose(&policy, &sure(16), Some(started)).wait_us, 0);
        let hopeless = [sure(3), unsure(2)].concat();
        let choice = choose(&policy, &hopeless, Some(started));
        assert_eq!((choice.n, choice.wait_us), (3, 0));
    }

    #[test]
    fn the_target_waits_for_our_word_only_if_that_is_quick() {
        let policy = measured(linear, 2_000.0, 200.0);
        let choice = |round_trip| {
            let context = StepContext {
                n_max: 16,
                pending: Some(FRESH),
                round_trip,
                ..StepContext::default()
            };
            policy.choose(&sure(4), &context)
        };
        assert_eq!(choice(Duration::from_millis(1)).hold_us, 2_500);
        assert_eq!(choice(Duration::from_secs(1)).hold_us, 0);
    }

    #[test]
    fn nonsense_is_not_offered_and_its_drafter_is_asked_less_and_less_often() {
        let mut policy = AdaptivePolicy::default();
        let class = TokenClass::untold(0);
        policy.calibrate((0..=16).map(|n| (n, us(linear(n)))));
        for _ in 0..60 {
            policy.observe(class, false);
        }
        assert_eq!(choose(&policy, &[class; 4], None).n, 0);
        assert!(!pays(&policy));
        let mut asked = Vec::new();
        for i in 0..2000_usize {
            policy.record_step(&step(0, 0, linear(0)), &[]);
            if policy.draft_limit(0, false, 16, ConcurrentLoad::default(), Duration::ZERO) > 0 {
                asked.push(i);
            }
        }
        assert!(asked.len() > 4 && asked.len() < 10, "{asked:?}");
        for _ in 0..200 {
            policy.observe(class, true);
        }
        assert!(pays(&policy) && choose(&policy, &[class; 4], None).n > 0);
    }

    #[test]
    fn a_step_is_expected_to_be_as_late_as_two_before_it_were() {
        let mut policy = AdaptivePolicy::default();
        policy.calibrate((0..=16).map(|n| (n, us(linear(n)))));
        let expected =
            |policy: &AdaptivePolicy| policy.step_us(0, ConcurrentLoad::default()).unwrap_or_default() / linear(0);
        policy.record_step(&step(4, 4, 8.0 * linear(4)), &[]);
        assert!(expected(&policy) < 1.3, "one step may be late for reasons of its own");
        policy.record_step(&step(9, 9, 8.0 * linear(9)), &[]);
        assert!((6.0..10.0).contains(&expected(&policy)), "{}", expected(&policy));
        policy.record_step(&step(9, 9, linear(9)), &[]);
        assert!(expected(&policy) < 1.7, "{}", expected(&policy));
    }

    #[test]
    fn what_shares_the_pass_makes_long_drafts_dearer() {
        // Memory decides up to eight tokens, arithmetic from there on.
        let bent = |n: usize| 40_000.0 * (1.0 + 0.01 * n as f64 + 0.4 * n.saturating_sub(8) as f64);
        let mut policy = AdaptivePolicy::default();
        policy.calibrate((0..=16).map(|n| (n, us(bent(n)))));
        let draft = vec![TokenClass::of_probability(0, 0.85); 8];
        let chosen = |load| {
            let context = StepContext {
                n_max: 16,
                load,
                ..StepContext::default()
            };
            policy.choose(&draft, &context).n
        };
        let alone = chosen(ConcurrentLoad::default());
        let crowded = chosen(ConcurrentLoad {
            completions: 3,
            tokens: 12,
        });
        assert!(alone >= 6 && crowded < alone, "{alone} alone, {crowded} in a crowd");
    }

    fn classes(n: usize) -> impl Strategy<Value = Vec<TokenClass>> {
        let class = prop_oneof![
            (0.0..1.0).prop_map(|p| TokenClass::of_probability(0, p)),
            (0.0..1.0).prop_map(|p| TokenClass::of_probability(1, p)),
            Just(TokenClass::untold(0)),
            (0_usize..40).prop_map(TokenClass::of_match),
            (0_usize..40).prop_map(TokenClass::of_prediction),
        ];
        prop::collection::vec(class, 0..n)
    }

    proptest! {
        #[test]
        fn a_choice_is_always_possible(
            steps in prop::collection::vec((0_usize..20, 0_usize..20, 1_u64..10_000_000), 0..100),
            tokens in prop::collection::vec((0_usize..3, 0_u64..10_000_000, 0_usize..9, 0_u64..10_000_000), 0..50),
            seen in classes(100),
            draft in classes(40),
            n_max in 0_usize..32,
            pending in prop::option::of((0_usize..4, any::<bool>(), 0_u64..100_000_000)),
            busy_us in 0.0..1e7,
            round_trip in 0_u64..10_000_000,
            (others, load) in (0_usize..9, 0_usize..99),
        ) {
            let mut policy = AdaptivePolicy::default();
            for (drafted, accepted, us) in steps {
                let duration = Duration::from_micros(us);
                let accepted = accepted.min(drafted);
                policy.record_step(&StepSample { drafted, accepted, duration, since_last: 2 * duration, batch: 1 + drafted }, &[(drafted % 3) as f64 / 2.0, (us % 7) as f64 / 6.0]);
            }
            for (drafter, first, n, us) in tokens {
                policy.record_first_token(drafter, Duration::from_micros(first), n % 2 == 0);
                policy.record_tokens(drafter, n, Duration::from_micros(us), n % 2 == 0);
            }
            for (i, class) in seen.into_iter().enumerate() {
                policy.observe(class, i % 3 == 0);
            }
            let context = StepContext {
                n_max,
                pending: pending.map(|(drafter, started, silent_for)| PendingDraft { drafter, started, silent_for: Duration::from_micros(silent_for) }),
                rests: Some(others),
                busy_us,
                round_trip: Duration::from_micros(round_trip),
                load: ConcurrentLoad { completions: others, tokens: load },
            };
            let choice = policy.choose(&draft, &context);
            prop_assert!(choice.n <= n_max.min(draft.len()));
            prop_assert!(choice.worth.is_finite());
            prop_assert!(pending.is_some() || choice.wait_us == 0);
        }
    }
}
