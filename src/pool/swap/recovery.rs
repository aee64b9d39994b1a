//! What follows a failure: the same model again after a pause, or the one before it.

use std::time::{Duration, Instant};

use super::event::{Action, Failure, Unready};
use super::queue::Waiter;
use super::snapshot::Failed;
use super::{Phase, Swap};
use crate::supervise::restart::{self, Decision, Restarts};

/// Longest pause before workers are asked again that were not ready: nobody tells when one without an agent returns.
pub(super) const UNREADY_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause before a start after a worker was lost: whoever returns should be used soon.
pub(super) const LOST_PAUSE: Duration = Duration::from_secs(4);
/// Longest pause before a start after any other death.
pub(super) const DEATH_PAUSE: Duration = Duration::from_secs(10);
/// Pause after what may go better some day and did not go better for several starts.
pub(super) const GAVE_UP_PAUSE: Duration = Duration::from_secs(60);
/// How long a model whose workers are not ready is tried before the one before it comes back: the memory of that one may
/// be free only some seconds after its end.
pub(super) const SWAP_PATIENCE: Duration = Duration::from_secs(30);
/// There is one coordinator, so that nobody could start in step with it.
pub(super) const JITTER: f64 = 1.0;

impl Swap {
    /// What was in the way may be so no longer.
    pub(super) fn try_now(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Down { .. }) {
            self.down(Some(now), false);
            self.restarts = Restarts::default();
            self.setbacks = 0;
        }
    }

    /// Pause after another try that workers brought to nothing.
    fn set_back(&mut self, longest: Duration) -> Duration {
        self.setbacks = self.setbacks.saturating_add(1);
        restart::pause(self.setbacks, JITTER).min(longest)
    }

    pub(super) fn unready(&mut self, now: Instant, unready: Unready, actions: &mut Vec<Action>) {
        match unready {
            Unready::Yet(why) => {
                let retry = Some(now + self.set_back(UNREADY_PAUSE));
                let since = *self.unready_since.get_or_insert(now);
                if self.before.is_some() && now < since + SWAP_PATIENCE {
                    self.problem = Some(why);
                    self.down(retry, false);
                } else {
                    self.fall(now, why, retry, false, actions);
                }
            }
            Unready::Ever(why) => self.fall(now, why, None, true, actions),
        }
    }

    pub(super) fn recover(
        &mut self,
        now: Instant,
        failure: Failure,
        ready: Option<Duration>,
        actions: &mut Vec<Action>,
    ) {
        // However often workers are lost, the model is none the worse for it.
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

    /// `model` failed: the one before it comes back, or the next try is at `retry`.
    fn fall(&mut self, now: Instant, why: String, retry: Option<Instant>, gave_up: bool, actions: &mut Vec<Action>) {
        let failed = self.model.clone();
        let wants = |waiter: &Waiter| waiter.model.as_ref() == Some(&failed);
        if let Some(before) = self.before.take() {
            self.refuse_all(actions, &why, wants, &failed);
            self.last_failure = Some(Failed { model: failed, why });
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

    /// Nothing is held against another model.
    pub(super) fn begin_anew(&mut self) {
        self.restarts = Restarts::default();
        self.setbacks = 0;
        self.unready_since = None;
    }
}
