//! Measures what drafting gains: asks the same prompts with and without drafting, and times both with the same clock.
//!
//! All contenders take turns, so that a machine that slows down slows all of them. The commands `bench`, `verify` and `demo` use it.
//!
//! | file | what it does |
//! | --- | --- |
//! | `prompts`, `prompts.jsonl` | the prompts: the set that ships, or a file |
//! | `padding` | lengthens prompts, for a longer context |
//! | `contender` | a server to measure, and its counts of drafting |
//! | `measure` | asks the contenders in turns |
//! | `native_draft` | a llama-server that drafts in its own process, to compare with |
//! | `delay` | a relay that adds latency to a server |
//! | `statistics` | medians, percentiles and ratios |
//! | [`pool`] | measures the speed of a pool |
//! | `report` | the figures of each mode, side by side |
//! | `verify` | compares answers and finds the first difference |

mod contender;
mod delay;
mod measure;
mod native_draft;
mod padding;
pub mod pool;
mod prompts;
mod report;
mod statistics;
mod verify;

pub use contender::{Contender, Mode};
pub use delay::{Relay, RelayError};
pub use measure::{Measurements, Plan, Progress, Sample, measure};
pub use native_draft::{LengthTrial, ModelPair, NativeDraft, NativeDraftError};
pub use padding::pad;
pub use prompts::{Prompt, PromptError};
pub use report::{Acceptance, Comparison, Figures, Group};
pub(crate) use statistics::median;
pub use verify::{Divergence, Verified, verify};
