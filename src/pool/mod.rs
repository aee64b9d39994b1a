//! One model over the GPUs of several machines: llama.cpp's RPC backend, supervised.
//!
//! A worker lends its GPUs; the coordinator leases the workers, starts one llama-server over them and forwards requests to it.
//! Invariant: a GPU has one owner at a time, which the lease ensures.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`agent`] | the HTTP protocol between coordinator and worker |
//! | [`agent_client`] | its client |
//! | [`build`] | the build of llama.cpp, which all hosts must share |
//! | [`rpc_probe`] | asks an unused ggml-rpc-server for its devices |
//! | [`worker`] | a host that lends its GPUs |
//! | [`devices`] | finds the devices of the pool and their memory |
//! | [`launch`] | the command line of its llama-server |
//! | [`swap`] | the state machine: which model runs, which requests wait (pure) |
//! | [`coordinator`] | one endpoint over the pool |

pub mod agent;
pub mod agent_client;
pub mod build;
pub mod coordinator;
pub mod devices;
pub mod launch;
pub mod rpc_probe;
pub mod swap;
pub mod worker;
