//! The errors of the pool, as HTTP answers and as events of a stream.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};

use super::pool::{Pool, ServerInstance};
use super::status::SwapError;
use crate::http::paths::Dialect;
use crate::http::refusal::{self, Refusal};
use crate::pool::swap::{Ended, Refused};

/// Longest time from a broken connection until the reason is known.
const DIAGNOSIS: Duration = Duration::from_secs(4);

/// Why a client gets no answer, or only a part of it.
#[derive(Debug)]
pub(super) enum Problem {
    /// It was not admitted.
    Refused {
        why: Refused,
        /// Progress of the load, for clients that retry.
        loading: Value,
    },
    /// Its server ended, or had to be ended.
    Ended(Ended),
    /// Its server closed the connection for an unknown reason.
    Broke(Refusal),
}

impl Problem {
    pub(super) fn refused(why: Refused, pool: &Pool) -> Self {
        let report = pool.report();
        let mut loading = json!({
            "model": report.now.model,
            "state": report.now.state,
            "progress": report.load.progress,
        });
        if let (Some(eta), Some(loading)) = (report.load.eta_seconds, loading.as_object_mut()) {
            loading.insert("eta_seconds".to_owned(), eta.into());
        }
        Self::Refused { why, loading }
    }

    /// The connection to the server broke: waits a moment for the reason.
    pub(super) async fn broke(refusal: Refusal, instance: &ServerInstance) -> Self {
        match tokio::time::timeout(DIAGNOSIS, instance.ended()).await {
            Ok(ended) => Self::Ended(ended),
            Err(_) => Self::Broke(refusal),
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Refused {
                why: Refused::Unknown { .. } | Refused::OtherRuns { .. },
                ..
            } => StatusCode::NOT_FOUND,
            Self::Refused {
                why: Refused::Superseded(_),
                ..
            } => StatusCode::CONFLICT,
            Self::Refused { .. } | Self::Ended(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Broke(refusal) => refusal.status(),
        }
    }

    /// The error code for programs.
    fn code(&self) -> &'static str {
        match self {
            Self::Refused { why, .. } => match why {
                Refused::Unknown { .. } => "model_not_found",
                Refused::OtherRuns { .. } => "model_not_loaded",
                Refused::NotReady { .. } => "model_loading",
                Refused::Full(_) => "queue_full",
                Refused::Failed { .. } => "model_failed",
                Refused::Superseded(_) => "superseded",
                Refused::Shutdown => "shutting_down",
            },
            Self::Ended(ended) => match ended {
                Ended::Failed(failure) if failure.worker => "worker_lost",
                Ended::Failed(_) => "server_failed",
                Ended::Swapped(_) => "model_swapped",
                Ended::Shutdown => "shutting_down",
            },
            Self::Broke(_) => "server_broke_off",
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Refused { why, .. } => why.to_string(),
            Self::Ended(ended) => ended.to_string(),
            Self::Broke(refusal) => refusal.to_string(),
        }
    }

    /// The error object.
    pub(super) fn error(&self) -> SwapError {
        let code = self.code();
        let kind = match (code, self.status().is_server_error()) {
            ("model_loading", _) => "model_loading",
            (_, true) => "server_error",
            (_, false) => "invalid_request_error",
        };
        SwapError {
            message: self.message(),
            kind: kind.to_owned(),
            code: code.to_owned(),
            param: None,
        }
    }

    /// Logs a warning once per problem until an answer succeeds: many requests meet the same problem.
    fn log(&self, what: &str, pool: &Pool) {
        let message = self.message();
        if pool.problems().is_new(&message) {
            tracing::warn!(code = self.code(), "{what}: {message}");
        } else {
            tracing::debug!(code = self.code(), "{what}: {message}");
        }
    }

    fn body(&self, dialect: Dialect) -> Value {
        let mut body = refusal::in_dialect(dialect, &json!(self.error()));
        if let (Self::Refused { loading, why }, Some(body)) = (self, body.as_object_mut())
            && !matches!(why, Refused::Unknown { .. } | Refused::OtherRuns { .. })
        {
            body.insert("loading".to_owned(), loading.clone());
        }
        body
    }

    /// The problem as an HTTP answer.
    pub(super) fn response(&self, dialect: Dialect, pool: &Pool) -> Response {
        let status = self.status();
        self.log("refused", pool);
        let again = (status == StatusCode::SERVICE_UNAVAILABLE).then_some("5");
        refusal::error_response(status, &self.body(dialect), again)
    }

    /// The problem as the last event of a stream whose status 200 was already sent.
    pub(super) fn event(&self, dialect: Dialect, pool: &Pool) -> Bytes {
        self.log("a stream ends", pool);
        refusal::event(dialect, &self.body(dialect))
    }
}
