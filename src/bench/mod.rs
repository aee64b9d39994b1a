//! What drafting gains, measured: the same prompts with and without it, by the same clock.
//!
//! | file | what it does |
//! | --- | --- |
//! | `prompts`, `prompts.jsonl` | what is asked: the set that ships, or a file |
//! | `padding` | longer prompts, for a longer context |
//! | `contender` | who is asked, and what its server counts beside |
//! | `measure` | asks, in turns |
//! | `own_draft` | a llama-server that drafts in its own process, to compare with |
//! | `delay` | a longer way to a server |
//! | `statistics` | medians and ratios |
//! | `report` | what the measurements come to |
//! | `verify` | whether two answers are the same, and where they part |

mod contender;
mod delay;
mod measure;
mod native_draft;
mod padding;
mod prompts;
mod report;
mod statistics;
mod verify;

pub use contender::{Contender, Mode};
pub use delay::{Relay, RelayError};
pub use measure::{Measurements, Plan, Progress, Sample, measure};
pub use native_draft::{OwnDraft, OwnDraftError, Pair, Tried};
pub use padding::pad;
pub use prompts::{Prompt, PromptError};
pub use report::{Acceptance, Comparison, Figures, Group};
pub(crate) use statistics::median;
pub use verify::{Divergence, Verified, verify};
