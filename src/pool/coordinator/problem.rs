//! Everything that can go wrong between a client and the pool, as HTTP.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};

use super::pool::{Life, Pool};
use super::status::SwapError;
use crate::http::paths::Dialect;
use crate::http::refusal::{self, Refusal};
use crate::pool::swap::{Ended, Refused};

/// Why a worker was lost is known so long after its server's connections broke, at the latest.
const DIAGNOSIS: Duration = Duration::from_secs(4);

/// Why there is no answer, or not all of it.
#[derive(Debug)]
pub(super) enum Problem {
    /// It was not admitted.
    Refused {
        why: Refused,
        /// How far the load is, for who comes again.
        loading: Value,
    },
    /// Its server ended, or had to be ended.
    Ended(Ended),
    /// Its server broke off for no reason that is known.
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

    /// The connection to the server broke: that has a reason, which is known soon.
    pub(super) async fn broke(refusal: Refusal, life: &Life) -> Self {
        match tokio::time::timeout(DIAGNOSIS, life.ended()).await {
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

    /// By which programs know it.
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

    /// The error object, in the words that all clients of this endpoint get.
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

    /// Many requests meet one problem: it is a warning once, until an answer comes again.
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

    /// As an HTTP answer.
    pub(super) fn response(&self, dialect: Dialect, pool: &Pool) -> Response {
        let status = self.status();
        self.log("refused", pool);
        let again = (status == StatusCode::SERVICE_UNAVAILABLE).then_some("5");
        refusal::error_response(status, &self.body(dialect), again)
    }

    /// As the last event of a stream whose 200 is out already.
    pub(super) fn event(&self, dialect: Dialect, pool: &Pool) -> Bytes {
        self.log("a stream ends", pool);
        refusal::event(dialect, &self.body(dialect))
    }
}
