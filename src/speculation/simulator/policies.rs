//! Policies that the simulator runs: the adaptive one of the engine, and fixed schedules to compare it with.

use std::time::Duration;

use super::super::session::max_lookahead;
use super::super::{AdaptivePolicy, ConcurrentLoad, Policy, StepContext, StepPlan, StepSample, TokenClass, Tuning};
use super::PLAIN_US;

/// A policy that is told what the engine measures.
pub trait Learner: Policy {
    /// A step of the target ended; the drafter was busy for a share of it.
    fn stepped(&mut self, _step: &StepSample, _busy_share: f64) {}
    /// A stream of the drafter brought its first token.
    fn first_token(&mut self, _latency: Duration, _target_waits: bool) {}
    /// It brought a further token.
    fn token(&mut self, _since_last: Duration, _target_waits: bool) {}
}

impl Learner for AdaptivePolicy {
    fn stepped(&mut self, step: &StepSample, busy_share: f64) {
        self.record_step(step, &[busy_share]);
    }

    fn first_token(&mut self, latency: Duration, target_waits: bool) {
        self.record_first_token(0, latency, target_waits);
    }

    fn token(&mut self, since_last: Duration, target_waits: bool) {
        self.record_tokens(0, 1, since_last, target_waits);
    }
}

/// A fixed schedule: always the same number of draft tokens, which the target waits for or takes as they come.
#[derive(Debug, Clone, Copy)]
pub struct FixedPolicy {
    /// Draft tokens per step.
    pub n: usize,
    /// Whether the target waits for them.
    pub waits: bool,
    /// Whether the drafter makes no more than these, and so pauses while they are verified.
    pub pauses: bool,
}

impl Policy for FixedPolicy {
    fn observe(&mut self, _class: TokenClass, _accepted: bool) {}

    fn draft_limit(
        &mut self,
        _drafter: usize,
        target_waits: bool,
        n_max: usize,
        _load: ConcurrentLoad,
        _round_trip: Duration,
    ) -> usize {
        match (self.n > 0, self.pauses) {
            (true, false) => max_lookahead(n_max),
            (_, true) if !target_waits => 0,
            _ => self.n,
        }
    }

    fn prefix_acceptance(&self, _draft: &[TokenClass]) -> f64 {
        1.0
    }

    fn step_us(&self, _n: usize, _load: ConcurrentLoad) -> Option<f64> {
        Some(PLAIN_US)
    }

    fn choose(&self, draft: &[TokenClass], context: &StepContext) -> StepPlan {
        let n = draft.len().min(self.n);
        let long = if self.waits && self.n > 0 { 1_000_000_000 } else { 0 };
        StepPlan {
            n,
            wait_us: if n < self.n && context.pending.is_some() {
                long
            } else {
                0
            },
            hold_us: long,
            pause_drafter: self.pauses,
            value: n as f64,
        }
    }

    fn tuning(&self) -> &Tuning {
        &Tuning::DEFAULT
    }
}

impl Learner for FixedPolicy {}
