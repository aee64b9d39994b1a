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

    /// Takes in what `/slots` says (`None`: it did not answer), and says whether nothing has moved for too long. A server
    /// answers it between two batches, so that no answer is no news.
    pub(super) fn look(&mut self, now: Instant, slots: Option<Vec<Slot>>) -> bool {
        if let Some(slots) = slots {
            let idle = !slots.iter().any(|slot| slot.is_processing);
            if idle || slots != self.slots {
                self.moved = now;
            }
            self.slots = slots;
        }
        now.duration_since(self.moved) >= self.patience
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
            assert!(!stall.look(
                begun + Duration::from_secs(second),
                Some(slots(true, 4, i64::try_from(second).unwrap()))
            ));
        }
        let last = begun + Duration::from_secs(99);
        assert!(!stall.look(last + Duration::from_secs(29), Some(slots(true, 4, 99))));
        assert!(stall.look(last + PATIENCE, Some(slots(true, 4, 99))));
    }

    #[test]
    fn a_long_prompt_moves_too_and_idleness_is_no_stall() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        for minute in 1..10_u32 {
            assert!(!stall.look(begun + PATIENCE * minute, Some(slots(true, minute.into(), 0))));
        }
        for minute in 10..20_u32 {
            assert!(!stall.look(begun + PATIENCE * minute, Some(slots(false, 9, 0))));
        }
    }

    #[test]
    fn a_server_that_never_answers_is_stalled() {
        let begun = Instant::now();
        let mut stall = Stall::new(PATIENCE, begun);
        assert!(!stall.look(begun + Duration::from_secs(29), None));
        assert!(stall.look(begun + PATIENCE, None));
    }
}
