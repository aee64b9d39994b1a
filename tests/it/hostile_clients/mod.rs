//! Clients that hold what they were given, web pages of others, and text that is meant for a log: tried against the proxy,
//! the worker's agent and the coordinator.

mod connections;
mod coordinator;
mod disclosure;
mod pages;

use std::path::Path;
use std::time::Duration;

use crate::harness::fake_upstream::{FakeUpstream, json};
use crate::harness::llama_server::Program;
use crate::harness::wait::eventually;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const CHAT: &str = "/v1/chat/completions";
const UNSTREAMED: &str = r#"{"messages":[]}"#;
const STREAMED: &str = r#"{"messages":[],"stream":true}"#;
const EVIL: &str = "https://evil.example";

/// A target that answers everything with an empty object.
async fn content() -> FakeUpstream {
    FakeUpstream::start(|_| json("200 OK", "{}")).await
}

/// A connection to `address` on which `text` has been sent.
async fn sent(address: &str, text: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(text.as_bytes()).await.unwrap();
    socket
}

/// `tightwad run …` with a config and folders of its own.
struct Run {
    program: Program,
    _folder: TempDir,
}

impl Run {
    /// Runs `part` after `before` in a shell.
    fn start(before: &str, part: &[&str], config: &str) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = folder.path().join("tightwad.yaml");
        std::fs::write(&file, config).unwrap();
        let home = folder.path().display();
        let script = format!(
            "{before}; export XDG_RUNTIME_DIR={home} XDG_STATE_HOME={home}; exec {} -c {} run \"$@\"",
            env!("CARGO_BIN_EXE_tightwad"),
            file.display()
        );
        let args: Vec<&str> = ["-c", &script, "sh"].into_iter().chain(part.iter().copied()).collect();
        Self {
            program: Program::start(Path::new("sh"), &args),
            _folder: folder,
        }
    }

    /// Waits until it listens.
    async fn listens(&self, port: u16) -> String {
        let address = format!("127.0.0.1:{port}");
        let up = eventually(Duration::from_secs(10), || TcpStream::connect(address.clone())).await;
        assert!(up.is_ok(), "{}", self.program.log());
        address
    }

    fn limit(&self) -> String {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", self.program.pid())).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        line.split_whitespace().nth(3).unwrap().to_owned()
    }
}
