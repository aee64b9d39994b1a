//! The address at the other end of a connection, and whether the request came through a reverse proxy.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, header};
use tokio::net::TcpStream;

/// Headers that a reverse proxy adds. Behind one, all clients have the address of the reverse proxy.
const FORWARDED: [HeaderName; 3] = [
    header::FORWARDED,
    header::VIA,
    HeaderName::from_static("x-forwarded-for"),
];

/// The addresses of a connection, where they are known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Peer {
    theirs: Option<IpAddr>,
    ours: Option<IpAddr>,
}

impl Peer {
    /// The addresses of `socket`.
    pub(crate) fn of(socket: &TcpStream) -> Self {
        Self {
            theirs: socket.peer_addr().ok().map(|address| address.ip().to_canonical()),
            ours: socket.local_addr().ok().map(|address| address.ip().to_canonical()),
        }
    }

    /// Whether a request with these headers comes from this host, and not through something that runs on it.
    pub(crate) fn is_this_host(self, headers: &HeaderMap) -> bool {
        let is_ours = self
            .theirs
            .is_some_and(|theirs| theirs.is_loopback() || self.ours == Some(theirs));
        is_ours && !FORWARDED.iter().any(|name| headers.contains_key(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_loopback_or_the_address_that_was_called() {
        let is_this_host = |theirs: &str, ours: &str, headers: &HeaderMap| {
            let peer = Peer {
                theirs: Some(theirs.parse().unwrap()),
                ours: Some(ours.parse().unwrap()),
            };
            peer.is_this_host(headers)
        };
        let none = HeaderMap::new();
        assert!(is_this_host("127.0.0.1", "127.0.0.1", &none));
        assert!(is_this_host("10.0.0.1", "10.0.0.1", &none));
        assert!(!is_this_host("10.0.0.2", "10.0.0.1", &none));
        assert!(!Peer::default().is_this_host(&none));
        for name in ["x-forwarded-for", "forwarded", "via"] {
            let mut forwarded = HeaderMap::new();
            forwarded.insert(name, "x".parse().unwrap());
            assert!(!is_this_host("127.0.0.1", "127.0.0.1", &forwarded), "{name}");
        }
    }
}
