//! A proxy inside of this process, for measurements.

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

/// Pause between two looks at a proxy that has not found out yet what its servers can.
const POLL: Duration = Duration::from_millis(100);
/// A proxy that has just met its servers measures them for about so long at most.
const MEASURING: Duration = Duration::from_secs(20);
/// Time after which a proxy that still probes its servers says so.
const SILENCE: Duration = Duration::from_secs(1);
/// How long a proxy's status may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running proxy.
#[derive(Debug)]
pub struct OwnProxy {
    stop: CancellationToken,
    serving: JoinHandle<Result<(), Failure>>,
}

impl OwnProxy {
    /// Serves on `listener` as the section says.
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

/// Waits until the proxy can draft with any of its drafters and has measured its servers, for at most `patience`, or until it
/// knows its target and has no draft at all; then the reason why it cannot.
///
/// While it waits it says so on stderr, once for each reason.
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
        let measuring = status.measuring && began.elapsed() < MEASURING.max(patience);
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
        // What comes right at once needs no words.
        if began.elapsed() >= SILENCE && said.as_ref() != Some(&waits) {
            line.tell(&waits);
            said = Some(waits);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The URLs of the proxy's drafts that do not answer.
pub async fn urls_of_drafts_down(proxy: &ChatServer) -> Result<Vec<String>, ChatError> {
    let status = fetch(proxy).await?;
    let down = status.as_ref().map(status::drafts_down).unwrap_or_default();
    Ok(down.into_iter().map(str::to_owned).collect())
}

/// What is wrong with the drafters, if that is so of all that there are.
fn drafts_down(status: &Status) -> Option<String> {
    let problem = |draft: &DraftStatus| {
        let server = &draft.server;
        Some(format!("the draft {}: {}", server.url, server.problem.as_ref()?))
    };
    let problems = status.drafts.iter().map(problem).collect::<Option<Vec<_>>>()?;
    (!problems.is_empty()).then(|| problems.join(", "))
}

/// Whether the proxy answers in rounds, which it does for no request that wants to know token ids.
pub async fn answers_in_rounds(proxy: &ChatServer) -> Result<bool, ChatError> {
    let status = fetch(proxy).await?;
    Ok(status.is_some_and(|status| matches!(status.verification, Verification::FanOut | Verification::Scored)))
}

/// Its status; `None` of a server that is no proxy of ours.
async fn fetch(proxy: &ChatServer) -> Result<Option<Status>, ChatError> {
    match proxy.get("/v1/tightwad/status", PATIENCE).await {
        Ok(status) => Ok(serde_json::from_str(&status).ok()),
        Err(ChatError::Refused { status, .. }) if status == StatusCode::NOT_FOUND => Ok(None),
        Err(error) => Err(error),
    }
}
