//! The policy: how many draft tokens the target verifies next, and whether it waits for more of them.
//!
//! [`AdaptivePolicy`] measures what a target and its drafters cost and decides from that; its decisions change the speed of
//! an answer, never its text. [`super::Session`] asks it through the trait [`Policy`] at each event of a completion, the
//! engine feeds it measurements, and all completions of one target share it.
//!
//! `docs/explanation/policy.md` derives the formulas and explains the exceptions by which the policy keeps measuring. Its
//! symbols in this code:
//!
//! | symbol | code |
//! | --- | --- |
//! | `a_i` | [`AcceptanceRate`] of a token's [`TokenClass`] |
//! | `a` | `mean_acceptance` of a drafter, in a [`DrafterProfile`] `acceptance` |
//! | `E(k)` | `expected` |
//! | `T(k)` | [`CostModel::step_us`], from [`StepCost`] |
//! | `r` | [`CostModel::rate`] |
//! | `A` | [`DraftLatency::arrival_us`] |
//! | `p` | `survival` of a `StepEstimate` in `cost_model.rs` |
//!
//! | decision | function |
//! | --- | --- |
//! | how many tokens to verify, and whether the drafter rests | [`Policy::choose`] |
//! | how long to wait for a longer draft | [`CostModel::consider_wait`] |
//! | which schedule a drafter's measurements allow | [`CostModel::best_schedule`] |
//! | how many tokens a drafter should have drafted | [`Policy::draft_limit`] |

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::acceptance::{AcceptanceRate, MATCH_BUCKETS, TokenClass, TokenSource};
use super::cost_model::{CostModel, DraftLatency, DraftSchedule, DrafterProfile, ScheduleEstimate, WaitCandidate};
use super::drafter_stats::{DrafterStats, DrafterTiming, MovingAverage};
use super::session::max_lookahead;
use super::slowdown::{PassSample, ReprobeKind};
use super::step_cost::StepCost;
use super::{Tuning, micros, whole};

/// Decides for a [`super::Session`]; see [`AdaptivePolicy`].
pub trait Policy {
    /// Records whether the target chose a draft token itself. It chose all draft tokens before this one.
    fn observe(&mut self, class: TokenClass, accepted: bool);

    /// Most tokens beyond the committed ones that a drafter should have drafted now; 0: do not ask it. The caller asks the
    /// drafter when the limit is larger.
    fn draft_limit(
        &mut self,
        drafter: usize,
        target_waits: bool,
        n_max: usize,
        load: ConcurrentLoad,
        round_trip: Duration,
    ) -> usize;

    /// Probability that the target accepts all of `draft`.
    fn prefix_acceptance(&self, draft: &[TokenClass]) -> f64;

    /// Expected microseconds of a step over `n` draft tokens beside the other completions; `None` before any was measured.
    fn step_us(&self, n: usize, load: ConcurrentLoad) -> Option<f64>;

    /// Plans the target's next step with this draft.
    fn choose(&self, draft: &[TokenClass], context: &StepContext) -> StepPlan;

    /// The constants that a session decides with.
    fn tuning(&self) -> &Tuning;
}

/// A measured step of the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSample {
    /// Draft tokens that it verified.
    pub drafted: usize,
    /// Draft tokens that it accepted.
    pub accepted: usize,
    /// Duration of the forward pass.
    pub duration: Duration,
    /// Time since the step before ended, waits included.
    pub since_last: Duration,
    /// Tokens in the batch, of all completions and prompts.
    pub batch: usize,
}

/// Other completions that run on the same target.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ConcurrentLoad {
    /// Number of completions.
    pub completions: usize,
    /// Tokens that all of them together bring into a batch.
    pub tokens: usize,
}

/// A draft that is being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PendingDraft {
    /// The drafter's number.
    pub drafter: usize,
    /// Whether its stream has brought a token.
    pub started: bool,
    /// Time since its last token, or since the request.
    pub silent_for: Duration,
}

/// State of the target and the drafters in which a step is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepContext {
    /// Most draft tokens of a step.
    pub n_max: usize,
    /// The stream that extends the draft, if one runs.
    pub pending: Option<PendingDraft>,
    /// The drafter that does not draft now and can after the step.
    pub idle_drafter: Option<usize>,
    /// Microseconds until the target's current step ends; 0: it waits for an offer.
    pub busy_us: f64,
    /// Round trip to the target.
    pub round_trip: Duration,
    /// Other completions on the target.
    pub load: ConcurrentLoad,
}

