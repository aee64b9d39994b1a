//! Child processes: start, watch, restart, end.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`command`] | llama-server's arguments (pure) |
//! | [`preflight`] | what must be there before a start |
//! | [`parent_bound`] | a child that is killed with its supervisor, however that dies |
//! | [`child`] | one running child, as a guard |
//! | [`death`] | why a child died (pure) |
//! | [`restart`] | when to start again, when to give up (pure) |
//! | [`service`] | keeps one server running |
//! | [`notify`] | what systemd, which supervises us, is told |
//! | [`stall`] | whether a server still generates |
//! | [`devices`] | what a server computes on |
//! | [`environment`] | what a child inherits |
//! | [`sockets`] | who listens and who is connected, without touching a port |

pub mod child;
pub mod command;
pub mod death;
pub mod devices;
pub mod environment;
pub mod notify;
pub mod parent_bound;
pub mod preflight;
pub mod restart;
pub mod service;
pub mod sockets;
pub mod stall;
