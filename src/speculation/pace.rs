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
//! Whether the target should wait for drafts at all follows from two cycles (renewal-reward theorem), each from one
//! contradicted draft to the next. With a usual chance `a` a draft of `n` is followed by another one without a pause with
//! the chance `p = a^(n+1)`: all of it is accepted, and the token that the target adds is the next of the draft. So
//! `1 / (1 - p)` steps of `E(n)` tokens and the time `T(n)` come in a row, and then
//!
//! - a target that waits stands still until the next draft is there: for `A = round trip + first token + (n - 1) token`;
//! - a target that does not takes plain steps meanwhile: `j` of them until the draft is `n` tokens ahead of it, which it
//!   survives with the chance `a^j`; one that does not begins anew, after `(1 - a^j) / (1 - a)` steps on average.
//!
//! The better of the two, over all `n`, against a plain step says whether a drafter pays. One that does not is asked again
//! now and then, less and less often, and its drafts are only compared with what the target says, which costs the target
//! nothing. Where waiting pays, waiting for a draft to grow to `m` tokens is worth `E(m) - r (T(m) + w)`, where `w` is how
//! long its last token comes after the target is done with the step that it is in.
//!
//! Other completions in the same pass make it longer for all of them: `T` is taken beyond their tokens, and `r` is what
//! all of them yield; the cycles are those of a crowd that does the same. A pass waits for all of them at once, so with `m`
//! completions it waits if any of them begins anew, with the chance `1 - p^m`.
//!
//! Costs that keep drafts from being verified would never be measured again. So they are doubted now and then: a draft that
//! should yield two tokens or more is verified all the same.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use serde::Serialize;

use super::session::Policy;
use super::{micros, whole};

/// What is known of a draft token before the target sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    source: Source,
    /// Index into the source's grades.
    grade: usize,
}

/// Where a draft token comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
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
const MATCHED: [(usize, f64); 4] = [(0, 0.5), (5, 0.7), (9, 0.8), (17, 0.9)];
/// The chance of a token that a drafter of which nothing is known has yet to draft.
const USUAL: f64 = 0.85;

impl Class {
    /// A token that the drafter of this number gives the probability `p`.
    #[must_use]
    pub fn of_probability(drafter: usize, p: f64) -> Self {
        let grade = DOUBT.iter().position(|(doubt, _)| 1.0 - p < *doubt);
        Self {
            source: Source::Drafter(drafter),
            grade: grade.unwrap_or(DOUBT.len() - 1),
        }
    }

    /// A token of the drafter of this number, which does not tell how sure it is.
    #[must_use]
    pub fn untold(drafter: usize) -> Self {
        Self {
            source: Source::Drafter(drafter),
            grade: UNTOLD.0,
        }
    }

    /// A token that is copied from a place where the `matched` tokens before it are the same.
    #[must_use]
    pub fn of_match(matched: usize) -> Self {
        let grade = MATCHED.iter().rposition(|(fewest, _)| *fewest <= matched);
        Self {
            source: Source::Copy,
            grade: grade.unwrap_or_default(),
        }
    }

    /// A token that is copied from the client's prediction of the answer, as in [`Self::of_match`].
    #[must_use]
    pub fn of_prediction(matched: usize) -> Self {
        Self {
            source: Source::Prediction,
            ..Self::of_match(matched)
        }
    }

    /// Whether the client predicted this token.
    #[must_use]
    pub fn is_predicted(self) -> bool {
        self.source == Source::Prediction
    }
}

/// One step of the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
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
    /// Whether a drafter was at work at the same time, perhaps on the same machine.
    pub beside_draft: bool,
}

/// What other completions do at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Other completions that run.
    pub others: usize,
    /// Tokens that they bring into a pass, all together.
    pub tokens: usize,
}

/// More draft tokens are on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Growing {
    /// The drafter that makes them.
    pub drafter: usize,
    /// Whether the stream has given tokens already.
    pub begun: bool,
    /// Time since its last token, or since it was asked for.
    pub silent: Duration,
}

/// The moment at which a step is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Circumstances {
    /// Most draft tokens of a step.
    pub n_max: usize,
    /// Whether the draft grows.
    pub growing: Option<Growing>,
    /// How long the target will go on with the step that it is in, in microseconds; 0: it waits for us.
    pub busy_us: f64,
    /// From asking the target to its answer.
    pub round_trip: Duration,
    /// What else the target does.
    pub load: Load,
}