/// Plan for the next step of the target.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepPlan {
    /// Draft tokens to verify.
    pub n: usize,
    /// Longest wait for more draft tokens before the step, in microseconds; 0: do not wait.
    pub wait_us: u64,
    /// Longest wait after the step for the next offer, in microseconds.
    pub hold_us: u64,
    /// Whether the drafter should pause during the step, because it would slow the step down.
    pub pause_drafter: bool,
    /// Value of the step in tokens. Only differences between plans have a meaning.
    pub value: f64,
}

/// The policy of the engine: learns costs and acceptance rates from what happens, and decides from them.
#[derive(Debug, Clone)]
pub struct AdaptivePolicy {
    tuning: Tuning,
    /// With no drafter at work.
    step_cost: StepCost,
    last_pass: Option<PassSample>,
    /// Duration over expected duration of the last two steps.
    overruns: [f64; 2],
    copy_acceptance: [AcceptanceRate; MATCH_BUCKETS.len()],
    prediction_acceptance: [AcceptanceRate; MATCH_BUCKETS.len()],
    drafters: Vec<DrafterStats>,
    round_trip_us: MovingAverage,
    /// Tokens and microseconds of the last steps; old steps fade.
    recent_tokens: f64,
    recent_us: f64,
    steps_since_draft: u32,
    /// Steps without a draft after which one is verified although it does not pay.
    probe_interval: u32,
}

impl Default for AdaptivePolicy {
    fn default() -> Self {
        Self::new(Tuning::default())
    }
}

/// Summary of a drafter for the status page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DrafterOutlook {
    /// Share of its tokens that the target chose itself after the same text.
    pub agreement: Option<f64>,
    /// Milliseconds from the request to its first token.
    pub first_token_ms: Option<f64>,
    /// Milliseconds per further token.
    pub token_ms: Option<f64>,
    /// Factor by which a step of the target takes longer while a drafter is busy: above 1 they share a device.
    pub slowdown: f64,
    /// Expected speed relative to plain steps without a drafter, for that agreement and one completion at a time.
    pub expected_speed_up: Option<f64>,
    /// Whether the target waits for its drafts at that speed.
    pub target_waits: bool,
    /// Whether it pauses while the target is in a step.
    pub drafter_rests: bool,
    /// Whether it is asked for drafts now. Otherwise it is retried now and then.
    pub pays: bool,
}

impl AdaptivePolicy {
    /// A policy with these constants that has measured nothing yet.
    #[must_use]
    pub fn new(tuning: Tuning) -> Self {
        Self {
            step_cost: StepCost::default(),
            last_pass: None,
            overruns: [1.0; 2],
            copy_acceptance: Default::default(),
            prediction_acceptance: Default::default(),
            drafters: Vec::new(),
            round_trip_us: MovingAverage::default(),
            recent_tokens: 0.0,
            recent_us: 0.0,
            steps_since_draft: 0,
            probe_interval: tuning.min_probe_interval,
            tuning,
        }
    }

    /// Records a step of the target and for what share of it, 0 to 1, each drafter was busy.
    pub fn record_step(&mut self, step: &StepSample, busy_shares: &[f64]) {
        // A token costs the same whichever completion brings it.
        let further_tokens = step.batch.max(1 + step.drafted) - 1;
        if further_tokens < self.tuning.max_decode_batch {
            self.record_pass(further_tokens, step, busy_shares);
        }
        // A pause of the client or of the machine is not part of the step.
        let since_last = micros(step.since_last).min(self.tuning.max_counted_pause * micros(step.duration));
        self.recent_tokens = self.tuning.throughput_decay * self.recent_tokens + 1.0 + step.accepted as f64;
        self.recent_us = self.tuning.throughput_decay * self.recent_us + since_last.max(micros(step.duration));
        if step.drafted == 0 {
            self.steps_since_draft = self.steps_since_draft.saturating_add(1);
        } else if std::mem::take(&mut self.steps_since_draft) >= self.probe_interval {
            self.probe_interval = (2 * self.probe_interval).min(self.tuning.max_probe_interval);
        } else {
            self.probe_interval = self.tuning.min_probe_interval;
        }
        for drafter in &mut self.drafters {
            drafter.steps_since_asked = drafter.steps_since_asked.saturating_add(1);
        }
    }

