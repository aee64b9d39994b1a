//! One model over the GPUs of several machines: llama.cpp's RPC, supervised.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`agent`] | what a worker's agent says over HTTP |
//! | [`agent_client`] | asks it |
//! | [`build`] | the build of llama.cpp |
//! | [`rpc_probe`] | asks a ggml-rpc-server that nobody has |
//! | [`worker`] | a host that lends its GPUs |

pub mod agent;
pub mod agent_client;
pub mod build;
pub mod rpc_probe;
pub mod worker;
