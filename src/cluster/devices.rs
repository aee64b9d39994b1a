//! The devices of the pool and their memory.
//!
//! A worker's agent knows them best; without one the config's `vram_gb` has to do. The coordinator's own GPUs are asked of
//! `llama-server --list-devices`. Only what the config lends is taken: the coordinator's `gpus`, and of a worker all that its
//! agent tells. What was not to be had is told, and never ends the search.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use futures_util::future::join_all;

use super::agent::WorkerStatus;
use super::plan::{Device, KnownFrom};
use crate::config::{Config, Coordinator, DEFAULT_RPC_PORT, Gpu, GpuBackend, Worker, is_loopback};
use crate::supervise::command;

/// An agent answers from memory.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);
/// A GPU driver that wakes up takes a while.
const LIST_PATIENCE: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;
/// What people read as the host of the coordinator's own GPUs.
const COORDINATOR: &str = "coordinator";

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The devices, in llama.cpp's order: the workers' first.
    pub devices: Vec<Device>,
    /// What could not be asked, and what was taken instead: a sentence each.
    pub notes: Vec<String>,
}

/// Asks all that can be asked, at once.
pub async fn find(config: &Config, coordinator: &Coordinator) -> Found {
    let workers = join_all(config.workers.iter().map(of_worker));
    let (workers, own) = tokio::join!(workers, own(&config.binaries.llama_server, coordinator));
    let mut found = Found::default();
    for part in workers.into_iter().chain([own]) {
        found.devices.extend(part.devices);
        found.notes.extend(part.notes);
    }
    found
}

async fn of_worker(worker: &Worker) -> Found {
    let name = worker.name();
    let mut found = Found::default();
    if has_agent(worker) {
        match ask(worker).await {
            Ok(status) => {
                found.devices = told(worker, &status);
                if found.devices.is_empty() {
                    found.notes.push(format!("the agent of worker {name} tells no devices"));
                }
            }
            Err(error) => found.notes.push(format!(
                "the agent of worker {name} does not answer at {}:{} ({error})",
                worker.host, worker.agent_port
            )),
        }
    } else {
        found.notes.push(format!("worker {name} has no agent"));
    }
    if found.devices.is_empty() {
        found.devices = configured(worker);
        let instead = if found.devices.is_empty() {
            "it is left out, since its `gpus` are not in the config either"
        } else {
            "its `vram_gb` is taken as free memory"
        };
        if let Some(note) = found.notes.last_mut() {
            note.push_str("; ");
            note.push_str(instead);
        }
    }
    found
}

/// Whether an agent can be asked: without a token only one on this machine.
fn has_agent(worker: &Worker) -> bool {
    let token = worker.agent_token.is_some() || worker.agent_token_file.is_some();
    worker.agent_port != 0 && (token || is_loopback(&worker.host))
}

/// Asks a worker's agent how it is.
async fn ask(worker: &Worker) -> Result<WorkerStatus, String> {
    let client = reqwest::Client::builder()
        .timeout(AGENT_PATIENCE)
        .no_proxy()
        .build()
        .map_err(|error| error.to_string())?;
    let mut request = client.get(format!("http://{}:{}/v1/worker", worker.host, worker.agent_port));
    if let Some(token) = &worker.agent_token {
        request = request.bearer_auth(token.expose());
    } else if let Some(file) = &worker.agent_token_file {
        let token = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        request = request.bearer_auth(token.trim());
    }
    let answer = request.send().await.map_err(|error| {
        let why = if error.is_timeout() {
            "no answer within 2 s"
        } else if error.is_connect() {
            "no connection"
        } else {
            "no HTTP"
        };
        why.to_owned()
    })?;
    let status = answer.status();
    if !status.is_success() {
        return Err(format!("it answers {status}"));
    }
    answer
        .json()
        .await
        .map_err(|_| "its answer is not that of an agent".to_owned())
}

/// The devices that an agent tells.
#[must_use]
pub fn told(worker: &Worker, status: &WorkerStatus) -> Vec<Device> {
    let of_endpoint = |endpoint: &super::agent::Endpoint| {
        let address = format!("{}:{}", worker.host, endpoint.port);
        let devices = endpoint.devices.clone();
        devices.into_iter().map(move |device| Device {
            host: worker.name().to_owned(),
            label: device.description,
            endpoint: Some(address.clone()),
            name: device.name,
            total_bytes: device.total_bytes,
            free_bytes: device.free_bytes,
            known_from: KnownFrom::Agent,
        })
    };
    status.endpoints.iter().flat_map(of_endpoint).collect()
}

