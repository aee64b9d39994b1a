//! Recovery from a failure: the same model again after a pause, or the previous model.

use std::time::{Duration, Instant};

use super::event::{Action, Failure, NotReady};
use super::queue::Waiter;
use super::snapshot::FailedSwap;
use super::{Phase, Swap};
use crate::supervise::restart::{self, Decision, Restarts};

/// Longest pause before workers that were not ready are asked again. A worker without an agent does not announce itself.
pub(super) const NOT_READY_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause before a start after a worker was lost, so that a returning worker is used soon.
pub(super) const LOST_PAUSE: Duration = Duration::from_secs(4);
/// Longest pause before a start after any other death.
pub(super) const DEATH_PAUSE: Duration = Duration::from_secs(10);
/// Pause after several failed starts whose cause may go away.
pub(super) const GAVE_UP_PAUSE: Duration = Duration::from_secs(60);
/// How long a new model is tried while its workers are not ready, before the previous model comes back. The previous
/// model's memory may become free only some seconds after its end.
pub(super) const SWAP_TIMEOUT: Duration = Duration::from_secs(30);
/// No jitter: a pool has one coordinator, so no other starts in step with it.
pub(super) const JITTER: f64 = 1.0;

impl Swap {
    /// Tries again now: the cause of the failure may be gone.
    pub(super) fn try_now(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Down { .. }) {
            self.down(Some(now), false);
            self.restarts = Restarts::default();
            self.setbacks = 0;
        }
    }

    /// Counts another try that failed because of workers; returns the pause before the next.
    fn set_back(&mut self, longest: Duration) -> Duration {
        self.setbacks = self.setbacks.saturating_add(1);
        restart::pause(self.setbacks, JITTER).min(longest)
    }

    pub(super) fn not_ready(&mut self, now: Instant, not_ready: NotReady, actions: &mut Vec<Action>) {
        match not_ready {
            NotReady::Retryable(why) => {
                let retry = Some(now + self.set_back(NOT_READY_PAUSE));
                let since = *self.not_ready_since.get_or_insert(now);
                if self.before.is_some() && now < since + SWAP_TIMEOUT {
                    self.problem = Some(why);
                    self.down(retry, false);
                } else {
                    self.fall(now, why, retry, false, actions);
                }
            }
            NotReady::Permanent(why) => self.fall(now, why, None, true, actions),
        }
    }

    pub(super) fn recover(
        &mut self,
        now: Instant,
        failure: Failure,
        ready: Option<Duration>,
        actions: &mut Vec<Action>,
    ) {
        // Lost workers do not count against the model.
        let (retry, gave_up) = if failure.worker {
            (Some(now + self.set_back(LOST_PAUSE)), false)
        } else {
            match self.restarts.died(ready, failure.curable.into(), JITTER) {
                Decision::Again(pause) => (Some(now + pause.min(DEATH_PAUSE)), false),
                Decision::GiveUp if failure.curable => (Some(now + GAVE_UP_PAUSE), true),
                Decision::GiveUp => (None, true),
            }
        };
        self.fall(now, failure.why, retry, gave_up, actions);
    }

    /// `model` failed: return to the previous model, or try again at `retry`.
    fn fall(&mut self, now: Instant, why: String, retry: Option<Instant>, gave_up: bool, actions: &mut Vec<Action>) {
        let failed = self.model.clone();
        let wants = |waiter: &Waiter| waiter.model.as_ref() == Some(&failed);
        if let Some(before) = self.before.take() {
            self.refuse_all(actions, &why, wants, &failed);
            self.last_failure = Some(FailedSwap { model: failed, why });
            self.model = before;
            self.begin_anew();
            return self.down(Some(now), false);
        }
        if gave_up {
            self.refuse_all(actions, &why, |waiter| waiter.model.is_none() || wants(waiter), &failed);
        }
        self.problem = Some(why);
        self.down(retry, gave_up);
    }

    /// Resets the counts of failures, for another model.
    pub(super) fn begin_anew(&mut self) {
        self.restarts = Restarts::default();
        self.setbacks = 0;
        self.not_ready_since = None;
    }
}
