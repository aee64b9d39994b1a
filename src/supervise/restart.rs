//! Decides whether and when a dead child is started again. Pure.
//!
//! Pauses grow exponentially up to [`LONGEST_PAUSE`]. A child that never became ready is given up after [`MOST_FAILED_STARTS`] starts;
//! one that was ready once is never given up.

use std::time::Duration;

/// Pause after the first death; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// After this time in the ready state, the next death counts as the first again.
const STABLE: Duration = Duration::from_secs(60);
/// Failed starts in a row after which a child is given up.
pub const MOST_FAILED_STARTS: u32 = 5;

/// Decision after a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Start again after this pause.
    Again(Duration),
    /// Starting again would not help.
    GiveUp,
}

/// Whether starting again may help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prospect {
    /// It may help.
    Open,
    /// It cannot help.
    Hopeless,
    /// It helps as soon as something missing appears, for example a device.
    Waits,
}

/// `Open` for a curable cause, `Hopeless` for any other.
impl From<bool> for Prospect {
    fn from(curable: bool) -> Self {
        if curable { Self::Open } else { Self::Hopeless }
    }
}

/// The deaths so far.
#[derive(Debug, Clone, Default)]
pub struct Restarts {
    deaths: u32,
    failed_starts: u32,
}

impl Restarts {
    /// Counts the death of a child that was ready for `ready`, or never if `None`. `jitter` is a random number from 0 to 1.
    pub fn died(&mut self, ready: Option<Duration>, prospect: Prospect, jitter: f64) -> Decision {
        if let Some(ready) = ready {
            self.failed_starts = 0;
            self.deaths = if ready >= STABLE {
                1
            } else {
                self.deaths.saturating_add(1)
            };
        } else {
            self.deaths = self.deaths.saturating_add(1);
            if prospect != Prospect::Waits {
                self.failed_starts += 1;
            }
            if prospect == Prospect::Hopeless || self.failed_starts >= MOST_FAILED_STARTS {
                return Decision::GiveUp;
            }
        }
        Decision::Again(pause(self.deaths, jitter))
    }
}

/// Pause after the `deaths`th death. It grows exponentially, and `jitter` shortens it by up to half, so that several supervisors do not
/// restart at the same time.
#[must_use]
pub fn pause(deaths: u32, jitter: f64) -> Duration {
    let doublings = deaths.saturating_sub(1).min(16);
    let full = (FIRST_PAUSE * 2_u32.pow(doublings)).min(LONGEST_PAUSE);
    full.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_pause_is_never_longer_than_the_longest_nor_shorter_than_half_of_the_first(deaths: u32, jitter in 0.0..=1.0) {
            let pause = pause(deaths, jitter);
            prop_assert!(pause <= LONGEST_PAUSE);
            prop_assert!(pause >= FIRST_PAUSE / 2);
        }

        #[test]
        fn pauses_grow_with_the_deaths(deaths in 0_u32..1000, jitter in 0.0..=1.0) {
            prop_assert!(pause(deaths + 1, jitter) >= pause(deaths, jitter));
        }

        #[test]
        fn a_child_that_never_becomes_ready_is_given_up_after_exactly_so_many_starts(jitter in 0.0..=1.0) {
            let mut restarts = Restarts::default();
            let starts = (1..100).find(|_| restarts.died(None, Prospect::Open, jitter) == Decision::GiveUp);
            prop_assert_eq!(starts, Some(MOST_FAILED_STARTS));
        }

        #[test]
        fn a_child_that_becomes_ready_is_never_given_up(lives in prop::collection::vec(0_u64..200, 1..50)) {
            let mut restarts = Restarts::default();
            for seconds in lives {
                let decision = restarts.died(Some(Duration::from_secs(seconds)), Prospect::Open, 0.5);
                prop_assert!(matches!(decision, Decision::Again(_)));
            }
        }

        #[test]
        fn after_a_stable_minute_the_pause_is_the_first_one_again(deaths in 1_u32..20) {
            let mut restarts = Restarts::default();
            for _ in 0..deaths {
                restarts.died(Some(Duration::ZERO), Prospect::Open, 1.0);
            }
            prop_assert_eq!(restarts.died(Some(STABLE), Prospect::Open, 1.0), Decision::Again(FIRST_PAUSE));
        }
    }

    #[test]
    fn a_start_that_waits_for_something_is_never_given_up() {
        let mut restarts = Restarts::default();
        for _ in 0..100 {
            assert!(matches!(restarts.died(None, Prospect::Waits, 0.5), Decision::Again(_)));
        }
    }

    #[test]
    fn a_start_that_cannot_go_better_is_given_up_at_once() {
        assert_eq!(
            Restarts::default().died(None, Prospect::Hopeless, 0.5),
            Decision::GiveUp
        );
    }
}