/// What the target should do next.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Choice {
    /// Draft tokens to verify.
    pub n: usize,
    /// How long the target should wait for more before its next step, in microseconds; 0: go on with these.
    pub wait_us: u64,
    /// How long the target should wait after that step for the word of what comes next, in microseconds.
    pub hold_us: u64,
    /// What the step is worth, in tokens; only differences mean something.
    pub worth: f64,
}

/// What is known of a target and its drafters.
#[derive(Debug, Clone)]
pub struct Pace {
    step: StepCost,
    /// Microseconds of a plain step with nothing beside it. Beside a drafter on the same machine it takes longer, which
    /// the other costs hold.
    alone_us: Average,
    copies: [Rate; MATCHED.len()],
    predicted: [Rate; MATCHED.len()],
    drafters: Vec<Drafter>,
    /// Microseconds from asking the target to its answer.
    round_trip_us: Average,
    /// Tokens and microseconds of the last steps, fading.
    tokens: f64,
    us: f64,
    /// Steps since one verified a draft, and after how many the next one does although it does not pay.
    undrafted: u32,
    trust: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            step: StepCost::default(),
            alone_us: Average::default(),
            copies: Default::default(),
            predicted: Default::default(),
            drafters: Vec::new(),
            round_trip_us: Average::default(),
            tokens: 0.0,
            us: 0.0,
            undrafted: 0,
            trust: TRUST.0,
        }
    }
}

/// What a drafter is worth on the whole.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Outlook {
    /// Share of its tokens that were the target's own, after the same text.
    pub agreement: Option<f64>,
    /// Milliseconds from asking it to its first token.
    pub first_token_ms: Option<f64>,
    /// Milliseconds per further token.
    pub token_ms: Option<f64>,
    /// Speed over that of plain steps with no drafter at work, as the formula of the cycles has it for that agreement and
    /// one completion at a time.
    pub expected_speed_up: Option<f64>,
    /// Whether the target waits for its drafts at that.
    pub target_waits: bool,
    /// Whether it is asked for drafts now; if not it is only tried now and then.
    pub pays: bool,
}

/// What is known of one drafter.
#[derive(Debug, Clone)]
struct Drafter {
    /// By doubt.
    acceptance: [Rate; DOUBT.len() + 1],
    /// Of its tokens of any grade.
    usual: Rate,
    /// Of all its tokens that were ever compared with the target's: how many, and how many were the same.
    compared: u32,
    agreed: u32,
    /// Microseconds from the start of a stream to its first token.
    first_us: Average,
    /// Microseconds per further token.
    token_us: Average,
    /// Steps of the target since it was asked last, and after how many it is asked again although it does not pay.
    idle: u32,
    patience: u32,
}

impl Default for Drafter {
    fn default() -> Self {
        Self {
            acceptance: [Rate::default(); DOUBT.len() + 1],
            usual: Rate::default(),
            compared: 0,
            agreed: 0,
            first_us: Average::default(),
            token_us: Average::default(),
            idle: 0,
            patience: PATIENCE.0,
        }
    }
}

/// Steps until a drafter that does not pay is asked again: at first, and at most; it doubles in between.
const PATIENCE: (u32, u32) = (16, 512);
/// Steps until the costs of steps are doubted if they keep drafts from being verified: at first, and at most; it doubles.
const TRUST: (u32, u32) = (64, 1024);
/// Tokens that a draft should yield on average for the costs to be doubted.
const DOUBTED: f64 = 2.0;
/// Passes over more tokens process a prompt.
const LARGEST_BATCH: usize = 256;
/// Where nothing was measured, drafts are this long.
const FIRST_GUESS: usize = 8;
/// Microseconds by which things may come later than expected.
const SLACK_US: f64 = 500.0;

