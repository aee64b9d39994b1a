//! Tuned constants of the drafting policy and its cost model.
//!
//! [`Tuning::default`] holds the values that ship. They were chosen with the simulator (`simulator/`), which can sweep each
//! of them; no other module of this crate holds a constant of the policy. [`super::AdaptivePolicy`] owns one
//! `Tuning` and lends it to the cost model, the estimators and the session.
//!
//! Two kinds of numbers are not here: the bounds that sort draft tokens into classes (`acceptance.rs`), because they define
//! what a class is, and the lengths that text matching uses (`lookup.rs`), because they cost no time of the target.

use super::acceptance::{CONFIDENCE_BUCKETS, MATCH_BUCKETS};

/// Tuned constants, grouped by what uses them. Times are microseconds, intervals are steps of the target.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuning {
    // Acceptance rates.
    /// Acceptance rate that each confidence bucket of a drafter starts with, most confident first.
    pub confidence_priors: [f64; CONFIDENCE_BUCKETS.len()],
    /// Acceptance rate that tokens of a drafter without reported probabilities start with.
    pub unknown_confidence_prior: f64,
    /// Acceptance rate that each bucket of copied tokens starts with, shortest match first.
    pub match_priors: [f64; MATCH_BUCKETS.len()],
    /// Acceptance rate that tokens of a drafter start with while they are not drafted yet.
    pub undrafted_prior: f64,
    /// Number of observations that a prior counts for.
    pub prior_weight: f64,
    /// Factor by which old observations fade with each new one: 0.99 remembers about the last hundred.
    pub acceptance_decay: f64,

    // Averages over time.
    /// Weight of a new value in an average of latencies.
    pub latency_weight: f64,
    /// Factor by which the current throughput forgets older steps.
    pub throughput_decay: f64,
    /// Longest time between two steps that counts for the throughput, in step durations; a longer pause is not the target's.
    pub max_counted_pause: f64,

    // When to try what does not pay.
    /// Steps until a drafter that does not pay is asked again: the first interval, which doubles up to ...
    pub min_retry_interval: u32,
    /// ... this one.
    pub max_retry_interval: u32,
    /// Draft tokens that a retried drafter is asked for.
    pub retry_tokens: usize,
    /// Steps without a draft until one is verified to measure its cost again: the first interval, which doubles up to ...
    pub min_probe_interval: u32,
    /// ... this one.
    pub max_probe_interval: u32,
    /// Expected tokens per step that a draft needs to be verified for measurement only.
    pub min_probe_yield: f64,

    // Offers and waits.
    /// Draft tokens to offer while no step was measured.
    pub initial_offer: usize,
    /// Time by which a draft or a message may come later than expected.
    pub slack_us: f64,
    /// As `slack_us` where target and drafter alternate and so depend on each other; a share of a plain step.
    pub alternate_slack: f64,
    /// Factor on the expected arrival of a draft token that gives the longest wait for it.
    pub wait_margin: f64,
    /// Round trips that the target waits after a step for the next offer.
    pub hold_round_trips: f64,
    /// Drafts are not extended when the drafter's next token would be accepted with a smaller probability.
    pub min_prefix_acceptance: f64,
    /// Tokens by which a running stream may be behind the target before it is restarted.
    pub max_stream_lag: usize,
    /// Steps that the target may have taken unseen; more are not predicted.
    pub max_unseen_steps: usize,

    // Schedules.
    /// Smallest probability that a draft is contradicted, which bounds the steps that an accepted draft lasts.
    pub min_contradiction: f64,
    /// The estimate of the overlap schedule ends when a draft survives with a smaller probability ...
    pub min_survival: f64,
    /// ... or after this many tokens.
    pub max_survival_tokens: f64,

    // Cost of steps.
    /// Largest batch that counts as a decode step; larger ones contain prefill.
    pub max_decode_batch: usize,
    /// A step is compared with the one before only if it ends within this many step durations.
    pub max_step_gap: u32,
    /// Share of a step that one more token is assumed to cost while steps of one size only were seen.
    pub assumed_slope: f64,
    /// Smallest share of a step that one more token costs beyond the largest measured size.
    pub min_slope: f64,
    /// Longest overrun of a step that counts, as a factor: another request's prefill may share its batch.
    pub max_overrun: f64,
    /// Share of an overrun, as an exponent, that changes the cost of steps of all sizes.
    pub scale_weight: f64,
    /// Share of an overrun, as an exponent, that changes the cost of steps of that size.
    pub shape_weight: f64,
    /// Largest `shape_weight` of a size that was not seen for long.
    pub max_shape_weight: f64,

    // Slowdown of the target by a drafter on the same device.
    /// A drafter that is busy for a smaller share of a step does not count.
    pub min_busy_share: f64,
    /// A step counts as undisturbed if the drafter is busy for a smaller share of it.
    pub undisturbed_share: f64,
    /// A step shows the slowdown if the drafter is busy for at least this share of it.
    pub disturbed_share: f64,
    /// Comparisons that the calibration at startup counts for.
    pub calibration_weight: f64,
    /// Most comparisons that the estimate remembers.
    pub slowdown_memory: f64,
    /// Weight of a new value in the average busy share.
    pub busy_share_weight: f64,
    /// Largest slowdown that is believed.
    pub max_slowdown: f64,
    /// Smallest slowdown that counts; less is noise, and target and drafter count as on separate devices.
    pub min_slowdown: f64,
    /// A comparison that differs from the estimate by this factor is repeated soon.
    pub slowdown_surprise: f64,
    /// Steps until the slowdown is measured again: the first interval, which doubles up to ...
    pub min_reprobe_interval: u32,
    /// ... this one.
    pub max_reprobe_interval: u32,
    /// Steps that one such measurement lasts.
    pub reprobe_steps: u32,
}

impl Tuning {
    /// The values that ship.
    pub const DEFAULT: Self = Self {
        confidence_priors: [0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.7, 0.55, 0.4, 0.2],
        unknown_confidence_prior: 0.7,
        match_priors: [0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        undrafted_prior: 0.85,
        prior_weight: 3.0,
        acceptance_decay: 0.99,
        latency_weight: 0.15,
        throughput_decay: 0.95,
        max_counted_pause: 4.0,
        min_retry_interval: 16,
        max_retry_interval: 512,
        retry_tokens: 8,
        min_probe_interval: 64,
        max_probe_interval: 1024,
        min_probe_yield: 2.0,
        initial_offer: 8,
        slack_us: 500.0,
        alternate_slack: 0.25,
        wait_margin: 1.5,
        hold_round_trips: 2.0,
        min_prefix_acceptance: 0.05,
        max_stream_lag: 2,
        max_unseen_steps: 4,
        min_contradiction: 0.01,
        min_survival: 0.001,
        max_survival_tokens: 256.0,
        max_decode_batch: 256,
        max_step_gap: 4,
        assumed_slope: 0.05,
        min_slope: 0.01,
        max_overrun: 2.0,
        scale_weight: 0.2,
        shape_weight: 0.1,
        max_shape_weight: 0.5,
        min_busy_share: 0.1,
        undisturbed_share: 0.02,
        disturbed_share: 0.15,
        calibration_weight: 4.0,
        slowdown_memory: 10.0,
        busy_share_weight: 0.1,
        max_slowdown: 16.0,
        min_slowdown: 1.05,
        slowdown_surprise: 1.35,
        min_reprobe_interval: 64,
        max_reprobe_interval: 1024,
        reprobe_steps: 6,
    };
}

impl Default for Tuning {
    fn default() -> Self {
        Self::DEFAULT
    }
}
