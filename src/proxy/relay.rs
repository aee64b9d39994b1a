//! The answer's bytes on their way to the client.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use reqwest::Response;
use tokio_util::sync::CancellationToken;

use super::running::Running;
use super::usage;
use crate::failure;
use crate::http::events::{Boundary, WAITING};
use crate::http::paths::Dialect;
use crate::http::refusal::{self, Refusal};

/// Most of a target's error answer that is read when it has to travel in an event.
const LONGEST_ERROR: usize = 64 * 1024;

/// How long that may take.
const ERROR_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether something may be put into an answer with these headers.
pub(crate) fn is_open_event_stream(headers: &HeaderMap) -> bool {
    is_event_stream(headers)
        && !headers.contains_key(header::CONTENT_LENGTH)
        && !headers.contains_key(header::CONTENT_ENCODING)
}

/// Whether these are the headers of an event stream.
pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    content_type(headers)
        .trim_ascii_start()
        .to_ascii_lowercase()
        .starts_with("text/event-stream")
}

pub(crate) fn content_type(headers: &HeaderMap) -> &str {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

/// The bytes of an answer, with its usage completed where the client is told what came of its prediction, and whether
/// they have the length that the target announced.
fn bytes_of(answer: Response, running: &Running) -> (BoxStream<'static, reqwest::Result<Bytes>>, bool) {
    let streamed = is_event_stream(answer.headers());
    let open = answer.status().is_success() && !answer.headers().contains_key(header::CONTENT_ENCODING);
    match running.reported().filter(|_| open) {
        None => (answer.bytes_stream().boxed(), true),
        Some(counts) => (usage::completed(answer.bytes_stream(), streamed, counts), false),
    }
}

/// The body of an answer that is no open event stream, and whether it has the length that the target announced. When the
/// target breaks off, the client's connection does too.
pub(super) fn whole(response: Response, mut running: Running) -> (Body, bool) {
    let mut left = response.content_length();
    if left == Some(0) {
        running.finishes();
        return (Body::empty(), true);
    }
    let (bytes, sized) = bytes_of(response, &running);
    left = left.filter(|_| sized);
    let bytes = bytes.map(Some).chain(stream::once(async { None }));
    let body = Body::from_stream(bytes.filter_map(move |chunk| {
        match &chunk {
            Some(Ok(bytes)) => {
                running.bytes_came(bytes);
                left = left.map(|left| left.saturating_sub(bytes.len() as u64));
                // Who knows the length does not wait for the end.
                if left == Some(0) {
                    running.finishes();
                }
            }
            Some(Err(error)) => {
                tracing::warn!(error = failure::explain(error), "the target broke off");
                running.fails();
            }
            None => running.finishes(),
        }
        std::future::ready(chunk)
    }));
    (body, sized)
}

/// An event stream, with comments in long silences and with an error event when the target breaks off.
pub(super) struct Events {
    source: Source,
    boundary: Boundary,
    dialect: Dialect,
    /// Silence after which the client gets a comment.
    keepalive: Option<Duration>,
    /// The target's URL, for messages.
    target: String,
    /// Cancelled when the proxy cannot go on with it.
    cut_off: CancellationToken,
    running: Running,
}

enum Source {
    /// The client has its 200 already, the target has not answered yet.
    Awaited(BoxFuture<'static, Result<Response, Refusal>>),
    Flowing(BoxStream<'static, reqwest::Result<Bytes>>),
    Over,
}

enum Step {
    Answered(Result<Response, Refusal>),
    Bytes(Bytes),
    Broken(reqwest::Error),
    CutOff,
    End,
}

impl Source {
    async fn step(&mut self) -> Step {
        match self {
            Self::Awaited(answer) => Step::Answered(answer.await),
            Self::Flowing(bytes) => match bytes.next().await {
                Some(Ok(bytes)) => Step::Bytes(bytes),
                Some(Err(error)) => Step::Broken(error),
                None => Step::End,
            },
            Self::Over => Step::End,
        }
    }
}

impl Events {
    /// Nothing was sent so far.
    pub(super) fn new(
        dialect: Dialect,
        keepalive: Option<Duration>,
        target: &str,
        cut_off: CancellationToken,
        running: Running,
    ) -> Self {
        let target = target.to_owned();
        Self {
            source: Source::Over,
            boundary: Boundary::new(),
            dialect,
            keepalive,
            target,
            cut_off,
            running,
        }
    }

    /// The stream of an answer that has begun.
    pub(super) fn of(mut self, answer: Response) -> Body {
        self.source = Source::Flowing(bytes_of(answer, &self.running).0);
        Body::from_stream(self.stream())
    }

    /// The stream of an answer that the client is kept waiting for; it begins with a comment that says so.
    pub(super) fn awaiting(mut self, answer: impl Future<Output = Result<Response, Refusal>> + Send + 'static) -> Body {
        self.source = Source::Awaited(Box::pin(answer));
        let first = stream::once(async { Ok(Bytes::from_static(WAITING)) });
        Body::from_stream(first.chain(self.stream()))
    }

    fn stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(
            self,
            |mut events| async move { Some((Ok(events.next().await?), events)) },
        )
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let step = self.cut_off.run_until_cancelled(self.source.step());
            let step = async { step.await.unwrap_or(Step::CutOff) };
            let step = match self.keepalive {
                None => step.await,
                Some(keepalive) => match tokio::time::timeout(keepalive, step).await {
                    Ok(step) => step,
                    Err(_) if self.boundary.is_between_events() => return Some(Bytes::from_static(WAITING)),
                    Err(_) => continue,
                },
            };
            match step {
                Step::Bytes(bytes) => {
                    self.running.bytes_came(&bytes);
                    self.boundary.pass(&bytes);
                    return Some(bytes);
                }
                Step::Answered(Ok(response)) => match self.begin(response).await {
                    Ok(()) => {}
                    Err(event) => return Some(self.fail(&event)),
                },
                Step::Answered(Err(refusal)) => return Some(self.fail(&refusal.event(self.dialect))),
                Step::Broken(error) => {
                    let refusal = Refusal::BrokeOff {
                        url: self.target.clone(),
                        cause: failure::explain(&error),
                    };
                    return Some(self.fail(&refusal.event(self.dialect)));
                }
                Step::CutOff if matches!(self.source, Source::Over) => return None,
                Step::CutOff => return Some(self.fail(&Refusal::ShuttingDown.event(self.dialect))),
                Step::End => {
                    if !matches!(self.source, Source::Over) {
                        self.running.finishes();
                    }
                    return None;
                }
            }
        }
    }

    /// Turns to the bytes of an answer, or says in an event why there are none.
    async fn begin(&mut self, answer: Response) -> Result<(), Bytes> {
        let status = answer.status();
        if !status.is_success() {
            return Err(refusal::targets_error(self.dialect, status, &error_body(answer).await));
        }
        if !is_open_event_stream(answer.headers()) {
            let content_type = content_type(answer.headers()).to_owned();
            return Err(Refusal::NotAStream {
                url: self.target.clone(),
                content_type,
            }
            .event(self.dialect));
        }
        self.source = Source::Flowing(bytes_of(answer, &self.running).0);
        Ok(())
    }

    /// Ends the stream with `event`.
    fn fail(&mut self, event: &Bytes) -> Bytes {
        tracing::warn!(event = %String::from_utf8_lossy(event).trim_end(), "the stream ends with an error");
        self.running.fails();
        self.source = Source::Over;
        if self.boundary.is_between_events() {
            return event.clone();
        }
        // Ends the event that the target left unfinished.
        [b"\n\n", event.as_ref()].concat().into()
    }
}

/// The target's answer; an error is put into the client's dialect, and says what to change where the target's own words are
/// those of its command line.
pub(crate) async fn explained(dialect: Dialect, answer: Response) -> Response {
    let short = answer
        .content_length()
        .is_some_and(|length| length <= LONGEST_ERROR as u64);
    let encoded = answer.headers().contains_key(header::CONTENT_ENCODING);
    if answer.status().as_u16() < 400 || !short || encoded {
        return answer;
    }
    let (status, mut headers) = (answer.status(), answer.headers().clone());
    let body = error_body(answer).await.freeze();
    let body = match refusal::explained(dialect, status, &body) {
        Some(explained) => {
            headers.insert(header::CONTENT_LENGTH, explained.len().into());
            explained
        }
        None => body,
    };
    let mut explained = axum::http::Response::new(body);
    *explained.status_mut() = status;
    *explained.headers_mut() = headers;
    explained.into()
}

/// The beginning of an error answer; what cannot be read of it is missing.
pub(crate) async fn error_body(answer: Response) -> BytesMut {
    let mut body = BytesMut::new();
    let _ = tokio::time::timeout(ERROR_TIMEOUT, async {
        let mut chunks = answer.bytes_stream();
        while let Some(Ok(chunk)) = chunks.next().await {
            body.extend_from_slice(&chunk);
            if body.len() > LONGEST_ERROR {
                break;
            }
        }
    })
    .await;
    body
}
