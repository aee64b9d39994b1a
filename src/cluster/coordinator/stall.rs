//! Whether the server still generates. A worker that falls silent hangs it for ever, with all its sockets open, so what is
//! watched are tokens.

use std::time::{Duration, Instant};

use serde::Deserialize;

/// What `GET /slots` tells of a slot: build b11434, `server_slot::to_json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Slot {
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
pub(super) struct Stall {
    patience: Duration,
    moved: Instant,
    slots: Vec<Slot>,
}

impl Stall {
    pub(super) fn new(patience: Duration, now: Instant) -> Self {
        Self {
            patience,
            moved: now,
            slots: Vec::new(),
        }
    }

    /// Takes in what `/slots` says (`None`: it did not answer), and says how long nothing has moved if that is too long. A
    /// server does not answer it in the middle of a batch, so that no answer is no news; and one that was idle when it was
    /// last heard of may have a prompt by now.
    pub(super) fn look(&mut self, now: Instant, slots: Option<Vec<Slot>>) -> Option<Duration> {
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
