//! Clients of the servers behind us.

pub mod chat;
mod connection;
mod llama_server;
mod sglang;
pub(crate) mod sse;
mod text_server;
mod vllm;

pub use chat::{ChatError, ChatServer};
pub use connection::UpstreamError;
pub use llama_server::{
    DraftAnswer, DraftCall, DraftPiece, DraftState, DraftStream, Generated, LlamaServer, Props, StreamEnd,
};
pub use sglang::Sglang;
pub use text_server::{TextPiece, TextServer, TextStream};
pub use vllm::Vllm;

use crate::speculation::Token;

/// What a server that scores prompts said of a text and a draft after it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scores {
    /// For each draft token the one that the model finds likeliest in its place; `None` where the server does not tell.
    pub likeliest: Vec<Option<Token>>,
    /// What it generated after the draft.
    pub generated: Generated,
}

/// The tokens of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// The tokens.
    pub tokens: Vec<Token>,
    /// Tokens that a prompt and its answer may have together, where the server tells.
    pub n_ctx: Option<usize>,
}