    fn record_pass(&mut self, further_tokens: usize, step: &StepSample, busy_shares: &[f64]) {
        let us = micros(step.duration);
        let expected_us = self.step_cost.us(further_tokens, &self.tuning);
        let expected_us = expected_us.map(|us| self.current_slowdown() * us);
        self.overruns = [
            self.overruns[1],
            expected_us.map_or(1.0, |expected_us| us / expected_us),
        ];
        let adjacent = step.since_last < self.tuning.max_step_gap * step.duration;
        let before = self.last_pass.take().filter(|_| adjacent);
        self.last_pass = self
            .step_cost
            .measured_us(further_tokens)
            .map(|expected_us| PassSample {
                overrun: us / expected_us,
                busy_shares: busy_shares.to_vec(),
            });
        if let Some(pass) = self.last_pass.clone() {
            for drafter in 0..busy_shares.len() {
                let (stats, tuning) = self.drafter(drafter);
                stats.slowdown.record(drafter, before.as_ref(), &pass, tuning);
            }
        }
        let slowdowns = self.drafters.iter().zip(busy_shares);
        let slowdown: f64 = slowdowns
            .map(|(drafter, share)| drafter.slowdown.at_share(*share, &self.tuning))
            .product();
        let undisturbed = |pass: &PassSample| pass.is_undisturbed(&self.tuning);
        if slowdown <= 1.0 || self.last_pass.as_ref().is_none_or(undisturbed) {
            self.step_cost.record(further_tokens, us / slowdown, &self.tuning);
        } else {
            self.step_cost.record_scale(further_tokens, us / slowdown, &self.tuning);
        }
    }

    /// Factor by which a step takes longer while all drafters are as busy as lately.
    fn current_slowdown(&self) -> f64 {
        self.drafters
            .iter()
            .map(|drafter| drafter.slowdown.current(&self.tuning))
            .product()
    }

    /// Replaces the costs of steps by measurements: pairs of draft tokens and duration.
    pub fn calibrate(&mut self, costs: impl IntoIterator<Item = (usize, Duration)>) {
        self.step_cost = StepCost::default();
        self.last_pass = None;
        self.overruns = [1.0; 2];
        for (n, duration) in costs {
            self.step_cost.record(n, micros(duration), &self.tuning);
        }
    }

    /// Sets the factor by which steps take longer while this drafter is busy.
    pub fn calibrate_slowdown(&mut self, drafter: usize, factor: f64) {
        let (stats, tuning) = self.drafter(drafter);
        stats.slowdown.calibrate(factor, tuning);
    }

    /// Records the round trip of a call to the target.
    pub fn record_round_trip(&mut self, duration: Duration) {
        self.round_trip_us.record(micros(duration), &self.tuning);
    }

