//! Caps the connections of a server, in all and by peer.
//!
//! To make room for a new connection, it ends the connection that has been idle for longest, and never one on which a request
//! is being answered.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_util::sync::CancellationToken;

use super::body::Memory;

/// Descriptors that are not for clients: logs, models, connections to drafters.
const OTHER_DESCRIPTORS: usize = 64;
/// Descriptors for each client: its connection, and those to the servers behind.
const DESCRIPTORS_EACH: usize = 3;

const MIB: usize = 1024 * 1024;

/// Limits of a server towards its clients.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most connections. Fewer where the system grants fewer descriptors.
    pub connections: usize,
    /// Most connections of one peer: an IPv4 address, or an IPv6 network of 64 bits.
    pub per_peer: usize,
    /// Most connections on which no request is being answered.
    pub idle: usize,
    /// Longest silence before a request.
    pub idle_time: Duration,
    /// Longest time for the head of a request, from its first byte.
    pub head_time: Duration,
    /// A body may take this long, and longer only as far as it keeps to `body_rate`.
    pub body_grace: Duration,
    /// Slowest rate of a body in bytes per second.
    pub body_rate: u32,
    /// Most bytes of request bodies in memory, of all requests together.
    pub body_memory: usize,
    /// Most bytes of request bodies in memory, of all requests of one peer.
    pub body_memory_per_peer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            per_peer: 12_288,
            idle: 1024,
            idle_time: Duration::from_secs(120),
            head_time: Duration::from_secs(20),
            body_grace: Duration::from_secs(10),
            body_rate: 16 * 1024,
            body_memory: 256 * MIB,
            body_memory_per_peer: 192 * MIB,
        }
    }
}

impl Limits {
    /// These limits, with room for at least one body of `bytes`.
    #[must_use]
    pub fn for_bodies_of(mut self, bytes: u64) -> Self {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.body_memory = self.body_memory.max(bytes);
        self.body_memory_per_peer = self.body_memory_per_peer.max(bytes);
        self
    }

    /// These limits, lowered to what `descriptors` allow.
    fn within(mut self, descriptors: usize) -> Self {
        let most = (descriptors.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS_EACH).max(1);
        if most < self.connections {
            self.connections = most;
            self.per_peer = self.per_peer.min((most * 3).div_ceil(4));
        }
        self
    }
}

/// Raises the soft limit of descriptors to the hard one and returns it.
fn descriptors() -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let granted = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(error) => {
            tracing::debug!(%error, "the limit of open files cannot be raised");
            current
        }
    };
    // `None`: no limit.
    granted.map_or(usize::MAX, |granted| usize::try_from(granted).unwrap_or(usize::MAX))
}

/// The connections of a server.
#[derive(Debug)]
pub(super) struct ConnectionLimiter {
    limits: Limits,
    body_memory: Memory,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_peer: HashMap<IpAddr, OfPeer>,
    /// Idle connections, the one that has been idle for longest first.
    idle: BTreeMap<u64, Idle>,
    last_number: u64,
}

#[derive(Debug)]
struct OfPeer {
    connections: usize,
    body_memory: Memory,
}

#[derive(Debug)]
struct Idle {
    peer: IpAddr,
    evict: CancellationToken,
}

impl ConnectionLimiter {
    /// A limiter for `limits`, lowered to the descriptors of this process.
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            body_memory: Memory::of(limits.body_memory),
            limits: limits.within(descriptors()),
            taken: Mutex::default(),
        })
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// A permit for a connection of `peer`. Where all are taken, ends the connection that has been idle for longest; `None`
    /// if none is idle.
    pub(super) fn take(self: &Arc<Self>, peer: IpAddr) -> Option<ConnectionPermit> {
        let peer = network(peer);
        let (place, room);
        {
            let mut taken = self.taken.lock();
            let of_peer = taken.by_peer.get(&peer).map_or(0, |peer| peer.connections);
            room = if of_peer >= self.limits.per_peer {
                taken.evict(|idle| idle.peer == peer)
            } else if taken.all >= self.limits.connections || taken.idle.len() >= self.limits.idle {
                taken.evict(|_| true)
            } else {
                true
            };
            taken.all += 1;
            let of_peer = taken.by_peer.entry(peer).or_insert_with(|| OfPeer {
                connections: 0,
                body_memory: self.body_memory.of_peer(self.limits.body_memory_per_peer),
            });
            of_peer.connections += 1;
            // Dropping the permit gives it back.
            place = ConnectionPermit {
                places: Arc::clone(self),
                peer,
                body_memory: of_peer.body_memory.clone(),
                evicted: CancellationToken::new(),
                number: Mutex::new(None),
            };
        }
        if !room {
            return None;
        }
        place.rests();
        Some(place)
    }

    /// Ends the connection that has been idle for longest.
    pub(super) fn make_room(&self) {
        self.taken.lock().evict(|_| true);
    }
}

