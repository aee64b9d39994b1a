//! What a worker's agent says over HTTP.
//!
//! The RPC port of a worker serves one client at a time, and whoever else connects hangs (llama.cpp b11434,
//! `ggml_backend_rpc_start_server`). So nobody asks that port how a worker is: the agent, on a port of its own, knows.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/worker` | [`WorkerStatus`] |
//! | `POST /v1/worker/lease` with [`LeaseRequest`] | [`Lease`], as soon as fresh `ggml-rpc-server`s listen; 409 while another holder has it |
//! | `POST /v1/worker/lease/{id}/renew` | [`Renewal`]; 404 if that lease is over |
//! | `DELETE /v1/worker/lease/{id}` | 204, as soon as the servers have ended and their memory is free |
//!
//! Every request carries `Authorization: Bearer TOKEN` where the worker has a token; 401 without it. 503: its servers do
//! not start, or it still checks what it has on disk. Whatever is refused is refused with a [`Refusal`].

use serde::{Deserialize, Serialize};

/// How a worker is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its name in the cluster file.
    pub name: String,
    /// The build of llama.cpp, as its programs tell it: `b11434`.
    pub build: String,
    /// Version of the RPC protocol: `7.0.0`; `None` until a server has told it.
    pub protocol: Option<String>,
    /// Its `ggml-rpc-server`s.
    pub endpoints: Vec<Endpoint>,
    /// Who has it.
    pub lease: Option<Holder>,
    /// Bytes of model parts on its disk, counted within the last half minute, and the most that it keeps.
    pub cache_bytes: u64,
    /// See `cache_bytes`.
    pub cache_quota_bytes: u64,
    /// Last lines of the servers' log.
    pub last_lines: Vec<String>,
}

/// One `ggml-rpc-server` of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its port.
    pub port: u16,
    /// How it is.
    pub state: EndpointState,
    /// Its devices, in the order in which its clients see them.
    pub devices: Vec<DeviceStatus>,
}

/// How a `ggml-rpc-server` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointState {
    /// Not running; a lease starts it.
    Idle,
    /// It starts.
    Starting,
    /// It listens.
    Listening,
    /// A coordinator's llama-server is connected.
    Connected,
    /// It died, and what it held is lost: only the next lease starts another. Or it was stopped (SIGSTOP), and answers
    /// nobody.
    Failed,
}

impl Endpoint {
    /// What is wrong with these of a worker, if anything is.
    #[must_use]
    pub fn problem(all: &[Self]) -> Option<String> {
        let failed = all.iter().filter(|endpoint| endpoint.state == EndpointState::Failed);
        let failed = failed.map(|endpoint| format!("its ggml-rpc-server on port {} does not work", endpoint.port));
        failed.reduce(|all, one| format!("{all}; {one}"))
    }
}

/// One device of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// As llama.cpp calls it: `CUDA0`.
    pub name: String,
    /// What it is: `NVIDIA GeForce RTX 4070 Ti SUPER`.
    pub description: String,
    /// Its memory.
    pub total_bytes: u64,
    /// What of that is free, last looked at while no coordinator was connected.
    pub free_bytes: u64,
}

impl DeviceStatus {
    /// Reads a line of the lists that llama.cpp's programs print:
    /// `  CUDA0: NVIDIA GeForce RTX 4070 (16000 MiB, 15000 MiB free)` (b11434, `common_print_available_devices`, and
    /// `main` of `ggml-rpc-server`).
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (device, memory) = line.trim().strip_suffix(" MiB free)")?.rsplit_once(" (")?;
        let (name, description) = device.split_once(": ")?;
        let (total, free) = memory.split_once(" MiB, ")?;
        let bytes = |mebibytes: &str| mebibytes.parse::<u64>().ok()?.checked_mul(1 << 20);
        Some(Self {
            name: name.to_owned(),
            description: description.trim().to_owned(),
            total_bytes: bytes(total)?,
            free_bytes: bytes(free)?,
        })
    }
}

/// Asks for the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// Name of the coordinator that wants it, `192.168.1.10:8080#1f0c9a3e`. Two coordinators never have the same.
    pub holder: String,
    /// Grows with each start of a llama-server. The same holder takes over its own lease with a higher one; a lower or
    /// equal one is refused with 409.
    pub epoch: u64,
}

/// The worker is yours until you return it, or fall silent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Unguessable name.
    pub id: String,
    /// Seconds after which it is over unless it is renewed.
    pub expires_seconds: u64,
}

/// A lease goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Renewal {
    /// Its `ggml-rpc-server`s, as they are now: whoever renews need not ask again.
    pub endpoints: Vec<Endpoint>,
}

/// Who has a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// As in [`LeaseRequest`].
    pub holder: String,
    /// As in [`LeaseRequest`].
    pub epoch: u64,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// One sentence.
    pub error: String,
    /// With 409: who has the worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
}
