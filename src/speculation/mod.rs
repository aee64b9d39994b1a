//! Decisions of speculative decoding: what to draft, what to offer, and how long the target waits.
//!
//! Everything here is free of I/O and of clocks: callers pass times in. The engine runs one [`Session`] per completion, which
//! turns events into actions; [`Lookup`] drafts from the text itself; [`AdaptivePolicy`] measures a target and its drafters
//! and decides; [`Retokeniser`] turns the text of a drafter with another vocabulary into the target's tokens.

use std::time::Duration;

mod acceptance;
mod copied_text;
mod cost_model;
mod draft_buffer;
mod drafter_stats;
mod lookup;
mod policy;
mod retokenise;
mod session;
#[cfg(test)]
mod simulator;
mod slowdown;
mod step_cost;
mod tuning;

pub use acceptance::TokenClass;
pub use lookup::{Lookup, Proposal};
pub use policy::{
    AdaptivePolicy, ConcurrentLoad, DrafterOutlook, PendingDraft, Policy, StepContext, StepPlan, StepSample,
};
pub use retokenise::{Retokeniser, Spelled};
pub use session::{Offer, Session, SessionAction, SessionContext, SessionEvent};
pub use tuning::Tuning;

/// A token id of the target's vocabulary.
pub type Token = i32;

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// The whole part of a number of microseconds or tokens; 0 for negative ones.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, which is what is wanted"
)]
fn whole(number: f64) -> u64 {
    number as u64
}
