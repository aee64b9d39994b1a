//! The coordinator's side of an answer that is relayed: comments while it waits for a model, and why it broke off.

use std::time::Duration;

use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

use super::pool::{Admission, Pool};
use super::problem::Problem;
use crate::failure;
use crate::http::paths::Dialect;
use crate::http::refusal::Refusal;
use crate::http::relay::{self, ServerBytes};
use crate::pool::swap::State;

/// Silence after which a client that waits for a model or a slot gets a comment.
const COMMENTS: Duration = Duration::from_secs(3);

/// One request on its way to its answer.
pub(super) struct Exchange {
    pub(super) pool: Pool,
    pub(super) dialect: Dialect,
}

impl relay::Exchange for Exchange {
    type Guard = Admission;
    type Error = Problem;

    fn dialect(&self) -> Dialect {
        self.dialect
    }

    fn url<'a>(&'a self, admission: &'a Admission) -> &'a str {
        admission.instance.target.shown()
    }

    fn silence(&self, flowing: bool) -> Option<Duration> {
        (!flowing).then_some(COMMENTS)
    }

    fn comment(&self) -> Bytes {
        let report = self.pool.report();
        match (report.now.state, report.load.progress) {
            (State::Loading, Some(progress)) => format!(": loading the model, {:.0} %\n\n", progress * 100.0),
            (State::Ready | State::Draining, _) => ": waiting for a slot\n\n".to_owned(),
            (state, _) => format!(": waiting for the model, {state}\n\n"),
        }
        .into()
    }

    fn refuse(self, problem: Problem) -> Response {
        problem.response(self.dialect, &self.pool)
    }

    fn error_event(&self, problem: &Problem) -> Bytes {
        problem.event(self.dialect, &self.pool)
    }

    fn events(&self, admission: Admission, bytes: ServerBytes) -> BoxStream<'static, Result<Bytes, Problem>> {
        let events = stream::unfold((admission, bytes), |(admission, mut bytes)| async move {
            let chunk = tokio::select! {
                biased;
                chunk = bytes.next() => match chunk? {
                    Ok(bytes) => Ok(bytes),
                    Err(error) => {
                        let url = admission.instance.target.shown().to_owned();
                        let cause = failure::explain(&error);
                        Err(Problem::broke(Refusal::BrokeOff { url, cause }, &admission.instance).await)
                    }
                },
                ended = admission.instance.ended() => Err(Problem::Ended(ended)),
            };
            Some((chunk, (admission, bytes)))
        });
        events.boxed()
    }

    fn reaches_server(&mut self) {
        self.pool.problems().clear();
    }
}