impl Pace {
    /// Takes in a step of the target.
    pub fn record_step(&mut self, step: &Step) {
        // A token costs the same whoever brings it.
        let others = step.batch.max(1 + step.drafted) - 1;
        if others < LARGEST_BATCH {
            self.step.record(others, micros(step.duration));
        }
        if others == 0 && !step.beside_draft {
            self.alone_us.record(micros(step.duration));
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

    /// Replaces what is known of the cost of steps by measurements: draft tokens and duration.
    pub fn calibrate(&mut self, costs: impl IntoIterator<Item = (usize, Duration)>) {
        self.step = StepCost::default();
        for (n, duration) in costs {
            self.step.record(n, micros(duration));
            if n == 0 {
                self.alone_us = Average(Some(micros(duration)));
            }
        }
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

    /// Takes in how long a stream of a drafter took to its first token.
    pub fn record_first_token(&mut self, drafter: usize, latency: Duration) {
        self.drafter(drafter).first_us.record(micros(latency));
    }

    /// Takes in that a stream was given up before its first token: it would have taken at least this long.
    pub fn record_silence(&mut self, drafter: usize, silent: Duration) {
        let first_us = &mut self.drafter(drafter).first_us;
        if first_us.get().is_none_or(|usual| micros(silent) > usual) {
            first_us.record(micros(silent));
        }
    }

    /// Takes in the time between tokens of one stream.
    pub fn record_tokens(&mut self, drafter: usize, n: usize, duration: Duration) {
        if n > 0 {
            self.drafter(drafter).token_us.record(micros(duration) / n as f64);
        }
    }

    /// Whether this drafter makes the target faster.
    #[must_use]
    pub fn pays(&self, drafter: usize, n_max: usize, load: Load, round_trip: Duration) -> bool {
        let Some(market) = self.market(load) else { return true };
        let unknown = Drafter::default();
        let drafter = self.drafters.get(drafter).unwrap_or(&unknown);
        market.cycle(drafter.supply(round_trip), n_max).speed_up() > 1.0
    }

    /// What is known of a drafter on the whole; `None` before anything is.
    #[must_use]
    pub fn outlook(&self, number: usize, n_max: usize) -> Option<Outlook> {
        let drafter = self.drafters.get(number)?;
        let market = self.market(Load::default())?;
        let agreement = (drafter.compared > 0).then(|| f64::from(drafter.agreed) / f64::from(drafter.compared));
        let usual = drafter.supply(self.round_trip());
        let cycle = agreement.map(|chance| market.cycle(Supply { chance, ..usual }, n_max));
        let speed_up = |cycle: Cycle| match self.alone_us.get() {
            Some(alone_us) => cycle.rate * alone_us,
            None => cycle.speed_up(),
        };
        Some(Outlook {
            agreement,
            first_token_ms: drafter.first_us.get().map(|us| us / 1e3),
            token_ms: drafter.token_us.get().map(|us| us / 1e3),
            expected_speed_up: cycle.map(speed_up),
            target_waits: cycle.is_some_and(|cycle| cycle.waits_for.is_some()),
            pays: self.pays(number, n_max, Load::default(), self.round_trip()),
        })
    }

    /// What steps cost, in milliseconds by the number of draft tokens; only sizes that were measured.
    #[must_use]
    pub fn step_costs(&self) -> BTreeMap<usize, f64> {
        let measured = self.step.shape.iter().enumerate();
        measured
            .filter_map(|(n, shape)| Some((n, (*shape)? * self.step.scale_us / 1e3)))
            .collect()
    }

    fn drafter(&mut self, number: usize) -> &mut Drafter {
        if self.drafters.len() <= number {
            self.drafters.resize_with(number + 1, Drafter::default);
        }
        &mut self.drafters[number]
    }

    fn acceptance(&self, class: Class) -> f64 {
        match class.source {
            Source::Copy => self.copies[class.grade].of(MATCHED[class.grade].1),
            Source::Prediction => self.predicted[class.grade].of(MATCHED[class.grade].1),
            Source::Drafter(number) => {
                let prior = DOUBT.get(class.grade).map_or(UNTOLD.1, |(_, chance)| *chance);
                let known = self.drafters.get(number).map(|drafter| drafter.acceptance[class.grade]);
                known.unwrap_or_default().of(prior)
            }
        }
    }

    fn market(&self, load: Load) -> Option<Market<'_>> {
        let plain_us = self.step.micros(load.tokens)?;
        // What others draft is no reason to draft: at least this is had if nobody does.
        let undrafted_us = self.step.micros(load.others)?;
        let now = if self.us > 0.0 { self.tokens / self.us } else { 0.0 };
        Some(Market {
            step: &self.step,
            load,
            plain_us,
            rate: now.max(1.0 / undrafted_us) * (load.others + 1) as f64,
        })
    }
}

/// What time costs.
struct Market<'a> {
    step: &'a StepCost,
    load: Load,
    /// A step without a draft.
    plain_us: f64,
    /// Tokens per microsecond of all completions as they come now, and at least what plain steps give.
    rate: f64,
}

impl Market<'_> {
    /// What a step over `n` draft tokens is worth that is expected to yield `expected` tokens.
    fn worth(&self, expected: f64, n: usize) -> f64 {
        expected - self.rate * self.step_us(n)
    }

