//! Asks a `ggml-rpc-server` for its protocol version and its devices' memory.
//!
//! Allowed only while no client uses the server: it serves one client at a time, and the next one waits without end
//! (llama.cpp b11434, `ggml_backend_rpc_start_server`). So every probe has a timeout and closes its connection at once.
//!
//! The wire (`ggml-rpc.cpp`): a request is a command (1 byte), the size of what follows (8 bytes) and that; an answer is
//! its size (8 bytes) and that. Numbers are little-endian. The first command must be HELLO with 24 bytes of transport
//! capabilities; all zero means plain TCP.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::failure::explain;

const GET_DEVICE_MEMORY: u8 = 11;
const HELLO: u8 = 14;
const DEVICE_COUNT: u8 = 15;
/// Bytes of transport capabilities in a HELLO and its answer.
const CAPABILITIES: usize = 24;
/// The major version that these command numbers belong to; only that of HELLO never changes.
const MAJOR: u8 = 7;
/// Limit for the number of devices; no host has more.
const MOST_DEVICES: u32 = 64;

/// Version of the RPC protocol. A client refuses a server of another major, or of a newer minor version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// Changes with the form of messages.
    pub major: u8,
    /// Changes with new messages.
    pub minor: u8,
    /// Changes with the rest.
    pub patch: u8,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Memory of a device in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Free memory now.
    pub free_bytes: u64,
    /// Total memory.
    pub total_bytes: u64,
}

/// The report of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RpcServer {
    /// Its protocol.
    pub protocol: Protocol,
    /// Its devices, in the order in which clients see them; empty if the protocol is unknown.
    pub devices: Vec<DeviceMemory>,
}

/// Why a probe failed.
#[derive(Debug, thiserror::Error)]
pub enum RpcProbeError {
    /// Nothing listens there, or the connection broke off.
    #[error("no ggml-rpc-server answers at {address} ({}); start it there, and check host, port and firewall", explain(.source))]
    Unreachable {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// It accepted the connection and does not answer.
    #[error(
        "the ggml-rpc-server at {address} does not answer; it serves one client at a time and may have another: stop \
         that one, or restart the server"
    )]
    Silent {
        /// Where.
        address: SocketAddr,
    },
    /// It is not a `ggml-rpc-server`, or a very old one.
    #[error("what listens at {address} does not speak llama.cpp's RPC protocol; check the port and its version")]
    Foreign {
        /// Where.
        address: SocketAddr,
    },
}

/// Probes the server at `address`; gives up after `patience`.
pub async fn probe(address: SocketAddr, patience: Duration) -> Result<RpcServer, RpcProbeError> {
    match timeout(patience, ask(address)).await {
        Ok(Ok(told)) => Ok(told),
        Ok(Err(source)) if matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => {
            Err(RpcProbeError::Foreign { address })
        }
        Ok(Err(source)) => Err(RpcProbeError::Unreachable { address, source }),
        Err(_) => Err(RpcProbeError::Silent { address }),
    }
}

async fn ask(address: SocketAddr) -> io::Result<RpcServer> {
    let mut server = TcpStream::connect(address).await?;
    server.set_nodelay(true)?;
    let hello: [u8; 4 + CAPABILITIES] = call(&mut server, HELLO, &[0; CAPABILITIES]).await?;
    let protocol = Protocol {
        major: hello[0],
        minor: hello[1],
        patch: hello[2],
    };
    let mut devices = Vec::new();
    if protocol.major == MAJOR {
        let count = u32::from_le_bytes(call(&mut server, DEVICE_COUNT, &[]).await?);
        for device in 0..count.min(MOST_DEVICES) {
            let memory: [u8; 16] = call(&mut server, GET_DEVICE_MEMORY, &device.to_le_bytes()).await?;
            let (free, total) = memory.split_at(8);
            devices.push(DeviceMemory {
                free_bytes: number(free),
                total_bytes: number(total),
            });
        }
    }
    Ok(RpcServer { protocol, devices })
}

/// Sends one command; its answer has a known size.
async fn call<const SIZE: usize>(server: &mut TcpStream, command: u8, input: &[u8]) -> io::Result<[u8; SIZE]> {
    let mut request = vec![command];
    request.extend((input.len() as u64).to_le_bytes());
    request.extend(input);
    server.write_all(&request).await?;
    if server.read_u64_le().await? != SIZE as u64 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut answer = [0; SIZE];
    server.read_exact(&mut answer).await?;
    Ok(answer)
}

/// Eight little-endian bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const SOON: Duration = Duration::from_millis(300);

    /// A server that answers whoever connects with `bytes`, and then waits.
    async fn saying(bytes: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            client.write_all(bytes).await.unwrap();
            let mut rest = Vec::new();
            let _ = client.read_to_end(&mut rest).await;
        });
        address
    }

    #[tokio::test]
    async fn a_server_that_has_another_client_is_silent_and_we_do_not_hang() {
        let address = saying(b"").await;
        assert!(matches!(probe(address, SOON).await, Err(RpcProbeError::Silent { .. })));
    }

    #[tokio::test]
    async fn what_speaks_another_protocol_is_foreign() {
        let address = saying(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        assert!(matches!(probe(address, SOON).await, Err(RpcProbeError::Foreign { .. })));
    }

    #[tokio::test]
    async fn nobody_there_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert!(matches!(
            probe(address, SOON).await,
            Err(RpcProbeError::Unreachable { .. })
        ));
    }

    #[tokio::test]
    async fn another_major_version_is_told_and_asked_no_further() {
        let address = saying(b"\x1c\0\0\0\0\0\0\0\x06\x01\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0").await;
        let told = probe(address, SOON).await.unwrap();
        assert_eq!(told.protocol.to_string(), "6.1.2");
        assert!(told.devices.is_empty());
    }
}
