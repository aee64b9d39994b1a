//! Finds a llama-server that no longer generates.
//!
//! A silent worker, and some grammars, make llama-server hang for ever with all sockets open. So this watches the tokens that `/slots`
//! counts. A server that is idle is never stalled.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::time::sleep;

use super::child::Activity;
use crate::config::Secret;
use crate::http::client::{self, ReadError};

/// Interval between polls.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// A load without progress for this long has stalled. One tensor over a slow network takes a minute or two.
pub const LOAD_PATIENCE: Duration = Duration::from_secs(300);
/// Time limit of a poll.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest list of slots in bytes. A slot takes some thousand.
const MAX_BODY: usize = 4 << 20;

/// Why a running server makes no progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stalled {
    /// No token for this long.
    Still(Duration),
    /// A signal or a debugger has stopped its process for this long.
    Stopped(Duration),
}

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Still(still) => write!(f, "nothing has moved for {} s", still.as_secs()),
            Self::Stopped(stopped) => write!(
                f,
                "its process has been stopped for {} s (SIGSTOP, or a debugger)",
                stopped.as_secs()
            ),
        }
    }
}

/// A client for polls of servers on this machine.
pub fn client() -> io::Result<reqwest::Client> {
    let client = client::builder().timeout(POLL_TIMEOUT).pool_max_idle_per_host(0);
    client.build().map_err(io::Error::other)
}

