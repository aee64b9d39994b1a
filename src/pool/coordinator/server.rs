//! Runs one llama-server from its start to its end, and reports what happens as events.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};

use super::load::{self, Line};
use super::pool::Message;
use super::workers::Workers;
use crate::config::Secret;
use crate::pool::swap::{Event, Failure};
use crate::supervise::child::{Child, Listener};
use crate::supervise::command::{Launch, Role};
use crate::supervise::death::{Cause, Death};
use crate::supervise::stall::{self, LOAD_PATIENCE, Stalled, until_stalled};

/// Interval for polling a server that starts.
const POLL: Duration = Duration::from_millis(100);
/// How long a server may take to end when asked.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for one that is broken.
const BROKEN_TIMEOUT: Duration = Duration::from_millis(200);

/// Everything that the run needs.
pub(super) struct Run {
    pub(super) epoch: u64,
    pub(super) launch: Launch,
    pub(super) key: Secret,
    pub(super) stall: Duration,
    pub(super) workers: Workers,
    pub(super) tell: mpsc::UnboundedSender<Message>,
    /// Ends the server; `true` if it is broken.
    pub(super) stop: oneshot::Receiver<bool>,
    pub(super) started: oneshot::Sender<u32>,
    pub(super) last_lines: oneshot::Sender<Vec<String>>,
}

/// Runs the server to its end.
pub(super) async fn run(run: Run) {
    let Run {
        epoch,
        launch,
        key,
        stall: patience,
        workers,
        tell,
        mut stop,
        started,
        last_lines,
    } = run;
    let moved = watch::Sender::new(());
    let listener = {
        let (tell, moved) = (tell.clone(), moved.clone());
        Arc::new(move |line: &str| match load::read(line) {
            Line::Progress(progress) => {
                moved.send_replace(());
                let _ = tell.send(Message::Loaded(epoch, progress));
                true
            }
            Line::News => true,
            Line::Log => false,
        })
    };
    let (http, mut child) = match spawn(&launch, listener).await {
        Ok(spawned) => spawned,
        Err(error) => {
            let death = Death::not_started(&error);
            return send(&tell, Event::Died(epoch, failure(&death, &workers).await));
        }
    };
    let pid = child.pid();
    let _ = started.send(pid);
    let url = launch.url();
    let broken = {
        let looks = async {
            let broken = tokio::select! {
                () = until_ready(&http, &url) => {
                    send(&tell, Event::Ready(epoch));
                    tokio::select! {
                        stalled = until_stalled(&http, &url, Some(&key), pid, patience) => Ok(stalled),
                        lost = workers.until_disconnected() => Err(lost),
                    }
                }
                () = until_load_stalls(moved.subscribe()) => Ok(Stalled::Still(LOAD_PATIENCE)),
            };
            let failure = match broken {
                Err(lost) => curable(lost, true),
                Ok(stalled) => stands_still(stalled, &workers).await,
            };
            send(&tell, Event::Broken(epoch, failure));
            std::future::pending::<()>().await;
        };
        tokio::select! {
            status = child.wait() => Err(status),
            broken = &mut stop => Ok(broken.unwrap_or(true)),
            () = looks => Ok(true),
        }
    };
    match broken {
        Ok(broken) => {
            let patience = if broken { BROKEN_TIMEOUT } else { STOP_TIMEOUT };
            if let Err(error) = child.stop(patience).await {
                tracing::warn!("could not wait for the llama-server: {error}");
            }
            send(&tell, Event::Stopped(epoch));
        }
        Err(status) => {
            let lines = child.last_lines().await;
            let death = match status {
                Ok(status) => Death::explain(status, lines),
                Err(error) => Death::not_started(&error),
            };
            let _ = last_lines.send(death.last_lines.clone());
            let failure = failure(&death, &workers).await;
            send(&tell, Event::Died(epoch, failure));
        }
    }
}

/// Starts the server, with a client to poll it.
async fn spawn(launch: &Launch, listener: Listener) -> io::Result<(reqwest::Client, Child)> {
    let http = stall::client()?;
    let child = Child::spawn_with(Role::Coordinator, launch, Some(listener)).await?;
    Ok((http, child))
}

fn send(tell: &mpsc::UnboundedSender<Message>, event: Event) {
    let _ = tell.send(Message::Event(event));
}

/// A failure that another start may cure.
fn curable(why: String, worker: bool) -> Failure {
    Failure {
        why,
        curable: true,
        worker,
    }
}

/// Why a running server has stalled.
async fn stands_still(stalled: Stalled, workers: &Workers) -> Failure {
    if let Stalled::Stopped(_) = stalled {
        return curable(stalled.to_string(), false);
    }
    let lost = workers.who_is_lost(true).await;
    let worker = lost.is_some();
    let why = lost.unwrap_or_else(|| {
        "no worker's agent knows why; give more `stall_seconds` if one batch of a prompt takes longer".to_owned()
    });
    curable(format!("{stalled}: {why}"), worker)
}

async fn failure(death: &Death, workers: &Workers) -> Failure {
    let says_so = matches!(death.cause, Cause::WorkerLost(_) | Cause::OtherBuild(_));
    let may_be = says_so || matches!(death.cause, Cause::Signal(_) | Cause::Code(_));
    let found = if may_be { workers.who_is_lost(false).await } else { None };
    let found = found.or_else(|| {
        workers
            .only()
            .filter(|_| says_so)
            .map(|name| format!("worker {name} was lost"))
    });
    Failure {
        worker: says_so || found.is_some(),
        why: found.unwrap_or_else(|| format!("the llama-server died: {death}")),
        curable: death.is_curable(),
    }
}

async fn until_ready(http: &reqwest::Client, url: &str) {
    let health = format!("{url}/health");
    loop {
        let answer = http.get(&health).send().await;
        if answer.is_ok_and(|answer| answer.status() == StatusCode::OK) {
            return;
        }
        sleep(POLL).await;
    }
}

async fn until_load_stalls(mut moved: watch::Receiver<()>) {
    while let Ok(Ok(())) = timeout(LOAD_PATIENCE, moved.changed()).await {}
}
