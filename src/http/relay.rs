//! Relays the answer of a server behind this process to a client.
//!
//! The bytes of an answer pass as they come and are never re-serialised. An event stream also gets comments while it is
//! silent, and an error event where it breaks off; both stand between two events. The proxy and the coordinator implement
//! [`Exchange`] for what differs between them and hand each request to [`respond`], the last step on its way.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::timeout;

use super::events::Boundary;
use super::headers::{X_ACCEL_BUFFERING, to_client};
use super::paths::Dialect;
use super::refusal::{self, Refusal};

/// Longest error body that is read to be explained or to travel in an event.
const LONGEST_ERROR: usize = 64 * 1024;

/// Timeout for reading an error body.
const ERROR_TIMEOUT: Duration = Duration::from_secs(5);

/// Body of a server's answer.
pub(crate) type ServerBytes = BoxStream<'static, reqwest::Result<Bytes>>;

/// An answer with its guard, once the server has sent the head.
type Awaited<X> = BoxFuture<'static, Result<(<X as Exchange>::Guard, reqwest::Response), <X as Exchange>::Error>>;

/// One request and its answer: what the proxy and the coordinator do differently while [`respond`] relays.
pub(crate) trait Exchange: Send + Sync + Sized + 'static {
    /// Comes with an answer and is dropped after its last byte.
    type Guard: Send + 'static;
    /// Why there is no answer, or only a part of one.
    type Error: Send + 'static;

    /// How the client expects errors.
    fn dialect(&self) -> Dialect;
    /// URL of the server that answers, for messages.
    fn url<'a>(&'a self, guard: &'a Self::Guard) -> &'a str;
    /// Silence after which an event stream gets a comment. `flowing`: the server has begun to answer.
    fn silence(&self, flowing: bool) -> Option<Duration>;
    /// A comment for a silent event stream.
    fn comment(&self) -> Bytes;
    /// The HTTP answer for a client that has no head yet.
    fn refuse(self, error: Self::Error) -> Response;
    /// The last event for a client that has its 200 already.
    fn error_event(&self, error: &Self::Error) -> Bytes;
    /// Resolves when an event stream has to end early.
    fn interrupted(&self) -> impl Future<Output = Self::Error> + Send {
        std::future::pending()
    }
    /// The body of an answer, and whether it keeps the length that the server announced.
    fn body(&self, answer: reqwest::Response) -> (ServerBytes, bool) {
        (answer.bytes_stream().boxed(), true)
    }
    /// The bytes of an event stream, with the reason where they break off.
    fn events(&self, guard: Self::Guard, bytes: ServerBytes) -> BoxStream<'static, Result<Bytes, Self::Error>>;

    /// The server has answered before the client was kept waiting.
    fn reaches_server(&mut self) {}
    /// The client gets a head with this status.
    fn begins(&mut self, _status: StatusCode) {}
    /// These bytes of the server pass.
    fn passes(&mut self, _bytes: &[u8]) {}
    /// The answer is complete.
    fn finishes(&mut self) {}
    /// The server broke off an answer that is no event stream.
    fn breaks_off(&mut self, _error: &reqwest::Error) {}
    /// The stream ends with this error event.
    fn fails(&mut self, _event: &Bytes) {}
}

/// Waits for `answer` and relays it. With `patience`, the client asked for an event stream: when the server has not answered
/// after that time, the client gets its head and comments until it does.
pub(crate) async fn respond<X: Exchange>(
    exchange: X,
    method: &Method,
    patience: Option<Duration>,
    answer: impl Future<Output = Result<(X::Guard, reqwest::Response), X::Error>> + Send + 'static,
) -> Response {
    let dialect = exchange.dialect();
    let mut answer: Awaited<X> = Box::pin(async move {
        let (guard, answer) = answer.await?;
        Ok((guard, explained(dialect, answer).await))
    });
    let answered = match patience {
        None => answer.await,
        Some(patience) => match timeout(patience, &mut answer).await {
            Ok(answered) => answered,
            Err(_) => return keep_waiting(exchange, answer),
        },
    };
    match answered {
        Ok((guard, answer)) => pass_on(exchange, method, guard, answer),
        Err(error) => exchange.refuse(error),
    }
}

