//! The last requests, for the status. Keeps at most [`CAPACITY`].

use std::collections::VecDeque;

use parking_lot::Mutex;
use serde::Serialize;

use crate::engine::Counts;
use crate::observe::Outcome;

/// Number of requests that are kept.
const CAPACITY: usize = 50;

/// One request that has ended.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// Its `x-request-id`.
    pub id: String,
    /// Time of its arrival, in seconds since 1970.
    pub time: f64,
    /// Its path, without the query.
    pub path: String,
    /// HTTP status of the answer; `None` if the client left before.
    pub status: Option<u16>,
    /// Whether the client requested a stream.
    pub streamed: bool,
    /// Milliseconds from its arrival to the end of its answer.
    pub duration_ms: f64,
    /// Milliseconds from its arrival to its first token; `None` unless it is streamed.
    pub ttft_ms: Option<f64>,
    /// Counts of the target for it; `None` without a step, for example for a request that was only forwarded.
    #[serde(flatten)]
    pub counts: Option<Counts>,
    /// How it ended.
    pub outcome: Outcome,
}

/// The last requests, oldest first.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<Record>>);

impl Recent {
    /// Adds a request, and drops the oldest one if there are too many.
    pub fn push(&self, record: Record) {
        let mut records = self.0.lock();
        if records.len() == CAPACITY {
            records.pop_front();
        }
        records.push_back(record);
    }

    /// All that are kept, newest first.
    #[must_use]
    pub fn newest_first(&self) -> Vec<Record> {
        let records = self.0.lock();
        records.iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_fifty_are_kept_newest_first() {
        let recent = Recent::default();
        for id in 0..60 {
            recent.push(Record {
                id: id.to_string(),
                time: 0.0,
                path: "/v1/completions".into(),
                status: Some(200),
                streamed: false,
                duration_ms: 1.0,
                ttft_ms: None,
                counts: None,
                outcome: Outcome::Finished,
            });
        }
        let ids: Vec<_> = recent.newest_first().into_iter().map(|record| record.id).collect();
        assert_eq!(ids.len(), CAPACITY);
        assert_eq!((ids[0].as_str(), ids[49].as_str()), ("59", "10"));
    }
}