    /// Chooses to wait for a draft to grow within these lengths, if that is worth more. As it is it is accepted as a whole
    /// with the chance `reach` and yields `expected` tokens.
    fn weigh_growth(
        &self,
        drafter: &Drafter,
        growing: Growing,
        lengths: Range<usize>,
        (mut reach, mut expected): (f64, f64),
        moment: &Circumstances,
        choice: &mut Choice,
    ) {
        let (Some(first_us), Some(token_us)) = (drafter.first_us.get(), drafter.token_us.get()) else {
            return;
        };
        // What is late stays late by as much again.
        let usual_us = if growing.begun { token_us } else { first_us };
        let next_us = (usual_us - micros(growing.silent)).abs();
        let mut comes_us = next_us - token_us;
        for n in lengths.start + 1..=lengths.end {
            comes_us += token_us;
            reach *= drafter.usual.of(USUAL);
            expected += reach;
            let late_us = (comes_us - moment.busy_us).max(0.0);
            let worth = self.worth(expected, n) - self.rate * late_us;
            if worth > choice.worth {
                choice.worth = worth;
                // Half as much again as expected.
                choice.wait_us = whole((1.5 * comes_us + SLACK_US - moment.busy_us).max(0.0));
            }
        }
    }

    /// The best way to use such drafts, if all completions use them so. While the target waits for one of them, all stand
    /// still.
    fn cycle(&self, supply: Supply, n_max: usize) -> Cycle {
        let all = self.load.others + 1;
        let step_us = |n: usize| self.step.micros(all * (1 + n) - 1).unwrap_or(self.plain_us);
        let plain_us = step_us(0);
        let mut best = Cycle {
            rate: 1.0 / plain_us,
            plain_us,
            waits_for: None,
        };
        let mut expected = 1.0;
        for n in 1..=n_max {
            let survives = |tokens: usize| supply.chance.powi(i32::try_from(tokens).unwrap_or(i32::MAX));
            expected += survives(n);
            let in_a_row = 1.0 / (1.0 - survives(n + 1)).max(0.01);
            // In a row the drafter has to keep up.
            let step_us = step_us(n).max((n + 1) as f64 * supply.token_us);
            let (tokens, time_us) = (in_a_row * expected, in_a_row * step_us);
            let comes_us = supply.first_us + (n - 1) as f64 * supply.token_us;
            let waits = in_a_row * (1.0 - (1.0 - 1.0 / in_a_row).powf(all as f64));
            let waiting = Cycle {
                rate: tokens / (waits * comes_us + time_us),
                waits_for: Some(n),
                ..best
            };
            let gains_us = plain_us - supply.token_us;
            let plain_steps = ((comes_us + SLACK_US) / gains_us).ceil().max(1.0);
            let going_on = Cycle {
                rate: if gains_us > 0.0 {
                    let chance = supply.chance.powf(plain_steps);
                    let taken = (1.0 - chance) / (1.0 - supply.chance).max(1e-6);
                    (taken + chance * tokens) / (taken * plain_us + chance * time_us)
                } else {
                    0.0
                },
                waits_for: None,
                ..best
            };
            for cycle in [waiting, going_on] {
                if cycle.rate > best.rate {
                    best = cycle;
                }
            }
        }
        best
    }

    fn step_us(&self, n: usize) -> f64 {
        self.step.micros(self.load.tokens + n).unwrap_or(self.plain_us)
    }
}

