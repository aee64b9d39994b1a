//! A server that answers as a script says, byte by byte, and remembers what it saw: for the faults that real servers
//! show too rarely.

#![allow(dead_code)] // Each test file uses its own part.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// One step of an answer.
#[derive(Debug, Clone)]
pub enum Act {
    /// Sends these bytes as they stand.
    Send(Vec<u8>),
    /// Sends these bytes as one chunk of a chunked body.
    Chunk(Vec<u8>),
    /// Ends a chunked body.
    EndChunks,
    /// Sends these bytes again and again, as one chunk of a chunked body each time, until the other side goes away.
    Forever(Vec<u8>),
    /// Does nothing for a while.
    Wait(Duration),
    /// Does nothing until the other side goes away.
    Hang,
    /// Closes the connection.
    Close,
}

/// `Send` of a text.
pub fn send(text: impl Into<Vec<u8>>) -> Act {
    Act::Send(text.into())
}

/// `Chunk` of a text.
pub fn chunk(text: impl Into<Vec<u8>>) -> Act {
    Act::Chunk(text.into())
}

/// `Wait` in milliseconds.
pub fn wait(milliseconds: u64) -> Act {
    Act::Wait(Duration::from_millis(milliseconds))
}

/// The head of a chunked event stream.
pub fn stream_head() -> Act {
    send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
}

/// A whole answer in JSON.
pub fn json(status: &str, body: &str) -> Vec<Act> {
    let length = body.len();
    vec![send(format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    ))]
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Which connection it came on, counted from 0.
    pub connection: usize,
    /// How many requests came before it, on any connection.
    pub number: usize,
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(it, _)| it == name)
            .map(|(_, value)| value.as_str())
    }
}

type Script = dyn Fn(&Seen) -> Vec<Act> + Send + Sync;

#[derive(Default)]
struct Log {
    seen: Mutex<Vec<Seen>>,
    /// When each piece of an answer was sent.
    sent: Mutex<Vec<Instant>>,
    /// When the other side went away in the middle of an answer.
    left: Mutex<Vec<Instant>>,
    open: AtomicUsize,
    accepted: AtomicUsize,
}

/// The server; it ends when it is dropped.
pub struct FakeUpstream {
    pub address: SocketAddr,
    log: Arc<Log>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for FakeUpstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeUpstream {
    /// Answers each request with what `script` makes of it.
    pub async fn start(script: impl Fn(&Seen) -> Vec<Act> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Log::default());
        let script: Arc<Script> = Arc::new(script);
        let task = tokio::spawn({
            let log = Arc::clone(&log);
            async move {
                // Owned here, so that its connections end with it.
                let mut connections = tokio::task::JoinSet::new();
                while let Ok((socket, _)) = listener.accept().await {
                    connections.spawn(serve(socket, Arc::clone(&log), Arc::clone(&script)));
                }
            }
        });
        Self { address, log, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.log.seen.lock().unwrap().clone()
    }

    /// The only request so far.
    pub fn only(&self) -> Seen {
        let seen = self.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen[0].clone()
    }

    /// When each `Send` and `Chunk` so far was done.
    pub fn sent(&self) -> Vec<Instant> {
        self.log.sent.lock().unwrap().clone()
    }

    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.log.open.load(Ordering::SeqCst)
    }

    /// Connections that ever were.
    pub fn accepted(&self) -> usize {
        self.log.accepted.load(Ordering::SeqCst)
    }

    /// Requests for this path and query so far, and the connections that they came on.
    pub fn on_connections(&self, target: &str) -> (usize, usize) {
        let seen = self.seen().into_iter().filter(|seen| seen.target == target);
        let connections: Vec<usize> = seen.map(|seen| seen.connection).collect();
        let different: HashSet<&usize> = connections.iter().collect();
        (connections.len(), different.len())
    }

    /// Waits until `count` requests have come.
    pub async fn has_seen(&self, count: usize) {
        until("the requests to come", || self.log.seen.lock().unwrap().len() >= count).await;
    }

    /// How often the other side has gone away in the middle of an answer.
    pub fn left(&self) -> usize {
        self.log.left.lock().unwrap().len()
    }

    /// Waits until the other side has gone away in the middle of an answer, and tells when.
    pub async fn was_left(&self) -> Instant {
        until("the other side to leave", || !self.log.left.lock().unwrap().is_empty()).await;
        self.log.left.lock().unwrap()[0]
    }
}

/// Waits for something to become true; gives up after 5 s.
pub async fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(5), "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

struct Open<'a>(&'a Log);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn serve(socket: TcpStream, log: Arc<Log>, script: Arc<Script>) {
    let connection = log.accepted.fetch_add(1, Ordering::SeqCst);
    log.open.fetch_add(1, Ordering::SeqCst);
    let _open = Open(&log);
    socket.set_nodelay(true).unwrap();
    let (reader, mut writer) = socket.into_split();
    let mut reader = BufReader::new(reader);
    while let Some(mut seen) = request(&mut reader).await {
        seen.connection = connection;
        {
            let mut all = log.seen.lock().unwrap();
            seen.number = all.len();
            all.push(seen.clone());
        }
        let acts = script(&seen);
        let mut byte = [0; 1];
        tokio::select! {
            biased;
            goes_on = answer(&mut writer, &log, acts) => if !goes_on { return },
            _ = reader.read(&mut byte) => {
                log.left.lock().unwrap().push(Instant::now());
                return;
            }
        }
    }
}

/// Does what the script says; false when the connection is to be closed.
async fn answer(writer: &mut OwnedWriteHalf, log: &Log, acts: Vec<Act>) -> bool {
    for act in acts {
        let bytes = match act {
            Act::Send(bytes) => bytes,
            Act::Chunk(bytes) => [format!("{:x}\r\n", bytes.len()).as_bytes(), &bytes, b"\r\n"].concat(),
            Act::EndChunks => b"0\r\n\r\n".to_vec(),
            Act::Forever(bytes) => {
                let chunk = [format!("{:x}\r\n", bytes.len()).as_bytes(), &bytes, b"\r\n"].concat();
                while writer.write_all(&chunk).await.is_ok() {}
                return false;
            }
            Act::Wait(time) => {
                tokio::time::sleep(time).await;
                continue;
            }
            Act::Hang => std::future::pending().await,
            Act::Close => return false,
        };
        log.sent.lock().unwrap().push(Instant::now());
        if writer.write_all(&bytes).await.is_err() {
            return false;
        }
    }
    true
}

async fn request(reader: &mut BufReader<OwnedReadHalf>) -> Option<Seen> {
    let line = line(reader).await?;
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let line = self::line(reader).await?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut seen = Seen {
        connection: 0,
        number: 0,
        method,
        target,
        headers,
        body: Vec::new(),
    };
    if let Some(length) = seen.header("content-length") {
        seen.body = vec![0; length.parse().unwrap()];
        reader.read_exact(&mut seen.body).await.ok()?;
    }
    assert!(
        seen.header("transfer-encoding").is_none(),
        "the proxy knows the length of what it sends"
    );
    Some(seen)
}

async fn line(reader: &mut BufReader<OwnedReadHalf>) -> Option<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(reader.read_u8().await.ok()?);
    }
    line.truncate(line.len() - 2);
    Some(String::from_utf8_lossy(&line).into_owned())
}
