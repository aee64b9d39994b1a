//! Code that all HTTP servers and clients of Tightwad share: the proxy, the coordinator, a worker's agent and their clients.
//!
//! This module imports nothing of this crate but [`crate::config`] and [`crate::failure`]. A request passes through these
//! files in this order:
//!
//! | file | what it does |
//! | --- | --- |
//! | `serve` | accepts connections, hands requests to a router, shuts down |
//! | `limits` | caps the number of connections and decides which idle one makes room for another |
//! | `socket`, `progress` | deadlines of a connection; whether a client that sent everything still listens |
//! | `peer` | the address at the other end of a connection |
//! | `origin` | refuses foreign web pages and sets the CORS headers |
//! | `auth` | asks for the token |
//! | `paths` | what a path is: its dialect, whether it generates, who may use it |
//! | `body` | reads request bodies at a minimum rate and within a budget of memory |
//! | `admission`, `nesting`, `bounds` | refuse bodies that the server behind could not bear |
//! | `headers` | which headers go on to the other side |
//! | `target` | sends a request to the server behind; retries once on a fresh connection |
//! | `relay`, `events` | passes the answer on, with comments and error events between its events |
//! | `refusal` | every error as HTTP, in the client's dialect |
//! | `members` | sets a member of a JSON object and keeps every other byte |
//! | `excerpt` | shortens and escapes untrusted text for a log |
//! | [`client`] | HTTP clients, and answers read within bounds |

pub(crate) mod admission;
mod ambiguity;
pub(crate) mod auth;
pub(crate) mod body;
mod bounds;
pub mod client;
pub(crate) mod events;
pub(crate) mod excerpt;
pub(crate) mod headers;
pub(crate) mod limits;
pub(crate) mod members;
pub(crate) mod nesting;
pub(crate) mod origin;
pub(crate) mod paths;
pub(crate) mod peer;
mod progress;
pub(crate) mod refusal;
pub(crate) mod relay;
pub(crate) mod serve;
mod socket;
pub(crate) mod target;

pub use limits::Limits;
