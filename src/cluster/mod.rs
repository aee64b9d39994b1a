//! One model over the GPUs of several machines: llama.cpp's RPC, supervised.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`agent`] | what a worker's agent says over HTTP |
//! | [`gguf`] | the header of a model file |
//! | [`devices`] | the devices of the pool and their memory |
//! | [`plan`] | which layers go where (pure) |

pub mod agent;
pub mod devices;
pub mod gguf;
pub mod plan;
