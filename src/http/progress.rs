//! How far the request of a connection is. Its socket, request body and response body share one [`Progress`].

use std::sync::atomic::{AtomicU8, Ordering};

use super::limits::ConnectionPermit;

/// Phase of a connection.
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
    /// The answer is being sent, or a client of HTTP/1.0 waits for it.
    Answering,
    /// The answer has been handed to the socket, which may not have sent all of it.
    Answered,
}

/// The progress of a connection.
#[derive(Debug)]
pub(super) struct Progress {
    phase: AtomicU8,
    permit: ConnectionPermit,
}

impl Progress {
    pub(super) fn new(permit: ConnectionPermit) -> Self {
        Self {
            phase: AtomicU8::new(Phase::Idle as u8),
            permit,
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
        self.permit.works();
        self.becomes(Phase::Body);
    }

    /// The last byte of the body has come. `interim`: the client understands interim responses (HTTP/1.1).
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

    /// The answer is complete.
    pub(super) fn answer_ends(&self) {
        self.becomes(Phase::Answered);
    }

    /// The client has been sent all of the answer.
    pub(super) fn rests(&self) {
        self.becomes(Phase::Idle);
        self.permit.rests();
    }

    fn becomes(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }
}