/// Waits until the load of a model in the process `pid` has stalled: the process was stopped for `patience`, or used no processor time
/// for [`LOAD_PATIENCE`]. Waits for ever if `patience` is zero.
pub async fn until_load_stalled(pid: u32, patience: Duration) -> Stalled {
    if patience.is_zero() {
        return std::future::pending().await;
    }
    let (mut runs, mut moves, mut before) = (Instant::now(), Instant::now(), 0);
    loop {
        let activity = Activity::of(pid);
        if !activity.is_stopped {
            runs = Instant::now();
        }
        if activity.ticks != before {
            moves = Instant::now();
            before = activity.ticks;
        }
        if runs.elapsed() >= patience {
            return Stalled::Stopped(runs.elapsed());
        }
        if moves.elapsed() >= LOAD_PATIENCE {
            return Stalled::Still(moves.elapsed());
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// Waits until the server at `url` has stalled for `patience`, or for ever if that is zero. `pid` is the server's process.
pub async fn until_stalled(
    http: &reqwest::Client,
    url: &str,
    key: Option<&Secret>,
    pid: u32,
    patience: Duration,
) -> Stalled {
    if patience.is_zero() {
        return std::future::pending().await;
    }
    let slots = format!("{url}/slots");
    let mut stall = Stall::new(patience, Instant::now());
    let mut runs = Instant::now();
    let mut refused = None;
    loop {
        if !Activity::of(pid).is_stopped {
            runs = Instant::now();
        }
        if runs.elapsed() >= patience {
            return Stalled::Stopped(runs.elapsed());
        }
        let request = http.get(&slots);
        let request = match key {
            Some(key) => request.bearer_auth(key.expose()),
            None => request,
        };
        let stalled = match poll(request).await {
            Poll::Slots(slots) => {
                refused = None;
                stall.update(Instant::now(), Some(slots))
            }
            Poll::NoAnswer => stall.update(Instant::now(), None),
            Poll::Refused(why) => {
                stall.answered(Instant::now());
                if refused.as_ref() != Some(&why) {
                    tracing::warn!(
                        "{slots} answers {why}, so Tightwad cannot notice if the server hangs; remove --no-slots and --api-key \
                         from `extra_args`"
                    );
                }
                refused = Some(why);
                None
            }
        };
        if let Some(still) = stalled {
            return Stalled::Still(still);
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// Answer to a request for the slots.
enum Poll {
    Slots(Vec<Slot>),
    /// No answer: the server is busy, or hangs.
    NoAnswer,
    /// An answer without slots, with the reason. The next answer may have some.
    Refused(String),
}

async fn poll(request: reqwest::RequestBuilder) -> Poll {
    let Ok(answer) = request.send().await else {
        return Poll::NoAnswer;
    };
    let status = answer.status();
    if !status.is_success() {
        return Poll::Refused(status.to_string());
    }
    match client::json(answer, MAX_BODY).await {
        Ok(slots) => Poll::Slots(slots),
        Err(ReadError::Broken(_)) => Poll::NoAnswer,
        Err(_) => Poll::Refused("without a list of slots".to_owned()),
    }
}

/// A slot in the answer of `GET /slots` (build b11434, `server_slot::to_json`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
struct Slot {
    is_processing: bool,
    #[serde(default)]
    id_task: i64,
    #[serde(default)]
    n_prompt_tokens_processed: i64,
    #[serde(default)]
    next_token: Vec<NextToken>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
struct NextToken {
    #[serde(default)]
    n_decoded: i64,
}

impl Slot {
    /// Whether the slot reads a prompt. Its counts change only after each whole batch.
    fn is_in_prefill(&self) -> bool {
        self.is_processing && self.next_token.iter().all(|token| token.n_decoded == 0)
    }
}

/// Factor for the time limit while a prompt is read, in batches of up to 2048 tokens.
const PREFILL_FACTOR: u32 = 10;

/// Measures the time since the last progress.
#[derive(Debug)]
struct Stall {
    patience: Duration,
    last_progress: Instant,
    slots: Vec<Slot>,
}

impl Stall {
    fn new(patience: Duration, now: Instant) -> Self {
        Self {
            patience,
            last_progress: now,
            slots: Vec::new(),
        }
    }

    /// The server answered without its slots. Counts as progress, because the slots are unknown.
    fn answered(&mut self, now: Instant) {
        self.last_progress = now;
        self.slots.clear();
    }

    /// Takes in the answer of `/slots`, or `None` without an answer. Returns the time since the last progress if that is too long.
    ///
    /// A server does not answer in the middle of a batch, so a missing answer changes nothing. A server that was idle at the last
    /// answer may read a prompt by now, and gets the longer time limit.
    fn update(&mut self, now: Instant, slots: Option<Vec<Slot>>) -> Option<Duration> {
        if let Some(slots) = slots {
            let idle = !slots.iter().any(|slot| slot.is_processing);
            if idle || slots != self.slots {
                self.last_progress = now;
            }
            self.slots = slots;
        }
        let idle = !self.slots.iter().any(|slot| slot.is_processing);
        let patience = if idle || self.slots.iter().any(Slot::is_in_prefill) {
            self.patience * PREFILL_FACTOR
        } else {
            self.patience
        };
        Some(now.duration_since(self.last_progress)).filter(|still| *still >= patience)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::http::StatusCode;
    use axum::routing::get;
    use futures_util::future::join_all;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Whether a server that gives these answers to `/slots`, the last one again and again, is taken for stalled `within` this time.
    async fn stalls(answers: Vec<(StatusCode, &'static str)>, within: Duration) -> bool {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let count = Arc::new(AtomicUsize::new(0));
        let answer = move || {
            let number = count.fetch_add(1, Ordering::Relaxed).min(answers.len() - 1);
            std::future::ready(answers[number])
        };
        let router = axum::Router::new().route("/slots", get(answer));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let (http, patience) = (client().unwrap(), Duration::from_millis(200));
        let stalled = until_stalled(&http, &url, None, std::process::id(), patience);
        tokio::time::timeout(within, stalled).await.is_ok()
    }

    #[tokio::test]
    async fn one_bad_answer_does_not_end_the_watch_for_stalls() {
        const STUCK: &str = r#"[{"is_processing":true,"id_task":7,"next_token":[{"n_decoded":3}]}]"#;
        let bad = [
            (StatusCode::INTERNAL_SERVER_ERROR, "{}"),
            (StatusCode::SERVICE_UNAVAILABLE, "loading"),
            (StatusCode::OK, "[{"),
        ];
        let after_bad_ones = bad.map(|bad| stalls(vec![bad, (StatusCode::OK, STUCK)], Duration::from_secs(8)));
        assert_eq!(join_all(after_bad_ones).await, [true; 3]);
    }

    #[tokio::test]
    async fn a_server_that_never_lists_its_slots_is_not_taken_for_one_that_hangs() {
        assert!(!stalls(vec![(StatusCode::NOT_IMPLEMENTED, "{}")], Duration::from_secs(4)).await);
    }

    fn slots(is_processing: bool, prompt: i64, decoded: i64) -> Vec<Slot> {
        let slot = serde_json::json!([{
            "id": 0, "is_processing": is_processing, "id_task": 7, "n_prompt_tokens_processed": prompt,
            "next_token": [{ "n_decoded": decoded }]
        }]);
        serde_json::from_value(slot).unwrap()
    }

    #[test]
    fn a_slot_that_does_not_move_is_stalled_and_one_that_does_is_not() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        for second in 0..100 {
            let decoded = i64::try_from(second).unwrap() + 1;
            let stalled = stall.update(begun + Duration::from_secs(second), Some(slots(true, 4, decoded)));
            assert_eq!(stalled, None);
        }
        let last = begun + Duration::from_secs(99);
        assert_eq!(
            stall.update(last + Duration::from_secs(29), Some(slots(true, 4, 100))),
            None
        );
        assert_eq!(stall.update(last + PATIENCE, None), Some(PATIENCE));
    }

    #[test]
    fn a_prompt_may_take_ten_times_as_long_for_each_of_its_batches() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        for minute in 1..10_u32 {
            let now = begun + PATIENCE * 9 * minute;
            assert_eq!(stall.update(now, Some(slots(true, minute.into(), 0))), None);
            assert_eq!(stall.update(now + PATIENCE * 8, None), None);
        }
        let last = begun + PATIENCE * 81;
        assert!(stall.update(last + PATIENCE * 10, None).is_some());
    }

    #[test]
    fn one_that_decodes_beside_a_prompt_waits_for_its_batches_too() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        let both: Vec<_> = [slots(true, 4, 7), slots(true, 2048, 0)].concat();
        assert_eq!(stall.update(begun, Some(both.clone())), None);
        assert_eq!(stall.update(begun + PATIENCE * 2, Some(both)), None);
    }

    #[test]
    fn idleness_is_no_stall() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        for minute in 1..20_u32 {
            assert_eq!(
                stall.update(begun + PATIENCE * 20 * minute, Some(slots(false, 9, 0))),
                None
            );
        }
    }

    #[test]
    fn a_server_that_never_answers_is_stalled() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        assert_eq!(stall.update(begun + PATIENCE * 9, None), None);
        assert!(stall.update(begun + PATIENCE * 10, None).is_some());
    }
}
