//! One model over the GPUs of several machines: llama.cpp's RPC, supervised.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`agent`] | what a worker's agent says over HTTP |
//! | [`agent_client`] | asks it |
//! | [`build`] | the build of llama.cpp |
//! | [`rpc_probe`] | asks a ggml-rpc-server that nobody has |
//! | [`worker`] | a host that lends its GPUs |
//! | [`devices`] | the devices of the pool and their memory |
//! | [`launch`] | the command line of its llama-server |
//! | [`swap`] | which model runs, who waits, what happens next (pure) |
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
