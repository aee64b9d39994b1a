//! What a target and its drafters cost, and how many draft tokens the target should verify next.
//!
//! A draft token has a *class*: how sure its drafter was, or how well the text matched that it was copied from. From what
//! the target chose itself, each class gets a chance of acceptance `a`. A step over the first `k` tokens of a draft yields
//! `E(k) = 1 + a_1 + a_1 a_2 + … + a_1…a_k` tokens (Leviathan et al. 2023, section 3.1, with a chance per token) and takes
//! `T(k)`, measured for each `k`: on some machines two tokens cost as much as two steps, and eight less than seven.
//!
//! With `r` tokens per microsecond as they come now, a step is worth `E(k) - r T(k)`: what it yields less what the target
//! would yield in that time anyway (fractional programming, Dinkelbach 1967). The best `k` is offered. Three kinds of
//! waiting are weighed in the same coin:
//!
//! - for a draft to grow to `m` tokens: `E(m) - r (T(m) + w)`, where `w` is how long its last token comes after the target
//!   is done with the step that it is in (drafting during a step costs nothing), with a usual `a` for tokens to come;
//! - after a step, for the word of what comes next: worth a round trip if the usual draft is;
//! - a drafter is asked at all while its usual draft is worth more than a plain step. If not it is asked again now and
//!   then, less and less often, and its drafts are only compared with what the target says, which costs the target nothing.
//!
//! Other completions in the same pass make it longer for all of them: `T` is taken beyond their tokens, and `r` is what
//! all of them yield. The threshold form of such rules is optimal (`SpecDec++`, arXiv 2405.19715, section 3).

use std::time::Duration;

use super::session::Policy;

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
const USUAL: f64 = 0.7;

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
    /// What else was in the pass.
    pub load: Load,
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
#[derive(Debug, Clone, Default)]
pub struct Pace {
    step: StepCost,
    copies: [Rate; MATCHED.len()],
    predicted: [Rate; MATCHED.len()],
    drafters: Vec<Drafter>,
    /// Tokens and microseconds of the last steps, fading.
    tokens: f64,
    us: f64,
}

/// What is known of one drafter.
#[derive(Debug, Clone)]
struct Drafter {
    /// By doubt.
    acceptance: [Rate; DOUBT.len() + 1],
    /// Of its tokens of any grade.
    usual: Rate,
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
            first_us: Average::default(),
            token_us: Average::default(),
            idle: 0,
            patience: PATIENCE.0,
        }
    }
}

/// Steps until a drafter that does not pay is asked again: at first, and at most; it doubles in between.
const PATIENCE: (u32, u32) = (16, 512);
/// Where nothing was measured, drafts are this long.
const FIRST_GUESS: usize = 8;
/// Microseconds by which things may come later than expected.
const SLACK_US: f64 = 500.0;

impl Pace {
    /// Takes in a step of the target.
    pub fn record_step(&mut self, step: &Step) {
        self.step.record(step.load.tokens + step.drafted, micros(step.duration));
        // A pause of the client or of the machine is no cost of the step.
        let since_last = micros(step.since_last).min(4.0 * micros(step.duration));
        self.tokens = 0.95 * self.tokens + 1.0 + step.accepted as f64;
        self.us = 0.95 * self.us + since_last.max(micros(step.duration));
        for drafter in &mut self.drafters {
            drafter.idle = drafter.idle.saturating_add(1);
        }
    }

