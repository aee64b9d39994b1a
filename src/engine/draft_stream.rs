//! One stream of a drafter: its pieces, and the latencies that they show.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::FutureExt;
use futures_util::stream::Fuse;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};

use super::busy_clock::BusyGuard;
use crate::upstream::{DraftPiece, DraftStream, UpstreamError};

/// Most pieces that are taken at once.
const PIECES: usize = 64;

/// One item of a stream.
pub(super) type StreamItem = Result<DraftPiece, UpstreamError>;

/// A running stream. Waking up for each token is most of what drafting costs the proxy, so reading can pause for a while.
pub(super) struct DrafterStream {
    id: u64,
    pieces: Fuse<DraftStream>,
    /// Pieces that arrived and are not handled yet.
    come: Vec<StreamItem>,
    /// When the last token was read, or the stream started.
    heard_at: Instant,
    /// When its first token was read.
    first_at: Option<Instant>,
    n_tokens: usize,
    /// When reading resumes.
    rests_until: Option<Instant>,
    /// Whether the pieces arrived while reading paused.
    lay_around: bool,
    work: BusyGuard,
}

/// Latencies that a group of tokens shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StreamTiming {
    /// Time to the first token.
    pub(super) first: Option<Duration>,
    /// Number of further tokens and their time.
    pub(super) further: Option<(usize, Duration)>,
}