    /// Average round trip to the target.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        Duration::from_secs_f64(self.round_trip_us.get().unwrap_or_default() / 1e6)
    }

    /// Records the time to the first token of a drafter's stream, and whether the target waited meanwhile.
    pub fn record_first_token(&mut self, drafter: usize, latency: Duration, target_waits: bool) {
        let (stats, tuning) = self.drafter(drafter);
        let timing = stats.timing_mut(target_waits);
        timing.first_us.record(micros(latency), tuning);
    }

    /// Records that a stream was stopped before its first token, which therefore takes at least this long.
    pub fn record_silence(&mut self, drafter: usize, silent_for: Duration, target_waits: bool) {
        let (stats, tuning) = self.drafter(drafter);
        let first_us = &mut stats.timing_mut(target_waits).first_us;
        if first_us.get().is_none_or(|average| micros(silent_for) > average) {
            first_us.record(micros(silent_for), tuning);
        }
    }

    /// Records that `n` further tokens of a stream took `duration`, and whether the target waited meanwhile.
    pub fn record_tokens(&mut self, drafter: usize, n: usize, duration: Duration, target_waits: bool) {
        if n > 0 {
            let (stats, tuning) = self.drafter(drafter);
            let timing = stats.timing_mut(target_waits);
            timing.token_us.record(micros(duration) / n as f64, tuning);
        }
    }

    /// Expected time of one token of a drafter while the target is in a step.
    #[must_use]
    pub fn token_time(&self, drafter: usize) -> Duration {
        let drafter = self.drafters.get(drafter);
        let us = drafter.and_then(|drafter| drafter.timing(false, &self.tuning).token_us.get());
        Duration::from_secs_f64(us.unwrap_or_default() / 1e6)
    }

    /// Expected time of a draft of `n` tokens while the target is in a step; `None` before it was measured.
    #[must_use]
    pub fn draft_time(&self, drafter: usize, n: usize) -> Option<Duration> {
        let timing = self.drafters.get(drafter)?.timing(false, &self.tuning);
        let us = timing.first_us.get()? + n.saturating_sub(1) as f64 * timing.token_us.get()?;
        Duration::try_from_secs_f64(us / 1e6).ok()
    }

    /// Whether this drafter makes the target faster; true while the target was not measured.
    #[must_use]
    pub fn pays(&self, drafter: usize, n_max: usize, load: ConcurrentLoad, round_trip: Duration) -> bool {
        let estimate = self.best_schedule(drafter, n_max, load, round_trip);
        estimate.is_none_or(|estimate| estimate.speed_up() > 1.0)
    }

    /// The best schedule with this drafter; `None` while the target was not measured.
    fn best_schedule(
        &self,
        drafter: usize,
        n_max: usize,
        load: ConcurrentLoad,
        round_trip: Duration,
    ) -> Option<ScheduleEstimate> {
        let cost_model = self.cost_model(load)?;
        let profile = match self.drafters.get(drafter) {
            Some(drafter) => drafter.profile(round_trip, &self.tuning),
            None => DrafterStats::new(&self.tuning).profile(round_trip, &self.tuning),
        };
        Some(cost_model.best_schedule(profile, n_max))
    }

    /// Summary of a drafter; `None` before it or the target was measured.
    #[must_use]
    pub fn outlook(&self, number: usize, n_max: usize) -> Option<DrafterOutlook> {
        let drafter = self.drafters.get(number)?;
        let cost_model = self.cost_model(ConcurrentLoad::default())?;
        let agreement = drafter.agreement();
        let profile = drafter.profile(self.round_trip(), &self.tuning);
        let estimate =
            agreement.map(|acceptance| cost_model.best_schedule(DrafterProfile { acceptance, ..profile }, n_max));
        let schedule = estimate.map(|estimate| estimate.schedule);
        let target_waits = schedule.is_some_and(|schedule| schedule.waits_for().is_some());
        let timing = if target_waits {
            [drafter.waiting, drafter.stepping]
        } else {
            [drafter.stepping, drafter.waiting]
        };
        let ms = |us: fn(&DrafterTiming) -> MovingAverage| {
            timing.iter().find_map(|timing| us(timing).get()).map(|us| us / 1e3)
        };
        Some(DrafterOutlook {
            agreement,
            first_token_ms: ms(|timing| timing.first_us),
            token_ms: ms(|timing| timing.token_us),
            slowdown: drafter.slowdown.factor(&self.tuning),
            expected_speed_up: estimate.map(ScheduleEstimate::speed_up),
            target_waits,
            drafter_rests: matches!(schedule, Some(DraftSchedule::Alternate { .. })),
            pays: self.pays(number, n_max, ConcurrentLoad::default(), self.round_trip()),
        })
    }

    /// Duration of a step without a draft and with no drafter at work; `None` before any was measured.
    #[must_use]
    pub fn plain_step(&self) -> Option<Duration> {
        Duration::try_from_secs_f64(self.step_cost.us(0, &self.tuning)? / 1e6).ok()
    }

    /// Milliseconds per step by number of draft tokens, for the sizes that were measured.
    #[must_use]
    pub fn step_costs(&self) -> BTreeMap<usize, f64> {
        self.step_cost.measured().map(|(n, us)| (n, us / 1e3)).collect()
    }

    fn drafter(&mut self, number: usize) -> (&mut DrafterStats, &Tuning) {
        let tuning = &self.tuning;
        if self.drafters.len() <= number {
            self.drafters.resize_with(number + 1, || DrafterStats::new(tuning));
        }
        (&mut self.drafters[number], tuning)
    }

    /// Measurements of the source that would extend the draft: the running stream, else the source of its first token, else an idle
    /// drafter.
    fn profile(&self, draft: &[TokenClass], context: &StepContext) -> Option<DrafterProfile> {
        let running = context.pending.map(|pending| TokenSource::Drafter(pending.drafter));
        let source = draft.first().map(|class| class.source);
        match running.or(source).or(context.idle_drafter.map(TokenSource::Drafter))? {
            TokenSource::Drafter(number) => {
                let drafter = self.drafters.get(number)?;
                Some(drafter.profile(context.round_trip, &self.tuning))
            }
            TokenSource::Copy | TokenSource::Prediction => {
                let latency = DraftLatency {
                    first_us: micros(context.round_trip),
                    token_us: 0.0,
                };
                Some(DrafterProfile {
                    acceptance: draft.first().map_or(0.0, |class| self.acceptance(*class)),
                    waiting: latency,
                    stepping: latency,
                    slowdown: 1.0,
                })
            }
        }
    }

    fn acceptance(&self, class: TokenClass) -> f64 {
        let rate = match class.source {
            TokenSource::Copy => self.copy_acceptance[class.bucket],
            TokenSource::Prediction => self.prediction_acceptance[class.bucket],
            TokenSource::Drafter(number) => {
                let drafter = self.drafters.get(number);
                drafter
                    .map(|drafter| drafter.acceptance[class.bucket])
                    .unwrap_or_default()
            }
        };
        rate.estimate(class.prior(&self.tuning), &self.tuning)
    }

    fn cost_model(&self, load: ConcurrentLoad) -> Option<CostModel<'_>> {
        let slowdown = self.current_slowdown();
        let plain_us = slowdown * self.step_cost.us(load.tokens, &self.tuning)?;
        // A lower bound of the throughput: plain decoding. Drafts of other completions must not be a reason to draft.
        let plain_batch_us = self.step_cost.us(load.completions, &self.tuning)?;
        let current = if self.recent_us > 0.0 {
            self.recent_tokens / self.recent_us
        } else {
            0.0
        };
        Some(CostModel {
            tuning: &self.tuning,
            step_cost: &self.step_cost,
            slowdown,
            load,
            plain_us,
            rate: current.max(1.0 / plain_batch_us) * (load.completions + 1) as f64,
        })
    }
}

