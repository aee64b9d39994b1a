//! A drafter in one completion: its stream, its slot, and the time of its next retry.

use std::time::Duration;

use futures_util::future::OptionFuture;
use tokio::time::{Instant, sleep_until};

use super::draft_server::DraftServer;
use super::draft_stream::{DrafterStream, StreamItem};
use super::slots::SlotLease;
use super::watch::{ConfiguredServer, DraftProtocol};
use crate::speculation::Token;
use crate::upstream::LlamaServer;

/// A stream that is silent for longer has failed.
pub(super) const DRAFTER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses after a failure, from the first to the last, doubling.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A drafter in one completion.
pub(super) struct SessionDrafter {
    pub(super) server: ConfiguredServer,
    /// How it is asked for drafts.
    pub(super) protocol: Option<(DraftProtocol, DraftServer)>,
    pub(super) stream: Option<DrafterStream>,
    pub(super) lease: Option<SlotLease>,
    /// Whether the session counts it as available.
    pub(super) available: bool,
    back_off: Duration,
    /// When it is tried again after a failure.
    pub(super) retry_at: Option<Instant>,
}

impl SessionDrafter {
    pub(super) fn new(server: ConfiguredServer) -> Self {
        Self {
            server,
            protocol: None,
            stream: None,
            lease: None,
            available: false,
            back_off: BACK_OFF.0,
            retry_at: None,
        }
    }

    /// Sets the protocol for the next drafts.
    pub(super) fn set_protocol(&mut self, protocol: DraftProtocol, target: &LlamaServer) {
        if self.protocol.as_ref().is_some_and(|(current, _)| *current == protocol) {
            return;
        }
        let server = DraftServer::new(&self.server, &protocol, target);
        self.protocol = Some((protocol, server));
    }

    /// Whether the target knows a token of its drafts.
    pub(super) fn is_known(&self, token: Token) -> bool {
        self.protocol
            .as_ref()
            .is_some_and(|(protocol, _)| protocol.knows(token))
    }

    /// Resets the back-off after a token arrived.
    pub(super) fn succeeded(&mut self) {
        self.back_off = BACK_OFF.0;
    }

    /// Schedules a retry, later after each failure in a row.
    pub(super) fn failed(&mut self) {
        self.retry_at = Some(Instant::now() + self.back_off);
        self.back_off = (2 * self.back_off).min(BACK_OFF.1);
    }

    /// Waits for the next event.
    pub(super) async fn next(&mut self) -> DrafterEvent {
        if let Some(stream) = &mut self.stream {
            stream.rested().await;
        }
        let silent_at = self
            .stream
            .as_ref()
            .map(|stream| Instant::now() - stream.silent() + DRAFTER_TIMEOUT);
        tokio::select! {
            // Pieces that arrived count, however long ago the last one was read.
            biased;
            Some(pieces) = OptionFuture::from(self.stream.as_mut().map(DrafterStream::next)) => DrafterEvent::Pieces(pieces),
            () = sleep_until(silent_at.unwrap_or_else(Instant::now)), if silent_at.is_some() => DrafterEvent::Silent,
            () = sleep_until(self.retry_at.unwrap_or_else(Instant::now)), if self.retry_at.is_some() => DrafterEvent::RetryDue,
            else => std::future::pending().await,
        }
    }
}

/// An event of a drafter.
pub(super) enum DrafterEvent {
    Pieces(Vec<StreamItem>),
    /// Its stream was silent for longer than [`DRAFTER_TIMEOUT`].
    Silent,
    /// It may be tried again.
    RetryDue,
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use futures_util::future::join_all;
    use futures_util::stream;

    use super::super::busy_clock::BusyClock;
    use super::*;
    use crate::config::Upstream;
    use crate::upstream::DraftPiece;

    #[tokio::test]
    async fn a_drafter_that_was_left_alone_for_long_is_heard_before_it_is_taken_for_silent() {
        let url = "http://127.0.0.1:1";
        let spoke = || async {
            let mut drafter = SessionDrafter::new(ConfiguredServer {
                config: Upstream::at(url),
                client: LlamaServer::new(url, None).unwrap(),
                text: None,
            });
            let said = stream::iter([Ok(DraftPiece::Tokens(vec![(7, None)]))]).boxed();
            let mut left_alone = DrafterStream::new(1, said, BusyClock::default().begin());
            left_alone.rest(DRAFTER_TIMEOUT + Duration::from_millis(50));
            drafter.stream = Some(left_alone);
            matches!(drafter.next().await, DrafterEvent::Pieces(_))
        };
        let spoke = join_all(std::iter::repeat_with(spoke).take(20)).await;
        assert!(spoke.iter().all(|spoke| *spoke), "{spoke:?}");
    }
}
