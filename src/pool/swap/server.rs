//! The steps of one server: take leases, start, stop, return leases.

use std::time::{Duration, Instant};

use super::event::{Action, NotReady};
use super::{Next, Phase, Swap};

impl Swap {
    /// How long the server has been ready: `None` without a server, `Some(None)` while it loads.
    #[expect(clippy::option_option, reason = "no server, one that loads, one that answers")]
    pub(super) fn alive(&self, now: Instant) -> Option<Option<Duration>> {
        match self.phase {
            Phase::Loading => Some(None),
            Phase::Ready { since } | Phase::Draining { since, .. } => Some(Some(now.duration_since(since))),
            _ => None,
        }
    }

    pub(super) fn stop(&mut self, next: Next, broken: bool, actions: &mut Vec<Action>) {
        self.phase = Phase::Stopping { next };
        self.check = None;
        actions.push(Action::Stop {
            epoch: self.epoch,
            broken,
        });
    }

    pub(super) fn free(&mut self, next: Next, actions: &mut Vec<Action>) {
        self.phase = Phase::Freeing { next };
        self.check = None;
        actions.push(Action::Free(self.epoch));
    }

    /// Stops leasing; `next` follows.
    pub(super) fn cancel_lease(&mut self, next: Next, actions: &mut Vec<Action>) {
        if let Phase::Leasing { cancelled } = &mut self.phase
            && cancelled.is_none()
        {
            *cancelled = Some(next);
            actions.push(Action::CancelLease(self.epoch));
        }
    }

    pub(super) fn leased(
        &mut self,
        now: Instant,
        result: Result<(), NotReady>,
        cancelled: Option<Next>,
        actions: &mut Vec<Action>,
    ) {
        match (result, cancelled) {
            (Ok(()), None) => {
                self.not_ready_since = None;
                self.phase = Phase::Loading;
                actions.push(Action::Start(self.epoch, self.model.clone()));
            }
            (Ok(()), Some(next)) => self.free(next, actions),
            (Err(_), Some(next)) => self.go_on(now, next, actions),
            (Err(not_ready), None) => self.not_ready(now, not_ready, actions),
        }
    }

    pub(super) fn stopped(&mut self, actions: &mut Vec<Action>) {
        if let Phase::Stopping { next } = &self.phase {
            let next = next.clone();
            self.free(next, actions);
        }
    }

    /// Takes the next step: nothing runs and nothing is leased.
    pub(super) fn go_on(&mut self, now: Instant, next: Next, actions: &mut Vec<Action>) {
        match next {
            Next::Start => self.down(Some(now), false),
            Next::Recover(failure, ready) => self.recover(now, failure, ready, actions),
            Next::Await(why) => self.not_ready(now, NotReady::Retryable(why), actions),
        }
    }

    pub(super) fn down(&mut self, retry: Option<Instant>, gave_up: bool) {
        self.phase = Phase::Down { retry, gave_up };
    }

    pub(super) fn lease(&mut self, actions: &mut Vec<Action>) {
        self.epoch += 1;
        self.phase = Phase::Leasing { cancelled: None };
        actions.push(Action::Lease(self.epoch, self.model.clone()));
    }
}
