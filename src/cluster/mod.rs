//! One model over the GPUs of several machines: llama.cpp's RPC, supervised.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`agent`] | what a worker's agent says over HTTP |
//! | [`agent_client`] | asks it |

pub mod agent;
pub mod agent_client;
