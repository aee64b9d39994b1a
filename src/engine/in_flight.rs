//! Requests that the target is working on for the proxy's clients.
//!
//! The proxy holds a [`RequestGuard`] per request; the stall check of the watcher waits here until there is one.

use tokio::sync::watch as channel;

/// Counts the requests in flight.
#[derive(Debug, Clone, Default)]
pub struct InFlightRequests(channel::Sender<InFlightState>);

#[derive(Debug, Clone, Copy, Default)]
struct InFlightState {
    running: usize,
    /// Number of requests that started or ended so far.
    changes: u64,
}

/// In-flight guard; counts until dropped.
#[derive(Debug)]
pub struct RequestGuard(InFlightRequests);

impl InFlightRequests {
    /// Counts a request until the guard is dropped.
    #[must_use]
    pub fn begin(&self) -> RequestGuard {
        self.0.send_modify(|requests| {
            requests.running += 1;
            requests.changes += 1;
        });
        RequestGuard(self.clone())
    }

    /// Waits until a request is in flight or the count differs from `changes`; returns the new count.
    pub async fn since(&self, changes: u64) -> u64 {
        let mut requests = self.0.subscribe();
        let busy = requests.wait_for(|requests| requests.running > 0 || requests.changes != changes);
        // The sender lives in `self`.
        busy.await.map_or(changes, |requests| requests.changes)
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.0.send_modify(|requests| {
            requests.running -= 1;
            requests.changes += 1;
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_target_is_busy_with_a_request_and_once_more_when_that_has_ended() {
        let in_flight = InFlightRequests::default();
        let busy = async |changes| timeout(Duration::from_millis(50), in_flight.since(changes)).await.ok();
        assert_eq!(busy(0).await, None);
        let request = in_flight.begin();
        assert_eq!(busy(0).await, Some(1));
        assert_eq!(busy(1).await, Some(1));
        drop(request);
        assert_eq!(busy(1).await, Some(2));
        assert_eq!(busy(2).await, None);
    }
}
