//! What a pair of servers costs, and the lengths that follow from it.
//!
//! With `a_i` the chance that the i-th draft token is accepted when those before it were, one step over `n` draft tokens
//! yields `E(n) = 1 + a_1 + a_1 a_2 + … + a_1…a_n` tokens (Leviathan et al. 2023, section 3.1, with a rate per position).
//! A step of the target over `n` draft tokens takes `T(n)`, a draft that starts anew takes `H(n) = L + n d` until it has
//! `n` tokens (`L`: until the first request is answered, `d`: per token).
//!
//! - Tokens that are there already cost only their verification: offer the `n` with the most `E(n) / T(n)`.
//! - After a miss there are none. Waiting for `n` of them yields `E(n)` in `H(n) + T(n)`; not waiting yields one token in
//!   `T(0)`, in which the draft gets ready, and `E(n)` in the next `T(n)` if the draft guessed that token too. Wait for
//!   the `n` with the most `E(n) / (H(n) + T(n))` if that beats `(1 + a_1 E(n)) / (T(0) + T(n))`.

use std::time::Duration;

/// Lengths for the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Plan {
    /// Most tokens to offer.
    pub n_offer: usize,
    /// The target may wait for this many; 0: it does not wait.
    pub n_min: usize,
    /// The longest time that it may wait, in microseconds.
    pub hold_us: u64,
    /// How far to draft beyond the committed tokens.
    pub n_ahead: usize,
}

/// One step of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Draft tokens that it verified.
    pub drafted: usize,
    /// Of these, the ones that it kept.
    pub accepted: usize,
    /// How long the pass took.
    pub duration: Duration,
}

/// What is known of a pair of draft server and target.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    acceptance: Acceptance,
    step: StepCost,
    /// Microseconds from the start of a stream to its first token.
    first_us: Average,
    /// Microseconds per further token.
    token_us: Average,
    steps_without_draft: u32,
}

/// Where nothing was measured, drafts are this long.
const FIRST_GUESS: usize = 8;
/// While drafting does not pay, one step in so many still gets a short draft, to see whether it does now.
const PROBE_EVERY: u32 = 32;

