//! Attacks that came to nothing, in short: they must not come to anything later.

mod configs;
mod memory;
mod requests;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use crate::harness::llama_server::{Program, free_port};
use crate::harness::wait::eventually;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// `tightwad run proxy` on a port of its own.
struct ProxyProcess {
    program: Program,
    address: SocketAddr,
    _folder: TempDir,
}

impl ProxyProcess {
    /// Starts it with these keys of the section `proxy`, and waits until it takes connections.
    async fn start(mut keys: Value) -> Self {
        let port = free_port();
        keys["host"] = json!("127.0.0.1");
        keys["port"] = json!(port);
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = folder.path().join("tightwad.yaml");
        std::fs::write(&file, json!({ "proxy": keys }).to_string()).unwrap();
        let home = |variable: &str| format!("{variable}={}", folder.path().display());
        let (runtime, state) = (home("XDG_RUNTIME_DIR"), home("XDG_STATE_HOME"));
        let command = [&*runtime, &*state, env!("CARGO_BIN_EXE_tightwad")];
        let args = [&command[..], &["-c", file.to_str().unwrap(), "run", "proxy"]].concat();
        let program = Program::start(Path::new("env"), &args);
        let address: SocketAddr = ([127, 0, 0, 1], port).into();
        let up = eventually(Duration::from_secs(20), || async { TcpStream::connect(address).await });
        up.await.unwrap_or_else(|error| panic!("{error}: {}", program.log()));
        Self {
            program,
            address,
            _folder: folder,
        }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}
