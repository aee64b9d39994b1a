//! The OpenAI endpoint: forwards what clients send to the target, byte for byte, and lets a drafter attach.
//!
//! A request passes through these files in this order:
//!
//! | file | what it does |
//! | --- | --- |
//! | `server` | serves the router, see [`crate::http`] |
//! | `router` | gives the request its id, asks for the token, picks our own endpoints out |
//! | `paths` | knows the target's paths |
//! | `admission` | reads the body and refuses what cannot be answered |
//! | `nesting`, `bounds` | refuse JSON, grammars and schemas that the target would not bear |
//! | `forward` | sends it on and makes the answer |
//! | `target` | the connection to the target |
//! | `relay` | the answer's bytes, with comments and errors where an event stream needs them |
//! | `usage` | what a request with a prediction finds in its answer's usage |
//! | `agreement` | what a drafter would have said, where the target cannot verify drafts |
//! | `observed`, `recent` | metrics and the last requests |
//! | `running` | what is counted of a request while it lives |
//! | `respond` | everything that can go wrong, as HTTP |
//! | `status` | our own endpoints |

mod agreement;
mod forward;
mod observed;
mod recent;
mod router;
mod running;
mod server;
mod settings;
mod status;
mod usage;

pub use observed::metrics;
pub use server::{ServeError, serve};
pub use settings::{Settings, SettingsError};
