//! Measures how long a drafter is busy, over all completions that it drafts for.
//!
//! Overlapping drafts count once. A stream holds a [`BusyGuard`]; the attach loop reads the clock at each step of the target to
//! learn what share of the step the drafter was busy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A clock that runs while the drafter is busy.
#[derive(Debug, Clone, Default)]
pub struct BusyClock(Arc<Mutex<BusyState>>);

#[derive(Debug, Default)]
struct BusyState {
    works: usize,
    since: Option<Instant>,
    before: Duration,
}

/// Keeps the clock running until it is dropped.
#[derive(Debug)]
pub struct BusyGuard {
    busy_clock: BusyClock,
    /// Time since the drafter finished.
    done: Duration,
}

impl BusyGuard {
    /// Stops the clock as if the drafter had finished `ago` before now.
    pub fn ended(mut self, ago: Duration) {
        self.done = ago;
    }

    /// Stops the clock after half of `time`, the average rest of a token that takes `time`. Must be called within a tokio
    /// runtime.
    pub fn ends_within(self, time: Duration) {
        tokio::spawn(async move {
            tokio::time::sleep(time / 2).await;
            drop(self);
        });
    }
}

impl BusyClock {
    /// Starts a piece of work.
    #[must_use]
    pub fn begin(&self) -> BusyGuard {
        let mut clock = self.0.lock();
        clock.works += 1;
        clock.since.get_or_insert_with(Instant::now);
        drop(clock);
        BusyGuard {
            busy_clock: self.clone(),
            done: Duration::ZERO,
        }
    }

    /// Total time during which the drafter was busy.
    #[must_use]
    pub fn total(&self) -> Duration {
        let clock = self.0.lock();
        clock.before + clock.since.map(|since| since.elapsed()).unwrap_or_default()
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        let mut clock = self.busy_clock.0.lock();
        clock.works -= 1;
        if clock.works == 0
            && let Some(since) = clock.since.take()
        {
            clock.before += since.elapsed().saturating_sub(self.done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_while_anybody_works_and_counts_no_time_twice() {
        let busy_clock = BusyClock::default();
        assert_eq!(busy_clock.total(), Duration::ZERO);
        let began = Instant::now();
        let (one, two) = (busy_clock.begin(), busy_clock.begin());
        std::thread::sleep(Duration::from_millis(5));
        drop(one);
        let halfway = busy_clock.total();
        assert!(halfway >= Duration::from_millis(5));
        std::thread::sleep(Duration::from_millis(5));
        drop(two);
        let total = busy_clock.total();
        assert!(total >= halfway + Duration::from_millis(5) && total <= began.elapsed());
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(busy_clock.total(), total);
        let late = busy_clock.begin();
        std::thread::sleep(Duration::from_millis(20));
        late.ended(Duration::from_millis(15));
        let more = busy_clock.total().saturating_sub(total);
        assert!(more >= Duration::from_millis(5), "{more:?}");
        assert!(more + Duration::from_millis(30) <= began.elapsed(), "{more:?}");
    }
}
