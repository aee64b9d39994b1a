//! What a pair of servers costs, and how many draft tokens the target should verify next.
//!
//! A draft token has a *class*: how sure the drafter was, or how well the text matched that it was copied from. From what
//! the target kept, each class gets a chance of acceptance `a`. A step over the first `k` tokens of a draft yields
//! `E(k) = 1 + a_1 + a_1 a_2 + … + a_1…a_k` tokens (Leviathan et al. 2023, section 3.1, with a chance per token) and takes
//! `T(k)`, measured for each `k`: on some machines two tokens cost as much as two steps, and eight less than seven.
//!
//! With `r` tokens per microsecond as they come now, a step is worth `E(k) - r T(k)`: what it yields less what the target
//! would yield in that time anyway (fractional programming, Dinkelbach 1967). The best `k` is offered. Waiting for a draft
//! to grow to `m` tokens, at `d` microseconds each, is worth it while that promises more than the best `k` there is:
//! `E(m) - r (T(m) + wait(m))`, with a usual `a` for tokens that are not there yet. The threshold form of such rules is
//! optimal (`SpecDec++`, arXiv 2405.19715, section 3).

use std::time::Duration;

/// What is known of a draft token before the target sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class(usize);

impl Class {
    /// Bounds of the drafter's doubt, `1 - p`, and the chance that a token of that class starts with.
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
    /// A token of a drafter that does not tell.
    pub const UNKNOWN: Self = Self(Self::DOUBT.len());
    /// Fewest matching tokens of each class of copies, and the chance that a token of that class starts with.
    const MATCHED: [(usize, f64); 4] = [(0, 0.5), (5, 0.7), (9, 0.8), (17, 0.9)];
    /// The first class of tokens that the client predicted; those of other copies stand before them.
    const PREDICTED: usize = Self::DOUBT.len() + 1 + Self::MATCHED.len();
    const COUNT: usize = Self::PREDICTED + Self::MATCHED.len();

    /// A token that the drafter gives the probability `p`.
    #[must_use]
    pub fn of_probability(p: f64) -> Self {
        Self(
            Self::DOUBT
                .iter()
                .position(|(doubt, _)| 1.0 - p < *doubt)
                .unwrap_or(Self::DOUBT.len() - 1),
        )
    }

    /// A token that is copied from a place where the `matched` tokens before it are the same.
    #[must_use]
    pub fn of_match(matched: usize) -> Self {
        let class = Self::MATCHED
            .iter()
            .rposition(|(fewest, _)| *fewest <= matched)
            .unwrap_or_default();
        Self(Self::UNKNOWN.0 + 1 + class)
    }

    /// A token that is copied from the client's prediction of the answer, as in [`Self::of_match`].
    #[must_use]
    pub fn of_prediction(matched: usize) -> Self {
        Self(Self::of_match(matched).0 + Self::MATCHED.len())
    }

    /// Whether the client predicted this token.
    #[must_use]
    pub fn is_predicted(self) -> bool {
        self.0 >= Self::PREDICTED
    }

    /// The chance of acceptance of a pair of which nothing is known.
    fn prior(self) -> f64 {
        match self.0.checked_sub(Self::UNKNOWN.0) {
            None => Self::DOUBT[self.0].1,
            Some(0) => 0.7,
            Some(copy) => Self::MATCHED[(copy - 1) % Self::MATCHED.len()].1,
        }
    }
}

/// One step of the target.
#[derive(Debug, Clone, PartialEq)]
pub struct Step<'a> {
    /// Classes of the draft tokens that it verified.
    pub drafted: &'a [Class],
    /// Of these, the ones that it kept.
    pub accepted: usize,
    /// How long the pass took.
    pub duration: Duration,
    /// Since the step before, waiting included.
    pub since_last: Duration,
}

/// What is known of a pair of draft server and target.
#[derive(Debug, Clone)]
pub struct Pace {
    acceptance: [Rate; Class::COUNT],
    /// Of the drafter's tokens of any class.
    usual: Rate,
    step: StepCost,
    /// Microseconds from the start of a stream to its first token.
    first_us: Average,
    /// Microseconds per further token.
    token_us: Average,
    /// Tokens and microseconds of the last steps, fading.
    tokens: f64,
    us: f64,
    steps_without_draft: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            acceptance: [Rate::default(); Class::COUNT],
            usual: Rate::default(),
            step: StepCost::default(),
            first_us: Average::default(),
            token_us: Average::default(),
            tokens: 0.0,
            us: 0.0,
            steps_without_draft: 0,
        }
    }
}

