//! Tightwad: speculative decoding over several machines, and one model over the GPUs of several machines, behind one OpenAI-compatible
//! endpoint.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`background`] | tasks whose panic is handled; imports nothing |
//! | [`config`] | the cluster file |
//! | [`speculation`] | decisions of speculative decoding, free of I/O |
//! | [`engine`] | attaches a drafter to running completions |
//! | [`rounds`] | drafts for targets that no drafter can attach to |
//! | [`failure`] | explains errors of the system and of HTTP; imports nothing |
//! | [`upstream`] | clients of llama-server, Ollama, vLLM, SGLang and OpenAI |
//! | [`proxy`] | the OpenAI endpoint |
//! | [`mod@bench`] | measures what drafting gains |
//! | [`gguf`] | the header of a model file |
//! | [`plan`] | which layers of a model go on which device |
//! | [`pool`] | one model over the GPUs of several machines |
//! | [`mod@count`] | numbers with their nouns |
//! | [`supervise`] | child processes |
//! | [`http`] | code that all HTTP servers and clients share |
//! | [`observe`] | log and metrics |
//! | [`cli`] | the command line |

pub mod background;
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
