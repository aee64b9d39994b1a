//! Finds the devices of the pool and their free memory, for a plan.
//!
//! Sources, best first: the worker's agent, a probe of its `ggml-rpc-server`, `vram_gb` of the config. The coordinator's own
//! GPUs come from `llama-server --list-devices`. Only lent devices count: the coordinator's `gpus`, and everything that a
//! worker's agent lists. A source that does not answer adds a note and never ends the search.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::agent::{DeviceStatus, WorkerStatus};
use super::agent_client::{AgentClient, AgentError};
use super::build;
use super::rpc_probe::RpcServer;
use crate::config::{Config, Coordinator, GpuBackend, Secret, Worker};
use crate::count::count;
use crate::plan::device::{name, of_config, of_port};
use crate::plan::{Device, KnownFrom, configured};
use crate::supervise::devices::Missing;
use crate::supervise::{self, command};

/// Timeout for an agent, which answers from memory.
const AGENT_TIMEOUT: Duration = Duration::from_secs(2);
/// Host name of the coordinator's own GPUs in messages.
const COORDINATOR: &str = "coordinator";

/// The devices of the pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FoundDevices {
    /// The devices, in llama.cpp's order: those of workers first.
    pub devices: Vec<Device>,
    /// One sentence for each source that did not answer, with what was used instead.
    pub notes: Vec<String>,
    /// Set if llama-server sees none of the coordinator's own GPUs; `devices` then has those of the config.
    pub missing: Option<Missing>,
    /// The coordinator's own GPUs that llama-server does not see.
    pub missing_gpus: Vec<String>,
    /// Names of the workers whose agent does not answer.
    pub silent: Vec<String>,
    /// The llama.cpp build of each worker, by the worker's name.
    pub builds: BTreeMap<String, String>,
}

/// Reports of servers without an agent, by `host:port`; see [`super::rpc_probe`] for when they may be probed.
pub type ProbedServers = BTreeMap<String, RpcServer>;

/// A server has a different number of devices than the config lists. llama.cpp numbers all devices of a server, so the
/// numbers of all later devices would be wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the ggml-rpc-server at {endpoint} has {} and the config gives worker {worker} {configured} there; list as \
     many `gpus` with that `rpc_port`, or start the server with `--device`",
    count(*.told as u64, "device", "devices")
)]
pub struct DeviceCountMismatch {
    /// Name of the worker.
    pub worker: String,
    /// `host:port` of the server.
    pub endpoint: String,
    /// GPUs that the config lists there.
    pub configured: usize,
    /// Devices that it has.
    pub told: usize,
}

/// Asks all sources at once.
pub async fn find(
    config: &Config,
    coordinator: &Coordinator,
    probed: &ProbedServers,
) -> Result<FoundDevices, DeviceCountMismatch> {
    let workers = join_all(config.workers.iter().map(|worker| of_worker(worker, probed)));
    let (workers, own) = tokio::join!(workers, of_coordinator(&config.binaries.llama_server, coordinator));
    let mut found = FoundDevices::default();
    for part in workers.into_iter().chain([Ok(own)]) {
        let part = part?;
        found.devices.extend(part.devices);
        found.notes.extend(part.notes);
        found.silent.extend(part.silent);
        found.missing = found.missing.or(part.missing);
        found.missing_gpus.extend(part.missing_gpus);
        found.builds.extend(part.builds);
    }
    Ok(found)
}

async fn of_worker(worker: &Worker, probed: &ProbedServers) -> Result<FoundDevices, DeviceCountMismatch> {
    let mut found = FoundDevices::default();
    if !worker.has_agent() {
        found.devices = of_servers(worker, probed)?;
        if found
            .devices
            .iter()
            .any(|device| device.known_from == KnownFrom::Config)
        {
            found.notes.push(format!(
                "worker {} has no agent; its `vram_gb` is taken as free memory",
                worker.name()
            ));
        } else if found.devices.is_empty() {
            found.notes.push(left_out(worker, "it has no agent"));
        }
        return Ok(found);
    }
    let why = match ask(worker).await {
        Ok(status) => {
            found.devices = of_agent(worker, &status);
            if status.build != build::UNKNOWN {
                found.builds.insert(worker.name().to_owned(), status.build);
            }
            if !found.devices.is_empty() {
                return Ok(found);
            }
            "its agent tells no devices".to_owned()
        }
        Err(error) => {
            found.silent.push(worker.name().to_owned());
            error.to_string()
        }
    };
    found.devices = configured(worker);
    found.notes.push(if found.devices.is_empty() {
        left_out(worker, &why)
    } else {
        format!(
            "the `vram_gb` of worker {} is taken as free memory: {why}",
            worker.name()
        )
    });
    Ok(found)
}

fn left_out(worker: &Worker, why: &str) -> String {
    format!(
        "worker {} is left out, since its `gpus` are not in the config either: {why}",
        worker.name()
    )
}