impl DrafterStream {
    /// A stream with this id; `work` runs the drafter's busy clock.
    pub(super) fn new(id: u64, pieces: DraftStream, work: BusyGuard) -> Self {
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

    /// Its id in the session's events.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Whether a token was read.
    pub(super) fn begun(&self) -> bool {
        self.first_at.is_some()
    }

    /// Time since the last token was read, or since the stream started.
    pub(super) fn silent(&self) -> Duration {
        self.heard_at.elapsed()
    }

    /// Pauses reading for this time.
    pub(super) fn rest(&mut self, time: Duration) {
        self.rests_until = (!time.is_zero()).then(|| Instant::now() + time);
    }

    /// Ends the pause.
    pub(super) fn wake(&mut self) {
        if self.rests_until.is_some() {
            self.rests_until = Some(Instant::now());
        }
    }

    /// Waits until the pause ends. Cancel-safe.
    pub(super) async fn rested(&mut self) {
        if let Some(until) = self.rests_until {
            sleep_until(until).await;
            self.catch_up().await;
            self.rests_until = None;
            self.lay_around = !self.come.is_empty();
        }
    }

    /// Reads all pieces that arrived. The connection is a task of its own, which passes on one event after the other.
    async fn catch_up(&mut self) {
        let mut before = usize::MAX;
        while before != self.come.len() && self.come.len() < PIECES {
            before = self.come.len();
            self.take_ready();
            yield_now().await;
        }
    }

    /// Waits for pieces and returns all that arrived. Cancel-safe.
    pub(super) async fn next(&mut self) -> Vec<StreamItem> {
        if self.come.is_empty() {
            self.come.extend(self.pieces.next().await);
            self.take_ready();
        }
        std::mem::take(&mut self.come)
    }

    fn take_ready(&mut self) {
        while self.come.len() < PIECES
            && let Some(Some(piece)) = self.pieces.next().now_or_never()
        {
            self.come.push(piece);
        }
    }

    /// Counts `n` new tokens, which are the last ones if the stream has `ended`; `took` as in [`DraftPiece::End`].
    pub(super) fn count(&mut self, n: usize, ended: bool, took: Option<Duration>) -> StreamTiming {
        let silent = self.silent();
        self.n_tokens += n;
        self.heard_at = Instant::now();
        let further = self.n_tokens - 1;
        if self.first_at.is_none() {
            // All tokens at once: the time of the further ones is not part of the time to the first.
            let took = took.filter(|_| ended);
            self.first_at = self.heard_at.checked_sub(took.unwrap_or_default());
            return StreamTiming {
                first: Some(silent.saturating_sub(took.unwrap_or_default())),
                further: took.map(|took| (further, took)),
            };
        }
        let further = if ended && self.lay_around {
            // The pause in reading is not the time that they took.
            took.map(|took| (further, took))
        } else {
            Some((n, silent))
        };
        StreamTiming { first: None, further }
    }

    /// Ends the stream that the drafter completed; `took` as in [`DraftPiece::End`].
    pub(super) fn end(self, took: Option<Duration>) {
        let last_at = self
            .first_at
            .zip(took)
            .and_then(|(first, took)| first.checked_add(took));
        self.work.ended(last_at.map(|at| at.elapsed()).unwrap_or_default());
    }

    /// Drops the stream; the drafter stops within this time.
    pub(super) fn stop(self, within: Duration) {
        self.work.ends_within(within);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use tokio::time::sleep;

    use super::super::busy_clock::BusyClock;
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

    /// ... each in its own time.
    fn says(n: usize, pause: Duration, took: Duration) -> DraftStream {
        said(n, Some(took))
            .then(move |piece| sleep(pause).map(|()| piece))
            .boxed()
    }

    fn first(timing: &StreamTiming) -> Option<Duration> {
        assert_eq!(timing.further, None);
        timing.first
    }

    #[tokio::test]
    async fn tokens_that_lay_around_took_as_long_as_the_drafter_says() {
        for (took, timing) in [(Some(6 * MS), Some((3, 6 * MS))), (None, None)] {
            let busy_clock = BusyClock::default();
            let pieces = stream::iter([Ok(DraftPiece::Tokens(vec![(7, None)]))])
                .chain(stream::once(sleep(MS)).filter_map(|()| std::future::ready(None)))
                .chain(said(3, took))
                .boxed();
            let mut stream = DrafterStream::new(1, pieces, busy_clock.begin());
            assert_eq!(stream.next().await.len(), 1);
            assert!(first(&stream.count(1, false, None)).is_some());
            stream.rest(60 * MS);
            stream.rested().await;
            assert_eq!(stream.next().await.len(), 4);
            assert_eq!(
                stream.count(3, true, took),
                StreamTiming {
                    first: None,
                    further: timing
                }
            );
            let silent = stream.silent();
            stream.end(took);
            let at_work = busy_clock.total();
            if took.is_some() {
                assert!(at_work < 50 * MS, "{at_work:?} at work, last heard of {silent:?} ago");
            } else {
                assert!(at_work >= 60 * MS, "{at_work:?}");
            }
        }
    }

    #[tokio::test]
    async fn tokens_that_are_heard_at_once_took_as_long_as_it_was_silent() {
        let busy_clock = BusyClock::default();
        let mut stream = DrafterStream::new(1, says(2, 5 * MS, 9 * MS), busy_clock.begin());
        stream.rested().await;
        assert!(!stream.begun());
        stream.next().await;
        assert!(first(&stream.count(1, false, None)).is_some_and(|time| time >= 5 * MS));
        assert!(stream.begun());
        stream.next().await;
        let timing = stream.count(1, true, Some(9 * MS));
        assert!(
            matches!(timing.further, Some((1, time)) if time >= 5 * MS && time != 9 * MS),
            "{timing:?}"
        );
    }

    #[tokio::test]
    async fn of_a_draft_in_one_piece_the_drafter_says_how_much_was_not_the_first_token() {
        let busy_clock = BusyClock::default();
        let pieces = stream::once(sleep(20 * MS))
            .flat_map(|()| said(4, Some(12 * MS)))
            .boxed();
        let mut stream = DrafterStream::new(1, pieces, busy_clock.begin());
        assert_eq!(stream.next().await.len(), 5);
        let timing = stream.count(4, true, Some(12 * MS));
        assert_eq!(timing.further, Some((3, 12 * MS)));
        let first = timing.first.unwrap_or_default();
        assert!((8 * MS..1000 * MS).contains(&first), "{first:?}");
    }

    #[tokio::test]
    async fn a_stream_that_is_woken_is_heard_before_its_time() {
        let busy_clock = BusyClock::default();
        let mut stream = DrafterStream::new(1, said(4, None), busy_clock.begin());
        stream.rest(3600 * 1000 * MS);
        stream.wake();
        stream.rested().await;
        assert_eq!(stream.next().await.len(), 5);
    }
}
