//! Reads request bodies at a minimum rate and within a budget of memory.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep_until};

use super::limits::Limits;
use super::progress::Progress;

type BoxError = Box<dyn Error + Send + Sync>;

/// How long a refused body is read on, so that its sender receives the answer rather than a reset connection.
const DISCARD_TIME: Duration = Duration::from_secs(1);

/// Why a body cannot be read.
#[derive(Debug)]
pub(crate) enum BodyError {
    /// It is longer than the limit; this is the rest of it.
    TooLarge(Body),
    /// Other requests' bodies use all of the memory; this is the rest of it.
    NoMemory(Body),
    /// It came below the minimum rate.
    TooSlow,
    /// It ended early.
    Cut(axum::Error),
}

/// Reads a body of at most `limit` bytes. They count in the server's budget until their last copy is dropped.
pub(crate) async fn read(body: Body, parts: &Parts, limit: u64) -> Result<Bytes, BodyError> {
    let announced = announced(&parts.headers);
    if announced.is_some_and(|length| length > limit) {
        return Err(BodyError::TooLarge(body));
    }
    let mut share = parts.extensions.get::<Memory>().map(Memory::share);
    let mut chunks = body.into_data_stream();
    let mut whole = BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| {
            if is_slow(&error) {
                BodyError::TooSlow
            } else {
                BodyError::Cut(error)
            }
        })?;
        if (whole.len() + chunk.len()) as u64 > limit {
            return Err(BodyError::TooLarge(Body::from_stream(chunks)));
        }
        if let Some(share) = &mut share
            && !share.grow(chunk.len())
        {
            return Err(BodyError::NoMemory(Body::from_stream(chunks)));
        }
        if whole.is_empty() && announced.is_some_and(|length| length == chunk.len() as u64) {
            return Ok(counted(chunk, share));
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(counted(whole.freeze(), share))
}

/// Reads a refused body for a moment and drops it. Many clients look for an answer only after they have sent everything,
/// and lose it if the connection is reset meanwhile.
pub(crate) fn discard(body: Body, headers: &HeaderMap) {
    if headers.contains_key(header::EXPECT) || HttpBody::is_end_stream(&body) {
        return; // Nothing comes. Reading would ask a client that waits with `Expect` to begin.
    }
    tokio::spawn(tokio::time::timeout(DISCARD_TIME, async move {
        let mut chunks = body.into_data_stream();
        while let Some(Ok(_)) = chunks.next().await {}
    }));
}

/// Whether a body is JSON by its `Content-Type`. A web page may send other types without a CORS preflight.
pub(crate) fn is_json(headers: &HeaderMap) -> bool {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = given.and_then(|given| given.split(';').next()).unwrap_or_default();
    essence.trim().eq_ignore_ascii_case("application/json")
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The memory budgets for request bodies: of a server, and of one peer of it.
#[derive(Debug, Clone)]
pub(super) struct Memory([Arc<Semaphore>; 2]);

/// One body's part of the budgets.
#[derive(Debug)]
struct Share {
    memory: Memory,
    taken: Option<[OwnedSemaphorePermit; 2]>,
}

impl Memory {
    /// A server's budget of `bytes`, which a single peer may use up.
    pub(super) fn of(bytes: usize) -> Self {
        Self([semaphore(bytes), semaphore(bytes)])
    }

    /// The same server's budget, of which one peer may use `bytes`.
    pub(super) fn of_peer(&self, bytes: usize) -> Self {
        Self([Arc::clone(&self.0[0]), semaphore(bytes)])
    }

    fn share(&self) -> Share {
        Share {
            memory: self.clone(),
            taken: None,
        }
    }
}

fn semaphore(bytes: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)))
}

impl Share {
    /// Takes `bytes` more; false if a budget is used up.
    fn grow(&mut self, bytes: usize) -> bool {
        let Ok(bytes) = u32::try_from(bytes) else { return false };
        let [all, of_peer] = self
            .memory
            .0
            .each_ref()
            .map(|budget| Arc::clone(budget).try_acquire_many_owned(bytes));
        let (Ok(all), Ok(of_peer)) = (all, of_peer) else {
            return false;
        };
        match &mut self.taken {
            Some(taken) => {
                taken[0].merge(all);
                taken[1].merge(of_peer);
            }
            None => self.taken = Some([all, of_peer]),
        }
        true
    }
}

/// Bytes that give their share back when their last copy is dropped.
fn counted(bytes: Bytes, share: Option<Share>) -> Bytes {
    struct Counted {
        bytes: Bytes,
        _share: Share,
    }
    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }
    match share {
        Some(share) if share.taken.is_some() => Bytes::from_owner(Counted { bytes, _share: share }),
        _ => bytes,
    }
}

