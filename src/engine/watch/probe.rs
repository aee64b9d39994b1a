//! Probes of one server: whether it answers, and what it reports about itself.
//!
//! A probe never changes the server's state and never blocks another probe. [`super::Watcher`] combines the probes of all
//! servers.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

use super::super::ServerStatus;
use super::super::in_flight::InFlightRequests;
use super::ConfiguredServer;
use crate::config::Backend;
use crate::failure;
use crate::upstream::{Props, UpstreamError};

/// Time between two probes of a server.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two checks whether the target takes tasks.
const TASK_INTERVAL: Duration = Duration::from_secs(10);
/// Servers that start together with the proxy may take this long until they answer.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Prefix of the problem of a server that has not answered yet within [`STARTUP_TIMEOUT`].
pub(super) const NOT_UP_YET: &str = "it is not up yet: ";
/// Problem of a llama-server that has just started.
pub(super) const LOADING: &str = "it is loading its model";

/// Probes a server repeatedly; the first time at once.
pub(super) fn probes(server: Option<ConfiguredServer>) -> BoxStream<'static, Probe> {
    let Some(server) = server else {
        return stream::pending().boxed();
    };
    let give_up = Instant::now() + STARTUP_TIMEOUT;
    stream::unfold(
        (server, Duration::ZERO, false),
        move |(server, pause, seen)| async move {
            tokio::time::sleep(pause).await;
            let mut probe = probe_server(&server).await;
            let problem = probe.status.problem.as_mut().filter(|problem| *problem != LOADING);
            let seen = seen || probe.status.healthy || problem.is_none();
            if let Some(problem) = problem.filter(|_| !seen && Instant::now() < give_up) {
                problem.insert_str(0, NOT_UP_YET);
            }
            Some((probe, (server, PROBE_INTERVAL, seen)))
        },
    )
    .boxed()
}

/// Yields whether a llama-server takes no tasks. It is asked only while it has requests or may hang in one: the question would
/// wake up an unused server that sleeps.
pub(super) fn stalls(
    server: Option<ConfiguredServer>,
    in_flight: InFlightRequests,
    after: Duration,
) -> BoxStream<'static, bool> {
    let Some(server) = server.filter(|server| server.config.backend == Backend::Llamacpp) else {
        return stream::pending().boxed();
    };
    let asks = (server, in_flight, Duration::ZERO, 0);
    stream::unfold(asks, move |(server, in_flight, pause, seen)| async move {
        tokio::time::sleep(pause).await;
        let changes = in_flight.since(seen).await;
        if server.client.takes_tasks(after).await {
            Some((false, (server, in_flight, TASK_INTERVAL, changes)))
        } else {
            // Ask again, whether it has requests or not.
            Some((true, (server, in_flight, Duration::ZERO, seen)))
        }
    })
    .boxed()
}

/// Result of one probe.
pub(super) struct Probe {
    pub(super) status: ServerStatus,
    /// Of a llama-server that answers.
    pub(super) props: Option<Props>,
}

impl Probe {
    /// The state before the first probe.
    pub(super) fn before(server: Option<&ConfiguredServer>) -> Self {
        let status = server.map(|server| ServerStatus {
            problem: Some("it was not asked yet".into()),
            ..server.unknown()
        });
        Self {
            status: status.unwrap_or_default(),
            props: None,
        }
    }
}

impl ConfiguredServer {
    /// Its status before anything is known about it.
    fn unknown(&self) -> ServerStatus {
        ServerStatus {
            url: self.config.url.clone(),
            model: self.config.model_name.clone(),
            ..ServerStatus::default()
        }
    }
}

/// Probes a server once.
async fn probe_server(server: &ConfiguredServer) -> Probe {
    let ConfiguredServer { config, client, text } = server;
    let text = text.as_ref().filter(|_| config.backend != Backend::Llamacpp);
    let mut status = server.unknown();
    let mut props = None;
    let answer = if config.backend == Backend::Llamacpp {
        match client.health().await {
            Ok(()) => client.props().await.map(|found| props = Some(found)),
            Err(error) => Err(error),
        }
    } else {
        match (client.answers().await, text) {
            (Ok(()), Some(text)) => text.ready().await,
            (answer, _) => answer,
        }
    };
    match answer {
        Ok(()) => status.healthy = true,
        // Something else than a llama-server answers, or one without these routes.
        Err(error @ (UpstreamError::Refused { status: 404 | 405, .. } | UpstreamError::Malformed { .. }))
            if text.is_none() =>
        {
            status.healthy = true;
            status.problem = Some(format!(
                "it answers, but not like llama-server; set `backend` to what it is ({error})"
            ));
        }
        Err(UpstreamError::Refused { status: 503, .. }) => status.problem = Some(LOADING.into()),
        Err(error) => status.problem = Some(format!("{error}{}", remedy(server, &error))),
    }
    if status.model.is_none() {
        status.model = props.as_ref().and_then(|props| props.model_alias.clone());
    }
    Probe { status, props }
}

/// The next step for the user where nothing listens.
fn remedy(server: &ConfiguredServer, error: &UpstreamError) -> &'static str {
    match (error, server.config.backend, &server.text) {
        (UpstreamError::Unreachable { cause, .. }, _, _) if !failure::is_refused(cause) => "",
        (UpstreamError::Unreachable { .. }, Backend::Llamacpp, Some(_)) => "; start `tightwad run draft` on that host",
        (UpstreamError::Unreachable { .. }, Backend::Llamacpp, None) => {
            "; start `tightwad run target` or `tightwad run coordinator` on that host"
        }
        (UpstreamError::Unreachable { .. }, ..) => "; start the server on that host",
        _ => "",
    }
}
