//! Counts a request while it lives: metrics, the status page and the log.
//!
//! The guard lives as long as the answer. Whatever ends the answer drops the guard, which counts the request once and ends
//! its drafting. `forward` makes one for each request.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use tokio::runtime::Handle;
use tokio::sync::watch as channel;

use super::agreement::Question;
use super::first_token::FirstToken;
use super::observed::Observed;
use super::recent::Record;
use crate::engine::{Attachment, Counts, RequestGuard};
use crate::http::paths::Route;
use crate::observe::Outcome;
use crate::observe::metrics::Ended;

/// Most characters of a path that the status page keeps.
const LONGEST_PATH: usize = 128;

/// A request that is being answered, counted when it is dropped. Without another outcome it counts as cancelled.
#[derive(Debug)]
pub(super) struct ActiveRequest {
    observed: Arc<Observed>,
    attachment: Option<Attachment>,
    /// Marks the target as busy with this request.
    occupied: Option<RequestGuard>,
    /// The client sent a prediction and gets its counts in the usage.
    predicted: bool,
    /// The request, to compare the drafter's answer with the target's.
    question: Option<Question>,
    /// The counts of an answer in rounds.
    rounds: Option<channel::Receiver<Counts>>,
    id: String,
    path: String,
    route: Route,
    begun: Instant,
    first_token: FirstToken,
    /// When the first token came; `None` in an answer that is no event stream.
    first_token_at: Option<Instant>,
    status: Option<StatusCode>,
    streamed: bool,
    outcome: Outcome,
}

impl ActiveRequest {
    pub(super) fn begin(observed: &Arc<Observed>, id: String, path: &str, route: Route) -> Self {
        observed.metrics.in_flight.inc();
        Self {
            observed: Arc::clone(observed),
            attachment: None,
            occupied: None,
            predicted: false,
            question: None,
            rounds: None,
            id,
            path: path.chars().take(LONGEST_PATH).collect(),
            route,
            begun: Instant::now(),
            first_token: FirstToken::default(),
            first_token_at: None,
            status: None,
            streamed: false,
            outcome: Outcome::Cancelled,
        }
    }

    /// The client asked for a stream.
    pub(super) fn streams(&mut self) {
        self.streamed = true;
    }

    /// The target has this request until it ends.
    pub(super) fn occupies(&mut self, target: RequestGuard) {
        self.occupied = Some(target);
    }

    /// Drafts for this request from now on until it ends.
    pub(super) fn drafts_with(&mut self, attachment: Attachment) {
        self.attachment = Some(attachment);
    }

    /// The client predicted the answer of a chat.
    pub(super) fn is_predicted(&mut self) {
        self.predicted = true;
    }

    /// The drafter may be asked the same when the answer is complete.
    pub(super) fn is_compared(&mut self, question: Question) {
        self.question = Some(question);
    }

    /// The final counts of drafting, if the answer has to report them. They are ready when the answer is complete.
    pub(super) fn reported(&self) -> Option<impl Future<Output = Counts> + Send + 'static> {
        let attachment = self.attachment.as_ref().filter(|_| self.predicted)?;
        Some(attachment.settled())
    }

    /// It is answered in rounds, which are counted here.
    pub(super) fn counts_with(&mut self, rounds: channel::Receiver<Counts>) {
        self.rounds = Some(rounds);
    }

    /// The client is told this.
    pub(super) fn answers(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// Bytes of the target's answer came.
    pub(super) fn bytes_came(&mut self, bytes: &[u8]) {
        if self.streamed && self.first_token.is_in(bytes) {
            self.first_token_at = Some(Instant::now());
        }
        if let Some(question) = &mut self.question {
            question.answered(bytes);
        }
    }

    /// The answer is complete.
    pub(super) fn finishes(&mut self) {
        let refused = self
            .status
            .is_some_and(|status| status.is_client_error() || status.is_server_error());
        self.outcome = if refused { Outcome::Failed } else { Outcome::Finished };
    }

    /// The answer broke off, or there is none.
    pub(super) fn fails(&mut self) {
        self.outcome = Outcome::Failed;
    }

    fn milliseconds_to(&self, then: Instant) -> f64 {
        let milliseconds = then.duration_since(self.begun).as_secs_f64() * 1e3;
        (milliseconds * 1e3).round() / 1e3
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        let duration = self.begun.elapsed();
        let metrics = &self.observed.metrics;
        metrics.in_flight.dec();
        if let Some(question) = self.question.take().filter(|_| self.outcome == Outcome::Finished) {
            question.compare(&self.observed);
        }
        metrics
            .requests
            .get_or_create(&Ended {
                path: self.route.label,
                outcome: self.outcome,
            })
            .inc();
        if self.route.completion {
            metrics.duration.observe(duration.as_secs_f64());
            if let Some(then) = self.first_token_at {
                metrics
                    .first_token
                    .observe(then.duration_since(self.begun).as_secs_f64());
            }
        }
        let record = Record {
            id: std::mem::take(&mut self.id),
            time: seconds_since_1970() - duration.as_secs_f64(),
            path: std::mem::take(&mut self.path),
            status: self.status.map(|status| status.as_u16()),
            streamed: self.streamed,
            duration_ms: self.milliseconds_to(self.begun + duration),
            ttft_ms: self.first_token_at.map(|then| self.milliseconds_to(then)),
            counts: match (&self.attachment, &self.rounds) {
                (Some(attachment), _) => counted(attachment.counts()),
                (None, Some(rounds)) => counted(*rounds.borrow()),
                (None, None) => None,
            },
            outcome: self.outcome,
        };
        let observed = Arc::clone(&self.observed);
        // Of an answer that is complete the target has a last word to say; of any other the drafting ends now.
        let attachment = self.attachment.take().filter(|_| self.outcome == Outcome::Finished);
        match (attachment, Handle::try_current()) {
            (Some(attachment), Ok(runtime)) => {
                runtime.spawn(async move {
                    let counts = counted(attachment.settled().await);
                    drop(attachment);
                    report(&observed, Record { counts, ..record });
                });
            }
            _ => report(&observed, record),
        }
    }
}

/// Counts of an answer; `None` if the target reported no step for it.
fn counted(counts: Counts) -> Option<Counts> {
    Some(counts).filter(|counts| counts.steps > 0)
}

fn report(observed: &Observed, record: Record) {
    tracing::info!(
        id = record.id,
        path = record.path,
        status = record.status,
        duration_ms = record.duration_ms,
        ttft_ms = record.ttft_ms,
        steps = record.counts.map(|counts| counts.steps),
        drafted = record.counts.map(|counts| counts.drafted),
        accepted = record.counts.map(|counts| counts.accepted),
        generated = record.counts.map(|counts| counts.generated),
        outcome = record.outcome.name(),
        "request"
    );
    observed.recent.push(record);
}

fn seconds_since_1970() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
