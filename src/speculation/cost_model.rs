//! Cost model used to choose a drafting schedule.
//!
//! It turns measurements into the throughput of each [`DraftSchedule`] and into the value of a wait, by the formulas in
//! `docs/explanation/policy.md`. It is pure: the same measurements give the same estimate. [`super::AdaptivePolicy`] builds a
//! [`CostModel`] for each decision and keeps nothing of it.

use std::ops::Range;

use super::drafter_stats::DrafterTiming;
use super::policy::{ConcurrentLoad, StepPlan};
use super::session::max_lookahead;
use super::step_cost::StepCost;
use super::{Tuning, whole};

/// Costs at the moment of a decision.
pub(super) struct CostModel<'a> {
    pub(super) tuning: &'a Tuning,
    pub(super) step_cost: &'a StepCost,
    /// Factor by which steps take longer beside the drafters that are busy now.
    pub(super) slowdown: f64,
    pub(super) load: ConcurrentLoad,
    /// Microseconds of a step without a draft.
    pub(super) plain_us: f64,
    /// Tokens per microsecond of all completions at the current speed, at least that of plain steps.
    pub(super) rate: f64,
}

impl CostModel<'_> {
    /// Sets `wait_us` if waiting for more draft tokens pays. The target accepts the whole draft as it is with probability
    /// `prefix_acceptance`; the draft then yields `expected` tokens.
    pub(super) fn consider_wait(
        &self,
        candidate: &WaitCandidate,
        (mut prefix_acceptance, mut expected): (f64, f64),
        busy_us: f64,
        plan: &mut StepPlan,
    ) {
        let timing = &candidate.timing;
        let (Some(first_us), Some(token_us)) = (timing.first_us.get(), timing.token_us.get()) else {
            return;
        };
        // Assume that an overdue token needs as long again as it is overdue.
        let usual_us = if candidate.started { token_us } else { first_us };
        let next_us = (usual_us - candidate.silent_us).abs();
        let mut arrives_us = next_us - token_us;
        for n in candidate.lengths.start + 1..=candidate.lengths.end {
            arrives_us += token_us;
            prefix_acceptance *= candidate.acceptance;
            expected += prefix_acceptance;
            let idle_us = (arrives_us - busy_us).max(0.0);
            let value = expected - self.rate * (self.step_us(n, candidate.drafter_pauses) + idle_us);
            if value > plan.value {
                plan.value = value;
                let longest_us = self.tuning.wait_margin * arrives_us + self.tuning.slack_us - busy_us;
                plan.wait_us = whole(longest_us.max(0.0));
            }
        }
    }

    /// The schedule with the highest throughput for such drafts, if all completions use the same one. While the target waits
    /// for the draft of one completion, all of them wait.
    pub(super) fn best_schedule(&self, drafts: DrafterProfile, n_max: usize) -> ScheduleEstimate {
        let completions = self.load.completions + 1;
        let step_us = |n: usize| {
            let us = self.step_cost.us(completions * (1 + n) - 1, self.tuning);
            us.unwrap_or(self.plain_us)
        };
        let plain_us = step_us(0);
        let mut best = ScheduleEstimate {
            rate: 1.0 / plain_us,
            plain_us,
            schedule: DraftSchedule::Plain,
        };
        let DrafterProfile { waiting, stepping, .. } = drafts;
        let mut steps = vec![StepEstimate {
            us: plain_us,
            expected: 1.0,
            survival: drafts.acceptance,
        }];
        for n in 1..=n_max {
            let before = steps[n - 1];
            let step = StepEstimate {
                us: step_us(n),
                expected: before.expected + before.survival,
                survival: before.survival * drafts.acceptance,
            };
            steps.push(step);
            // Steps from one contradicted draft to the next.
            let run = 1.0 / (1.0 - step.survival).max(self.tuning.min_contradiction);
            // The drafter fills its lookahead during the first step. During the rest of the run it has to keep up.
            let next = (n + 1) as f64;
            let made = (max_lookahead(n_max) - n) as f64 + (run - 1.0) * next;
            let run_us = drafts
                .slowed_us(run * step.us, made)
                .max(run * next * stepping.token_us);
            let waits = run * (1.0 - (1.0 - 1.0 / run).powf(completions as f64));
            let wait = ScheduleEstimate {
                rate: run * step.expected / (waits * waiting.arrival_us(n) + run_us),
                schedule: DraftSchedule::Wait { n },
                ..best
            };
            let alternate = ScheduleEstimate {
                rate: step.expected / (waiting.arrival_us(n) + step.us),
                schedule: DraftSchedule::Alternate { n },
                ..best
            };
            if wait.rate > best.rate {
                best = wait;
            }
            if drafts.may_alternate() && alternate.rate > best.rate {
                best = alternate;
            }
        }
        // The overlap schedule picks the draft length of each step by the value of time, which its own rate changes.
        for _ in 0..2 {
            let rate = drafts.overlap_rate(&steps, best.rate, self.tuning);
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

    /// Microseconds of a step over `n` draft tokens, while the drafter pauses or not.
    pub(super) fn step_us(&self, n: usize, drafter_pauses: bool) -> f64 {
        let slowdown = if drafter_pauses { 1.0 } else { self.slowdown };
        let us = self.step_cost.us(self.load.tokens + n, self.tuning);
        us.map_or(self.plain_us, |us| slowdown * us)
    }
}

/// A pending draft that the target may wait for.
pub(super) struct WaitCandidate {
    pub(super) timing: DrafterTiming,
    /// Acceptance rate of each token that is not drafted yet.
    pub(super) acceptance: f64,
    pub(super) started: bool,
    /// Microseconds since its last token, or since the request.
    pub(super) silent_us: f64,
    /// From the tokens drafted so far to the most that the target waits for.
    pub(super) lengths: Range<usize>,
    /// Whether the drafter pauses during the step.
    pub(super) drafter_pauses: bool,
}

/// Drafts of one source, as the cost model sees them.
#[derive(Debug, Clone, Copy)]
pub(super) struct DrafterProfile {
    /// Acceptance rate of a token that is not drafted yet.
    pub(super) acceptance: f64,
    /// Latency while the target waits.
    pub(super) waiting: DraftLatency,
    /// Latency while the target is in a step.
    pub(super) stepping: DraftLatency,
    /// Factor by which a step takes longer while a draft is made.
    pub(super) slowdown: f64,
}

impl DrafterProfile {
    /// Microseconds of steps that take `us` undisturbed, while `tokens` draft tokens are made; at most as long as beside a
    /// drafter that is always busy.
    fn slowed_us(&self, us: f64, tokens: f64) -> f64 {
        let busy_us = (tokens * self.stepping.token_us).min(us * self.slowdown);
        us + (1.0 - 1.0 / self.slowdown) * busy_us
    }

    /// Tokens per microsecond of the overlap schedule, from one contradicted draft to the next, where a microsecond is worth
    /// `rate` tokens.
    fn overlap_rate(&self, steps: &[StepEstimate], rate: f64, tuning: &Tuning) -> f64 {
        // For each number of available draft tokens, the number of them with the highest value.
        let mut best: Vec<(f64, &StepEstimate)> = Vec::with_capacity(steps.len());
        for (n, step) in (0_u32..).zip(steps) {
            let value = |step: &StepEstimate| step.expected - rate * step.us;
            best.push(match best.last() {
                Some(before) if value(before.1) >= value(step) => *before,
                _ => (f64::from(n), step),
            });
        }
        let DraftLatency { first_us, token_us } = self.stepping;
        let n_max = steps.len() - 1;
        let lookahead = max_lookahead(n_max) as f64;
        let (mut tokens, mut us) = (0.0, 0.0);
        // `survival`: the draft is not contradicted after `committed` tokens and `now_us`.
        let (mut survival, mut now_us, mut committed) = (1.0, 0.0, 0.0);
        while survival > tuning.min_survival && committed < tuning.max_survival_tokens {
            let drafting_us = now_us - first_us - tuning.slack_us;
            let drafted = if drafting_us < 0.0 {
                0.0
            } else {
                let made = (1.0 + drafting_us / token_us.max(1.0)).floor();
                made.min(committed + lookahead)
            };
            let available = usize::try_from(whole(drafted - committed)).unwrap_or(usize::MAX);
            let (n, step) = best[available.min(n_max)];
            let step_us = self.slowed_us(step.us, committed + lookahead - drafted);
            tokens += survival * step.expected;
            us += survival * step_us;
            survival *= step.survival;
            now_us += step_us;
            committed += n + 1.0;
        }
        tokens / us
    }

    /// Whether alternating can pay. Never pause an unmeasured drafter; it would stay unmeasured.
    fn may_alternate(&self) -> bool {
        let DraftLatency { first_us, token_us } = self.waiting;
        self.slowdown > 1.0 && first_us > 0.0 && token_us > 0.0
    }
}

/// Estimate of a step over some number of draft tokens.
#[derive(Debug, Clone, Copy)]
struct StepEstimate {
    /// Microseconds that it takes.
    us: f64,
    /// Expected tokens that it yields.
    expected: f64,
    /// Probability that the target accepts all of them and the drafter's next token.
    survival: f64,
}

/// When the tokens of a draft arrive.
#[derive(Debug, Clone, Copy)]
pub(super) struct DraftLatency {
    /// Microseconds from the step that contradicts a draft until the first token of the next draft is at the target.
    pub(super) first_us: f64,
    /// Microseconds per further token.
    pub(super) token_us: f64,
}

impl DraftLatency {
    /// Microseconds until a draft of `n` tokens, at least one, is at the target.
    pub(super) fn arrival_us(self, n: usize) -> f64 {
        self.first_us + (n - 1) as f64 * self.token_us
    }
}

/// How a target and a drafter share the time of a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DraftSchedule {
    /// Nothing is drafted.
    Plain,
    /// The target never waits: it verifies the tokens that have arrived by then.
    Overlap,
    /// The target waits for drafts of `n` tokens; the drafter goes on during the step.
    Wait { n: usize },
    /// The target waits for drafts of `n` tokens; the drafter pauses during the step.
    Alternate { n: usize },
}

impl DraftSchedule {
    /// Length of the drafts that the target waits for, if it waits.
    pub(super) fn waits_for(self) -> Option<usize> {
        match self {
            Self::Wait { n } | Self::Alternate { n } => Some(n),
            Self::Plain | Self::Overlap => None,
        }
    }
}

/// A schedule and its expected throughput.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScheduleEstimate {
    /// Tokens per microsecond of one completion.
    pub(super) rate: f64,
    /// Microseconds of a plain step with no drafter at work.
    pub(super) plain_us: f64,
    pub(super) schedule: DraftSchedule,
}

impl ScheduleEstimate {
    /// Speed relative to plain steps.
    pub(super) fn speed_up(self) -> f64 {
        self.rate * self.plain_us
    }
}
