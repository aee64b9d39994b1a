//! One life of the llama-server behind the front.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};

use super::load::{self, Line};
use super::pool::Message;
use super::stall::{Slot, Stall};
use super::workers::Workers;
use crate::cluster::bounded::{self, BodyError};
use crate::cluster::swap::{Event, Failure};
use crate::config::Secret;
use crate::supervise::child::Child;
use crate::supervise::command::{Launch, Role};
use crate::supervise::death::{Cause, Death};

/// Pause between two looks at a server that starts.
const POLL: Duration = Duration::from_millis(100);
/// Pause between two looks at one that runs.
const LOOK: Duration = Duration::from_secs(1);
/// Longest wait for the answer to a look.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest list of slots in bytes; a slot takes some thousand.
const MOST_BODY: usize = 4 << 20;
/// How long a server that is asked to end may take.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// The same for one that is broken.
const BROKEN_PATIENCE: Duration = Duration::from_millis(200);

/// A load that does not go on for so long never will: one tensor over a slow network takes a minute or two.
const LOAD_STALL: Duration = Duration::from_secs(300);

/// What is needed to run it.
pub(super) struct Run {
    pub(super) epoch: u64,
    pub(super) launch: Launch,
    pub(super) key: Secret,
    pub(super) stall: Duration,
    pub(super) workers: Workers,
    pub(super) tell: mpsc::UnboundedSender<Message>,
    /// Whether it is broken.
    pub(super) stop: oneshot::Receiver<bool>,
    pub(super) started: oneshot::Sender<u32>,
    pub(super) last_lines: oneshot::Sender<Vec<String>>,
}

