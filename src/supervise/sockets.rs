//! Listeners and connections of this machine, read from the kernel's list of sockets. Never connects: a `ggml-rpc-server` takes every
//! connection for its only client.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// The kernel's list of IPv4 sockets, see proc(5).
const SOCKETS: &str = "/proc/net/tcp";
/// Interval between checks for a listener.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// State of a socket, with the kernel's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Established = 1,
    Listening = 10,
}

/// Whether a process listens on this address, or on all addresses.
pub fn is_listening(address: SocketAddrV4) -> io::Result<bool> {
    Ok(lists(&fs::read_to_string(SOCKETS)?, address, State::Listening))
}

/// Waits until a process listens on this address.
pub async fn until_listening(address: SocketAddrV4) {
    while !is_listening(address).unwrap_or(false) {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Whether a client is connected to this address.
pub fn is_connected(address: SocketAddrV4) -> io::Result<bool> {
    Ok(lists(&fs::read_to_string(SOCKETS)?, address, State::Established))
}

fn lists(sockets: &str, address: SocketAddrV4, state: State) -> bool {
    sockets.lines().skip(1).filter_map(socket).any(|(local, code)| {
        let here = local.ip() == address.ip() || local.ip().is_unspecified() || address.ip().is_unspecified();
        code == state as u8 && local.port() == address.port() && here
    })
}

/// Local address and state from a line such as `0: 0100007F:C384 00000000:0000 0A …`. The address has the byte order of memory.
fn socket(line: &str) -> Option<(SocketAddrV4, u8)> {
    let mut fields = line.split_whitespace().skip(1);
    let (ip, port) = fields.next()?.split_once(':')?;
    let ip = u32::from_str_radix(ip, 16).ok()?.to_ne_bytes();
    let port = u16::from_str_radix(port, 16).ok()?;
    let state = u8::from_str_radix(fields.nth(1)?, 16).ok()?;
    Some((SocketAddrV4::new(Ipv4Addr::from(ip), port), state))
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn listening_and_connected_are_told_apart_without_connecting() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else {
            panic!("asked for IPv4")
        };
        assert!(is_listening(address).unwrap());
        assert!(!is_connected(address).unwrap());
        let client = TcpStream::connect(address).unwrap();
        assert!(is_connected(address).unwrap());
        let elsewhere = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 9), address.port());
        assert!(!is_connected(elsewhere).unwrap());
        drop((client, listener));
        assert!(!is_listening(address).unwrap());
    }

    #[test]
    fn lines_that_are_none_of_sockets_are_left_out() {
        assert_eq!(socket("  sl  local_address rem_address   st"), None);
        assert_eq!(socket(""), None);
        let line = "   0: 0100007F:C384 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 1 1";
        if cfg!(target_endian = "little") {
            let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0xC384);
            assert_eq!(socket(line), Some((address, State::Listening as u8)));
        }
    }
}
