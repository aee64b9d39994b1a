//! What the time of a target and of its drafters is worth: the cycles whose formula stands in `policy.rs`.

use std::ops::Range;

use super::policy::{ConcurrentLoad, DrafterTiming, SLACK_US, StepPlan};
use super::session::max_lookahead;
use super::step_cost::StepCost;
use super::whole;

/// What time costs.
pub(super) struct CostModel<'a> {
    pub(super) step: &'a StepCost,
    /// Steps take so many times longer beside the drafters that are at work now.
    pub(super) slowed: f64,
    pub(super) load: ConcurrentLoad,
    /// A step without a draft.
    pub(super) plain_us: f64,
    /// Tokens per microsecond of all completions as they come now, and at least what plain steps give.
    pub(super) rate: f64,
}

impl CostModel<'_> {
    /// Chooses to wait for a draft to grow, if that is worth more. As it is it is accepted as a whole with the chance `reach`
    /// and yields `expected` tokens.
    pub(super) fn weigh_growth(
        &self,
        growth: &WaitCandidate,
        (mut reach, mut expected): (f64, f64),
        busy_us: f64,
        choice: &mut StepPlan,
    ) {
        let (Some(first_us), Some(token_us)) = (growth.timing.first_us.get(), growth.timing.token_us.get()) else {
            return;
        };
        // What is late stays late by as much again.
        let usual_us = if growth.started { token_us } else { first_us };
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
    pub(super) fn best_schedule(&self, supply: DrafterProfile, n_max: usize) -> ScheduleEstimate {
        let all = self.load.completions + 1;
        let step_us = |n: usize| self.step.us(all * (1 + n) - 1).unwrap_or(self.plain_us);
        let plain_us = step_us(0);
        let mut best = ScheduleEstimate {
            rate: 1.0 / plain_us,
            plain_us,
            schedule: DraftSchedule::Plain,
        };
        let DrafterProfile {
            undisturbed,
            beside_step,
            ..
        } = supply;
        let mut sizes = vec![StepEstimate {
            us: plain_us,
            expected: 1.0,
            survives: supply.chance,
        }];
        for n in 1..=n_max {
            let before = sizes[n - 1];
            let size = StepEstimate {
                us: step_us(n),
                expected: before.expected + before.survives,
                survives: before.survives * supply.chance,
            };
            sizes.push(size);
            let in_a_row = 1.0 / (1.0 - size.survives).max(0.01);
            // The first step is beside all that the drafter makes ahead. In a row it has to keep up.
            let next = (n + 1) as f64;
            let made = (max_lookahead(n_max) - n) as f64 + (in_a_row - 1.0) * next;
            let time_us = supply
                .beside_us(in_a_row * size.us, made)
                .max(in_a_row * next * beside_step.token_us);
            let waits = in_a_row * (1.0 - (1.0 - 1.0 / in_a_row).powf(all as f64));
            let waiting = ScheduleEstimate {
                rate: in_a_row * size.expected / (waits * undisturbed.comes_us(n) + time_us),
                schedule: DraftSchedule::Wait { n },
                ..best
            };
            let in_turns = ScheduleEstimate {
                rate: size.expected / (undisturbed.comes_us(n) + size.us),
                schedule: DraftSchedule::Alternate { n },
                ..best
            };
            if waiting.rate > best.rate {
                best = waiting;
            }
            if supply.gains_by_rests() && in_turns.rate > best.rate {
                best = in_turns;
            }
        }
        // What is worth a step depends on what the steps are worth.
        for _ in 0..2 {
            let rate = supply.rate_of_going_on(&sizes, best.rate);
            if rate > best.rate {
                best = ScheduleEstimate {
                    rate,
                    schedule: DraftSchedule::Overlap,
                    ..best
                };
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

/// A draft that is not contradicted yet with less chance, or after so many tokens, is not reckoned with any more.
const NEGLIGIBLE: f64 = 0.001;
const MOST_PASSED: f64 = 256.0;

/// A draft in the making that the target may wait for.
pub(super) struct WaitCandidate {
    pub(super) timing: DrafterTiming,
    /// Of each token that is still to come.
    pub(super) chance: f64,
    pub(super) started: bool,
    /// Microseconds since its last token, or since it was asked for.
    pub(super) silent_us: f64,
    /// From what is there to the most that is waited for.
    pub(super) lengths: Range<usize>,
    /// Whether the drafter rests during the step.
    pub(super) rests: bool,
}

/// Drafts of one source, on the whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct DrafterProfile {
    /// Of a token that is still to come.
    pub(super) chance: f64,
    /// When they come while the target waits, and while it is in a step.
    pub(super) undisturbed: DraftLatency,
    pub(super) beside_step: DraftLatency,
    /// A step takes so many times longer while they are made.
    pub(super) slowdown: f64,
}

impl DrafterProfile {
    /// Microseconds of steps that take `us` alone, beside so many draft tokens in the making; at most beside a drafter that
    /// never rests.
    fn beside_us(&self, us: f64, tokens: f64) -> f64 {
        let at_work_us = (tokens * self.beside_step.token_us).min(us * self.slowdown);
        us + (1.0 - 1.0 / self.slowdown) * at_work_us
    }

    /// Tokens per microsecond of a target that goes on with what is there of the drafts, from one contradicted draft to the
    /// next, if a microsecond is worth `worth` tokens.
    fn rate_of_going_on(&self, sizes: &[StepEstimate], worth: f64) -> f64 {
        // Of the sizes up to each, the one that is worth most.
        let mut best: Vec<(f64, &StepEstimate)> = Vec::with_capacity(sizes.len());
        for (n, size) in (0_u32..).zip(sizes) {
            let gain = |size: &StepEstimate| size.expected - worth * size.us;
            best.push(match best.last() {
                Some(before) if gain(before.1) >= gain(size) => *before,
                _ => (f64::from(n), size),
            });
        }
        let DraftLatency { first_us, token_us } = self.beside_step;
        let n_max = sizes.len() - 1;
        let far = max_lookahead(n_max) as f64;
        let (mut tokens, mut us) = (0.0, 0.0);
        // As long as the draft is not contradicted.
        let (mut chance, mut now_us, mut passed) = (1.0, 0.0, 0.0);
        while chance > NEGLIGIBLE && passed < MOST_PASSED {
            let drafting_us = now_us - first_us - SLACK_US;
            let drafted = if drafting_us < 0.0 {
                0.0
            } else {
                (1.0 + drafting_us / token_us.max(1.0)).floor().min(passed + far)
            };
            let there = usize::try_from(whole(drafted - passed)).unwrap_or(usize::MAX);
            let (n, size) = best[there.min(n_max)];
            let step_us = self.beside_us(size.us, passed + far - drafted);
            tokens += chance * size.expected;
            us += chance * step_us;
            chance *= size.survives;
            now_us += step_us;
            passed += n + 1.0;
        }
        tokens / us
    }

    /// Whether it can be better not to draft during steps. Who rests before it is known how long it takes will not show it.
    pub(super) fn gains_by_rests(&self) -> bool {
        let DraftLatency { first_us, token_us } = self.undisturbed;
        self.slowdown > 1.0 && first_us > 0.0 && token_us > 0.0
    }
}

/// A step over so many draft tokens.
#[derive(Debug, Clone, Copy)]
struct StepEstimate {
    /// Microseconds that it takes.
    us: f64,
    /// Tokens that it yields on average.
    expected: f64,
    /// The chance that all of them and the next token of the draft are right.
    survives: f64,
}

/// When the tokens of a draft come.
#[derive(Debug, Clone, Copy)]
pub(super) struct DraftLatency {
    /// Microseconds from a step of the target that contradicts a draft until the first token of the next draft is with
    /// the target.
    pub(super) first_us: f64,
    /// Microseconds between two tokens.
    pub(super) token_us: f64,
}

impl DraftLatency {
    /// Microseconds until a draft of `n` tokens, at least one, is with the target.
    pub(super) fn comes_us(self, n: usize) -> f64 {
        self.first_us + (n - 1) as f64 * self.token_us
    }
}

/// How drafts are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DraftSchedule {
    /// Not at all.
    Plain,
    /// The target goes on and takes what is there.
    Overlap,
    /// The target waits for drafts of `n` tokens; the drafter goes on while they are verified.
    Wait { n: usize },
    /// The target waits for drafts of `n` tokens; the drafter rests while they are verified.
    Alternate { n: usize },
}

impl DraftSchedule {
    /// Tokens of the drafts that the target waits for, if it waits.
    pub(super) fn waits_for(self) -> Option<usize> {
        match self {
            Self::Wait { n } | Self::Alternate { n } => Some(n),
            Self::Plain | Self::Overlap => None,
        }
    }
}

/// A way to use drafts, and what comes of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScheduleEstimate {
    /// Tokens per microsecond of one completion.
    pub(super) rate: f64,
    /// Microseconds of a plain step with no drafter at work.
    pub(super) plain_us: f64,
    pub(super) schedule: DraftSchedule,
}

impl ScheduleEstimate {
    /// Speed over that of plain steps.
    pub(super) fn speed_up(self) -> f64 {
        self.rate * self.plain_us
    }
}
