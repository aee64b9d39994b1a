//! Whether the target has anything to do for the proxy's clients.

use tokio::sync::watch as channel;

/// The requests that the target has.
#[derive(Debug, Clone, Default)]
pub struct InFlightRequests(channel::Sender<InFlightState>);

#[derive(Debug, Clone, Copy, Default)]
struct InFlightState {
    running: usize,
    /// How often one has begun or ended.
    changes: u64,
}

/// A request that the target has until this is dropped.
#[derive(Debug)]
pub struct RequestGuard(InFlightRequests);

impl InFlightRequests {
    /// The target gets a request.
    #[must_use]
    pub fn begin(&self) -> RequestGuard {
        self.0.send_modify(|requests| {
            requests.running += 1;
            requests.changes += 1;
        });
        RequestGuard(self.clone())
    }

    /// Waits until the target has a request, or has had one since `changes`, and returns how often that has changed.
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