/// What the target should do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Choice {
    /// Draft tokens to verify.
    pub n: usize,
    /// How long the target should wait for more, in microseconds; 0: go on with these.
    pub wait_us: u64,
}

/// While drafting does not pay, one step in so many still gets a draft, to see whether it does now.
const PROBE_EVERY: u32 = 32;
/// Where nothing was measured, drafts are this long.
const FIRST_GUESS: usize = 8;

impl Pace {
    /// Takes in a step of the target.
    pub fn record_step(&mut self, step: &Step<'_>) {
        for (i, class) in step.drafted.iter().take(step.accepted + 1).enumerate() {
            let hit = i < step.accepted;
            self.acceptance[class.0].record(hit);
            if class.0 <= Class::UNKNOWN.0 {
                self.usual.record(hit);
            }
        }
        self.step.record(step.drafted.len(), micros(step.duration));
        // A pause of the client or of the machine is no cost of the step.
        let since_last = micros(step.since_last).min(4.0 * micros(step.duration));
        self.tokens = 0.95 * self.tokens + 1.0 + step.accepted as f64;
        self.us = 0.95 * self.us + since_last.max(micros(step.duration));
        let drafted = !step.drafted.is_empty();
        self.steps_without_draft = if drafted {
            0
        } else {
            self.steps_without_draft.saturating_add(1)
        };
        if drafted {
            for rate in &mut self.acceptance {
                rate.fade();
            }
        }
    }

    /// Replaces what is known of the cost of steps by measurements: draft tokens and duration.
    pub fn calibrate(&mut self, costs: impl IntoIterator<Item = (usize, Duration)>) {
        self.step = StepCost::default();
        for (n, duration) in costs {
            self.step.record(n, micros(duration));
        }
    }

    /// Takes in how long a stream of the drafter took to its first token.
    pub fn record_first_token(&mut self, latency: Duration) {
        self.first_us.record(micros(latency));
    }

    /// Takes in that a stream was given up before its first token: it would have taken at least this long.
    pub fn record_silence(&mut self, silent: Duration) {
        if self.first_us.get().is_none_or(|usual| micros(silent) > usual) {
            self.first_us.record(micros(silent));
        }
    }

    /// Takes in the time between tokens of one stream.
    pub fn record_tokens(&mut self, n: usize, duration: Duration) {
        if n > 0 {
            self.token_us.record(micros(duration) / n as f64);
        }
    }

    /// What to do with a draft, when one step can verify at most `n_max` tokens. `growing` says that more tokens are on
    /// their way: how long the drafter has been silent, and whether it has begun.
    #[must_use]
    pub fn choose(&self, draft: &[Class], n_max: usize, growing: Option<Growing>) -> Choice {
        self.weigh(draft, n_max, growing).0
    }

    /// What the best choice is worth, in tokens.
    #[must_use]
    pub fn worth(&self, draft: &[Class], n_max: usize, growing: Option<Growing>) -> f64 {
        self.weigh(draft, n_max, growing).1
    }

    fn weigh(&self, draft: &[Class], n_max: usize, growing: Option<Growing>) -> (Choice, f64) {
        let draft = &draft[..draft.len().min(n_max)];
        let Some(plain_us) = self.step.micros(0) else {
            return (
                Choice {
                    n: draft.len().min(FIRST_GUESS),
                    wait_us: 0,
                },
                0.0,
            );
        };
        let rate = self.rate(plain_us);
        let cost = |n: usize| rate * self.step.micros(n).unwrap_or(plain_us);
        let (mut reach, mut expected) = (1.0, 1.0);
        let mut best = (0, expected - cost(0));
        for (i, class) in draft.iter().enumerate() {
            reach *= self.chance(std::slice::from_ref(class));
            expected += reach;
            if expected - cost(i + 1) > best.1 {
                best = (i + 1, expected - cost(i + 1));
            }
        }
        let mut choice = Choice { n: best.0, wait_us: 0 };
        if let Some(growing) = growing
            && let (Some(first_us), Some(token_us)) = (self.first_us.get(), self.token_us.get())
        {
            let silent_us = micros(growing.silent);
            let next_us = if growing.begun {
                token_us.max(silent_us - token_us)
            } else {
                first_us.max(silent_us)
            };
            let mut wait_us = next_us - token_us;
            for n in draft.len() + 1..=n_max {
                wait_us += token_us;
                reach *= self.usual.of(0.7);
                expected += reach;
                let worth = expected - cost(n) - rate * wait_us;
                if worth > best.1 {
                    best.1 = worth;
                    // Half as much again as expected, and never more than the step that waiting saves.
                    choice.wait_us = whole((1.5 * wait_us + 500.0).min(plain_us));
                }
            }
        }
        if choice.n == 0 && choice.wait_us == 0 && self.steps_without_draft >= PROBE_EVERY {
            choice.n = draft.len().min(FIRST_GUESS);
        }
        (choice, best.1)
    }