impl Policy for AdaptivePolicy {
    fn observe(&mut self, class: TokenClass, accepted: bool) {
        match class.source {
            TokenSource::Copy => self.copy_acceptance[class.bucket].record(accepted, &self.tuning),
            TokenSource::Prediction => self.prediction_acceptance[class.bucket].record(accepted, &self.tuning),
            TokenSource::Drafter(number) => {
                let (drafter, tuning) = self.drafter(number);
                drafter.acceptance[class.bucket].record(accepted, tuning);
                drafter.mean_acceptance.record(accepted, tuning);
                drafter.n_compared = drafter.n_compared.saturating_add(1);
                drafter.n_agreed = drafter.n_agreed.saturating_add(u32::from(accepted));
            }
        }
    }

    fn draft_limit(
        &mut self,
        drafter: usize,
        target_waits: bool,
        n_max: usize,
        load: ConcurrentLoad,
        round_trip: Duration,
    ) -> usize {
        let estimate = self.best_schedule(drafter, n_max, load, round_trip);
        let (drafter, tuning) = self.drafter(drafter);
        let lookahead = max_lookahead(n_max);
        let reprobe = drafter.slowdown.reprobe(tuning);
        let useful = estimate.filter(|estimate| estimate.speed_up() > 1.0);
        let limit = match useful.map(|estimate| estimate.schedule) {
            Some(_) if reprobe == Some(ReprobeKind::Alone) => return 0,
            Some(DraftSchedule::Alternate { n }) if reprobe.is_none() => usize::from(target_waits) * n,
            Some(_) => lookahead,
            None if estimate.is_none() => lookahead,
            None if drafter.steps_since_asked >= drafter.retry_interval => {
                drafter.retry_interval = (2 * drafter.retry_interval).min(tuning.max_retry_interval);
                drafter.steps_since_asked = 0;
                return tuning.retry_tokens.min(lookahead);
            }
            None => return 0,
        };
        drafter.retry_interval = tuning.min_retry_interval;
        drafter.steps_since_asked = 0;
        limit
    }

