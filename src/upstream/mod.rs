//! Clients of the servers behind us.

pub mod chat;
mod connection;
mod llama_server;
pub(crate) mod sse;
mod text_server;

pub use chat::{ChatError, ChatServer};
pub use connection::UpstreamError;
pub use llama_server::{DraftAnswer, DraftCall, DraftPiece, DraftState, DraftStream, LlamaServer, Props, StreamEnd};
pub use text_server::{TextPiece, TextServer, TextStream};
