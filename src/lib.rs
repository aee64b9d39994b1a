//! Tightwad: many unlike GPUs on many machines behind one OpenAI-compatible endpoint.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | the cluster file |
//! | [`speculation`] | decisions of speculative decoding, free of I/O |
//! | [`engine`] | attaches a drafter to running completions |
//! | [`rounds`] | answers for targets that no drafter can attach to |
//! | [`failure`] | why an operation failed, in plain words; imports nothing |
//! | [`upstream`] | clients of the servers behind us |
//! | [`proxy`] | the OpenAI endpoint |
//! | [`mod@bench`] | what drafting gains, measured |
//! | [`gguf`] | the header of a model file |
//! | [`plan`] | which layers of a model go on which device |
//! | [`pool`] | one model over the GPUs of several machines |
//! | [`mod@count`] | numbers with their nouns |
//! | [`supervise`] | child processes |
//! | [`http`] | what every HTTP server of ours shares |
//! | [`observe`] | log and metrics |
//! | [`cli`] | the command line |

pub mod bench;
pub mod cli;
pub mod config;
pub mod count;
pub mod engine;
pub mod failure;
pub mod gguf;
pub mod http;
pub mod observe;
pub mod plan;
pub mod pool;
pub mod proxy;
pub mod rounds;
pub mod supervise;
pub mod upstream;

pub use tightwad_speculation as speculation;
