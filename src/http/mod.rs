//! HTTP, as every part of Tightwad speaks it.

pub mod client;
