//! Decisions of speculative decoding, free of I/O: what to draft, what to offer, how long to let the target wait.
//!
//! [`Session`] follows one completion; [`Lookup`] drafts from the text itself; [`AdaptivePolicy`] learns what a pair of servers costs
//! and chooses from it; [`Retokeniser`] makes tokens of what a drafter with another vocabulary says.

use std::time::Duration;

mod copied_text;
mod cost_model;
mod lookup;
mod policy;
mod retokenise;
mod session;
#[cfg(test)]
mod simulator;
mod slowdown;
mod step_cost;

pub use lookup::{Lookup, Proposal};
pub use policy::{
    AdaptivePolicy, ConcurrentLoad, DrafterOutlook, PendingDraft, StepContext, StepPlan, StepSample, TokenClass,
};
pub use retokenise::{Retokeniser, Spelled};
pub use session::{Offer, Policy, Session, SessionAction, SessionContext, SessionEvent};

/// A token id of the target's vocabulary.
pub type Token = i32;

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "microseconds of a step, not negative"
)]
fn whole(us: f64) -> u64 {
    us as u64
}
