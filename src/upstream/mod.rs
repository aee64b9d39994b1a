//! Clients of the servers behind us.

pub mod chat;
mod llama_server;
pub(crate) mod sse;

pub use chat::{ChatError, ChatServer};
pub use llama_server::{
    DraftAnswer, DraftCall, DraftPiece, DraftState, DraftStream, LlamaServer, Props, StreamEnd, UpstreamError,
};
