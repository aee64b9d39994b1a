//! The OpenAI-compatible endpoint: forwards requests to the target byte for byte and lets a drafter attach.
//!
//! No byte of a request or an answer is re-serialised, and a drafter that fails never ends an answer. Code that other servers
//! share is in [`crate::http`]. A request passes through these files in this order:
//!
//! | file | what it does |
//! | --- | --- |
//! | `server` | serves the router |
//! | `router` | gives the request an id, asks for the token, routes it |
//! | `forward` | checks the request, attaches a drafter and relays the answer |
//! | `usage` | adds the counts of a prediction to the usage of an answer |
//! | `agreement` | compares the drafter's answers with those of a target that cannot verify drafts |
//! | `active_request` | counts the request while it lives |
//! | `first_token` | finds the first token in the answer |
//! | `observed`, `recent` | metrics and the last requests |
//! | `status` | the proxy's own endpoints |
//! | `settings` | the proxy's part of the cluster file |

mod active_request;
mod agreement;
mod first_token;
mod forward;
mod observed;
mod recent;
mod router;
mod server;
mod settings;
pub mod status;
mod usage;

pub use server::{ServeError, serve};
pub use settings::{Settings, SettingsError};