/// The head of an event stream, before the server has sent one.
fn keep_waiting<X: Exchange>(mut exchange: X, answer: Awaited<X>) -> Response {
    exchange.begins(StatusCode::OK);
    let first = stream::iter([Ok(exchange.comment())]);
    let events = EventStream::new(exchange, Source::Awaited(answer));
    let mut response = Response::new(Body::from_stream(first.chain(events.bytes())));
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        (X_ACCEL_BUFFERING, "no"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The server's answer as it comes.
fn pass_on<X: Exchange>(mut exchange: X, method: &Method, guard: X::Guard, answer: reqwest::Response) -> Response {
    exchange.reaches_server();
    let status = answer.status();
    exchange.begins(status);
    let mut headers = to_client(answer.headers().clone());
    if is_event_stream(&headers) {
        headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
    }
    let body = if method == Method::HEAD || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        exchange.finishes();
        Body::empty()
    } else if is_open_event_stream(&headers) {
        let source = Source::flowing(&exchange, guard, answer);
        Body::from_stream(EventStream::new(exchange, source).bytes())
    } else {
        let (body, keeps_length) = whole(exchange, guard, answer);
        if !keeps_length {
            headers.remove(header::CONTENT_LENGTH);
        }
        body
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// The body of an answer that is no open event stream, and whether it keeps the length that the server announced. When the
/// server breaks off, the client's connection does too.
fn whole<X: Exchange>(mut exchange: X, guard: X::Guard, answer: reqwest::Response) -> (Body, bool) {
    let announced = answer.content_length();
    if announced == Some(0) {
        exchange.finishes();
        return (Body::empty(), true);
    }
    let (bytes, keeps_length) = exchange.body(answer);
    let mut left = announced.filter(|_| keeps_length);
    let bytes = bytes.map(Some).chain(stream::iter([None]));
    let body = Body::from_stream(bytes.filter_map(move |chunk| {
        let _ = &guard;
        match &chunk {
            Some(Ok(bytes)) => {
                exchange.passes(bytes);
                left = left.map(|left| left.saturating_sub(bytes.len() as u64));
                // A client that knows the length does not wait for the end.
                if left == Some(0) {
                    exchange.finishes();
                }
            }
            Some(Err(error)) => exchange.breaks_off(error),
            None => exchange.finishes(),
        }
        std::future::ready(chunk)
    }));
    (body, keeps_length)
}

/// The body of an event stream.
struct EventStream<X: Exchange> {
    exchange: X,
    source: Source<X>,
    boundary: Boundary,
}

enum Source<X: Exchange> {
    /// The client has its 200 already, the server has not answered yet.
    Awaited(Awaited<X>),
    Flowing(BoxStream<'static, Result<Bytes, X::Error>>),
    Over,
}

enum Step<X: Exchange> {
    Answered(X::Guard, reqwest::Response),
    Bytes(Bytes),
    Broken(X::Error),
    End,
}

impl<X: Exchange> Source<X> {
    fn flowing(exchange: &X, guard: X::Guard, answer: reqwest::Response) -> Self {
        let (bytes, _) = exchange.body(answer);
        Self::Flowing(exchange.events(guard, bytes))
    }

    async fn step(&mut self) -> Step<X> {
        match self {
            Self::Awaited(answer) => match answer.await {
                Ok((guard, answer)) => Step::Answered(guard, answer),
                Err(error) => Step::Broken(error),
            },
            Self::Flowing(bytes) => match bytes.next().await {
                Some(Ok(bytes)) => Step::Bytes(bytes),
                Some(Err(error)) => Step::Broken(error),
                None => Step::End,
            },
            Self::Over => Step::End,
        }
    }
}

impl<X: Exchange> EventStream<X> {
    fn new(exchange: X, source: Source<X>) -> Self {
        Self {
            exchange,
            source,
            boundary: Boundary::new(),
        }
    }

    fn bytes(self) -> impl stream::Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        stream::unfold(
            self,
            |mut events| async move { Some((Ok(events.next().await?), events)) },
        )
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if matches!(self.source, Source::Over) {
                return None;
            }
            let silence = self.exchange.silence(matches!(self.source, Source::Flowing(_)));
            let exchange = &self.exchange;
            let source = &mut self.source;
            let step = async move {
                tokio::select! {
                    biased;
                    error = exchange.interrupted() => Step::Broken(error),
                    step = source.step() => step,
                }
            };
            let step = match silence {
                None => step.await,
                Some(silence) => match timeout(silence, step).await {
                    Ok(step) => step,
                    Err(_) if self.boundary.is_between_events() => return Some(self.exchange.comment()),
                    Err(_) => continue,
                },
            };
            match step {
                Step::Bytes(bytes) => {
                    self.exchange.passes(&bytes);
                    self.boundary.pass(&bytes);
                    return Some(bytes);
                }
                Step::Answered(guard, answer) => match self.begin(guard, answer).await {
                    Ok(source) => self.source = source,
                    Err(event) => return Some(self.fail(&event)),
                },
                Step::Broken(error) => {
                    let event = self.exchange.error_event(&error);
                    return Some(self.fail(&event));
                }
                Step::End => {
                    self.exchange.finishes();
                    self.source = Source::Over;
                }
            }
        }
    }

    /// The bytes of an answer, or an event that says why there are none.
    async fn begin(&mut self, guard: X::Guard, answer: reqwest::Response) -> Result<Source<X>, Bytes> {
        let (dialect, status) = (self.exchange.dialect(), answer.status());
        if !status.is_success() {
            let body = error_body(answer).await;
            return Err(refusal::targets_error(dialect, status, &body));
        }
        if !is_open_event_stream(answer.headers()) {
            let refusal = Refusal::NotAStream {
                url: self.exchange.url(&guard).to_owned(),
                content_type: content_type(answer.headers()).to_owned(),
            };
            return Err(refusal.event(dialect));
        }
        Ok(Source::flowing(&self.exchange, guard, answer))
    }

    /// Ends the stream with `event`.
    fn fail(&mut self, event: &Bytes) -> Bytes {
        self.exchange.fails(event);
        self.source = Source::Over;
        if self.boundary.is_between_events() {
            return event.clone();
        }
        // Ends the event that the server left unfinished.
        [b"\n\n", event.as_ref()].concat().into()
    }
}

/// Whether these are the headers of an event stream into which events and comments can be put.
fn is_open_event_stream(headers: &HeaderMap) -> bool {
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

fn content_type(headers: &HeaderMap) -> &str {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

/// The answer with its error in the client's dialect, and with the key of our config where the server's words are those of
/// its own command line. Other answers stay as they are.
async fn explained(dialect: Dialect, answer: reqwest::Response) -> reqwest::Response {
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

/// The beginning of an error body; a part that does not come in time is missing.
async fn error_body(answer: reqwest::Response) -> BytesMut {
    let mut body = BytesMut::new();
    let _ = timeout(ERROR_TIMEOUT, async {
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
