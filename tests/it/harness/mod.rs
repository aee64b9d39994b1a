//! Real llama-server processes, scripted drafters and the proxy, for the black-box tests.

pub mod cluster;
pub mod drafter;
pub mod ended;
pub mod fake_agent;
pub mod fake_drafter;
pub mod fake_ollama;
pub mod fake_scoring;
pub mod fake_upstream;
pub mod far_device;
pub mod gguf;
pub mod llama_server;
pub mod network;
pub mod notify_socket;
pub mod pool;
pub mod proxy;
pub mod random_model;
pub mod request;
pub mod tuned_proxy;
pub mod wait;
pub mod worker;