/// Asks a worker's agent for its status.
async fn ask(worker: &Worker) -> Result<WorkerStatus, AgentError> {
    let client = AgentClient::new(worker)?;
    timeout(AGENT_TIMEOUT, client.status())
        .await
        .unwrap_or_else(|_| Err(client.silent()))
}

/// The devices that an agent lists.
#[must_use]
pub fn of_agent(worker: &Worker, status: &WorkerStatus) -> Vec<Device> {
    let of_endpoint = |endpoint: &super::agent::Endpoint| {
        let address = format!("{}:{}", worker.host, endpoint.port);
        let devices = endpoint.devices.clone();
        devices.into_iter().map(move |device| Device {
            endpoint: Some(address.clone()),
            ..listed(worker.name(), device, KnownFrom::Agent)
        })
    };
    status.endpoints.iter().flat_map(of_endpoint).collect()
}

fn listed(host: &str, device: DeviceStatus, known_from: KnownFrom) -> Device {
    Device {
        host: host.to_owned(),
        label: device.description,
        endpoint: None,
        name: device.name,
        total_bytes: device.total_bytes,
        free_bytes: device.free_bytes,
        known_from,
    }
}

/// The devices of a worker without an agent: those of the config, with the memory that probed servers reported.
fn of_servers(worker: &Worker, probed: &ProbedServers) -> Result<Vec<Device>, DeviceCountMismatch> {
    let mut devices = Vec::new();
    for (port, gpus) in worker.rpc_endpoints() {
        let endpoint = format!("{}:{port}", worker.host);
        let mut own = of_port(worker, port, &gpus);
        if let Some(told) = probed.get(&endpoint).filter(|told| !told.devices.is_empty()) {
            if own.is_empty() {
                own = unnamed(worker, &endpoint, told.devices.len());
            }
            if own.len() != told.devices.len() {
                return Err(DeviceCountMismatch {
                    worker: worker.name().to_owned(),
                    endpoint,
                    configured: own.len(),
                    told: told.devices.len(),
                });
            }
            for (device, memory) in own.iter_mut().zip(&told.devices) {
                device.total_bytes = memory.total_bytes;
                device.free_bytes = memory.free_bytes;
                device.known_from = KnownFrom::Probe;
            }
        }
        devices.append(&mut own);
    }
    Ok(devices)
}

/// Devices of which only the number is known.
fn unnamed(worker: &Worker, endpoint: &str, count: usize) -> Vec<Device> {
    let device = |number| Device {
        host: worker.name().to_owned(),
        label: String::new(),
        endpoint: Some(endpoint.to_owned()),
        name: name(worker.backend, number),
        total_bytes: 0,
        free_bytes: 0,
        known_from: KnownFrom::Probe,
    };
    (0..count).map(device).collect()
}

/// The GPUs of the coordinator's own host that its section lists.
async fn of_coordinator(llama_server: &Path, coordinator: &Coordinator) -> FoundDevices {
    let mut found = FoundDevices::default();
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
    let program = llama_server.as_os_str();
    let (listed, seen) = match supervise::devices::list(program, &variables(coordinator)).await {
        Ok(listing) => (parse_list(&listing.text), listing.describe(program)),
        Err(error) => (Vec::new(), error),
    };
    for (number, gpu) in coordinator.gpus.iter().enumerate() {
        let own = match &gpu.device {
            Some(name) => listed.iter().find(|device| device.name == *name),
            None => listed.get(number),
        };
        match own {
            Some(own) => found.devices.push(Device {
                label: gpu.name.clone(),
                ..own.clone()
            }),
            None => found.missing_gpus.push(gpu.name.clone()),
        }
    }
    if found.devices.is_empty() {
        let kind = coordinator.backend;
        let missing = Missing { kind, found: seen };
        found.notes.push(format!(
            "{missing}; the `vram_gb` of the coordinator's `gpus` is taken as free memory"
        ));
        let gpus = coordinator.gpus.iter().enumerate();
        let of_config = |(number, gpu)| of_config(COORDINATOR, gpu, kind.device_name(number));
        found.devices = gpus.map(of_config).collect();
        found.missing = Some(missing);
    } else if !found.missing_gpus.is_empty() {
        found.notes.push(format!(
            "the coordinator computes without its GPU {}: {seen}",
            found.missing_gpus.join(", ")
        ));
    }
    found
}

/// The environment of the coordinator's llama-server.
fn variables(coordinator: &Coordinator) -> Vec<(String, Secret)> {
    let of_kind = command::gpu_environment(Some(coordinator.backend), coordinator.gpus.len());
    let own = coordinator
        .env
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    let all = of_kind.iter().copied().chain(own);
    all.map(|(name, value)| (name.to_owned(), Secret::new(value))).collect()
}

