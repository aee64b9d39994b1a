//! Real llama-server processes and a scripted drafter, for the black-box tests.

// every test file compiles this for itself and uses a part of it
#![allow(dead_code, missing_docs, clippy::missing_panics_doc)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod drafter;
pub mod llama_server;
pub mod random_model;