/// Runs it to its end, and tells what happens.
pub(super) async fn run(run: Run) {
    let Run {
        epoch,
        launch,
        key,
        stall,
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
    let client = match client() {
        Ok(client) => client,
        Err(error) => {
            let why = format!("this host's HTTP client cannot be set up: {error}");
            return send(&tell, Event::Died(epoch, curable(why, false)));
        }
    };
    let mut child = match Child::spawn_with(Role::Coordinator, &launch, Some(listener)).await {
        Ok(child) => child,
        Err(error) => {
            let death = Death::not_started(&error);
            return send(&tell, Event::Died(epoch, failure(&death, &workers).await));
        }
    };
    let _ = started.send(child.pid());
    let url = launch.url();
    let broken = {
        let looks = async {
            let seconds = tokio::select! {
                () = until_ready(&client, &url) => {
                    send(&tell, Event::Ready(epoch));
                    tokio::select! {
                        stalled = until_stalled(&client, &url, &key, stall) => Ok(stalled.as_secs()),
                        lost = workers.until_disconnected() => Err(lost),
                    }
                }
                () = until_load_stalls(moved.subscribe()) => Ok(LOAD_STALL.as_secs()),
            };
            let failure = match seconds {
                Err(lost) => curable(lost, true),
                Ok(seconds) => stalled(seconds, &workers).await,
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
            let patience = if broken { BROKEN_PATIENCE } else { STOP_PATIENCE };
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

fn send(tell: &mpsc::UnboundedSender<Message>, event: Event) {
    let _ = tell.send(Message::Event(event));
}

/// A failure that another start may mend.
fn curable(why: String, worker: bool) -> Failure {
    Failure {
        why,
        curable: true,
        worker,
    }
}

/// Why nothing has moved for so many seconds.
async fn stalled(seconds: u64, workers: &Workers) -> Failure {
    let lost = workers.who_is_lost(true).await;
    let worker = lost.is_some();
    let why = lost.unwrap_or_else(|| {
        "no worker's agent knows why; give more `stall_seconds` if one batch of a prompt takes longer".to_owned()
    });
    curable(format!("nothing has moved for {seconds} s: {why}"), worker)
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

/// Client for the llama-server of this host.
fn client() -> Result<Client, reqwest::Error> {
    Client::builder()
        .no_proxy()
        .redirect(Policy::none())
        .timeout(PATIENCE)
        .pool_max_idle_per_host(0)
        .build()
}

async fn until_ready(client: &Client, url: &str) {
    let health = format!("{url}/health");
    loop {
        let answer = client.get(&health).send().await;
        if answer.is_ok_and(|answer| answer.status() == StatusCode::OK) {
            return;
        }
        sleep(POLL).await;
    }
}

async fn until_load_stalls(mut moved: watch::Receiver<()>) {
    while let Ok(Ok(())) = timeout(LOAD_STALL, moved.changed()).await {}
}

/// Waits until nothing has moved for too long, and says how long that was.
///
/// An answer without slots (an error, or bad JSON) counts as no news. A server that has never listed its slots, as with
/// `--no-slots`, is not watched, since every pause would look like a stall.
async fn until_stalled(client: &Client, url: &str, key: &Secret, patience: Duration) -> Duration {
    if patience.is_zero() {
        return std::future::pending().await;
    }
    let slots = format!("{url}/slots");
    let mut stall = Stall::new(patience, Instant::now());
    let (mut lists_slots, mut warned) = (false, false);
    loop {
        let seen = match look(client.get(&slots).bearer_auth(key.expose())).await {
            Look::Slots(slots) => {
                lists_slots = true;
                Some(slots)
            }
            Look::Nothing => None,
            Look::Unusable(why) => {
                if !lists_slots {
                    if !warned {
                        tracing::warn!(
                            "llama-server does not list its slots ({why}), so a server that hangs is not noticed; take \
                             --no-slots out of `extra_args`"
                        );
                        warned = true;
                    }
                    stall = Stall::new(patience, Instant::now());
                }
                None
            }
        };
        if let Some(stalled) = stall.look(Instant::now(), seen) {
            return stalled;
        }
        sleep(LOOK).await;
    }
}

/// What comes of asking for the slots.
enum Look {
    Slots(Vec<Slot>),
    /// No answer: the server is busy, or hangs.
    Nothing,
    /// An answer without slots.
    Unusable(String),
}

async fn look(request: reqwest::RequestBuilder) -> Look {
    let Ok(answer) = request.send().await else {
        return Look::Nothing;
    };
    let status = answer.status();
    match bounded::body(answer, MOST_BODY).await {
        Err(BodyError::Broken(_)) => Look::Nothing,
        Err(error @ BodyError::TooLong(_)) => Look::Unusable(error.to_string()),
        Ok(_) if !status.is_success() => Look::Unusable(status.to_string()),
        Ok(body) => serde_json::from_slice(&body).map_or_else(|error| Look::Unusable(error.to_string()), Look::Slots),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::get;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(1);

    /// A server that gives these answers to `/slots`, the last one again and again.
    async fn server(answers: Vec<(StatusCode, &'static str)>) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let count = Arc::new(AtomicUsize::new(0));
        let answer = move || {
            let number = count.fetch_add(1, Ordering::Relaxed).min(answers.len() - 1);
            std::future::ready(answers[number])
        };
        let router = Router::new().route("/slots", get(answer));
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    async fn stalls(answers: Vec<(StatusCode, &'static str)>, within: Duration) -> bool {
        let url = server(answers).await;
        let key = Secret::new("k");
        let stalled = async { until_stalled(&client().unwrap(), &url, &key, PATIENCE).await };
        timeout(within, stalled).await.is_ok()
    }

    /// A slot that generates and does not move.
    const STUCK: &str = r#"[{"is_processing":true,"id_task":7,"next_token":[{"n_decoded":3}]}]"#;

    #[tokio::test]
    async fn one_bad_answer_does_not_end_the_watch_for_stalls() {
        for (status, body) in [
            (StatusCode::INTERNAL_SERVER_ERROR, "{}"),
            (StatusCode::SERVICE_UNAVAILABLE, "loading"),
            (StatusCode::OK, "[{"),
        ] {
            for before in [vec![], vec![(StatusCode::OK, STUCK)]] {
                let answers = [before, vec![(status, body), (StatusCode::OK, STUCK)]].concat();
                assert!(stalls(answers, PATIENCE * 6).await, "{status} {body}");
            }
        }
    }

    #[tokio::test]
    async fn a_server_that_never_lists_its_slots_is_not_taken_for_one_that_hangs() {
        assert!(!stalls(vec![(StatusCode::NOT_IMPLEMENTED, "{}")], PATIENCE * 13).await);
    }
}