impl Taken {
    /// Ends the connection that has been idle for longest among those that `fits` takes; false if there is none.
    fn evict(&mut self, fits: impl Fn(&Idle) -> bool) -> bool {
        let oldest = self.idle.iter().find(|(_, idle)| fits(idle)).map(|(number, _)| *number);
        match oldest.and_then(|number| self.idle.remove(&number)) {
            Some(idle) => {
                idle.evict.cancel();
                true
            }
            None => false,
        }
    }
}

/// Counts one connection until it is dropped.
#[derive(Debug)]
pub(super) struct ConnectionPermit {
    places: Arc<ConnectionLimiter>,
    peer: IpAddr,
    body_memory: Memory,
    evicted: CancellationToken,
    /// Its number among the idle connections; `None` while it is busy.
    number: Mutex<Option<u64>>,
}

impl ConnectionPermit {
    /// Cancelled when this connection has to make room for another.
    pub(super) fn evicted(&self) -> CancellationToken {
        self.evicted.clone()
    }

    /// The memory for the bodies of its peer's requests.
    pub(super) fn body_memory(&self) -> Memory {
        self.body_memory.clone()
    }

    /// Marks the connection as idle.
    pub(super) fn rests(&self) {
        let mut taken = self.places.taken.lock();
        taken.last_number += 1;
        let number = taken.last_number;
        let idle = Idle {
            peer: self.peer,
            evict: self.evicted.clone(),
        };
        taken.idle.insert(number, idle);
        *self.number.lock() = Some(number);
    }

    /// Marks the connection as answering a request.
    pub(super) fn works(&self) {
        let mut taken = self.places.taken.lock();
        if let Some(number) = self.number.lock().take() {
            taken.idle.remove(&number);
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.works();
        let mut taken = self.places.taken.lock();
        taken.all = taken.all.saturating_sub(1);
        if let Some(of_peer) = taken.by_peer.get_mut(&self.peer) {
            of_peer.connections = of_peer.connections.saturating_sub(1);
            if of_peer.connections == 0 {
                taken.by_peer.remove(&self.peer);
            }
        }
    }
}

/// The unit that counts as one peer: an IPv4 address, or an IPv6 network of 64 bits.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(connections: usize, per_peer: usize, idle: usize) -> Arc<ConnectionLimiter> {
        ConnectionLimiter::new(Limits {
            connections,
            per_peer,
            idle,
            ..Limits::default()
        })
    }

    fn peer(number: u8) -> IpAddr {
        [192, 168, 1, number].into()
    }

    #[test]
    fn the_connection_that_was_idle_for_longest_makes_room_and_none_that_works() {
        let places = places(3, 3, 3);
        let taken: Vec<ConnectionPermit> = (1..=3).map(|number| places.take(peer(number)).unwrap()).collect();
        taken[0].works();
        let fourth = places.take(peer(4)).unwrap();
        let evicted = |place: &ConnectionPermit| place.evicted().is_cancelled();
        assert_eq!(
            taken.iter().map(evicted).collect::<Vec<_>>(),
            [false, true, false],
            "the oldest idle one"
        );
        fourth.works();
        taken[2].works();
        assert!(places.take(peer(5)).is_none(), "all are at work");
        taken[0].rests();
        assert!(places.take(peer(5)).is_some());
        assert!(evicted(&taken[0]));
    }

    #[test]
    fn a_peer_that_has_its_share_makes_room_itself_or_waits() {
        let places = places(10, 2, 10);
        let (other, first, second) = (
            places.take(peer(9)).unwrap(),
            places.take(peer(1)).unwrap(),
            places.take(peer(1)).unwrap(),
        );
        first.works();
        second.works();
        assert!(places.take(peer(1)).is_none());
        assert!(places.take(peer(2)).is_some());
        second.rests();
        assert!(places.take(peer(1)).is_some());
        assert!(second.evicted().is_cancelled() && !other.evicted().is_cancelled());
    }

    #[test]
    fn a_place_is_free_again_once_it_is_dropped() {
        let places = places(1, 1, 1);
        for _ in 0..3 {
            let place = places.take(peer(1)).unwrap();
            place.works();
            assert!(places.take(peer(2)).is_none());
        }
        assert!(places.taken.lock().by_peer.is_empty() && places.taken.lock().idle.is_empty());
        assert_eq!(places.taken.lock().all, 0);
    }

    #[test]
    fn an_ipv6_network_is_one_peer_and_a_mapped_address_is_its_ipv4_address() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.168.1.1"), peer(1));
    }

    #[test]
    fn few_descriptors_make_few_places() {
        let limits = Limits::default().within(256);
        assert_eq!((limits.connections, limits.per_peer), (64, 48));
        assert_eq!(Limits::default().within(usize::MAX).connections, 16_384);
    }
}
