//! Measures the devices while no lease runs: starts a private server, asks it and ends it.

use std::net::{Ipv4Addr, SocketAddrV4};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::servers::list;
use super::{ANSWER_TIMEOUT, EndpointSpec, NoServer, START_TIMEOUT};
use crate::config::GpuBackend;
use crate::pool::agent::DeviceStatus;
use crate::pool::rpc_probe::{RpcServer, probe};
use crate::supervise::child::Child;
use crate::supervise::command::{Launch, Role};
use crate::supervise::death::Death;
use crate::supervise::devices::{Missing, complaint};
use crate::supervise::service::RPC_STOP_TIMEOUT;
use crate::supervise::{preflight, sockets};

/// The result for one endpoint.
#[derive(Debug)]
pub struct Survey {
    pub protocol: String,
    pub devices: Vec<DeviceStatus>,
}

/// Starts a server like the endpoint's on a loopback port, where no client takes it for the real one. `stop` cancels it.
pub async fn look(endpoint: &EndpointSpec, stop: &CancellationToken) -> Result<Survey, NoServer> {
    let died = |death| NoServer::Died {
        port: endpoint.port,
        death,
    };
    let not_started = |error| died(Death::not_started(&error));
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, preflight::free_port().map_err(not_started)?);
    let mut child = Child::spawn(Role::Rpc, &elsewhere(&endpoint.launch, address))
        .await
        .map_err(not_started)?;
    let asked = async {
        match timeout(START_TIMEOUT, sockets::until_listening(address)).await {
            Ok(()) => Ok(probe(address.into(), ANSWER_TIMEOUT).await?),
            Err(_) => Err(NoServer::Slow { port: endpoint.port }),
        }
    };
    let told = tokio::select! {
        told = asked => told,
        () = stop.cancelled() => Err(NoServer::Ended),
        status = child.wait() => {
            let status = status.map_err(not_started)?;
            return Err(died(Death::explain(status, child.last_lines().await)));
        }
    };
    child.stop(RPC_STOP_TIMEOUT).await.map_err(not_started)?;
    // The server names its devices only in its log, which is complete now.
    let lines = child.last_lines().await;
    let told = told?;
    let devices = devices(&told, checked(endpoint, &lines)?);
    Ok(Survey {
        protocol: told.protocol.to_string(),
        devices,
    })
}

/// The devices in a server's first lines; for a worker with a `backend`, those of that kind. A server that finds no GPU
/// silently takes the CPU.
fn checked(endpoint: &EndpointSpec, lines: &[String]) -> Result<Vec<DeviceStatus>, NoServer> {
    let mut devices = named(lines);
    if let Some(kind) = endpoint.launch.gpus {
        let only = || format!("its ggml-rpc-server finds only {}", list(&devices));
        let found = complaint(lines).unwrap_or_else(only);
        devices.retain(|device| kind.is_named(&device.name));
        if devices.is_empty() {
            return Err(missing(endpoint, kind, found));
        }
    }
    Ok(devices)
}

/// The command line of the endpoint's server, bound to the surveyed devices: without one of them the server ends instead
/// of taking the CPU.
pub fn bound(endpoint: &EndpointSpec, devices: &[DeviceStatus]) -> Result<Launch, NoServer> {
    let mut launch = endpoint.launch.clone();
    let Some(kind) = launch.gpus.filter(|_| launch.value_of("--device").is_none()) else {
        return Ok(launch);
    };
    if devices.is_empty() {
        return Err(missing(endpoint, kind, "the last look at it found none".to_owned()));
    }
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    launch.args.extend(["--device".into(), names.join(",").into()]);
    Ok(launch)
}

fn missing(endpoint: &EndpointSpec, kind: GpuBackend, found: String) -> NoServer {
    NoServer::NoDevice {
        port: endpoint.port,
        missing: Missing { kind, found },
    }
}

/// The same server at another address; the later of two values of an option wins.
fn elsewhere(launch: &Launch, address: SocketAddrV4) -> Launch {
    let mut launch = launch.clone();
    launch.args.extend(["--host".into(), address.ip().to_string().into()]);
    launch.args.extend(["--port".into(), address.port().to_string().into()]);
    launch
}

fn devices(told: &RpcServer, named: Vec<DeviceStatus>) -> Vec<DeviceStatus> {
    if told.devices.len() != named.len() {
        return named;
    }
    let memory = told.devices.iter();
    let exact = named.into_iter().zip(memory).map(|(device, memory)| DeviceStatus {
        total_bytes: memory.total_bytes,
        free_bytes: memory.free_bytes,
        ..device
    });
    exact.collect()
}

/// The devices by a server's first lines.
fn named(lines: &[String]) -> Vec<DeviceStatus> {
    let listed = lines.iter().skip_while(|line| line.trim() != "Devices:").skip(1);
    listed.map_while(|line| DeviceStatus::parse(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_from_the_first_lines_whatever_their_names_hold() {
        let lines = [
            "Starting RPC server v7.0.0",
            "  endpoint       : 127.0.0.1:50052",
            "Devices:",
            "  CUDA0: NVIDIA GeForce RTX 4070 Ti SUPER (16063 MiB, 15000 MiB free)",
            "  CPU: Intel(R) Xeon(R) CPU: 2.20GHz (64000 MiB, 60000 MiB free)",
            "  transport      : TCP",
        ];
        let devices = named(&lines.map(str::to_owned));
        assert_eq!(devices.len(), 2);
        assert_eq!(devices[0].description, "NVIDIA GeForce RTX 4070 Ti SUPER");
        assert_eq!(devices[0].total_bytes, 16063 << 20);
        assert_eq!(devices[1].name, "CPU");
        assert_eq!(devices[1].description, "Intel(R) Xeon(R) CPU: 2.20GHz");
        assert_eq!(devices[1].free_bytes, 60000 << 20);
    }

    #[test]
    fn a_log_without_devices_has_none() {
        assert!(named(&["Client connection closed".to_owned()]).is_empty());
    }
}
