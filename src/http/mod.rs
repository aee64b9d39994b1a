//! What every HTTP server and client of Tightwad shares.
//!
//! A request passes through these files in this order:
//!
//! | file | what it does |
//! | --- | --- |
//! | `serve` | accepts connections, hands requests to a router, ends |
//! | `limits` | how many connections there may be, and which one makes room for another |
//! | `socket` | deadlines of a connection between requests; a client that has sent all and still listens |
//! | `peer` | who is at the other end of a connection |
//! | `progress` | how far the request of a connection is |
//! | `body` | reads request bodies at a minimum rate and within a budget |
//! | `origin` | refuses foreign web pages, and names those that may read answers (CORS) |
//! | `excerpt` | a stranger's text, short and harmless in a log |
//! | [`client`] | clients of the servers behind this process, and answers read within bounds |
//!
//! This module imports nothing of this crate but [`crate::config`].

pub(crate) mod admission;
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
