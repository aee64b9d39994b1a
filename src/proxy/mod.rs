//! The OpenAI endpoint.