    /// Whether drafts of the drafter are worth their while: it is asked for none while they are not, but for a probe now
    /// and then.
    #[must_use]
    pub fn pays(&self, n_max: usize) -> bool {
        let Some(plain_us) = self.step.micros(0) else {
            return true;
        };
        let rate = self.rate(plain_us);
        let (mut reach, mut expected) = (1.0, 1.0);
        let pays = (1..=n_max).any(|n| {
            reach *= self.usual.of(0.7);
            expected += reach;
            expected - rate * self.step.micros(n).unwrap_or(plain_us) > 1.0 - rate * plain_us
        });
        pays || self.steps_without_draft >= PROBE_EVERY
    }

    /// The chance that all of `draft` is accepted.
    #[must_use]
    pub fn chance(&self, draft: &[Class]) -> f64 {
        draft
            .iter()
            .map(|class| self.acceptance[class.0].of(class.prior()))
            .product()
    }

    /// How long a step over `n` draft tokens takes, in microseconds; `None` before the first one.
    #[must_use]
    pub fn step_us(&self, n: usize) -> Option<f64> {
        self.step.micros(n)
    }

    /// Tokens per microsecond as they come now, and at least what plain steps give.
    fn rate(&self, plain_us: f64) -> f64 {
        let now = if self.us > 0.0 { self.tokens / self.us } else { 0.0 };
        now.max(1.0 / plain_us)
    }
}

