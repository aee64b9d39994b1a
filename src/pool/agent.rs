//! The HTTP protocol between a coordinator and a worker's agent.
//!
//! The RPC port of a worker serves one client at a time; any other client that connects hangs (llama.cpp b11434,
//! `ggml_backend_rpc_start_server`). So the agent answers questions about the worker, on a port of its own.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/worker` | [`WorkerStatus`] |
//! | `POST /v1/worker/lease` with [`LeaseRequest`] | [`Lease`], as soon as fresh `ggml-rpc-server`s listen; 409 while another holder has it |
//! | `POST /v1/worker/lease/{id}/renew` | [`Renewal`]; 404 if that lease is over |
//! | `DELETE /v1/worker/lease/{id}` | 204, as soon as the servers have ended and their memory is free |
//!
//! If the worker has a token, every request carries `Authorization: Bearer TOKEN`; without it the answer is 401. 503 means
//! that the servers do not start, or that the worker still checks its cache. Every error has a [`Refusal`] as its body.

use serde::{Deserialize, Serialize};

/// Status of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its name in the cluster file.
    pub name: String,
    /// The build of llama.cpp: `b11434`.
    pub build: String,
    /// Version of the RPC protocol: `7.0.0`; `None` until a server has reported it.
    pub protocol: Option<String>,
    /// Its `ggml-rpc-server`s.
    pub endpoints: Vec<Endpoint>,
    /// The holder of the lease.
    pub lease: Option<Holder>,
    /// Bytes of model parts on its disk, counted within the last half minute.
    pub cache_bytes: u64,
    /// Most bytes of model parts that it keeps on its disk.
    pub cache_quota_bytes: u64,
    /// Last lines of the servers' log.
    pub last_lines: Vec<String>,
}

/// One `ggml-rpc-server` of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its port.
    pub port: u16,
    /// Its state.
    pub state: EndpointState,
    /// Its devices, in the order in which clients see them.
    pub devices: Vec<DeviceStatus>,
}

/// State of a `ggml-rpc-server`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointState {
    /// Not running; a lease starts it.
    Idle,
    /// It is starting.
    Starting,
    /// It listens.
    Listening,
    /// A coordinator's llama-server is connected.
    Connected,
    /// It died and lost its part of the model, and only the next lease starts another; or a signal (SIGSTOP) has stopped it.
    Failed,
}

impl Endpoint {
    /// The first problem of these servers of a worker, if any.
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
    /// llama.cpp's name for it: `CUDA0`.
    pub name: String,
    /// Its model: `NVIDIA GeForce RTX 4070 Ti SUPER`.
    pub description: String,
    /// Its memory in bytes.
    pub total_bytes: u64,
    /// Free bytes, as last measured while no coordinator was connected.
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

/// Request for a lease of the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// Unique name of the coordinator, `192.168.1.10:8080#1f0c9a3e`.
    pub holder: String,
    /// Number of the start of a llama-server; it only grows. A holder takes over its own lease with a higher epoch; a lower
    /// or equal one is refused with 409.
    pub epoch: u64,
}

/// A lease of the worker. It lasts until it is returned or expires.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Unguessable name.
    pub id: String,
    /// Seconds until it expires unless renewed.
    pub expires_seconds: u64,
}

/// Answer to a renewal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Renewal {
    /// The present state of its `ggml-rpc-server`s.
    pub endpoints: Vec<Endpoint>,
}

/// The holder of a lease.
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
    /// With 409: the holder of the lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
}