/// Drafts of one source, on the whole.
#[derive(Debug, Clone, Copy)]
struct Supply {
    /// Of a token that is still to come.
    chance: f64,
    /// From a step of the target that contradicts a draft until the first token of the next draft is with the target.
    first_us: f64,
    /// Between two tokens.
    token_us: f64,
}

/// A way to use drafts.
#[derive(Debug, Clone, Copy)]
struct Cycle {
    /// Tokens per microsecond of one completion.
    rate: f64,
    /// Microseconds of a plain step.
    plain_us: f64,
    /// The target waits for drafts of so many tokens; `None`: it goes on.
    waits_for: Option<usize>,
}

impl Cycle {
    /// Speed over that of plain steps.
    fn speed_up(self) -> f64 {
        self.rate * self.plain_us
    }
}

impl Drafter {
    /// What it makes; what is not known yet is taken to cost nothing.
    fn supply(&self, round_trip: Duration) -> Supply {
        Supply {
            chance: self.usual.of(USUAL),
            first_us: micros(round_trip) + self.first_us.get().unwrap_or(0.0),
            token_us: self.token_us.get().unwrap_or(0.0),
        }
    }
}

impl Policy for Pace {
    fn observe(&mut self, class: Class, accepted: bool) {
        match class.source {
            Source::Copy => self.copies[class.grade].record(accepted),
            Source::Prediction => self.predicted[class.grade].record(accepted),
            Source::Drafter(number) => {
                let drafter = self.drafter(number);
                drafter.acceptance[class.grade].record(accepted);
                drafter.usual.record(accepted);
                drafter.compared = drafter.compared.saturating_add(1);
                drafter.agreed = drafter.agreed.saturating_add(u32::from(accepted));
            }
        }
    }

    fn asks(&mut self, drafter: usize, n_max: usize, load: Load, round_trip: Duration) -> bool {
        let pays = self.pays(drafter, n_max, load, round_trip);
        let drafter = self.drafter(drafter);
        if pays {
            drafter.patience = PATIENCE.0;
        } else if drafter.idle >= drafter.patience {
            drafter.patience = (2 * drafter.patience).min(PATIENCE.1);
        } else {
            return false;
        }
        drafter.idle = 0;
        true
    }

    fn chance(&self, draft: &[Class]) -> f64 {
        draft.iter().map(|class| self.acceptance(*class)).product()
    }

    fn step_us(&self, n: usize, load: Load) -> Option<f64> {
        self.step.micros(load.tokens + n)
    }

    fn choose(&self, draft: &[Class], moment: &Circumstances) -> Choice {
        let draft = &draft[..draft.len().min(moment.n_max)];
        let Some(market) = self.market(moment.load) else {
            return Choice {
                n: draft.len().min(FIRST_GUESS),
                ..Choice::default()
            };
        };
        let (mut reach, mut expected) = (1.0, 1.0);
        let mut choice = Choice {
            worth: market.worth(expected, 0),
            ..Choice::default()
        };
        let mut doubtful = (0, 0.0);
        for (i, class) in draft.iter().enumerate() {
            reach *= self.acceptance(*class);
            expected += reach;
            let worth = market.worth(expected, i + 1);
            if worth > choice.worth {
                (choice.n, choice.worth) = (i + 1, worth);
            }
            let rate = expected / market.step_us(i + 1);
            if rate > doubtful.1 {
                doubtful = (i + 1, rate);
            }
        }
        if choice.n == 0 && self.undrafted >= self.trust && expected >= DOUBTED {
            // What no step verifies is not measured any more.
            choice.n = doubtful.0;
            return choice;
        }
        let source = moment.growing.map(|growing| Source::Drafter(growing.drafter));
        let supply = match source.or(draft.first().map(|class| class.source)) {
            Some(Source::Drafter(number)) => match self.drafters.get(number) {
                Some(drafter) => drafter.supply(moment.round_trip),
                None => return choice,
            },
            Some(Source::Copy | Source::Prediction) => Supply {
                chance: draft.first().map_or(0.0, |class| self.acceptance(*class)),
                first_us: micros(moment.round_trip),
                token_us: 0.0,
            },
            None => return choice,
        };
        if let Some(enough) = market.cycle(supply, moment.n_max).waits_for {
            choice.hold_us = whole(2.0 * micros(moment.round_trip) + SLACK_US);
            if let Some(growing) = moment.growing
                && let Some(drafter) = self.drafters.get(growing.drafter)
            {
                market.weigh_growth(
                    drafter,
                    growing,
                    draft.len()..enough,
                    (reach, expected),
                    moment,
                    &mut choice,
                );
            }
        }
        choice
    }
}

