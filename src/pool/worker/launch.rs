//! The arguments and environment of `ggml-rpc-server`. Pure.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use crate::config::{Gpu, GpuBackend, Secret, Worker};
use crate::supervise::command::{self, Launch};

/// The config does not say which GPUs of a host each of its servers gets.
#[derive(Debug, thiserror::Error)]
#[error(
    "worker {worker} serves its GPUs on several ports, and its config does not say which is which; give the worker a \
     `backend`, or each GPU a `device`, such as CUDA0"
)]
pub struct AmbiguousGpus {
    worker: String,
}

/// The command line of the server that listens at `host:port` and serves `gpus`. `extra_args` of the config come last and
/// win.
pub fn rpc_server(
    program: &Path,
    worker: &Worker,
    host: Ipv4Addr,
    port: u16,
    gpus: &[&Gpu],
    cache: Option<&Path>,
) -> Result<Launch, AmbiguousGpus> {
    let mut args: Vec<OsString> = vec!["--host".into(), host.to_string().into()];
    args.extend(["--port".into(), port.to_string().into()]);
    if let Some(devices) = devices(worker, gpus)? {
        args.extend(["--device".into(), devices.into()]);
    }
    let mut env: Vec<(String, Secret)> = Vec::new();
    if let Some(folder) = cache {
        args.push("--cache".into());
        env.push(("LLAMA_CACHE".into(), Secret::new(folder.to_string_lossy())));
    }
    let known_good = command::gpu_environment(worker.backend, worker.gpus.len()).iter();
    env.extend(known_good.map(|(name, value)| ((*name).to_owned(), Secret::new(*value))));
    // The later of two values with one name wins.
    env.extend(
        worker
            .env
            .iter()
            .map(|(name, value)| (name.clone(), Secret::new(value.clone()))),
    );
    args.extend(worker.extra_args.iter().map(OsString::from));
    let names_devices = worker
        .extra_args
        .iter()
        .any(|it| ["--device", "-d"].contains(&it.as_str()));
    Ok(Launch {
        program: program.into(),
        args,
        env,
        gpus: worker.backend.and_then(GpuBackend::gpu).filter(|_| !names_devices),
        stall: Duration::ZERO,
    })
}

/// The value of `--device`; `None` lets the server take all GPUs, or the CPU if there is none.
fn devices(worker: &Worker, gpus: &[&Gpu]) -> Result<Option<String>, AmbiguousGpus> {
    if worker.backend == Some(GpuBackend::Cpu) {
        return Ok(Some("CPU".to_owned()));
    }
    let all_in_one = gpus.len() == worker.gpus.len();
    if all_in_one && gpus.iter().all(|gpu| gpu.device.is_none()) {
        return Ok(None);
    }
    let names: Option<Vec<String>> = gpus.iter().map(|gpu| worker.device_name(gpu)).collect();
    match names {
        Some(names) => Ok(Some(names.join(","))),
        None => Err(AmbiguousGpus {
            worker: worker.name().to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(port: Option<u16>, device: Option<&str>) -> Gpu {
        Gpu {
            name: "a GPU".into(),
            vram_gb: 16.0,
            rpc_port: port,
            device: device.map(str::to_owned),
        }
    }

    fn worker(backend: Option<GpuBackend>, gpus: Vec<Gpu>) -> Worker {
        Worker {
            backend,
            gpus,
            ..Worker::at("10.0.0.2")
        }
    }

    /// The arguments of each server.
    fn lines(worker: &Worker) -> Vec<String> {
        let endpoints = worker.rpc_endpoints().into_iter();
        endpoints
            .map(|(port, gpus)| {
                let launch = launch(worker, port, &gpus).unwrap();
                let args = launch.args.iter().map(|arg| arg.to_str().unwrap());
                args.collect::<Vec<_>>().join(" ")
            })
            .collect()
    }

    fn launch(worker: &Worker, port: u16, gpus: &[&Gpu]) -> Result<Launch, AmbiguousGpus> {
        let host = Ipv4Addr::new(10, 0, 0, 2);
        rpc_server(Path::new("ggml-rpc-server"), worker, host, port, gpus, None)
    }

    #[test]
    fn gpus_of_one_port_share_a_server_that_finds_them_itself() {
        let worker = worker(Some(GpuBackend::Cuda), vec![gpu(None, None), gpu(Some(50052), None)]);
        assert_eq!(lines(&worker), ["--host 10.0.0.2 --port 50052"]);
    }

    #[test]
    fn each_of_several_servers_gets_its_own_gpus() {
        let worker = worker(
            Some(GpuBackend::Hip),
            vec![
                gpu(Some(7001), None),
                gpu(Some(7000), None),
                gpu(Some(7001), Some("ROCm5")),
            ],
        );
        assert_eq!(
            lines(&worker),
            [
                "--host 10.0.0.2 --port 7000 --device ROCm1",
                "--host 10.0.0.2 --port 7001 --device ROCm0,ROCm5"
            ]
        );
    }

    #[test]
    fn several_servers_of_unknown_gpus_are_refused() {
        let worker = worker(None, vec![gpu(Some(1), None), gpu(Some(2), None)]);
        let (port, gpus) = worker.rpc_endpoints().into_iter().next().unwrap();
        assert!(
            launch(&worker, port, &gpus)
                .unwrap_err()
                .to_string()
                .contains("`backend`")
        );
    }

    #[test]
    fn the_cpu_is_named_since_a_server_would_take_a_gpu() {
        let worker = worker(Some(GpuBackend::Cpu), Vec::new());
        assert_eq!(lines(&worker), ["--host 10.0.0.2 --port 50052 --device CPU"]);
    }

    #[test]
    fn several_amd_gpus_get_the_known_good_environment_unless_the_file_says_otherwise() {
        let mut worker = worker(Some(GpuBackend::Hip), vec![gpu(None, None), gpu(None, None)]);
        worker.env.insert("GPU_MAX_HW_QUEUES".into(), "4".into());
        let launch = launch(&worker, 1, &worker.gpus.iter().collect::<Vec<_>>()).unwrap();
        let last = |wanted: &str| {
            let mut named = launch.env.iter().filter(|(name, _)| name == wanted);
            named.next_back().map(|(_, value)| value.expose().to_owned())
        };
        assert_eq!(last("HSA_ENABLE_SDMA").as_deref(), Some("0"));
        assert_eq!(last("GPU_MAX_HW_QUEUES").as_deref(), Some("4"));
    }

    #[test]
    fn a_cache_is_asked_for_and_extra_arguments_come_last() {
        let mut worker = worker(None, Vec::new());
        worker.extra_args = vec!["-t".into(), "2".into()];
        let host = Ipv4Addr::LOCALHOST;
        let launch = rpc_server(Path::new("r"), &worker, host, 1, &[], Some(Path::new("/c"))).unwrap();
        assert_eq!(launch.args[4..], ["--cache", "-t", "2"]);
        assert_eq!(launch.env, [("LLAMA_CACHE".to_owned(), Secret::new("/c"))]);
    }
}
