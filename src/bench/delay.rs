//! A TCP relay that adds latency on the way to a server. Bytes keep their order, and the bandwidth stays the same.

use std::io;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc as channel;
use tokio::task::{AbortHandle, JoinSet};

/// Largest number of bytes in one read.
const CHUNK: usize = 64 * 1024;

/// A listener on this machine that relays connections to a server with a delay. Dropping it closes them.
#[derive(Debug)]
pub struct Relay {
    url: String,
    accepting: AbortHandle,
}

/// Why there is no [`Relay`].
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The URL is not a plain http:// URL.
    #[error("cannot delay connections to {0}: only servers with an http:// URL can be delayed")]
    Url(String),
    /// The system refuses.
    #[error("cannot relay connections to {url}: {source}")]
    Io {
        /// The server.
        url: String,
        /// Why.
        source: io::Error,
    },
}

/// Bytes on their way. Empty bytes mark the end of the stream.
struct Parcel {
    due: Instant,
    bytes: Vec<u8>,
    to: channel::UnboundedSender<Vec<u8>>,
}

impl Relay {
    /// Starts a relay to `url` that adds `delay` to each round trip, half of it in each direction. Connections are made without a
    /// delay.
    pub async fn start(url: &str, delay: Duration) -> Result<Self, RelayError> {
        let parsed = reqwest::Url::parse(url).ok().filter(|url| url.scheme() == "http");
        let (host, port) = parsed
            .as_ref()
            .and_then(|url| Some((url.host_str()?.trim_matches(['[', ']']), url.port_or_known_default()?)))
            .ok_or_else(|| RelayError::Url(url.to_owned()))?;
        let io = |source| RelayError::Io {
            url: url.to_owned(),
            source,
        };
        let server: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await.map_err(io)?.collect();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(io)?;
        let address = listener.local_addr().map_err(io)?;
        let parcels = delivery_thread().map_err(io)?;
        let accepting = tokio::spawn(accept(listener, server, parcels, delay / 2)).abort_handle();
        let path = parsed.as_ref().map_or("", |url| url.path().trim_end_matches('/'));
        Ok(Self {
            url: format!("http://{address}{path}"),
            accepting,
        })
    }

    /// Base URL of the relay.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Starts a thread that delivers parcels when they are due. All parcels wait for the same time, so they keep their order. A thread,
/// because the runtime's timer has a resolution of only one millisecond.
fn delivery_thread() -> io::Result<mpsc::Sender<Parcel>> {
    let (sender, parcels) = mpsc::channel::<Parcel>();
    std::thread::Builder::new().name("delay".into()).spawn(move || {
        for parcel in parcels {
            std::thread::sleep(parcel.due.saturating_duration_since(Instant::now()));
            // The connection may be closed already.
            let _ = parcel.to.send(parcel.bytes);
        }
    })?;
    Ok(sender)
}

async fn accept(listener: TcpListener, server: Vec<SocketAddr>, parcels: mpsc::Sender<Parcel>, one_way: Duration) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                let (server, parcels) = (server.clone(), parcels.clone());
                connections.spawn(async move {
                    if let Err(error) = connection(client, &server, &parcels, one_way).await {
                        tracing::debug!(%error, "a relayed connection broke");
                    }
                });
            }
        }
    }
}

/// Relays both directions until both have ended, or one has failed.
async fn connection(
    client: TcpStream,
    server: &[SocketAddr],
    parcels: &mpsc::Sender<Parcel>,
    one_way: Duration,
) -> io::Result<()> {
    let server = TcpStream::connect(server).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::try_join!(
        carry(from_client, to_server, parcels, one_way),
        carry(from_server, to_client, parcels, one_way),
    )?;
    Ok(())
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    parcels: &mpsc::Sender<Parcel>,
    one_way: Duration,
) -> io::Result<()> {
    let (sender, mut arrived) = channel::unbounded_channel();
    let collect = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = from.read(&mut buffer).await?;
            let parcel = Parcel {
                due: Instant::now() + one_way,
                bytes: buffer[..read].to_vec(),
                to: sender.clone(),
            };
            parcels.send(parcel).map_err(io::Error::other)?;
            if read == 0 {
                return Ok::<_, io::Error>(());
            }
        }
    };
    let deliver = async {
        while let Some(bytes) = arrived.recv().await.filter(|bytes: &Vec<u8>| !bytes.is_empty()) {
            to.write_all(&bytes).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(collect, deliver)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets.
    async fn echo() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = socket.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        url
    }

    async fn connect(relay: &Relay) -> TcpStream {
        TcpStream::connect(relay.url().strip_prefix("http://").unwrap())
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn a_round_trip_takes_the_delay_and_not_much_more() {
        let relay = Relay::start(&echo().await, Duration::from_millis(20)).await.unwrap();
        let mut socket = connect(&relay).await;
        let mut quickest = Duration::MAX;
        for _ in 0..5 {
            let sent = Instant::now();
            socket.write_all(b"x").await.unwrap();
            assert_eq!(socket.read_u8().await.unwrap(), b'x');
            assert!(sent.elapsed() >= Duration::from_millis(20));
            quickest = quickest.min(sent.elapsed());
        }
        assert!(quickest < Duration::from_millis(40), "{quickest:?}");
    }

    #[tokio::test]
    async fn bytes_follow_each_other_without_waiting_arrive_in_order_and_end() {
        let relay = Relay::start(&echo().await, Duration::from_millis(50)).await.unwrap();
        let mut socket = connect(&relay).await;
        let began = Instant::now();
        let mut sent = Vec::new();
        for number in 0..100_u8 {
            socket.write_all(&[number]).await.unwrap();
            sent.push(number);
            tokio::task::yield_now().await;
        }
        socket.shutdown().await.unwrap();
        let mut received = Vec::new();
        socket.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, sent);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_seen_by_the_server() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let relay = Relay::start(&url, Duration::from_millis(2)).await.unwrap();
        let client = connect(&relay).await;
        let (mut server, _) = listener.accept().await.unwrap();
        drop(client);
        let read = tokio::time::timeout(Duration::from_secs(5), server.read(&mut [0])).await;
        assert_eq!(read.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn only_bare_connections_are_relayed() {
        for url in ["https://there", "there:8080", ""] {
            assert!(Relay::start(url, Duration::ZERO).await.is_err(), "{url}");
        }
    }
}
