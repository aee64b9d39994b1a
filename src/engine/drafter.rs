//! A drafter of one completion: its stream, its slot, and when it may be asked.

use std::time::Duration;

use futures_util::future::OptionFuture;
use tokio::time::{Instant, sleep_until};

use super::draft_server::DraftServer;
use super::draft_stream::{Piece, Stream};
use super::slots::Lease;
use super::watch::{Language, Server};
use crate::speculation::Token;
use crate::upstream::LlamaServer;

/// A stream of the drafter that is silent for longer has failed.
pub(super) const DRAFTER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses after a failure, from the first to the last, doubling.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A drafter, as one completion has it.
pub(super) struct Drafter {
    pub(super) server: Server,
    /// As it is talked to.
    pub(super) spoken: Option<(Language, DraftServer)>,
    pub(super) stream: Option<Stream>,
    pub(super) lease: Option<Lease>,
    /// What the session was last told of it.
    pub(super) available: bool,
    back_off: Duration,
    /// When it is tried again after a failure.
    pub(super) retry_at: Option<Instant>,
}

impl Drafter {
    pub(super) fn new(server: Server) -> Self {
        Self {
            server,
            spoken: None,
            stream: None,
            lease: None,
            available: false,
            back_off: BACK_OFF.0,
            retry_at: None,
        }
    }

    /// Talks to it in this language from now on.
    pub(super) fn speak(&mut self, language: Language, target: &LlamaServer) {
        if self.spoken.as_ref().is_some_and(|(spoken, _)| *spoken == language) {
            return;
        }
        let server = DraftServer::new(&self.server, &language, target);
        self.spoken = Some((language, server));
    }

    /// Whether the target knows a token of its drafts.
    pub(super) fn is_known(&self, token: Token) -> bool {
        self.spoken.as_ref().is_some_and(|(language, _)| language.knows(token))
    }

    /// It has said something.
    pub(super) fn works(&mut self) {
        self.back_off = BACK_OFF.0;
    }

    /// It is left alone for a while, longer each time.
    pub(super) fn failed(&mut self) {
        self.retry_at = Some(Instant::now() + self.back_off);
        self.back_off = (2 * self.back_off).min(BACK_OFF.1);
    }

    /// What it does next.
    pub(super) async fn next(&mut self) -> Drafted {
        if let Some(stream) = &mut self.stream {
            stream.rested().await;
        }
        let silent_at = self
            .stream
            .as_ref()
            .map(|stream| Instant::now() - stream.silent() + DRAFTER_TIMEOUT);
        tokio::select! {
            // What has come counts, however long ago the last piece was heard.
            biased;
            Some(pieces) = OptionFuture::from(self.stream.as_mut().map(Stream::next)) => Drafted::Pieces(pieces),
            () = sleep_until(silent_at.unwrap_or_else(Instant::now)), if silent_at.is_some() => Drafted::Silence,
            () = sleep_until(self.retry_at.unwrap_or_else(Instant::now)), if self.retry_at.is_some() => Drafted::Rested,
            else => std::future::pending().await,
        }
    }
}

/// What a drafter did.
pub(super) enum Drafted {
    Pieces(Vec<Piece>),
    /// Its stream was silent for too long.
    Silence,
    /// It may be tried again.
    Rested,
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use futures_util::future::join_all;
    use futures_util::stream;

    use super::super::busy_clock::Activity;
    use super::*;
    use crate::config::Upstream;
    use crate::upstream::DraftPiece;

    #[tokio::test]
    async fn a_drafter_that_was_left_alone_for_long_is_heard_before_it_is_taken_for_silent() {
        let url = "http://127.0.0.1:1";
        let spoke = || async {
            let mut drafter = Drafter::new(Server {
                config: Upstream::at(url),
                client: LlamaServer::new(url, None).unwrap(),
                text: None,
            });
            let said = stream::iter([Ok(DraftPiece::Tokens(vec![(7, None)]))]).boxed();
            let mut left_alone = Stream::new(1, said, Activity::default().begin());
            left_alone.rest(DRAFTER_TIMEOUT + Duration::from_millis(50));
            drafter.stream = Some(left_alone);
            matches!(drafter.next().await, Drafted::Pieces(_))
        };
        let spoke = join_all(std::iter::repeat_with(spoke).take(20)).await;
        assert!(spoke.iter().all(|spoke| *spoke), "{spoke:?}");
    }
}
