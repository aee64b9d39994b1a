//! Clients of the servers behind us.

mod llama_server;

pub use llama_server::{
    DraftPiece, DraftState, DraftStream, LlamaServer, Offer, OfferAnswer, Props, StreamEnd, UpstreamError,
};