/// A request body with a minimum rate.
pub(super) struct PacedBody {
    body: Incoming,
    grace: Duration,
    rate: u32,
    received: u64,
    began: Instant,
    /// `None` until the body has to be waited for.
    alarm: Option<Pin<Box<Sleep>>>,
    progress: Arc<Progress>,
    /// The client understands interim responses (HTTP/1.1).
    interim: bool,
}

/// The error of a body that came too slowly.
#[derive(Debug, thiserror::Error)]
#[error("the body came too slowly")]
struct TooSlow;

fn is_slow(error: &axum::Error) -> bool {
    let error: &(dyn Error + 'static) = error;
    std::iter::successors(Some(error), |error| (*error).source()).any(<dyn Error + 'static>::is::<TooSlow>)
}

impl PacedBody {
    pub(super) fn new(body: Incoming, limits: &Limits, progress: &Arc<Progress>, interim: bool) -> Self {
        let paced = Self {
            body,
            grace: limits.body_grace,
            rate: limits.body_rate.max(1),
            received: 0,
            began: Instant::now(),
            alarm: None,
            progress: Arc::clone(progress),
            interim,
        };
        paced.look_for_end();
        paced
    }

    fn look_for_end(&self) {
        if self.body.is_end_stream() {
            self.progress.body_ends(self.interim);
        }
    }

    /// Deadline of the next byte.
    fn deadline(&self) -> Instant {
        self.began + self.grace + Duration::from_secs_f64(self.received as f64 / f64::from(self.rate))
    }
}

impl HttpBody for PacedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.received += frame.data_ref().map_or(0, Bytes::len) as u64;
                self.look_for_end();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => {
                self.progress.body_ends(self.interim);
                Poll::Ready(None)
            }
            Poll::Pending => {
                let deadline = self.deadline();
                let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
                if alarm.deadline() != deadline {
                    alarm.as_mut().reset(deadline);
                }
                alarm.as_mut().poll(cx).map(|()| Some(Err(TooSlow.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response body that reports its end to the connection's progress.
pub(super) struct TrackedBody {
    body: Body,
    progress: Arc<Progress>,
}

impl TrackedBody {
    pub(super) fn new(body: Body, progress: Arc<Progress>) -> Self {
        Self { body, progress }
    }
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        HttpBody::is_end_stream(&self.body)
    }

    fn size_hint(&self) -> SizeHint {
        HttpBody::size_hint(&self.body)
    }
}

impl Drop for TrackedBody {
    fn drop(&mut self) {
        self.progress.answer_ends();
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn parts(memory: &Memory) -> Parts {
        let mut request = Request::new(());
        request.extensions_mut().insert(memory.clone());
        request.into_parts().0
    }

    #[tokio::test]
    async fn a_body_counts_until_its_last_copy_is_dropped() {
        let memory = Memory::of(10);
        let parts = parts(&memory);
        let first = read(Body::from("12345678"), &parts, 100).await.unwrap();
        let copy = first.slice(2..4);
        drop(first);
        let refused = read(Body::from("123"), &parts, 100).await;
        assert!(matches!(refused, Err(BodyError::NoMemory(_))), "{refused:?}");
        drop(copy);
        assert_eq!(read(Body::from("1234567890"), &parts, 100).await.unwrap(), "1234567890");
        assert_eq!(memory.0[0].available_permits(), 10);
    }

    #[tokio::test]
    async fn a_peer_that_has_used_its_budget_leaves_the_rest_to_others() {
        let memory = Memory::of(10);
        let [greedy, other] = [6, 6].map(|bytes| parts(&memory.of_peer(bytes)));
        let held = read(Body::from("12345"), &greedy, 100).await.unwrap();
        let refused = read(Body::from("12"), &greedy, 100).await;
        assert!(matches!(refused, Err(BodyError::NoMemory(_))), "{refused:?}");
        read(Body::from("12345"), &other, 100).await.unwrap();
        drop(held);
        read(Body::from("123456"), &greedy, 100).await.unwrap();
    }

    #[tokio::test]
    async fn a_body_in_pieces_counts_while_it_comes_and_not_when_it_is_refused() {
        let memory = Memory::of(10);
        let parts = parts(&memory);
        let pieces = || {
            let pieces = ["1234", "5678", "90", "1"].map(Ok::<_, std::io::Error>);
            Body::from_stream(futures_util::stream::iter(pieces))
        };
        let refused = read(pieces(), &parts, 100).await;
        assert!(matches!(refused, Err(BodyError::NoMemory(_))), "{refused:?}");
        let refused = read(pieces(), &parts, 6).await;
        assert!(matches!(refused, Err(BodyError::TooLarge(_))), "{refused:?}");
        assert_eq!(memory.0[0].available_permits(), 10);
    }
}