/// The devices that the config gives a worker, endpoint by endpoint.
#[must_use]
pub fn configured(worker: &Worker) -> Vec<Device> {
    let port = |gpu: &Gpu| gpu.rpc_port.unwrap_or(DEFAULT_RPC_PORT);
    let mut ports: Vec<u16> = Vec::new();
    for gpu in &worker.gpus {
        if !ports.contains(&port(gpu)) {
            ports.push(port(gpu));
        }
    }
    let of_port = |wanted: u16| {
        let gpus = worker.gpus.iter().filter(move |gpu| port(gpu) == wanted);
        gpus.enumerate().map(move |(number, gpu)| Device {
            endpoint: Some(format!("{}:{wanted}", worker.host)),
            ..of_config(worker.name(), gpu, default_name(worker.backend, number))
        })
    };
    ports.into_iter().flat_map(of_port).collect()
}

fn of_config(host: &str, gpu: &Gpu, default_name: String) -> Device {
    let bytes = gib_to_bytes(gpu.vram_gb);
    Device {
        host: host.to_owned(),
        label: gpu.name.clone(),
        endpoint: None,
        name: gpu.device.clone().unwrap_or(default_name),
        total_bytes: bytes,
        free_bytes: bytes,
        known_from: KnownFrom::Config,
    }
}

/// What llama.cpp calls a host's device when nobody has said it.
fn default_name(backend: Option<GpuBackend>, number: usize) -> String {
    match backend {
        Some(GpuBackend::Hip) => format!("ROCm{number}"),
        Some(GpuBackend::Cuda) => format!("CUDA{number}"),
        Some(GpuBackend::Vulkan) => format!("Vulkan{number}"),
        Some(GpuBackend::Metal) => format!("MTL{number}"),
        Some(GpuBackend::Cpu) => "CPU".to_owned(),
        None => format!("GPU{number}"),
    }
}

/// The bytes of so many GiB, whole MiB of them.
fn gib_to_bytes(gib: f64) -> u64 {
    // A config has checked that it is above zero; what is beyond all memory is cut.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let mib = (gib * 1024.0) as u64;
    mib.saturating_mul(MIB)
}

/// The GPUs of the coordinator's own host, as far as its section lists them.
async fn own(llama_server: &Path, coordinator: &Coordinator) -> Found {
    let mut found = Found::default();
    if coordinator.gpus.is_empty() {
        return found;
    }
    if coordinator.backend == GpuBackend::Cpu {
        found.notes.push(
            "the coordinator's CPU is no device of llama-server; lend it by a worker on 127.0.0.1 with `backend: cpu`"
                .to_owned(),
        );
        return found;
    }
    let listed = match list(llama_server, coordinator).await {
        Ok(listed) => listed,
        Err(error) => {
            found.notes.push(format!(
                "{} --list-devices does not tell the coordinator's GPUs ({error}); their `vram_gb` is taken as free memory",
                llama_server.display()
            ));
            Vec::new()
        }
    };
    if listed.is_empty() && found.notes.is_empty() {
        found.notes.push(format!(
            "{} --list-devices sees no GPU on this host; the `vram_gb` of the coordinator's `gpus` is taken as free memory",
            llama_server.display()
        ));
    }
    for (number, gpu) in coordinator.gpus.iter().enumerate() {
        let seen = match &gpu.device {
            Some(name) => listed.iter().find(|device| device.name == *name),
            None => listed.get(number),
        };
        if seen.is_none() && !listed.is_empty() {
            found.notes.push(format!(
                "the coordinator's GPU {} is not among the devices of its llama-server ({}); it is left out",
                gpu.name,
                listed
                    .iter()
                    .map(|device| device.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", ")
            ));
            continue;
        }
        let of_config = of_config(COORDINATOR, gpu, default_name(Some(coordinator.backend), number));
        found.devices.push(match seen {
            Some(seen) => Device {
                label: gpu.name.clone(),
                ..seen.clone()
            },
            None => of_config,
        });
    }
    found
}