/// Reads the output of `llama-server --list-devices`: one device per indented line.
#[must_use]
pub fn parse_list(text: &str) -> Vec<Device> {
    let indented = text.lines().filter(|line| line.starts_with("  "));
    indented
        .filter_map(DeviceStatus::parse)
        .map(|device| listed(COORDINATOR, device, KnownFrom::LlamaServer))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Gpu;
    use crate::pool::rpc_probe::{DeviceMemory, Protocol};

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
            ("CUDA0", "NVIDIA GeForce RTX 4090 (sm (89))", 23900 << 20)
        );
        assert!(parse_list("Available devices:\n  (none)\n").is_empty());
    }

    #[tokio::test]
    async fn a_worker_that_cannot_be_asked_counts_with_its_vram_and_that_is_said() {
        let worker = Worker {
            gpus: vec![gpu("a", None)],
            agent_port: 1,
            ..Worker::at("127.0.0.1")
        };
        let found = of_worker(&worker, &ProbedServers::new()).await.unwrap();
        assert_eq!(found.silent, ["127.0.0.1"]);
        assert_eq!(found.devices, configured(&worker));
        assert!(
            found.notes[0].contains("127.0.0.1:1") && found.notes[0].contains("vram_gb"),
            "{:?}",
            found.notes
        );
        let nobody = Worker {
            agent_port: 1,
            ..Worker::at("127.0.0.1")
        };
        let unknown = of_worker(&nobody, &ProbedServers::new()).await.unwrap();
        assert!(
            unknown.devices.is_empty() && unknown.notes[0].contains("left out"),
            "{:?}",
            unknown.notes
        );
    }

    /// A server with devices of so many GiB of free memory, half of what they have.
    fn server(free: &[u64]) -> RpcServer {
        let device = |gib: &u64| DeviceMemory {
            free_bytes: gib << 30,
            total_bytes: gib << 31,
        };
        RpcServer {
            protocol: Protocol {
                major: 7,
                minor: 0,
                patch: 0,
            },
            devices: free.iter().map(device).collect(),
        }
    }

    #[tokio::test]
    async fn a_server_that_is_run_by_hand_counts_with_the_memory_that_it_told() {
        let worker = Worker {
            backend: Some(GpuBackend::Cuda),
            gpus: vec![gpu("a", None), gpu("b", None)],
            ..Worker::at("10.0.0.2")
        };
        let probed = ProbedServers::from([("10.0.0.2:50052".to_owned(), server(&[3, 5]))]);
        let found = of_worker(&worker, &probed).await.unwrap();
        let shown: Vec<_> = found
            .devices
            .iter()
            .map(|device| (device.label.as_str(), device.free_bytes >> 30, device.known_from))
            .collect();
        assert_eq!(shown, [("a", 3, KnownFrom::Probe), ("b", 5, KnownFrom::Probe)]);
        assert!(found.notes.is_empty(), "{:?}", found.notes);
        let without_gpus = of_worker(&Worker::at("10.0.0.2"), &probed).await.unwrap();
        assert_eq!(without_gpus.devices.len(), 2);
    }

    #[tokio::test]
    async fn a_server_with_more_devices_than_the_config_lists_is_refused_with_both_numbers() {
        let worker = Worker {
            gpus: vec![gpu("a", None)],
            ..Worker::at("10.0.0.2")
        };
        let probed = ProbedServers::from([("10.0.0.2:50052".to_owned(), server(&[3, 5]))]);
        let refused = of_worker(&worker, &probed).await.unwrap_err();
        assert_eq!((refused.configured, refused.told), (1, 2));
        assert!(refused.to_string().contains("10.0.0.2:50052"), "{refused}");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_leaves_the_vram_of_the_config() {
        let coordinator = Coordinator {
            gpus: vec![gpu("a", None), gpu("b", None)],
            ..Coordinator::default()
        };
        let found = of_coordinator(Path::new("/no/such/llama-server"), &coordinator).await;
        assert_eq!(
            found
                .devices
                .iter()
                .map(|device| device.name.as_str())
                .collect::<Vec<_>>(),
            ["ROCm0", "ROCm1"]
        );
        assert_eq!(found.notes.len(), 1);
        let missing = found.missing.unwrap().to_string();
        assert!(
            missing.contains("no ROCm device") && missing.contains("rocminfo"),
            "{missing}"
        );
        assert_eq!(found.missing_gpus, ["a", "b"]);
    }

    #[tokio::test]
    async fn one_missing_gpu_of_several_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("llama-server");
        let list =
            "#!/bin/sh\necho 'Available devices:'\necho '  ROCm0: AMD Radeon RX 7900 (24560 MiB, 24000 MiB free)'\n";
        std::fs::write(&program, list).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let coordinator = Coordinator {
            gpus: vec![gpu("a", None), gpu("b", None)],
            ..Coordinator::default()
        };
        let found = of_coordinator(&program, &coordinator).await;
        assert_eq!((found.devices.len(), found.missing), (1, None));
        assert_eq!(found.missing_gpus, ["b"]);
        assert!(found.notes[0].contains("without its GPU b"), "{:?}", found.notes);
    }
}
