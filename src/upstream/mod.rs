//! Clients of the servers behind us.

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