/// A chance, over about the last hundred tries.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    tries: f64,
    hits: f64,
}

impl Rate {
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
/// Time of a step by the number of draft tokens: a scale, in microseconds, that follows the machine's load and the growing
/// context, times a shape that belongs to the hardware. So sizes that are not used do not keep the costs of another time.
#[derive(Debug, Clone, Default)]
struct StepCost {
    scale_us: f64,
    /// Where it was measured; straight lines between.
    shape: Vec<Option<f64>>,
}

impl StepCost {
    /// Share of a step that a further token is taken to cost until steps of different sizes were seen.
    const SLOPE_GUESS: f64 = 0.05;
    /// A step that takes so many times longer than expected (another request's prompt went along) counts as this.
    const OUTLIER: f64 = 2.0;
    /// What of a deviation goes into the scale, and what into the shape (as exponents).
    const TO_SCALE: f64 = 0.2;
    const TO_SHAPE: f64 = 0.1;

    fn record(&mut self, n: usize, us: f64) {
        if us <= 0.0 {
            return;
        }
        if self.scale_us == 0.0 {
            self.scale_us = us;
        }
        if self.shape.len() <= n {
            self.shape.resize(n + 1, None);
        }
        match &mut self.shape[n] {
            Some(shape) => {
                let deviation = (us / (self.scale_us * *shape)).min(Self::OUTLIER);
                self.scale_us *= deviation.powf(Self::TO_SCALE);
                *shape *= deviation.powf(Self::TO_SHAPE);
            }
            unseen => *unseen = Some(us / self.scale_us),
        }
    }

    fn micros(&self, n: usize) -> Option<f64> {
        let at = |i: usize| self.shape.get(i).copied().flatten();
        let below = (0..=n.min(self.shape.len())).rev().find_map(|i| Some((i, at(i)?)));
        let above = (n..self.shape.len()).find_map(|i| Some((i, at(i)?)));
        let shape = match (below, above) {
            (Some((i, shape)), _) if i == n => shape,
            (Some((i, low)), Some((j, high))) => low + (high - low) * (n - i) as f64 / (j - i) as f64,
            (Some((i, low)), None) => {
                let before = (0..i).find_map(|j| Some((j, at(j)?)));
                let slope = before.map_or(Self::SLOPE_GUESS * low, |(j, first)| (low - first) / (i - j) as f64);
                low + slope.max(0.01 * low) * (n - i) as f64
            }
            (None, Some((j, high))) => high / (1.0 + Self::SLOPE_GUESS * (j - n) as f64),
            (None, None) => return None,
        };
        Some(self.scale_us * shape)
    }
}

/// A running average that forgets.
#[derive(Debug, Clone, Copy, Default)]
struct Average(Option<f64>);

impl Average {
    const NEW: f64 = 0.15;