impl Pace {
    /// Takes in a step of the target.
    pub fn record_step(&mut self, step: Step) {
        self.acceptance.record(step.drafted, step.accepted);
        self.step.record(step.drafted, micros(step.duration));
        self.steps_without_draft = if step.drafted > 0 {
            0
        } else {
            self.steps_without_draft.saturating_add(1)
        };
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

    /// Expected tokens of a step that verifies `n` draft tokens.
    #[must_use]
    pub fn expected_tokens(&self, n: usize) -> f64 {
        let mut reach = 1.0;
        1.0 + (0..n)
            .map(|i| {
                reach *= self.acceptance.rate(i);
                reach
            })
            .sum::<f64>()
    }

    /// The lengths for the next step, when one step can verify at most `cap` draft tokens and the running stream of the
    /// drafter has been silent for `silent`.
    #[must_use]
    pub fn plan(&self, cap: usize, silent: Duration) -> Plan {
        if cap == 0 {
            return Plan::default();
        }
        let Some(plain_us) = self.step.micros(0) else {
            let n_offer = cap.min(FIRST_GUESS);
            return Plan {
                n_offer,
                n_ahead: 2 * n_offer + 1,
                ..Plan::default()
            };
        };
        let step_us = |n: usize| self.step.micros(n).unwrap_or(plain_us);
        let n_offer = best(0..=cap, |n| self.expected_tokens(n) / step_us(n));
        if n_offer == 0 {
            return if self.steps_without_draft >= PROBE_EVERY {
                Plan {
                    n_offer: 1,
                    n_ahead: 2,
                    ..Plan::default()
                }
            } else {
                Plan::default()
            };
        }
        let mut plan = Plan {
            n_offer,
            n_ahead: 2 * n_offer + 1,
            ..Plan::default()
        };
        if let (Some(first_us), Some(token_us)) = (self.first_us.get(), self.token_us.get()) {
            let wait_us = |n: usize| first_us.max(micros(silent)) + n as f64 * token_us;
            let waiting = |n: usize| self.expected_tokens(n) / (wait_us(n) + step_us(n));
            let n = best(1..=n_offer, waiting);
            let going_on = (1.0 + self.acceptance.rate(0) * self.expected_tokens(n)) / (plain_us + step_us(n));
            if waiting(n) > going_on.max(1.0 / plain_us) {
                plan.n_min = n;
                // Half as much again as expected, and never more than the step that waiting saves.
                plan.hold_us = whole((1.5 * wait_us(n) + 500.0).min(plain_us));
            }
        }
        plan
    }
}

/// The candidate with the highest value; of equal ones the first.
fn best(candidates: std::ops::RangeInclusive<usize>, value: impl Fn(usize) -> f64) -> usize {
    let mut best = (*candidates.start(), f64::NEG_INFINITY);
    for n in candidates {
        let v = value(n);
        if v > best.1 {
            best = (n, v);
        }
    }
    best.0
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

/// Chance of acceptance by position, over about the last thirty steps that got there.
#[derive(Debug, Clone, Default)]
struct Acceptance {
    /// (tries, hits) of each position, fading.
    positions: Vec<(f64, f64)>,
}

impl Acceptance {
    const FADE: f64 = 0.97;
    /// What an unknown pair is credited with, as so many tries.
    const PRIOR: (f64, f64) = (2.0, 0.7);

    fn record(&mut self, drafted: usize, accepted: usize) {
        let reached = drafted.min(accepted + 1);
        if self.positions.len() < reached {
            self.positions.resize(reached, (0.0, 0.0));
        }
        for (i, (tries, hits)) in self.positions[..reached].iter_mut().enumerate() {
            *tries = *tries * Self::FADE + 1.0;
            *hits = *hits * Self::FADE + f64::from(u8::from(i < accepted));
        }
    }

    /// The rate at position `i` (from 0); a position of which little is known is taken to be like the one before.
    fn rate(&self, i: usize) -> f64 {
        let (weight, mut rate) = Self::PRIOR;
        for &(tries, hits) in self.positions.iter().take(i + 1) {
            rate = (hits + weight * rate) / (tries + weight);
        }
        rate
    }
}

/// Time of a step as a line over the number of draft tokens: least squares over about the last fifty steps.
#[derive(Debug, Clone, Default)]
struct StepCost {
    weight: f64,
    n: f64,
    n_n: f64,
    t: f64,
    n_t: f64,
}

impl StepCost {
    const FADE: f64 = 0.98;
    /// Share of a step that a further token is taken to cost until steps of different sizes were seen.
    const SLOPE_GUESS: f64 = 0.05;
    /// A step that takes so many times longer than expected (another request's prompt went along) counts as this.
    const OUTLIER: f64 = 3.0;

    fn record(&mut self, n: usize, us: f64) {
        let us = self.micros(n).map_or(us, |expected| us.min(Self::OUTLIER * expected));
        let n = n as f64;
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.n, n),
            (&mut self.n_n, n * n),
            (&mut self.t, us),
            (&mut self.n_t, n * us),
        ] {
            *sum = *sum * Self::FADE + value;
        }
    }

    fn micros(&self, n: usize) -> Option<f64> {
        if self.weight == 0.0 {
            return None;
        }
        let (mean_n, mean_t) = (self.n / self.weight, self.t / self.weight);
        let variance = self.n_n / self.weight - mean_n * mean_n;
        let slope = if variance > 0.25 {
            let covariance = self.n_t / self.weight - mean_n * mean_t;
            (covariance / variance).clamp(0.0, mean_t)
        } else {
            Self::SLOPE_GUESS * mean_t / (1.0 + Self::SLOPE_GUESS * mean_n)
        };
        let floor = mean_t / (1.0 + mean_n);
        Some((mean_t + slope * (n as f64 - mean_n)).max(floor))
    }
}

/// A running average that forgets.
#[derive(Debug, Clone, Copy, Default)]
struct Average(Option<f64>);

impl Average {
    const NEW: f64 = 0.1;

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

