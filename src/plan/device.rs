//! The devices of a pool, and those that the config lists.

use serde::Serialize;

use crate::config::{Gpu, GpuBackend, Worker};

const MIB: u64 = 1 << 20;

/// A device of the pool. llama.cpp orders them: those of the workers first, in the order of `--rpc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its host: the name of the worker, or `coordinator`.
    pub host: String,
    /// Its model: `RTX 4070 Ti Super`.
    pub label: String,
    /// `host:port` of its `ggml-rpc-server`; `None` for the coordinator's own devices.
    pub endpoint: Option<String>,
    /// llama.cpp's name for it on its host: `CUDA0`.
    pub name: String,
    /// Its memory in bytes.
    pub total_bytes: u64,
    /// Free bytes.
    pub free_bytes: u64,
    /// The source of these numbers.
    pub known_from: KnownFrom,
}

/// The source of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KnownFrom {
    /// The worker's agent.
    Agent,
    /// The worker's `ggml-rpc-server`.
    Probe,
    /// `llama-server --list-devices`.
    LlamaServer,
    /// `vram_gb` of the config; the free memory was not measured.
    Config,
}

/// The devices that the config lists for a worker, endpoint by endpoint.
#[must_use]
pub fn configured(worker: &Worker) -> Vec<Device> {
    let endpoints = worker.rpc_endpoints().into_iter();
    endpoints
        .flat_map(|(port, gpus)| of_port(worker, port, &gpus))
        .collect()
}

pub(crate) fn of_port(worker: &Worker, port: u16, gpus: &[&Gpu]) -> Vec<Device> {
    let device = |(number, gpu): (usize, &&Gpu)| Device {
        endpoint: Some(format!("{}:{port}", worker.host)),
        ..of_config(
            worker.name(),
            gpu,
            worker.device_name(gpu).unwrap_or_else(|| name(None, number)),
        )
    };
    gpus.iter().enumerate().map(device).collect()
}

/// llama.cpp's name for a device; `GPU0`, `GPU1`, … if its kind is unknown.
pub(crate) fn name(backend: Option<GpuBackend>, number: usize) -> String {
    backend.map_or_else(|| format!("GPU{number}"), |backend| backend.device_name(number))
}

pub(crate) fn of_config(host: &str, gpu: &Gpu, name: String) -> Device {
    let bytes = gib_to_bytes(gpu.vram_gb);
    Device {
        host: host.to_owned(),
        label: gpu.name.clone(),
        endpoint: None,
        name: gpu.device.clone().unwrap_or(name),
        total_bytes: bytes,
        free_bytes: bytes,
        known_from: KnownFrom::Config,
    }
}

/// Converts GiB to bytes, rounded down to whole MiB.
fn gib_to_bytes(gib: f64) -> u64 {
    // The config has checked that it is positive; the multiplication saturates.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let mib = (gib * 1024.0) as u64;
    mib.saturating_mul(MIB)
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
                ("c", "10.0.0.2:50052", "CUDA2"),
                ("b", "10.0.0.2:50053", "CUDA1")
            ]
        );
        assert_eq!(devices[0].free_bytes, 16 << 30);
    }
}
