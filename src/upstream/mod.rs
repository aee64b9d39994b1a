//! Clients of the servers behind this process: llama-server, Ollama, vLLM, SGLang, and any server with OpenAI's API.
//!
//! No answer is trusted: each is read within bounds by [`crate::http::client`], and what it counts is capped where it is
//! read.
//!
//! | file | what it does |
//! | --- | --- |
//! | `connection` | sends requests to one server, and every error of it |
//! | `llama_server` | token ids, drafts, the draft protocol |
//! | `text_server` | drafts as text |
//! | `scoring`, `vllm`, `sglang` | servers that score a draft in the prompt |
//! | `chat` | a chat completion as any client sees it |
//! | `sse` | the lines of an event stream |
//! | `written_tokens` | token ids as JSON, kept between requests |

pub mod chat;
mod connection;
mod llama_server;
mod scoring;
mod sglang;
pub(crate) mod sse;
mod text_server;
mod vllm;
mod written_tokens;

pub use crate::http::headers::MEASURING;
pub use chat::{ChatError, ChatServer};
pub use connection::UpstreamError;
pub use llama_server::{
    DraftAnswer, DraftCall, DraftPiece, DraftState, DraftStream, Generated, LlamaServer, Props, StreamEnd,
};
pub use scoring::{Scores, ScoringServer, Tokenized};
pub use sglang::Sglang;
pub use text_server::{TextPiece, TextServer, TextStream};
pub use vllm::Vllm;
pub use written_tokens::WrittenTokens;
