//! Decisions of speculative decoding, free of I/O: what to draft, what to offer, how long to let the target wait.
//!
//! [`Session`] follows one completion; [`Lookup`] drafts from the text itself; [`Pace`] learns what a pair of servers costs
//! and chooses from it; [`Retokeniser`] makes tokens of what a drafter with another vocabulary says.

mod lookup;
mod pace;
mod retokenise;
mod session;
#[cfg(test)]
mod simulator;

pub use lookup::{Lookup, Proposal};
pub use pace::{Choice, Circumstances, Class, Growing, Load, Outlook, Pace, Step};
pub use retokenise::{Retokeniser, Spelled};
pub use session::{Action, Event, Moment, Offer, Policy, Session};

/// A token id of the target's vocabulary.
pub type Token = i32;
