//! Tightwad seen from outside: the built program and its library against real llama.cpp processes and scripted servers.
//!
//! One binary, so that the harness compiles once. Each module is one subject and stands alone: it starts its own servers on
//! free ports and keeps its files in a folder of its own, so that tests run side by side in any order. `harness` starts
//! servers and fakes them. `cargo test --test it MODULE::` runs one module.

#![expect(clippy::print_stderr, reason = "a test may say what it leaves out")]
// A test that cannot go on says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// Tests are clients of servers that they started themselves.
#![allow(clippy::disallowed_methods)]

mod harness;

mod bench;
mod children;
mod cli;
mod cli_output;
mod config;
mod demo;
mod docs;
mod draft_schedules;
mod drafted_answers;
mod engine_cost;
mod fuzz;
mod hostile_clients;
mod hostile_requests;
mod hostile_servers;
mod layout;
mod llama_server_draft;
mod looked_up_drafts;
mod model_names;
mod never_slower;
mod nix;
mod own_drafts;
mod pid_files;
mod plain_errors;
mod plan;
mod pool;
mod pool_commands;
mod pool_faults;
mod pool_network;
mod pool_proxy;
mod pool_refusals;
mod proxy;
mod readme;
mod rendered_cluster;
mod rounds;
mod scripts;
mod systemd;
mod text_drafters;
mod what_held;
mod worker;
