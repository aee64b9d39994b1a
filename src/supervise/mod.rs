//! Starts, watches, restarts and ends child processes. No child outlives this process, however it dies.
//!
//! The command line and the worker start a [`service::Service`], which runs the checks and starts the child. Its state goes to
//! systemd and to the log.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`command`] | llama-server's arguments (pure) |
//! | [`preflight`] | checks before a start: program, model, port |
//! | [`parent_bound`] | a child that the kernel kills with its supervisor |
//! | [`child`] | one running child, as a guard |
//! | [`death`] | why a child died (pure) |
//! | [`restart`] | when to start again, when to give up (pure) |
//! | [`service`] | keeps one server running |
//! | [`notify`] | reports the state of this process to systemd |
//! | [`stall`] | finds a server that no longer generates |
//! | [`devices`] | the devices of a server |
//! | [`environment`] | the environment variables of a child |
//! | [`sockets`] | listeners and connections, found without connecting |

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
