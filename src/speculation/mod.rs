//! Decisions of speculative decoding, free of I/O: what to draft, what to offer, how long to let the target wait.
//!
//! [`Session`] follows one completion; [`Pace`] learns what a pair of servers costs and chooses lengths from it.

mod pace;
mod session;

pub use pace::{Pace, Plan, Step};
pub use session::{Action, Draft, Event, Session};

/// A token id of the target's vocabulary.
pub type Token = i32;
