//! Measurements of one drafter: acceptance, latency, and how much it slows the target down.
//!
//! Two latencies are kept apart, while the target waits and while it is in a step, because both may share a device. A latency
//! that was not measured is derived from the other one. [`super::AdaptivePolicy`] owns one [`DrafterStats`] per drafter and
//! hands a [`DrafterProfile`] of it to the cost model.

use std::time::Duration;

use super::acceptance::{AcceptanceRate, DRAFTER_BUCKETS};
use super::cost_model::{DraftLatency, DrafterProfile};
use super::slowdown::Slowdown;
use super::{Tuning, micros};

/// Measurements of one drafter.
#[derive(Debug, Clone)]
pub(super) struct DrafterStats {
    /// By confidence bucket.
    pub(super) acceptance: [AcceptanceRate; DRAFTER_BUCKETS],
    /// Of its tokens of all buckets.
    pub(super) mean_acceptance: AcceptanceRate,
    /// Tokens that were ever compared with the target's choice, and those that were the same.
    pub(super) n_compared: u32,
    pub(super) n_agreed: u32,
    /// While the target waits.
    pub(super) waiting: DrafterTiming,
    /// While the target is in a step.
    pub(super) stepping: DrafterTiming,
    pub(super) slowdown: Slowdown,
    /// Steps of the target since the drafter was asked last.
    pub(super) steps_since_asked: u32,
    /// Steps after which a drafter that does not pay is asked again.
    pub(super) retry_interval: u32,
}

/// Latency of a drafter.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DrafterTiming {
    /// Microseconds from the start of a stream to its first token.
    pub(super) first_us: MovingAverage,
    /// Microseconds per further token.
    pub(super) token_us: MovingAverage,
}

impl DrafterStats {
    pub(super) fn new(tuning: &Tuning) -> Self {
        Self {
            acceptance: [AcceptanceRate::default(); DRAFTER_BUCKETS],
            mean_acceptance: AcceptanceRate::default(),
            n_compared: 0,
            n_agreed: 0,
            waiting: DrafterTiming::default(),
            stepping: DrafterTiming::default(),
            slowdown: Slowdown::new(tuning),
            steps_since_asked: 0,
            retry_interval: tuning.min_retry_interval,
        }
    }

    /// Share of its tokens that were the target's own choice after the same text; `None` before any was compared.
    pub(super) fn agreement(&self) -> Option<f64> {
        (self.n_compared > 0).then(|| f64::from(self.n_agreed) / f64::from(self.n_compared))
    }

    pub(super) fn timing_mut(&mut self, target_waits: bool) -> &mut DrafterTiming {
        if target_waits {
            &mut self.waiting
        } else {
            &mut self.stepping
        }
    }

    /// Latency while the target waits or while it is in a step. A value that was not measured is taken from the other state:
    /// the drafter is slowed down as much as it slows the target down.
    pub(super) fn timing(&self, target_waits: bool, tuning: &Tuning) -> DrafterTiming {
        let slowdown = self.slowdown.factor(tuning);
        let (known, other, factor) = if target_waits {
            (self.waiting, self.stepping, 1.0 / slowdown)
        } else {
            (self.stepping, self.waiting, slowdown)
        };
        let us = |known: MovingAverage, other: MovingAverage| MovingAverage(known.0.or(other.0.map(|us| us * factor)));
        DrafterTiming {
            first_us: us(known.first_us, other.first_us),
            token_us: us(known.token_us, other.token_us),
        }
    }

    /// The drafter as the cost model sees it. Latencies that were not measured count as zero, so that the drafter is tried.
    pub(super) fn profile(&self, round_trip: Duration, tuning: &Tuning) -> DrafterProfile {
        let latency = |target_waits| {
            let timing = self.timing(target_waits, tuning);
            DraftLatency {
                first_us: micros(round_trip) + timing.first_us.get().unwrap_or(0.0),
                token_us: timing.token_us.get().unwrap_or(0.0),
            }
        };
        DrafterProfile {
            acceptance: self.mean_acceptance.estimate(tuning.undrafted_prior, tuning),
            waiting: latency(true),
            stepping: latency(false),
            slowdown: self.slowdown.factor(tuning),
        }
    }
}

/// An exponentially weighted average; `None` before the first value.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MovingAverage(Option<f64>);

impl MovingAverage {
    pub(super) fn record(&mut self, value: f64, tuning: &Tuning) {
        self.0 = Some(self.0.map_or(value, |old| old + tuning.latency_weight * (value - old)));
    }

    pub(super) fn get(self) -> Option<f64> {
        self.0
    }
}
