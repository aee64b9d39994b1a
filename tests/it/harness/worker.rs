use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tightwad::config::Secret;
use tightwad::pool::agent::{EndpointState, LeaseRequest, WorkerStatus};
use tightwad::pool::agent_client::AgentClient;
use tightwad::supervise::sockets;

use super::llama_server::{Program, free_port, llama_cpp};
use super::wait::eventually;

pub const TOKEN: &str = "between the two of us";

/// `tightwad run worker` on this machine, with a `ggml-rpc-server --device CPU` for each port.
pub struct Worker {
    program: Program,
    pub rpc_ports: Vec<u16>,
    pub agent_port: u16,
    folder: TempDir,
}

impl Worker {
    /// Starts it with one endpoint and waits until its agent answers.
    pub async fn start() -> Self {
        Self::start_with(1, "cache_gb: 0").await
    }

    /// As [`Self::start`], with so many endpoints and more keys of its entry. `FOLDER` in them is a folder of its own.
    pub async fn start_with(endpoints: usize, more: &str) -> Self {
        Self::try_start(endpoints, more, |config, _| config).await
    }

    /// As [`Self::start_with`] one endpoint; `change` has the last word on its config, and may put files into its folder.
    pub async fn start_as(more: &str, change: impl Fn(String, &Path) -> String) -> Self {
        Self::try_start(1, more, change).await
    }

    async fn try_start(endpoints: usize, more: &str, change: impl Fn(String, &Path) -> String) -> Self {
        // A port may be lost between asking for it and using it.
        for _ in 0..3 {
            let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
            let rpc_ports: Vec<u16> = (0..endpoints).map(|_| free_port()).collect();
            let agent_port = free_port();
            let more = more.replace("FOLDER", folder.path().to_str().expect("UTF-8"));
            let config = change(config(agent_port, &rpc_ports, &more), folder.path());
            let program = run_worker(folder.path(), &config);
            let mut worker = Self {
                program,
                rpc_ports,
                agent_port,
                folder,
            };
            let client = worker.client();
            loop {
                if client.status().await.is_ok() {
                    return worker;
                }
                if !worker.program.is_alive() {
                    assert!(worker.program.log().contains("is in use"), "{}", worker.program.log());
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        panic!("the worker does not start");
    }

    pub fn client(&self) -> AgentClient {
        self.client_with(Some(TOKEN))
    }

    pub fn client_with(&self, token: Option<&str>) -> AgentClient {
        let url = format!("http://127.0.0.1:{}", self.agent_port);
        AgentClient::at("w", url, token.map(Secret::new)).expect("a client")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn log(&self) -> String {
        self.program.log()
    }

    /// How an endpoint is, and with it the rest, once it is `state`.
    pub async fn becomes(&self, state: EndpointState, within: Duration) -> WorkerStatus {
        let shown = eventually(within, || async {
            let status = self.client().status().await.expect("the agent answers");
            let all = status.endpoints.iter().all(|endpoint| endpoint.state == state);
            if all { Ok(status) } else { Err(status) }
        });
        shown
            .await
            .unwrap_or_else(|status| panic!("not {state:?}: {status:#?}\n{}", self.log()))
    }

    /// Process ids of the servers that run.
    pub fn servers(&self) -> Vec<u32> {
        children(self.program.pid())
    }

    pub fn signal(&self, signal: Signal) {
        send(self.program.pid(), signal);
    }

    /// Waits until it has ended, and says with which exit code.
    pub async fn ended(&mut self, within: Duration) -> Option<i32> {
        let program = &mut self.program;
        let give_up = tokio::time::Instant::now() + within;
        while program.is_alive() {
            assert!(
                tokio::time::Instant::now() < give_up,
                "it still runs:\n{}",
                program.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        program.exit_code()
    }
}

/// A config with one worker, `w`.
pub fn config(agent_port: u16, rpc_ports: &[u16], more: &str) -> String {
    let gpus: Vec<String> = rpc_ports
        .iter()
        .map(|port| format!("{{ name: a CPU, vram_gb: 1, rpc_port: {port} }}"))
        .collect();
    format!(
        "workers:\n- {{ name: w, host: 127.0.0.1, backend: cpu, agent_port: {agent_port}, agent_token: {TOKEN}, \
         gpus: [ {} ], extra_args: [ -t, '1' ], {more} }}\nbinaries: {{ llama_server: {}, rpc_server: {} }}\n",
        gpus.join(", "),
        llama_cpp().join("bin/llama-server").display(),
        llama_cpp().join("bin/ggml-rpc-server").display(),
    )
}

/// Starts `tightwad run worker` with this config.
pub fn run_worker(folder: &Path, config: &str) -> Program {
    let file: PathBuf = folder.join("tightwad.yaml");
    fs::write(&file, config).expect("a config");
    let file = file.to_str().expect("UTF-8");
    Program::start(
        Path::new(env!("CARGO_BIN_EXE_tightwad")),
        &["-c", file, "run", "worker"],
    )
}

pub fn lease_request(holder: &str, epoch: u64) -> LeaseRequest {
    LeaseRequest {
        holder: holder.to_owned(),
        epoch,
    }
}

/// Whether somebody listens on a port of 127.0.0.1, asked without connecting.
pub fn is_listening(port: u16) -> bool {
    sockets::is_listening(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).expect("the kernel's list")
}

/// Process ids of the children of a process that have not ended.
pub fn children(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| matches!(state_and_parent(*pid), Some((state, of)) if of == parent && state != "Z"))
        .collect()
}

/// Whether a process runs.
pub fn lives(pid: u32) -> bool {
    state_and_parent(pid).is_some_and(|(state, _)| state != "Z")
}

pub fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process");
    kill_process(pid, signal).expect("it runs");
}

fn state_and_parent(pid: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split_whitespace();
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}