    /// A pair with constant costs, seen for `steps` steps of mixed sizes.
    fn measured(alpha: f64, plain_us: f64, slope: f64, first_us: f64, token_us: f64) -> Pace {
        let mut pace = Pace::default();
        let mut uniform = 0.5_f64;
        for i in 0..400_usize {
            let drafted = [0, 4, 8][i % 3];
            let mut accepted = 0;
            while accepted < drafted {
                uniform = (uniform * 997.0 + 0.123_456_7).fract();
                if uniform >= alpha {
                    break;
                }
                accepted += 1;
            }
            let us = plain_us * (1.0 + slope * drafted as f64);
            pace.record_step(Step {
                drafted,
                accepted,
                duration: Duration::from_secs_f64(us / 1e6),
            });
            pace.record_first_token(Duration::from_secs_f64(first_us / 1e6));
            pace.record_tokens(4, Duration::from_secs_f64(4.0 * token_us / 1e6));
        }
        pace
    }

    #[test]
    fn a_fast_good_drafter_is_waited_for() {
        let plan = measured(0.9, 90_000.0, 0.1, 3_000.0, 1_200.0).plan(16, Duration::ZERO);
        assert!((3..=12).contains(&plan.n_min), "{plan:?}");
        assert!(plan.n_offer >= plan.n_min && plan.n_ahead > plan.n_offer);
        assert!(plan.hold_us > 4_000 && plan.hold_us < 90_000, "{plan:?}");
    }

    #[test]
    fn a_slow_drafter_is_not_waited_for() {
        let plan = measured(0.9, 90_000.0, 0.02, 90_000.0, 90_000.0).plan(16, Duration::ZERO);
        assert_eq!(plan.n_min, 0, "{plan:?}");
    }

    #[test]
    fn a_drafter_that_fell_silent_is_not_waited_for() {
        let pace = measured(0.9, 90_000.0, 0.1, 3_000.0, 1_200.0);
        assert_eq!(pace.plan(16, Duration::from_millis(500)).n_min, 0);
    }

    #[test]
    fn nonsense_is_not_offered_but_tried_again() {
        let mut pace = measured(0.0, 90_000.0, 0.1, 3_000.0, 1_200.0);
        assert_eq!(pace.plan(16, Duration::ZERO).n_offer, 0);
        for _ in 0..PROBE_EVERY {
            pace.record_step(Step {
                drafted: 0,
                accepted: 0,
                duration: Duration::from_millis(90),
            });
        }
        assert_eq!(pace.plan(16, Duration::ZERO).n_offer, 1);
    }

    #[test]
    fn offers_grow_with_acceptance_and_shrink_with_the_cost_of_verifying() {
        let offer = |alpha, slope| {
            measured(alpha, 50_000.0, slope, 2_000.0, 1_000.0)
                .plan(16, Duration::ZERO)
                .n_offer
        };
        assert!(offer(0.95, 0.05) > offer(0.6, 0.05));
        assert!(offer(0.8, 0.02) > offer(0.8, 0.3));
    }

    proptest! {
        #[test]
        fn a_plan_is_always_consistent(
            steps in prop::collection::vec((0_usize..20, 0_usize..20, 1_u64..10_000_000), 0..200),
            drafts in prop::collection::vec((0_u64..10_000_000, 0_usize..9, 0_u64..10_000_000), 0..50),
            cap in 0_usize..64,
            silent in 0_u64..100_000_000,
        ) {
            let mut pace = Pace::default();
            for (drafted, accepted, us) in steps {
                let duration = Duration::from_micros(us);
                pace.record_step(Step { drafted, accepted: accepted.min(drafted), duration });
            }
            for (first, n, us) in drafts {
                pace.record_first_token(Duration::from_micros(first));
                pace.record_tokens(n, Duration::from_micros(us));
            }
            let plan = pace.plan(cap, Duration::from_micros(silent));
            prop_assert!(plan.n_offer <= cap);
            prop_assert!(plan.n_min <= plan.n_offer);
            prop_assert!((plan.n_min == 0) == (plan.hold_us == 0), "{plan:?}");
            prop_assert!((plan.n_offer == 0) == (plan.n_ahead == 0));
        }
    }
}
