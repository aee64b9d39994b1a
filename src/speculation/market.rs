//! What the time of a target and of its drafters is worth: the cycles whose formula stands in `pace.rs`.

use std::ops::Range;

use super::pace::{Choice, Load, SLACK_US, Timing};
use super::session::far;
use super::step_cost::StepCost;
use super::whole;

/// What time costs.
pub(super) struct Market<'a> {
    pub(super) step: &'a StepCost,
    /// Steps take so many times longer beside the drafters that are at work now.
    pub(super) slowed: f64,
    pub(super) load: Load,
    /// A step without a draft.
    pub(super) plain_us: f64,
    /// Tokens per microsecond of all completions as they come now, and at least what plain steps give.
    pub(super) rate: f64,
}

impl Market<'_> {
    /// Chooses to wait for a draft to grow, if that is worth more. As it is it is accepted as a whole with the chance `reach`
    /// and yields `expected` tokens.
    pub(super) fn weigh_growth(
        &self,
        growth: &Growth,
        (mut reach, mut expected): (f64, f64),
        busy_us: f64,
        choice: &mut Choice,
    ) {
        let (Some(first_us), Some(token_us)) = (growth.timing.first_us.get(), growth.timing.token_us.get()) else {
            return;
        };
        // What is late stays late by as much again.
        let usual_us = if growth.begun { token_us } else { first_us };
        let next_us = (usual_us - growth.silent_us).abs();
        let mut comes_us = next_us - token_us;
        for n in growth.lengths.start + 1..=growth.lengths.end {
            comes_us += token_us;
            reach *= growth.chance;
            expected += reach;
            let late_us = (comes_us - busy_us).max(0.0);
            let worth = expected - self.rate * (self.step_us(n, growth.rests) + late_us);
            if worth > choice.worth {
                choice.worth = worth;
                // Half as much again as expected.
                choice.wait_us = whole((1.5 * comes_us + SLACK_US - busy_us).max(0.0));
            }
        }
    }

    /// The best way to use such drafts, if all completions use them so. While the target waits for one of them, all stand
    /// still.
    pub(super) fn cycle(&self, supply: Supply, n_max: usize) -> Cycle {
        let all = self.load.others + 1;
        let step_us = |n: usize| self.step.us(all * (1 + n) - 1).unwrap_or(self.plain_us);
        let plain_us = step_us(0);
        let mut best = Cycle {
            rate: 1.0 / plain_us,
            plain_us,
            way: Way::Plain,
        };
        let Supply {
            undisturbed,
            beside_step,
            ..
        } = supply;
        // Steps beside so many draft tokens in the making, at most beside a drafter that never rests.
        let beside_us = |us: f64, tokens: f64| {
            let at_work_us = (tokens * beside_step.token_us).min(us * supply.slowdown);
            us + (1.0 - 1.0 / supply.slowdown) * at_work_us
        };
        let mut expected = 1.0;
        for n in 1..=n_max {
            let survives = |tokens: usize| supply.chance.powi(i32::try_from(tokens).unwrap_or(i32::MAX));
            expected += survives(n);
            let in_a_row = 1.0 / (1.0 - survives(n + 1)).max(0.01);
            // The first step is beside all that the drafter makes ahead. In a row it has to keep up.
            let next = (n + 1) as f64;
            let made = (far(n_max) - n) as f64 + (in_a_row - 1.0) * next;
            let time_us = beside_us(in_a_row * step_us(n), made).max(in_a_row * next * beside_step.token_us);
            let tokens = in_a_row * expected;
            let waits = in_a_row * (1.0 - (1.0 - 1.0 / in_a_row).powf(all as f64));
            let waiting = Cycle {
                rate: tokens / (waits * undisturbed.comes_us(n) + time_us),
                way: Way::Waits { n, rests: false },
                ..best
            };
            let in_turns = Cycle {
                rate: expected / (undisturbed.comes_us(n) + step_us(n)),
                way: Way::Waits { n, rests: true },
                ..best
            };
            let slow_us = supply.slowdown * plain_us;
            let gains_us = slow_us - beside_step.token_us;
            let plain_steps = ((beside_step.comes_us(n) + SLACK_US) / gains_us).ceil().max(1.0);
            let going_on = Cycle {
                rate: if gains_us > 0.0 {
                    let chance = supply.chance.powf(plain_steps);
                    let taken = (1.0 - chance) / (1.0 - supply.chance).max(1e-6);
                    (taken + chance * tokens) / (taken * slow_us + chance * time_us)
                } else {
                    0.0
                },
                way: Way::GoesOn,
                ..best
            };
            let turns = supply.gains_by_rests().then_some(in_turns);
            for cycle in [waiting, going_on].into_iter().chain(turns) {
                if cycle.rate > best.rate {
                    best = cycle;
                }
            }
        }
        best
    }

    /// Microseconds of a step over `n` draft tokens, during which the drafter `rests` or not.
    pub(super) fn step_us(&self, n: usize, rests: bool) -> f64 {
        let slowed = if rests { 1.0 } else { self.slowed };
        let us = self.step.us(self.load.tokens + n);
        us.map_or(self.plain_us, |us| slowed * us)
    }
}

/// A draft in the making that the target may wait for.
pub(super) struct Growth {
    pub(super) timing: Timing,
    /// Of each token that is still to come.
    pub(super) chance: f64,
    pub(super) begun: bool,
    /// Microseconds since its last token, or since it was asked for.
    pub(super) silent_us: f64,
    /// From what is there to the most that is waited for.
    pub(super) lengths: Range<usize>,
    /// Whether the drafter rests during the step.
    pub(super) rests: bool,
}

/// Drafts of one source, on the whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Supply {
    /// Of a token that is still to come.
    pub(super) chance: f64,
    /// When they come while the target waits, and while it is in a step.
    pub(super) undisturbed: Arrival,
    pub(super) beside_step: Arrival,
    /// A step takes so many times longer while they are made.
    pub(super) slowdown: f64,
}

impl Supply {
    /// Whether it can be better not to draft during steps. Who rests before it is known how long it takes will not show it.
    pub(super) fn gains_by_rests(&self) -> bool {
        let Arrival { first_us, token_us } = self.undisturbed;
        self.slowdown > 1.0 && first_us > 0.0 && token_us > 0.0
    }
}

/// When the tokens of a draft come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrival {
    /// Microseconds from a step of the target that contradicts a draft until the first token of the next draft is with
    /// the target.
    pub(super) first_us: f64,
    /// Microseconds between two tokens.
    pub(super) token_us: f64,
}

impl Arrival {
    /// Microseconds until a draft of `n` tokens, at least one, is with the target.
    pub(super) fn comes_us(self, n: usize) -> f64 {
        self.first_us + (n - 1) as f64 * self.token_us
    }
}

/// How drafts are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Not at all.
    Plain,
    /// The target goes on and takes what is there.
    GoesOn,
    /// The target waits for drafts of `n` tokens; the drafter goes on while they are verified, or `rests`.
    Waits { n: usize, rests: bool },
}

/// A way to use drafts, and what comes of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cycle {
    /// Tokens per microsecond of one completion.
    pub(super) rate: f64,
    /// Microseconds of a plain step with no drafter at work.
    pub(super) plain_us: f64,
    pub(super) way: Way,
}

impl Cycle {
    /// Speed over that of plain steps.
    pub(super) fn speed_up(self) -> f64 {
        self.rate * self.plain_us
    }
}
