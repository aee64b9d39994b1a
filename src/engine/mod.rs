//! Attaches a drafter to running completions: the I/O around [`crate::speculation`].
//!
//! The proxy sees three things: [`Engine::start`] begins to watch the two servers, [`Engine::attach`] gives a completion
//! its drafting session, and [`Engine::status`] tells how it goes.

use std::sync::Arc;

use serde::Serialize;

use crate::config;

/// A draft server and a target, watched.
#[derive(Debug)]
pub struct Engine {}

impl Engine {
    /// Begins to watch both servers in the background; returns at once, whatever is down.
    #[must_use]
    pub fn start(_proxy: &config::Proxy) -> Arc<Self> {
        Arc::new(Self {})
    }

    /// A drafting session for a completion that is about to be sent to the target, or `None` while there is nothing to
    /// draft with. The session begins by itself when the completion does, and ends when the value is dropped.
    #[must_use]
    pub fn attach(self: &Arc<Self>) -> Option<Attachment> {
        None
    }

    /// What is known of both servers and how the drafting went so far.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::default()
    }
}

/// The drafting of one completion; dropping it ends it.
#[derive(Debug)]
pub struct Attachment {}

impl Attachment {
    /// The value of the request header `X-Draft-Key`.
    #[must_use]
    pub fn key(&self) -> &str {
        ""
    }

    /// The counts so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts::default()
    }
}

/// Counted by the target.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Counts {
    /// Passes of the target model in which it generated.
    pub steps: u64,
    /// Draft tokens that the target verified.
    pub drafted: u64,
    /// Draft tokens that the target kept.
    pub accepted: u64,
    /// Tokens that the target generated.
    pub generated: u64,
}

/// How the target verifies drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verification {
    /// Drafts attach to the running completion: our patch of llama-server.
    Attached,
    /// The target cannot verify drafts, or there is no drafter; it is passed through.
    #[default]
    None,
}

/// Health of one server as last seen.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ServerStatus {
    /// Its base URL.
    pub url: String,
    /// The model's name as configured, else as the server tells it.
    pub model: Option<String>,
    /// Whether it answers.
    pub healthy: bool,
    /// Why not, or what is odd about it; one sentence.
    pub problem: Option<String>,
}

/// The engine's part of `/v1/tightwad/status`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Status {
    /// The drafter; `None` when none is configured.
    pub draft: Option<ServerStatus>,
    /// The target.
    pub target: ServerStatus,
    /// How drafts are verified.
    pub verification: Verification,
    /// Why there is no verification, and what would change that; one sentence.
    pub reason: Option<String>,
    /// Sum over all ended and running completions.
    pub counts: Counts,
}