/// More draft tokens are on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Growing {
    /// Whether the stream has given tokens already.
    pub begun: bool,
    /// Time since its last token, or since it was asked for.
    pub silent: Duration,
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

    /// What is not tried any more is forgotten in some hundred steps, so that it is tried again.
    fn fade(&mut self) {
        self.tries *= 0.995;
        self.hits *= 0.995;
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

    /// A pair whose steps cost `step_us(n)`, whose sure tokens are right and whose unsure ones seldom.
    fn measured(step_us: impl Fn(usize) -> f64, first_us: f64, token_us: f64) -> Pace {
        let (sure, unsure) = (Class::of_probability(SURE), Class::of_probability(UNSURE));
        let mut pace = Pace::default();
        for i in 0..300_usize {
            let (drafted, accepted) = match i % 4 {
                0 => (vec![], 0),
                1 => (vec![sure; 4], 4),
                2 => (vec![sure; 8], 8),
                _ => (vec![unsure; 3], 0),
            };
            let duration = us(step_us(drafted.len()));
            pace.record_step(&Step {
                drafted: &drafted,
                accepted,
                duration,
                since_last: duration,
            });
            pace.record_first_token(us(first_us));
            pace.record_tokens(4, us(4.0 * token_us));
        }
        pace
    }

    fn linear(n: usize) -> f64 {
        40_000.0 * (1.0 + 0.1 * n as f64)
    }

    fn sure(n: usize) -> Vec<Class> {
        vec![Class::of_probability(SURE); n]
    }

    const FRESH: Growing = Growing {
        begun: false,
        silent: Duration::ZERO,
    };

    #[test]
    fn sure_tokens_are_offered_and_unsure_ones_are_not() {
        let pace = measured(linear, 2_000.0, 200.0);
        assert_eq!(pace.choose(&sure(8), 16, None).n, 8);
        assert_eq!(pace.choose(&[Class::of_probability(UNSURE); 8], 16, None).n, 0);
        let mixed = [sure(5), vec![Class::of_probability(UNSURE); 5]].concat();
        assert_eq!(pace.choose(&mixed, 16, None).n, 5);
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
        let mut pace = measured(steep, 2_000.0, 200.0);
        pace.calibrate((0..16).map(|n| (n, us(steep(n)))));
        assert_eq!(pace.choose(&sure(1), 16, None).n, 0);
        assert_eq!(pace.choose(&sure(12), 16, None).n, 12);
    }

    #[test]
    fn a_fast_drafter_is_waited_for_and_a_slow_or_silent_one_is_not() {
        let fast = measured(linear, 2_000.0, 200.0);
        let choice = fast.choose(&[], 16, Some(FRESH));
        assert!(choice.wait_us > 2_000 && choice.wait_us < 40_000, "{choice:?}");
        let silent = Growing {
            begun: false,
            silent: Duration::from_millis(500),
        };
        assert_eq!(fast.choose(&[], 16, Some(silent)).wait_us, 0);
        let slow = measured(linear, 90_000.0, 90_000.0);
        assert_eq!(slow.choose(&[], 16, Some(FRESH)).wait_us, 0);
    }

    #[test]
    fn once_enough_is_drafted_the_target_goes_on() {
        let pace = measured(linear, 2_000.0, 200.0);
        let begun = Growing {
            begun: true,
            silent: Duration::ZERO,
        };
        assert!(pace.choose(&sure(2), 16, Some(begun)).wait_us > 0);
        assert_eq!(pace.choose(&sure(16), 16, Some(begun)).wait_us, 0);
        let hopeless = [sure(3), vec![Class::of_probability(UNSURE); 2]].concat();
        assert_eq!(pace.choose(&hopeless, 16, Some(begun)), Choice { n: 3, wait_us: 0 });
    }

    #[test]
    fn nonsense_is_not_offered_but_tried_again() {
        let mut pace = Pace::default();
        let class = Class::UNKNOWN;
        for _ in 0..60 {
            let step = Step {
                drafted: &[class; 4],
                accepted: 0,
                duration: us(linear(4)),
                since_last: us(linear(4)),
            };
            pace.record_step(&step);
        }
        pace.calibrate([(0, us(linear(0))), (4, us(linear(4)))]);
        assert_eq!(pace.choose(&[class; 4], 16, None).n, 0);
        assert!(!pace.pays(16));
        for _ in 0..PROBE_EVERY {
            pace.record_step(&Step {
                drafted: &[],
                accepted: 0,
                duration: us(linear(0)),
                since_last: us(linear(0)),
            });
        }
        assert!(pace.pays(16) && pace.choose(&[class; 4], 16, None).n > 0);
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

    proptest! {
        #[test]
        fn a_choice_is_always_possible(
            steps in prop::collection::vec((prop::collection::vec(0..Class::COUNT, 0..20), 0_usize..20, 1_u64..10_000_000), 0..100),
            tokens in prop::collection::vec((0_u64..10_000_000, 0_usize..9, 0_u64..10_000_000), 0..50),
            draft in prop::collection::vec(0..Class::COUNT, 0..40),
            n_max in 0_usize..32,
            growing in prop::option::of((any::<bool>(), 0_u64..100_000_000)),
        ) {
            let mut pace = Pace::default();
            for (drafted, accepted, us) in steps {
                let drafted: Vec<Class> = drafted.into_iter().map(Class).collect();
                let duration = Duration::from_micros(us);
                let accepted = accepted.min(drafted.len());
                pace.record_step(&Step { drafted: &drafted, accepted, duration, since_last: 2 * duration });
            }
            for (first, n, us) in tokens {
                pace.record_first_token(Duration::from_micros(first));
                pace.record_tokens(n, Duration::from_micros(us));
            }
            let draft: Vec<Class> = draft.into_iter().map(Class).collect();
            let growing = growing.map(|(begun, silent)| Growing { begun, silent: Duration::from_micros(silent) });
            let choice = pace.choose(&draft, n_max, growing);
            prop_assert!(choice.n <= n_max.min(draft.len()));
            if let Some(plain) = pace.step_us(0) {
                prop_assert!(choice.wait_us as f64 <= plain);
            }
            prop_assert!(growing.is_some() || choice.wait_us == 0);
        }
    }
}