async fn list(llama_server: &Path, coordinator: &Coordinator) -> Result<Vec<Device>, String> {
    let mut command = tokio::process::Command::new(llama_server);
    command
        .arg("--list-devices")
        .envs(
            command::gpu_environment(Some(coordinator.backend), coordinator.gpus.len())
                .iter()
                .copied(),
        )
        .envs(&coordinator.env)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(LIST_PATIENCE, command.output())
        .await
        .map_err(|_| "no answer within 30 s".to_owned())?
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(output.status.to_string());
    }
    Ok(parse_list(&String::from_utf8_lossy(&output.stdout)))
}

/// The devices of `llama-server --list-devices`: `  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23900 MiB free)`, as
/// `common_print_available_devices` of llama.cpp b11434 writes them.
#[must_use]
pub fn parse_list(text: &str) -> Vec<Device> {
    let device = |line: &str| -> Option<Device> {
        let (name, rest) = line.strip_prefix("  ")?.split_once(": ")?;
        let (label, memory) = rest.strip_suffix(" MiB free)")?.rsplit_once(" (")?;
        let (total, free) = memory.split_once(" MiB, ")?;
        let bytes = |mib: &str| Some(mib.parse::<u64>().ok()?.saturating_mul(MIB));
        Some(Device {
            host: COORDINATOR.to_owned(),
            label: label.to_owned(),
            endpoint: None,
            name: name.to_owned(),
            total_bytes: bytes(total)?,
            free_bytes: bytes(free)?,
            known_from: KnownFrom::LlamaServer,
        })
    };
    text.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(name: &str, rpc_port: Option<u16>) -> Gpu {
        Gpu {
            name: name.to_owned(),
            vram_gb: 16.0,
            rpc_port,
            device: None,
        }
    }

    #[test]
    fn a_list_of_devices_is_read_and_other_lines_are_not() {
        let text = "load_backend: loaded CUDA backend\nAvailable devices:\n  CUDA0: NVIDIA GeForce RTX 4090 (sm (89)) \
                    (24217 MiB, 23900 MiB free)\n  Vulkan0: odd\n";
        let devices = parse_list(text);
        assert_eq!(devices.len(), 1);
        assert_eq!(
            (
                devices[0].name.as_str(),
                devices[0].label.as_str(),
                devices[0].free_bytes
            ),
            ("CUDA0", "NVIDIA GeForce RTX 4090 (sm (89))", 23900 * MIB)
        );
        assert!(parse_list("Available devices:\n  (none)\n").is_empty());
    }

    #[test]
    fn gpus_with_one_port_are_one_endpoint() {
        let worker = Worker {
            backend: Some(GpuBackend::Cuda),
            gpus: vec![gpu("a", None), gpu("b", Some(50053)), gpu("c", None)],
            ..Worker::at("10.0.0.2")
        };
        let devices = configured(&worker);
        let shown: Vec<_> = devices
            .iter()
            .map(|device| {
                (
                    device.label.as_str(),
                    device.endpoint.as_deref().unwrap(),
                    device.name.as_str(),
                )
            })
            .collect();
        assert_eq!(
            shown,
            [
                ("a", "10.0.0.2:50052", "CUDA0"),
                ("c", "10.0.0.2:50052", "CUDA1"),
                ("b", "10.0.0.2:50053", "CUDA0")
            ]
        );
        assert_eq!(devices[0].free_bytes, 16 << 30);
    }

    #[tokio::test]
    async fn a_worker_that_cannot_be_asked_counts_with_its_vram_and_that_is_said() {
        let worker = Worker {
            gpus: vec![gpu("a", None)],
            agent_port: 1,
            ..Worker::at("127.0.0.1")
        };
        let found = of_worker(&worker).await;
        assert_eq!(found.devices, configured(&worker));
        assert!(
            found.notes[0].contains("127.0.0.1:1") && found.notes[0].contains("vram_gb"),
            "{:?}",
            found.notes
        );
        let unknown = of_worker(&Worker::at("127.0.0.1")).await;
        assert!(
            unknown.devices.is_empty() && unknown.notes[0].contains("left out"),
            "{:?}",
            unknown.notes
        );
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_leaves_the_vram_of_the_config() {
        let coordinator = Coordinator {
            gpus: vec![gpu("a", None), gpu("b", None)],
            ..Coordinator::default()
        };
        let found = own(Path::new("/no/such/llama-server"), &coordinator).await;
        assert_eq!(
            found
                .devices
                .iter()
                .map(|device| device.name.as_str())
                .collect::<Vec<_>>(),
            ["ROCm0", "ROCm1"]
        );
        assert_eq!(found.notes.len(), 1);
    }
}