    fn prefix_acceptance(&self, draft: &[TokenClass]) -> f64 {
        draft.iter().map(|class| self.acceptance(*class)).product()
    }

    fn step_us(&self, n: usize, load: ConcurrentLoad) -> Option<f64> {
        // The cost model follows slowly. If two steps in a row overran, or both ended early, the next one will too.
        let [before, last] = self.overruns;
        let overrun = before.min(last).max(before.max(last).min(1.0));
        Some(overrun * self.current_slowdown() * self.step_cost.us(load.tokens + n, &self.tuning)?)
    }

    fn choose(&self, draft: &[TokenClass], context: &StepContext) -> StepPlan {
        let draft = &draft[..draft.len().min(context.n_max)];
        let Some(cost_model) = self.cost_model(context.load) else {
            return StepPlan {
                n: draft.len().min(self.tuning.initial_offer),
                ..StepPlan::default()
            };
        };
        let profile = self.profile(draft, context);
        let schedule = profile.map_or(DraftSchedule::Plain, |profile| {
            cost_model.best_schedule(profile, context.n_max).schedule
        });
        let drafter = context.pending.map(|pending| pending.drafter).or(context.idle_drafter);
        let reprobe = drafter.and_then(|number| self.drafters.get(number)?.slowdown.reprobe(&self.tuning));
        let pause_drafter = reprobe == Some(ReprobeKind::Alone)
            || reprobe.is_none() && matches!(schedule, DraftSchedule::Alternate { .. });
        let step_us = |n| cost_model.step_us(n, pause_drafter);
        let value = |expected: f64, n| expected - cost_model.rate * step_us(n);
        let mut plan = StepPlan {
            value: value(1.0, 0),
            pause_drafter,
            ..StepPlan::default()
        };
        if reprobe == Some(ReprobeKind::Alone) && schedule != DraftSchedule::Plain {
            return plan;
        }
        let (mut prefix_acceptance, mut expected) = (1.0, 1.0);
        // The draft with the most tokens per microsecond, in case that none pays.
        let mut probe = (0, 0.0);
        for (i, class) in draft.iter().enumerate() {
            prefix_acceptance *= self.acceptance(*class);
            expected += prefix_acceptance;
            let value = value(expected, i + 1);
            if value > plan.value {
                (plan.n, plan.value) = (i + 1, value);
            }
            let rate = expected / step_us(i + 1);
            if rate > probe.1 {
                probe = (i + 1, rate);
            }
        }
        let probe_due = self.steps_since_draft >= self.probe_interval;
        if plan.n == 0 && probe_due && expected >= self.tuning.min_probe_yield {
            // Verify it to measure its cost again.
            plan.n = probe.0;
            return plan;
        }
        if let Some(enough) = schedule.waits_for() {
            // A paused drafter has nothing for a target that does not wait.
            let slack_us = if pause_drafter {
                (self.tuning.slack_us).max(self.tuning.alternate_slack * cost_model.plain_us)
            } else {
                self.tuning.slack_us
            };
            plan.hold_us = whole(self.tuning.hold_round_trips * micros(context.round_trip) + slack_us);
            if let Some(pending) = context.pending
                && let Some(drafter) = self.drafters.get(pending.drafter)
            {
                let candidate = WaitCandidate {
                    timing: drafter.timing(context.busy_us <= 0.0, &self.tuning),
                    acceptance: drafter
                        .mean_acceptance
                        .estimate(self.tuning.undrafted_prior, &self.tuning),
                    started: pending.started,
                    silent_us: micros(pending.silent_for),
                    lengths: draft.len()..enough,
                    drafter_pauses: pause_drafter,
                };
                cost_model.consider_wait(&candidate, (prefix_acceptance, expected), context.busy_us, &mut plan);
            }
        }
        plan
    }

    fn tuning(&self) -> &Tuning {
        &self.tuning
    }
}

#[cfg(test)]
mod tests;
