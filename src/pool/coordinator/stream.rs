//! An event stream: comments while it waits for a model, then the server's bytes, then an error if those break off.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};

use super::pool::{Granted, Pool};
use super::problem::Problem;
use crate::pool::swap::{Ended, State};
use crate::proxy::events::Boundary;
use crate::proxy::paths::Dialect;
use crate::proxy::relay;
use crate::proxy::respond::{self, Refusal};
use crate::upstream::failure;

/// Silence after which a waiting client gets a comment.
const COMMENTS: Duration = Duration::from_secs(3);

/// An event stream.
pub(super) struct Events {
    source: Source,
    boundary: Boundary,
    dialect: Dialect,
    pool: Pool,
    /// Nothing has been sent.
    fresh: bool,
}

enum Source {
    /// The client has its 200 already, and no server has answered.
    Awaited(BoxFuture<'static, Result<(Granted, reqwest::Response), Problem>>),
    Flowing(Granted, BoxStream<'static, reqwest::Result<Bytes>>),
    Over,
}

enum Step {
    Answered(Result<(Granted, reqwest::Response), Problem>),
    Bytes(Bytes),
    Broken(String),
    Ended(Ended),
    End,
}

impl Source {
    async fn step(&mut self) -> Step {
        match self {
            Self::Awaited(answer) => Step::Answered(answer.await),
            Self::Flowing(granted, bytes) => {
                tokio::select! {
                    biased;
                    chunk = bytes.next() => match chunk {
                        Some(Ok(bytes)) => Step::Bytes(bytes),
                        Some(Err(error)) => Step::Broken(failure::explain(&error)),
                        None => Step::End,
                    },
                    ended = granted.life.ended() => Step::Ended(ended),
                }
            }
            Self::Over => Step::End,
        }
    }
}

impl Events {
    /// The stream of an answer that has begun.
    pub(super) fn of(dialect: Dialect, pool: Pool, granted: Granted, answer: reqwest::Response) -> Self {
        Self::from(
            dialect,
            pool,
            Source::Flowing(granted, answer.bytes_stream().boxed()),
            false,
        )
    }

    /// The stream of an answer that the client is kept waiting for.
    pub(super) fn awaiting(
        dialect: Dialect,
        pool: Pool,
        answer: impl Future<Output = Result<(Granted, reqwest::Response), Problem>> + Send + 'static,
    ) -> Self {
        Self::from(dialect, pool, Source::Awaited(Box::pin(answer)), true)
    }

    fn from(dialect: Dialect, pool: Pool, source: Source, fresh: bool) -> Self {
        Self {
            source,
            boundary: Boundary::new(),
            dialect,
            pool,
            fresh,
        }
    }

    pub(super) fn body(self) -> Body {
        Body::from_stream(stream::unfold(self, |mut events| async move {
            let bytes = events.next().await?;
            Some((Ok::<_, Infallible>(bytes), events))
        }))
    }

    async fn next(&mut self) -> Option<Bytes> {
        if std::mem::take(&mut self.fresh) {
            return Some(self.comment());
        }
        loop {
            let step = match self.source {
                Source::Awaited(_) => match tokio::time::timeout(COMMENTS, self.source.step()).await {
                    Ok(step) => step,
                    Err(_) => return Some(self.comment()),
                },
                _ => self.source.step().await,
            };
            match step {
                Step::Bytes(bytes) => {
                    self.boundary.pass(&bytes);
                    return Some(bytes);
                }
                Step::Answered(Ok((granted, answer))) => match begin(self.dialect, granted, answer).await {
                    Ok(source) => self.source = source,
                    Err(event) => return Some(self.fail(&event)),
                },
                Step::Answered(Err(problem)) => return Some(self.fail(&problem.event(self.dialect, &self.pool))),
                Step::Ended(ended) => return Some(self.fail(&Problem::Ended(ended).event(self.dialect, &self.pool))),
                Step::Broken(cause) => {
                    let life = match &self.source {
                        Source::Flowing(granted, _) => Arc::clone(&granted.life),
                        Source::Awaited(_) | Source::Over => return None,
                    };
                    let url = life.target.shown().to_owned();
                    let problem = Problem::broke(Refusal::BrokeOff { url, cause }, &life).await;
                    return Some(self.fail(&problem.event(self.dialect, &self.pool)));
                }
                Step::End => return None,
            }
        }
    }

    /// What a waiting client is told.
    fn comment(&self) -> Bytes {
        let report = self.pool.report();
        match (report.now.state, report.load.progress) {
            (State::Loading, Some(progress)) => format!(": loading the model, {:.0} %\n\n", progress * 100.0),
            (State::Ready | State::Draining, _) => ": waiting for a slot\n\n".to_owned(),
            (state, _) => format!(": waiting for the model, {state}\n\n"),
        }
        .into()
    }

    /// Ends the stream with `event`.
    fn fail(&mut self, event: &Bytes) -> Bytes {
        self.source = Source::Over;
        if self.boundary.is_between_events() {
            return event.clone();
        }
        // Ends the event that the server left unfinished.
        [b"\n\n", event.as_ref()].concat().into()
    }
}

/// The bytes of an answer, or an event that says why there are none.
async fn begin(dialect: Dialect, granted: Granted, answer: reqwest::Response) -> Result<Source, Bytes> {
    let status = answer.status();
    if !status.is_success() {
        let body = relay::error_body(answer).await;
        return Err(respond::targets_error(dialect, status, &body));
    }
    if !relay::is_open_event_stream(answer.headers()) {
        let refusal = Refusal::NotAStream {
            url: granted.life.target.shown().to_owned(),
            content_type: relay::content_type(answer.headers()).to_owned(),
        };
        return Err(refusal.event(dialect));
    }
    Ok(Source::Flowing(granted, answer.bytes_stream().boxed()))
}
