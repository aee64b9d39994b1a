//! A device that drafts pay on.

use std::time::Duration;

use tightwad::bench::Relay;
use tokio::runtime::Runtime;

use super::llama_server::{Program, free_port, llama_cpp};
use super::wait::eventually;

/// A device on which a step takes ten milliseconds, however many tokens it verifies, in which the processors of this machine
/// are free: a worker of this machine whose bytes take their time on the way. So drafts pay here whatever the processors are
/// good at, and whatever else they do.
pub struct FarDevice {
    _rpc_server: Program,
    _relay: Relay,
    /// Of the relay, which is to outlive the test that started it.
    runtime: Option<Runtime>,
    endpoint: String,
}

impl FarDevice {
    const ROUND_TRIP: Duration = Duration::from_millis(8);

    pub async fn start() -> Self {
        let port = free_port().to_string();
        let rpc_server = Program::start(
            &llama_cpp().join("bin/ggml-rpc-server"),
            &["-H", "127.0.0.1", "-p", &port, "--device", "CPU", "-t", "1"],
        );
        let server = format!("127.0.0.1:{port}");
        let listens = eventually(Duration::from_secs(10), || async {
            tokio::net::TcpStream::connect(&server).await
        });
        listens.await.expect("ggml-rpc-server listens");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let relay = runtime.spawn(async move { Relay::start(&format!("http://{server}"), Self::ROUND_TRIP).await });
        let relay = relay.await.expect("it runs").expect("a relay");
        Self {
            endpoint: relay.url().trim_start_matches("http://").to_owned(),
            _rpc_server: rpc_server,
            _relay: relay,
            runtime: Some(runtime),
        }
    }

    /// What tells a llama-server to compute on it.
    pub fn args(&self) -> [&str; 6] {
        ["--rpc", &self.endpoint, "--device", "RPC0", "-ngl", "99"]
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        let port = self.endpoint.rsplit(':').next().expect("a port");
        port.parse().expect("a number")
    }
}

impl Drop for FarDevice {
    fn drop(&mut self) {
        // Not to be waited for where tasks run.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