    fn record(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |old| old + Self::NEW * (value - old)));
    }

    fn get(self) -> Option<f64> {
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

    fn step(drafted: usize, accepted: usize, us: f64) -> Step {
        let duration = Duration::from_secs_f64(us / 1e6);
        Step {
            drafted,
            accepted,
            duration,
            since_last: duration,
            batch: 1 + drafted,
            beside_draft: false,
        }
    }

    /// A pair whose steps cost `step_us(n)`, whose sure tokens are right and whose unsure ones seldom.
    fn measured(step_us: impl Fn(usize) -> f64, first_us: f64, token_us: f64) -> Pace {
        let mut pace = Pace::default();
        pace.calibrate((0..=16).map(|n| (n, us(step_us(n)))));
        for i in 0..300_usize {
            let n = 4 * (i % 3);
            pace.record_step(&step(n, n, step_us(n)));
            for _ in 0..8 {
                pace.observe(Class::of_probability(0, SURE), true);
            }
            pace.observe(Class::of_probability(0, UNSURE), i % 10 == 0);
            pace.record_first_token(0, us(first_us));
            pace.record_tokens(0, 4, us(4.0 * token_us));
        }
        pace
    }

    fn linear(n: usize) -> f64 {
        40_000.0 * (1.0 + 0.1 * n as f64)
    }

    fn sure(n: usize) -> Vec<Class> {
        vec![Class::of_probability(0, SURE); n]
    }

    fn unsure(n: usize) -> Vec<Class> {
        vec![Class::of_probability(0, UNSURE); n]
    }

    fn choose(pace: &Pace, draft: &[Class], growing: Option<Growing>) -> Choice {
        let moment = Circumstances {
            n_max: 16,
            growing,
            ..Circumstances::default()
        };
        pace.choose(draft, &moment)
    }

    const FRESH: Growing = Growing {
        drafter: 0,
        begun: false,
        silent: Duration::ZERO,
    };

    fn pays(pace: &Pace) -> bool {
        pace.pays(0, 16, Load::default(), Duration::ZERO)
    }

    #[test]
    fn sure_tokens_are_offered_and_unsure_ones_are_not() {
        let pace = measured(linear, 2_000.0, 200.0);
        assert_eq!(choose(&pace, &sure(8), None).n, 8);
        assert_eq!(choose(&pace, &unsure(8), None).n, 0);
        let mixed = [sure(5), unsure(5)].concat();
        assert_eq!(choose(&pace, &mixed, None).n, 5);
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
        let pace = measured(steep, 2_000.0, 200.0);
        assert_eq!(choose(&pace, &sure(1), None).n, 0);
        assert_eq!(choose(&pace, &sure(12), None).n, 12);
    }

    #[test]
    fn a_fast_drafter_is_waited_for_and_a_slow_or_silent_one_is_not() {
        let fast = measured(linear, 2_000.0, 200.0);
        let choice = choose(&fast, &[], Some(FRESH));
        assert!(choice.wait_us > 2_000 && choice.wait_us < 40_000, "{choice:?}");
        let silent = Growing {
            silent: Duration::from_millis(500),
            ..FRESH
        };
        assert_eq!(choose(&fast, &[], Some(silent)).wait_us, 0);
        let slow = measured(linear, 90_000.0, 90_000.0);
        assert_eq!(choose(&slow, &[], Some(FRESH)).wait_us, 0);
    }

    #[test]
    fn drafting_during_a_step_is_not_waited_for() {
        let pace = measured(linear, 2_000.0, 200.0);
        let moment = Circumstances {
            n_max: 16,
            growing: Some(FRESH),
            busy_us: 30_000.0,
            ..Circumstances::default()
        };
        assert_eq!(pace.choose(&[], &moment).wait_us, 0);
    }

    #[test]
    fn once_enough_is_drafted_the_target_goes_on() {
        let pace = measured(linear, 2_000.0, 200.0);
        let begun = Growing { begun: true, ..FRESH };
        assert!(choose(&pace, &sure(2), Some(begun)).wait_us > 0);
        assert_eq!(choose(&pace, &sure(16), Some(begun)).wait_us, 0);
        let hopeless = [sure(3), unsure(2)].concat();
        let choice = choose(&pace, &hopeless, Some(begun));
        assert_eq!((choice.n, choice.wait_us), (3, 0));
    }

    #[test]
    fn the_target_waits_for_our_word_only_if_that_is_quick() {
        let pace = measured(linear, 2_000.0, 200.0);
        let choice = |round_trip| {
            let moment = Circumstances {
                n_max: 16,
                growing: Some(FRESH),
                round_trip,
                ..Circumstances::default()
            };
            pace.choose(&sure(4), &moment)
        };
        assert_eq!(choice(Duration::from_millis(1)).hold_us, 2_500);
        assert_eq!(choice(Duration::from_secs(1)).hold_us, 0);
    }

    #[test]
    fn nonsense_is_not_offered_and_its_drafter_is_asked_less_and_less_often() {
        let mut pace = Pace::default();
        let class = Class::untold(0);
        pace.calibrate((0..=16).map(|n| (n, us(linear(n)))));
        for _ in 0..60 {
            pace.observe(class, false);
        }
        assert_eq!(choose(&pace, &[class; 4], None).n, 0);
        assert!(!pays(&pace));
        let mut asked = Vec::new();
        for i in 0..2000_usize {
            pace.record_step(&step(0, 0, linear(0)));
            if pace.asks(0, 16, Load::default(), Duration::ZERO) {
                asked.push(i);
            }
        }
        assert!(asked.len() > 4 && asked.len() < 10, "{asked:?}");
        for _ in 0..200 {
            pace.observe(class, true);
        }
        assert!(pays(&pace) && choose(&pace, &[class; 4], None).n > 0);
    }

    #[test]
    fn what_shares_the_pass_makes_long_drafts_dearer() {
        // Memory decides up to eight tokens, arithmetic from there on.
        let bent = |n: usize| 40_000.0 * (1.0 + 0.01 * n as f64 + 0.4 * n.saturating_sub(8) as f64);
        let mut pace = Pace::default();
        pace.calibrate((0..=16).map(|n| (n, us(bent(n)))));
        let draft = vec![Class::of_probability(0, 0.85); 8];
        let chosen = |load| {
            let moment = Circumstances {
                n_max: 16,
                load,
                ..Circumstances::default()
            };
            pace.choose(&draft, &moment).n
        };
        let alone = chosen(Load::default());
        let crowded = chosen(Load { others: 3, tokens: 12 });
        assert!(alone >= 6 && crowded < alone, "{alone} alone, {crowded} in a crowd");
    }

    #[test]
    fn a_machine_that_slows_down_slows_all_sizes() {
        let mut cost = StepCost::default();
        for n in [0, 4, 8] {
            cost.record(n, linear(n));
        }
        for _ in 0..40 {
            cost.record(0, 2.0 * linear(0));
        }
        let slower = cost.micros(8).unwrap() / linear(8);
        assert!((1.4..=2.1).contains(&slower), "{slower}");
    }

    #[test]
    fn what_a_drafter_on_the_same_machine_costs_the_target_is_no_speed_up() {
        let expected = |slower: f64| {
            let mut pace = measured(linear, 2_000.0, 200.0);
            for i in 0..100_usize {
                let n = 4 * (i % 3);
                pace.record_step(&Step {
                    beside_draft: true,
                    ..step(n, n, slower * linear(n))
                });
            }
            pace.outlook(0, 16).unwrap().expected_speed_up.unwrap()
        };
        let ratio = expected(1.25) / expected(1.0);
        assert!((0.75..=0.85).contains(&ratio), "{ratio}");
    }

    fn classes(n: usize) -> impl Strategy<Value = Vec<Class>> {
        let class = prop_oneof![
            (0.0..1.0).prop_map(|p| Class::of_probability(0, p)),
            (0.0..1.0).prop_map(|p| Class::of_probability(1, p)),
            Just(Class::untold(0)),
            (0_usize..40).prop_map(Class::of_match),
            (0_usize..40).prop_map(Class::of_prediction),
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
            growing in prop::option::of((0_usize..4, any::<bool>(), 0_u64..100_000_000)),
            busy_us in 0.0..1e7,
            round_trip in 0_u64..10_000_000,
            (others, load) in (0_usize..9, 0_usize..99),
        ) {
            let mut pace = Pace::default();
            for (drafted, accepted, us) in steps {
                let duration = Duration::from_micros(us);
                let accepted = accepted.min(drafted);
                pace.record_step(&Step { drafted, accepted, duration, since_last: 2 * duration, batch: 1 + drafted, beside_draft: drafted % 2 == 0 });
            }
            for (drafter, first, n, us) in tokens {
                pace.record_first_token(drafter, Duration::from_micros(first));
                pace.record_tokens(drafter, n, Duration::from_micros(us));
            }
            for (i, class) in seen.into_iter().enumerate() {
                pace.observe(class, i % 3 == 0);
            }
            let moment = Circumstances {
                n_max,
                growing: growing.map(|(drafter, begun, silent)| Growing { drafter, begun, silent: Duration::from_micros(silent) }),
                busy_us,
                round_trip: Duration::from_micros(round_trip),
                load: Load { others, tokens: load },
            };
            let choice = pace.choose(&draft, &moment);
            prop_assert!(choice.n <= n_max.min(draft.len()));
            prop_assert!(choice.worth.is_finite());
            prop_assert!(growing.is_some() || choice.wait_us == 0);
        }
    }
}
