//! Readers of strangers' bytes, each as a function of those bytes.
//!
//! Invariant: a function returns for every input. It panics over a bug, which is what a fuzzer looks for. The functions use
//! the public interface only. Servers are real ones on a loopback address, which send the input and close.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tightwad::config::{Environment, load_in};
use tightwad::gguf::ModelFile;
use tightwad::pool::rpc_probe::{RpcProbeError, probe};
use tightwad::upstream::chat::{Message, Wishes};
use tightwad::upstream::{ChatServer, DraftCall, DraftPiece, LlamaServer, WrittenTokens};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime;
use tokio::time::timeout;

/// Longest time for one input.
const LIMIT: Duration = Duration::from_secs(20);
/// Devices of a host that the probe asks for at most.
const MOST_DEVICES: usize = 64;
/// Draft tokens that are asked for.
const DRAFTED: usize = 8;

/// The header of a model file: it says how long the file is.
pub fn gguf(input: &[u8]) {
    with_file("model.gguf", input, |path| {
        if let Ok(model) = ModelFile::read(path) {
            assert_eq!(model.bytes, input.len() as u64);
        }
    });
}

/// The cluster file: an error names the file.
pub fn config(input: &[u8]) {
    with_file("tightwad.yaml", input, |path| {
        let environment = Environment {
            variables: [("SET".to_owned(), "value".to_owned())].into(),
            directory: path.parent().map(Path::to_owned).unwrap_or_default(),
        };
        if let Err(error) = load_in(Some(path), &environment) {
            let message = error.to_string();
            assert!(message.contains("tightwad.yaml"), "{message}");
        }
    });
}

/// The event stream of a chat: the text does not depend on how the bytes are cut into packets.
pub fn sse(input: &[u8]) {
    let text = |pieces: usize| {
        served(&event_stream(input), pieces, |address| async move {
            let server = ChatServer::new(address, None, None).expect("a client");
            let question = [Message::user("Hello.")];
            let answer = server.chat(&question, None, Wishes::default(), |_| Ok(())).await;
            answer.map(|answer| answer.text).ok()
        })
    };
    assert_eq!(text(1), text(7));
}

/// The answers of a `ggml-rpc-server`: the number of devices is bounded.
pub fn rpc_probe(input: &[u8]) {
    served(input, 1, |address| async move {
        let address = address.trim_start_matches("http://").parse().expect("an address");
        match probe(address, LIMIT / 2).await {
            Ok(told) => assert!(told.devices.len() <= MOST_DEVICES),
            Err(RpcProbeError::Silent { .. }) => panic!("it waits for a server that has hung up"),
            Err(_) => {}
        }
    });
}

/// The two halves of the draft protocol: tokens of a drafter and answers of a target. Neither holds more than was asked for.
pub fn draft(input: &[u8]) {
    served(&event_stream(input), 3, |address| async move {
        let server = LlamaServer::new(&address, None).expect("a client");
        let mut written = WrittenTokens::default();
        let mut drafted = 0;
        let mut pieces = server.draft(vec![1, 2, 3], &mut written, DRAFTED, 0, false);
        while let Some(Ok(piece)) = pieces.next().await {
            if let DraftPiece::Tokens(tokens) = piece {
                drafted += tokens.len();
            }
        }
        assert!(drafted <= DRAFTED, "{drafted} tokens");
    });
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        input.len()
    );
    served(&[head.as_bytes(), input].concat(), 1, |address| async move {
        let server = LlamaServer::new(&address, None).expect("a client");
        let call = DraftCall {
            key: "key",
            pos: 3,
            tokens: &[5, 6],
            n_min: 1,
            hold_us: 0,
            wait: false,
        };
        if let Ok(answer) = server.offer(&call).await {
            assert_eq!(answer.pos, call.pos);
        }
    });
}

fn with_file(name: &str, input: &[u8], read: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(name);
    std::fs::write(&path, input).expect("a file");
    read(&path);
}

fn event_stream(input: &[u8]) -> Vec<u8> {
    let head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";
    [head, input].concat()
}

/// Runs a client of a server that answers every connection with `answer`, sent in so many `pieces`, and then closes it.
fn served<T, F: Future<Output = T>>(answer: &[u8], pieces: usize, client: impl FnOnce(String) -> F) -> T {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("its address"));
        let answer: Arc<[u8]> = answer.into();
        let serving = async {
            loop {
                let Ok((connection, _)) = listener.accept().await else {
                    continue;
                };
                // Errors are those of a client that hangs up early.
                tokio::spawn(answer_with(connection, answer.clone(), pieces));
            }
        };
        tokio::select! {
            result = timeout(LIMIT, client(address)) => result.expect("it hangs"),
            () = serving => unreachable!("it serves for ever"),
        }
    })
}

async fn answer_with(mut connection: TcpStream, answer: Arc<[u8]>, pieces: usize) -> std::io::Result<()> {
    connection.set_nodelay(true)?;
    let mut request = [0; 4096];
    if connection.read(&mut request).await? == 0 {
        return Ok(());
    }
    for piece in answer.chunks(answer.len().div_ceil(pieces).max(1)) {
        connection.write_all(piece).await?;
        tokio::task::yield_now().await;
    }
    connection.shutdown().await?;
    // What is left unread at the end would reset the connection, and with it what was sent.
    while connection.read(&mut request).await? > 0 {}
    Ok(())
}