    /// Replaces what is known of the cost of steps by measurements: draft tokens and duration.
    pub fn calibrate(&mut self, costs: impl IntoIterator<Item = (usize, Duration)>) {
        self.step = StepCost::default();
        for (n, duration) in costs {
            self.step.record(n, micros(duration));
        }
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

    /// How long a step over `n` draft tokens takes, in microseconds; `None` before the first one.
    #[must_use]
    pub fn step_us(&self, n: usize) -> Option<f64> {
        self.step.micros(n)
    }

    /// Whether the usual draft of this drafter is worth more than a plain step.
    #[must_use]
    pub fn pays(&self, drafter: usize, n_max: usize, load: Load) -> bool {
        let Some(market) = self.market(load) else { return true };
        let unknown = Drafter::default();
        let drafter = self.drafters.get(drafter).unwrap_or(&unknown);
        market.worth_of_usual(drafter.usual.of(USUAL), drafter, n_max) > market.worth(1.0, 0)
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
        let now = if self.us > 0.0 { self.tokens / self.us } else { 0.0 };
        Some(Market {
            step: &self.step,
            load,
            plain_us,
            rate: now.max(1.0 / plain_us) * (load.others + 1) as f64,
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
        expected - self.rate * self.step.micros(self.load.tokens + n).unwrap_or(self.plain_us)
    }

    /// Chooses to wait for a draft of `begun` tokens, which is accepted as a whole with the chance `reach` and yields
    /// `expected` tokens, if a longer one is worth more.
    fn weigh_growth(
        &self,
        drafter: &Drafter,
        growing: Growing,
        begun: usize,
        (mut reach, mut expected): (f64, f64),
        moment: &Circumstances,
        choice: &mut Choice,
    ) {
        let (Some(first_us), Some(token_us)) = (drafter.first_us.get(), drafter.token_us.get()) else {
            return;
        };
        let silent_us = micros(growing.silent);
        let next_us = if growing.begun {
            token_us.max(silent_us - token_us)
        } else {
            first_us.max(silent_us)
        };
        let mut comes_us = next_us - token_us;
        for n in begun + 1..=moment.n_max {
            comes_us += token_us;
            reach *= drafter.usual.of(USUAL);
            expected += reach;
            let late_us = (comes_us - moment.busy_us).max(0.0);
            let worth = self.worth(expected, n) - self.rate * late_us;
            if worth > choice.worth {
                choice.worth = worth;
                // Half as much again as expected, and never more than the step that waiting saves.
                let wait_us = 1.5 * comes_us + SLACK_US - moment.busy_us;
                choice.wait_us = whole(wait_us.clamp(0.0, self.plain_us));
            }
        }
    }

    /// What a step over a draft of tokens with this `chance` is worth, if it is drafted while the target steps.
    fn worth_of_usual(&self, chance: f64, drafter: &Drafter, n_max: usize) -> f64 {
        let (first_us, token_us) = (drafter.first_us.get(), drafter.token_us.get());
        let (mut reach, mut expected) = (1.0, 1.0);
        (1..=n_max)
            .map(|n| {
                reach *= chance;
                expected += reach;
                let drafting_us = first_us.unwrap_or(0.0) + (n - 1) as f64 * token_us.unwrap_or(0.0);
                self.worth(expected, n) - self.rate * (drafting_us - self.plain_us).max(0.0)
            })
            .fold(f64::MIN, f64::max)
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
            }
        }
    }

    fn asks(&mut self, drafter: usize, n_max: usize, load: Load) -> bool {
        let pays = self.pays(drafter, n_max, load);
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

    fn step_us(&self, n: usize) -> f64 {
        self.step.micros(n).unwrap_or(0.0)
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
        for (i, class) in draft.iter().enumerate() {
            reach *= self.acceptance(*class);
            expected += reach;
            let worth = market.worth(expected, i + 1);
            if worth > choice.worth {
                (choice.n, choice.worth) = (i + 1, worth);
            }
        }
        let copied = Drafter::default();
        let (drafter, chance) = match (moment.growing, draft.first()) {
            (Some(growing), _) => {
                let Some(drafter) = self.drafters.get(growing.drafter) else {
                    return choice;
                };
                market.weigh_growth(drafter, growing, draft.len(), (reach, expected), moment, &mut choice);
                (drafter, drafter.usual.of(USUAL))
            }
            (None, Some(class)) => match class.source {
                Source::Drafter(number) => match self.drafters.get(number) {
                    Some(drafter) => (drafter, drafter.usual.of(USUAL)),
                    None => return choice,
                },
                Source::Copy | Source::Prediction => (&copied, self.acceptance(*class)),
            },
            (None, None) => return choice,
        };
        // The round trip is not free: the target could take a plain step meanwhile.
        let round_trip_us = micros(moment.round_trip);
        let next = market.worth_of_usual(chance, drafter, moment.n_max) - market.rate * round_trip_us;
        if next > market.worth(1.0, 0) {
            choice.hold_us = whole(2.0 * round_trip_us + SLACK_US);
        }
        choice
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "microseconds of a step, not negative"
)]
fn whole(us: f64) -> u64 {
    us as u64
}

/// A chance, over about the last fifty tries.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    tries: f64,
    hits: f64,
}

impl Rate {
    /// Tries that the prior counts for.
    const WEIGHT: f64 = 3.0;

    fn record(&mut self, hit: bool) {
        self.tries = self.tries * 0.98 + 1.0;
        self.hits = self.hits * 0.98 + f64::from(u8::from(hit));
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
