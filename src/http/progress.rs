//! How far the request of a connection is: known to its socket, its body and its answer.

use std::sync::atomic::{AtomicU8, Ordering};

use super::limits::Place;

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Nothing of a request has come.
    Idle,
    /// A part of a head has come.
    Head,
    /// The router has the request, and the body still comes.
    Body,
    /// The whole request has come, and nothing of the answer has been sent.
    Waiting,
    /// The answer is being sent, or the client of HTTP/1.0 waits for it.
    Answering,
    /// The answer has been handed over, and may not have been sent to its end.
    Answered,
}

/// The progress of a connection.
#[derive(Debug)]
pub(super) struct Progress {
    phase: AtomicU8,
    place: Place,
}

impl Progress {
    pub(super) fn new(place: Place) -> Self {
        Self {
            phase: AtomicU8::new(Phase::Idle as u8),
            place,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Idle,
            1 => Phase::Head,
            2 => Phase::Body,
            3 => Phase::Waiting,
            4 => Phase::Answering,
            _ => Phase::Answered,
        }
    }

    /// The first bytes of a head have come.
    pub(super) fn head_begins(&self) {
        self.becomes(Phase::Head);
    }

    /// The router gets a request.
    pub(super) fn request_begins(&self) {
        self.place.works();
        self.becomes(Phase::Body);
    }

    /// The last byte of the body has come. `interim`: the client knows answers before the answer (HTTP/1.1).
    pub(super) fn body_ends(&self, interim: bool) {
        let next = if interim { Phase::Waiting } else { Phase::Answering };
        // An answer may have begun before.
        let _ = self
            .phase
            .compare_exchange(Phase::Body as u8, next as u8, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// There is an answer.
    pub(super) fn answer_begins(&self) {
        self.becomes(Phase::Answering);
    }

    /// The server has all of the answer.
    pub(super) fn answer_ends(&self) {
        self.becomes(Phase::Answered);
    }

    /// The client has been sent all of the answer.
    pub(super) fn rests(&self) {
        self.becomes(Phase::Idle);
        self.place.rests();
    }

    fn becomes(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }
}
