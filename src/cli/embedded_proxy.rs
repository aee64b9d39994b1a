//! A proxy inside of this process, for measurements. Also waits until any proxy can draft.

use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::exit::Failure;
use super::progress::Line;
use super::{proxy, status};
use crate::config;
use crate::engine::{DraftStatus, Engine, Verification};
use crate::proxy::status::Status;
use crate::upstream::{ChatError, ChatServer};

/// Interval between status requests while the proxy probes its servers.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time limit for the measurements of a proxy that has just found its servers.
const MEASURING_TIMEOUT: Duration = Duration::from_secs(20);
/// Time before the first message about a wait.
const FIRST_MESSAGE_AFTER: Duration = Duration::from_secs(1);
/// Time limit for a proxy's status.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// A running proxy.
#[derive(Debug)]
pub struct EmbeddedProxy {
    stop: CancellationToken,
    serving: JoinHandle<Result<(), Failure>>,
}

impl EmbeddedProxy {
    /// Starts a proxy on `listener` with the settings of the section.
    pub fn start(listener: TcpListener, section: config::Proxy) -> Result<Self, Failure> {
        let engine: Arc<Engine> = proxy::start_engine(&section)?;
        let stop = CancellationToken::new();
        let serving = {
            let stop = stop.clone();
            tokio::spawn(async move { proxy::serve_on(listener, &section, engine, stop).await })
        };
        Ok(Self { stop, serving })
    }

    /// Finishes the running answers and ends.
    pub async fn close(self) -> Result<(), Failure> {
        self.stop.cancel();
        self.serving.await.map_err(|error| Failure::other("serve", error))?
    }
}

/// Waits until the proxy can draft and has measured its servers. Returns the reason if it cannot draft within `patience`, or if it has no
/// draft at all.
///
/// Prints each reason for the wait once on stderr.
pub async fn why_undrafted(proxy: &ChatServer, patience: Duration) -> Result<Option<String>, ChatError> {
    let began = tokio::time::Instant::now();
    let line = Line::new();
    let mut said = None;
    loop {
        let Some(status) = fetch(proxy).await? else {
            return Ok(Some(format!("{} is no proxy of Tightwad's", proxy.url())));
        };
        let verifies = status.verification != Verification::None;
        let reason = status.reason.clone().or_else(|| drafts_down(&status));
        let measuring = status.measuring && began.elapsed() < MEASURING_TIMEOUT.max(patience);
        let hopeless = status.target.healthy && status.drafts.is_empty() && reason.is_some();
        if !measuring && verifies && reason.is_none() {
            return Ok(None);
        }
        if !measuring && (hopeless || began.elapsed() >= patience) {
            return Ok(Some(reason.unwrap_or_else(|| "the proxy gives no reason".to_owned())));
        }
        let waits = if measuring {
            "measuring the servers".to_owned()
        } else {
            let reason = reason.as_deref().unwrap_or("the servers do not answer yet");
            format!("waiting for at most {} s: {reason}", patience.as_secs())
        };
        // A short wait needs no message.
        if began.elapsed() >= FIRST_MESSAGE_AFTER && said.as_ref() != Some(&waits) {
            line.tell(&waits);
            said = Some(waits);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The URLs of the proxy's drafts that do not answer.
pub async fn urls_of_drafts_down(proxy: &ChatServer) -> Result<Vec<String>, ChatError> {
    let status = fetch(proxy).await?;
    let down = status.as_ref().map(status::drafts_down).unwrap_or_default();
    Ok(down.into_iter().map(str::to_owned).collect())
}

/// The problems of the drafters, if all of them have one.
fn drafts_down(status: &Status) -> Option<String> {
    let problem = |draft: &DraftStatus| {
        let server = &draft.server;
        Some(format!("the draft {}: {}", server.url, server.problem.as_ref()?))
    };
    let problems = status.drafts.iter().map(problem).collect::<Option<Vec<_>>>()?;
    (!problems.is_empty()).then(|| problems.join(", "))
}

/// Whether the proxy answers in rounds. Such a proxy sends no token ids.
pub async fn answers_in_rounds(proxy: &ChatServer) -> Result<bool, ChatError> {
    let status = fetch(proxy).await?;
    Ok(status.is_some_and(|status| matches!(status.verification, Verification::FanOut | Verification::Scored)))
}

/// The status of the proxy; `None` if the server is not a Tightwad proxy.
async fn fetch(proxy: &ChatServer) -> Result<Option<Status>, ChatError> {
    match proxy.get("/v1/tightwad/status", STATUS_TIMEOUT).await {
        Ok(status) => Ok(serde_json::from_str(&status).ok()),
        Err(ChatError::Refused { status, .. }) if status == StatusCode::NOT_FOUND => Ok(None),
        Err(error) => Err(error),
    }
}
