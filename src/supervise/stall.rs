//! Whether a llama-server still generates. A worker that falls silent hangs it for ever, and so do some grammars, with all its
//! sockets open: what is watched are tokens.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::time::sleep;

use super::child::is_stopped;
use crate::config::Secret;

/// Pause between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Longest wait for the answer to a look.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is wrong with a server that runs and does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stalled {
    /// Nothing has moved for so long.
    Still(Duration),
    /// A signal or a debugger has stopped its process for so long.
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

/// A client for looks at servers of this machine, never through a proxy of the environment.
pub fn client() -> io::Result<reqwest::Client> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(PATIENCE)
        .pool_max_idle_per_host(0);
    client.build().map_err(io::Error::other)
}

/// Waits until the server at `url` has stalled for `patience`; for ever if that is zero. `pid` is that of its process.
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
        if !is_stopped(pid) {
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
        let stalled = match look(request).await {
            Look::Slots(slots) => {
                refused = None;
                stall.look(Instant::now(), Some(slots))
            }
            Look::Nothing => stall.look(Instant::now(), None),
            Look::Refused(why) => {
                stall.answered(Instant::now());
                if refused.as_ref() != Some(&why) {
                    tracing::warn!(
                        "{slots} answers {why}, so that nobody notices if the server hangs; take --no-slots and --api-key out \
                         of `extra_args`"
                    );
                }
                refused = Some(why);
                None
            }
        };
        if let Some(still) = stalled {
            return Stalled::Still(still);
        }
        sleep(LOOK).await;
    }
}

/// What comes of asking for the slots.
enum Look {
    Slots(Vec<Slot>),
    /// No answer: it is busy, or hangs.
    Nothing,
    /// An answer without slots; the next one may have some.
    Refused(String),
}

async fn look(request: reqwest::RequestBuilder) -> Look {
    let Ok(answer) = request.send().await else {
        return Look::Nothing;
    };
    let status = answer.status();
    match answer.bytes().await {
        Err(_) => Look::Nothing,
        Ok(_) if !status.is_success() => Look::Refused(status.to_string()),
        Ok(body) => serde_json::from_slice(&body).map_or_else(
            |_| Look::Refused("with something else than its slots".to_owned()),
            Look::Slots,
        ),
    }
}

/// What `GET /slots` tells of a slot: build b11434, `server_slot::to_json`.
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
    /// It works on a prompt, of which it tells nothing before a whole batch is computed.
    fn reads(&self) -> bool {
        self.is_processing && self.next_token.iter().all(|token| token.n_decoded == 0)
    }
}

/// A batch of a prompt has up to 2048 tokens, and so many times the patience of a single one.
const PROMPT: u32 = 10;

/// The time since something moved.
#[derive(Debug)]
struct Stall {
    patience: Duration,
    moved: Instant,
    slots: Vec<Slot>,
}

impl Stall {
    fn new(patience: Duration, now: Instant) -> Self {
        Self {
            patience,
            moved: now,
            slots: Vec::new(),
        }
    }

    /// It answers, though not with its slots: it lives, and what it does is not known.
    fn answered(&mut self, now: Instant) {
        self.moved = now;
        self.slots.clear();
    }

    /// Takes in what `/slots` says (`None`: it did not answer), and says how long nothing has moved if that is too long. A
    /// server does not answer it in the middle of a batch, so that no answer is no news; and one that was idle when it was
    /// last heard of may have a prompt by now.
    fn look(&mut self, now: Instant, slots: Option<Vec<Slot>>) -> Option<Duration> {
        if let Some(slots) = slots {
            let idle = !slots.iter().any(|slot| slot.is_processing);
            if idle || slots != self.slots {
                self.moved = now;
            }
            self.slots = slots;
        }
        let idle = !self.slots.iter().any(|slot| slot.is_processing);
        let patience = if idle || self.slots.iter().any(Slot::reads) {
            self.patience * PROMPT
        } else {
            self.patience
        };
        Some(now.duration_since(self.moved)).filter(|still| *still >= patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

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
            let look = stall.look(begun + Duration::from_secs(second), Some(slots(true, 4, decoded)));
            assert_eq!(look, None);
        }
        let last = begun + Duration::from_secs(99);
        assert_eq!(
            stall.look(last + Duration::from_secs(29), Some(slots(true, 4, 100))),
            None
        );
        assert_eq!(stall.look(last + PATIENCE, None), Some(PATIENCE));
    }

    #[test]
    fn a_prompt_may_take_ten_times_as_long_for_each_of_its_batches() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        for minute in 1..10_u32 {
            let now = begun + PATIENCE * 9 * minute;
            assert_eq!(stall.look(now, Some(slots(true, minute.into(), 0))), None);
            assert_eq!(stall.look(now + PATIENCE * 8, None), None);
        }
        let last = begun + PATIENCE * 81;
        assert!(stall.look(last + PATIENCE * 10, None).is_some());
    }

    #[test]
    fn one_that_decodes_beside_a_prompt_waits_for_its_batches_too() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        let both: Vec<_> = [slots(true, 4, 7), slots(true, 2048, 0)].concat();
        assert_eq!(stall.look(begun, Some(both.clone())), None);
        assert_eq!(stall.look(begun + PATIENCE * 2, Some(both)), None);
    }

    #[test]
    fn idleness_is_no_stall() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        for minute in 1..20_u32 {
            assert_eq!(
                stall.look(begun + PATIENCE * 20 * minute, Some(slots(false, 9, 0))),
                None
            );
        }
    }

    #[test]
    fn a_server_that_never_answers_is_stalled() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        assert_eq!(stall.look(begun + PATIENCE * 9, None), None);
        assert!(stall.look(begun + PATIENCE * 10, None).is_some());
    }
}
