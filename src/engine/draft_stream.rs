//! One stream of a drafter: what it says, and what that tells of how fast it is.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::FutureExt;
use futures_util::stream::Fuse;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};

use super::activity::Work;
use crate::upstream::{DraftPiece, DraftStream, UpstreamError};

/// Most pieces that are taken at once.
const PIECES: usize = 64;

/// What a stream says at a time.
pub(super) type Piece = Result<DraftPiece, UpstreamError>;

/// A running stream. To wake up for each of its tokens is most of what drafting costs the proxy, so it may be left alone for
/// a while.
pub(super) struct Stream {
    id: u64,
    pieces: Fuse<DraftStream>,
    /// Pieces that are not handled yet.
    come: Vec<Piece>,
    /// When the last token came, or the stream was begun.
    heard_at: Instant,
    /// When its first token came, and the number of all so far.
    first_at: Option<Instant>,
    n_tokens: usize,
    /// When it is looked at again.
    rests_until: Option<Instant>,
    /// What has come came some time ago.
    lay_around: bool,
    work: Work,
}

/// What tokens tell of how fast the drafter is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// How long the first one took.
    First(Duration),
    /// How long so many further ones took.
    Further(usize, Duration),
}

impl Stream {
    /// A stream of that name, which is what the drafter works at.
    pub(super) fn new(id: u64, pieces: DraftStream, work: Work) -> Self {
        Self {
            id,
            pieces: pieces.fuse(),
            come: Vec::new(),
            heard_at: Instant::now(),
            first_at: None,
            n_tokens: 0,
            rests_until: None,
            lay_around: false,
            work,
        }
    }

    /// Its name in the session's events.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Whether a token has come.
    pub(super) fn begun(&self) -> bool {
        self.first_at.is_some()
    }

    /// Since the last token came, or the stream was begun.
    pub(super) fn silent(&self) -> Duration {
        self.heard_at.elapsed()
    }

    /// Is left alone for so long.
    pub(super) fn rest(&mut self, time: Duration) {
        self.rests_until = (!time.is_zero()).then(|| Instant::now() + time);
    }

    /// Returns when it is not, or no more, to be left alone. It loses nothing when it is dropped.
    pub(super) async fn rested(&mut self) {
        if let Some(until) = self.rests_until {
            sleep_until(until).await;
            self.catch_up().await;
            self.rests_until = None;
            self.lay_around = !self.come.is_empty();
        }
    }

    /// Takes in what has come. A connection is a task of its own, which hands over its next event when one was taken.
    async fn catch_up(&mut self) {
        let mut before = usize::MAX;
        while before != self.come.len() && self.come.len() < PIECES {
            before = self.come.len();
            while let Some(Some(piece)) = self.pieces.next().now_or_never() {
                self.come.push(piece);
            }
            yield_now().await;
        }
    }

    /// What has come, as soon as something has. It loses nothing when it is dropped.
    pub(super) async fn next(&mut self) -> Vec<Piece> {
        if self.come.is_empty() {
            self.come.extend(self.pieces.next().await);
        }
        std::mem::take(&mut self.come)
    }

    /// Takes in that `n` tokens have come, which are the last ones if the stream has `ended`; `took` as in [`DraftPiece::End`].
    pub(super) fn count(&mut self, n: usize, ended: bool, took: Option<Duration>) -> Option<Told> {
        let silent = self.silent();
        self.n_tokens += n;
        self.heard_at = Instant::now();
        if self.first_at.is_none() {
            self.first_at = Some(self.heard_at);
            return Some(Told::First(silent));
        }
        if ended && self.lay_around {
            // For how long it has been silent since is not how long they took.
            return Some(Told::Further(self.n_tokens - 1, took?));
        }
        Some(Told::Further(n, silent))
    }

    /// The drafter has ended it, and is not at work since; `took` as in [`DraftPiece::End`].
    pub(super) fn end(self, took: Option<Duration>) {
        let last_at = self
            .first_at
            .zip(took)
            .and_then(|(first, took)| first.checked_add(took));
        self.work.ended(last_at.map(|at| at.elapsed()).unwrap_or_default());
    }

    /// The drafter is told to stop, and does within this time.
    pub(super) fn stop(self, within: Duration) {
        self.work.ends_within(within);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use tokio::time::sleep;

    use super::super::activity::Activity;
    use super::*;
    use crate::upstream::StreamEnd;

    const MS: Duration = Duration::from_millis(1);

    fn said(n: usize, took: Option<Duration>) -> DraftStream {
        let tokens = (0..n).map(|_| Ok(DraftPiece::Tokens(vec![(7, None)])));
        let end = DraftPiece::End {
            why: StreamEnd::Length,
            took,
        };
        stream::iter(tokens.chain([Ok(end)]).collect::<Vec<_>>()).boxed()
    }

    #[tokio::test]
    async fn tokens_that_lay_around_took_as_long_as_the_drafter_says() {
        for (took, told) in [(Some(6 * MS), Some(Told::Further(3, 6 * MS))), (None, None)] {
            let activity = Activity::default();
            let mut stream = Stream::new(1, said(4, took), activity.begin());
            assert_eq!(stream.next().await.len(), 1);
            assert!(matches!(stream.count(1, false, None), Some(Told::First(_))));
            stream.rest(60 * MS);
            stream.rested().await;
            assert_eq!(stream.next().await.len(), 4);
            assert_eq!(stream.count(3, true, took), told);
            let silent = stream.silent();
            stream.end(took);
            let at_work = activity.total();
            if took.is_some() {
                assert!(at_work < 50 * MS, "{at_work:?} at work, last heard of {silent:?} ago");
            } else {
                assert!(at_work >= 60 * MS, "{at_work:?}");
            }
        }
    }

    #[tokio::test]
    async fn tokens_that_are_heard_at_once_took_as_long_as_it_was_silent() {
        let activity = Activity::default();
        let mut stream = Stream::new(1, said(2, Some(9 * MS)), activity.begin());
        stream.rested().await;
        assert!(!stream.begun());
        stream.next().await;
        stream.count(1, false, None);
        assert!(stream.begun());
        sleep(5 * MS).await;
        stream.next().await;
        let told = stream.count(1, true, Some(9 * MS));
        assert!(
            matches!(told, Some(Told::Further(1, time)) if time >= 5 * MS && time != 9 * MS),
            "{told:?}"
        );
    }
}
