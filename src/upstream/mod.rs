//! Clients of the servers behind us.

mod llama_server;

pub use llama_server::{
    DraftAnswer, DraftCall, DraftPiece, DraftState, DraftStream, LlamaServer, Props, StreamEnd, UpstreamError,
};
