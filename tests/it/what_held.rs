//! Attacks that came to nothing, in short: they must not come to anything later.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::fake_upstream::{FakeUpstream, json as answer};
use crate::harness::llama_server::{Program, free_port};
use crate::harness::proxy::Proxy;
use crate::harness::wait::eventually;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use tightwad::config::{Environment, load_in};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A config that is read takes no longer than this, and neither does one that is refused.
const READ: Duration = Duration::from_secs(20);
/// A request that is not answered by then is one that has yet to end.
const SOON: Duration = Duration::from_millis(100);
/// Longest wait for the end of a connection.
const ANSWER: Duration = Duration::from_secs(20);

#[test]
fn a_yaml_bomb_is_refused_at_once() {
    let laughs = (1..12).fold("a0: &a0 [x, x]\n".to_owned(), |text, n| {
        let alias = format!("*a{}, ", n - 1).repeat(9);
        format!("{text}a{n}: &a{n} [{alias}x]\n")
    });
    let indented = (0..1000).fold(String::new(), |text, depth| format!("{text}{:depth$}a:\n", ""));
    let anchor = |n| format!("k{n}: &a{n} v\n");
    let bombs = [
        ("aliases of aliases", laughs),
        ("an alias of itself", "a: &a [*a]\n".to_owned()),
        ("lists in lists", "[".repeat(200_000)),
        ("mappings in mappings", "{a: ".repeat(100_000)),
        ("indentation", indented),
        ("a key without an end", format!("? {}", "a".repeat(900_000))),
        ("many anchors", (0..5_000).map(anchor).collect::<Vec<_>>().concat()),
        ("many references", format!("a: {}", "${A}".repeat(100_000))),
    ];
    for (what, text) in bombs {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tightwad.yaml"), text).unwrap();
        let environment = Environment {
            directory: folder.path().to_owned(),
            variables: [("A".to_owned(), "x".repeat(100))].into(),
        };
        let began = Instant::now();
        assert!(load_in(None, &environment).is_err(), "{what}");
        assert!(began.elapsed() < READ, "{what}: {:?}", began.elapsed());
    }
}

/// A target that answers whatever is asked of it.
async fn target() -> FakeUpstream {
    FakeUpstream::start(|_| answer("200 OK", r#"{"object":"text_completion","choices":[]}"#)).await
}

/// All that comes back when these bytes are sent. Where nothing more comes for `patience` the sending side is closed, as by
/// a client that has said all it has to say.
async fn exchange(address: SocketAddr, bytes: &[u8], patience: Duration) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).await.expect("it takes connections");
    let mut answer = Vec::new();
    let exchanged = timeout(ANSWER, async {
        // It may hang up before it has read all, and that is an answer too.
        let _ = socket.write_all(bytes).await;
        let mut chunk = [0; 4096];
        let mut closed = false;
        loop {
            match timeout(patience, socket.read(&mut chunk)).await {
                Ok(Ok(0) | Err(_)) => return,
                Ok(Ok(n)) => answer.extend_from_slice(&chunk[..n]),
                Err(_) if closed => {}
                Err(_) => {
                    let _ = socket.shutdown().await;
                    closed = true;
                }
            }
        }
    });
    let exchanged = exchanged.await;
    exchanged.unwrap_or_else(|_| panic!("no end after {}", String::from_utf8_lossy(bytes)));
    answer
}

/// The status of an answer, if there is one.
fn status(answer: &[u8]) -> Option<u16> {
    let head = String::from_utf8_lossy(answer);
    head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

fn post(path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\
         {headers}Connection: close\r\n\r\n{body}"
    )
}

/// What an attacker's fuzzer does to a request.
fn mutated(random: &mut StdRng, request: &str) -> Vec<u8> {
    let mut bytes = request.as_bytes().to_vec();
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..bytes.len());
        let end = (at + random.random_range(1..30)).min(bytes.len());
        match random.random_range(0..6) {
            0 => bytes[at] = random.random(),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            3 => drop(bytes.splice(at..at, *b"\r\n")),
            4 => {
                let many = vec![bytes[at]; random.random_range(1..5000)];
                bytes.splice(at..at, many);
            }
            _ => bytes.truncate(end),
        }
        if bytes.is_empty() {
            bytes.push(b'\n');
        }
    }
    bytes
}

#[tokio::test]
async fn no_mutated_request_makes_the_proxy_fail() {
    let target = target().await;
    let proxy = Proxy::start(&target.url(), None).await;
    let address: SocketAddr = proxy.url().trim_start_matches("http://").parse().unwrap();
    let chat =
        json!({ "model": "m", "messages": [{ "role": "user", "content": "hé" }], "max_tokens": 5, "stream": false });
    let legacy = json!({ "prompt": [1, 2, 3], "n_predict": -1, "stop": ["\u{0}"], "logit_bias": { "1": -100.5 } });
    let requests = [
        post("/v1/chat/completions", "", &chat.to_string()),
        post(
            "/completion?x=%2e%2e",
            "X-Request-Id: 1\r\nAccept: */*\r\n",
            &legacy.to_string(),
        ),
        post(
            "/v1/messages",
            "anthropic-version: 1\r\nTransfer-Encoding: chunked\r\n",
            "5\r\nhello\r\n0\r\n\r\n",
        ),
        "GET /v1/models?a=b HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, x\r\nx: y\r\n\r\n".to_owned(),
    ];
    let mut random = StdRng::seed_from_u64(15);
    let mut answered = 0;
    for number in 0..300 {
        let bytes = mutated(&mut random, &requests[number % requests.len()]);
        let answer = exchange(address, &bytes, SOON).await;
        if let Some(status) = status(&answer) {
            let (sent, got) = (String::from_utf8_lossy(&bytes), String::from_utf8_lossy(&answer));
            assert!(status < 500, "{number}: {sent}\n{got}");
            answered += 1;
        }
    }
    assert!(answered > 150, "{answered} of 300 were answered");
    let answer = exchange(address, requests[0].as_bytes(), ANSWER).await;
    assert_eq!(status(&answer), Some(200), "{}", String::from_utf8_lossy(&answer));
    let drafts = target
        .seen()
        .into_iter()
        .filter(|seen| seen.target.starts_with("/draft"));
    assert_eq!(drafts.count(), 0);
}

#[tokio::test]
async fn nothing_is_smuggled_past_the_token() {
    let target = target().await;
    let port = free_port();
    let config = json!({
        "proxy": { "host": "127.0.0.1", "port": port, "auth_token": "hush", "target": { "url": target.url() } },
    });
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = folder.path().join("tightwad.yaml");
    std::fs::write(&file, config.to_string()).unwrap();
    let args = ["-c", file.to_str().unwrap(), "run", "proxy"];
    let proxy = Program::start(Path::new(env!("CARGO_BIN_EXE_tightwad")), &args);
    let address: SocketAddr = ([127, 0, 0, 1], port).into();
    let up = eventually(Duration::from_secs(20), || async { TcpStream::connect(address).await });
    up.await.unwrap_or_else(|error| panic!("{error}: {}", proxy.log()));

    let inner = "POST /smuggled HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n";
    let length = inner.len();
    // Lengths on which two servers may disagree, and lines that one of them may take for two.
    let tricks = [
        format!("Content-Length: {length}\r\nContent-Length: 0\r\n\r\n"),
        format!("Content-Length: 0\r\nContent-Length: {length}\r\n\r\n"),
        format!("Content-Length: 0, {length}\r\n\r\n"),
        "Content-Length: +0\r\n\r\n".to_owned(),
        "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n\r\n0\r\n\r\n"),
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n".to_owned(),
        "Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n".to_owned(),
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n".to_owned(),
        "X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "Transfer-Encoding: chunked\r\n\r\n0;ext=\"\r\n\r\n\"\r\n\r\n".to_owned(),
        "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n\r\n0\r\n\r\n".to_owned(),
        "X: y\nContent-Length: 0\r\n\r\n".to_owned(),
        "Connection: close, content-length\r\nContent-Length: 0\r\n\r\n".to_owned(),
        "Expect: 100-continue\r\nContent-Length: 0\r\n\r\n".to_owned(),
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
            .to_owned(),
    ];
    for trick in &tricks {
        let head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer hush\r\n";
        let bytes = format!("{head}{trick}{inner}");
        exchange(address, bytes.as_bytes(), SOON).await;
        let smuggled = target.seen().into_iter().find(|seen| seen.target.contains("smuggled"));
        assert!(smuggled.is_none(), "{trick:?}: {smuggled:?}");
        let keyed = target
            .seen()
            .into_iter()
            .find(|seen| seen.headers.iter().any(|(_, value)| value.contains("hush")));
        assert!(keyed.is_none(), "the target learns the token: {keyed:?}");
    }

    // Whatever is asked without the token, or with another one, the target hears nothing of it.
    let before = target.seen().len();
    for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"] {
        for path in [
            "/v1/completions",
            "/v1/models",
            "/slots",
            "/props",
            "/draft",
            "//v1/models",
            "/v1/tightwad/status",
        ] {
            for credentials in [
                "",
                "Authorization: Bearer \r\n",
                "Authorization: Bearer hush2\r\n",
                "x-api-key: Hush\r\n",
            ] {
                let request = format!(
                    "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{credentials}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}"
                );
                let answer = exchange(address, request.as_bytes(), ANSWER).await;
                let status = status(&answer);
                assert!(
                    status.is_none_or(|status| (401..=405).contains(&status)),
                    "{request}\n{status:?}"
                );
            }
        }
    }
    let heard: Vec<String> = target.seen().drain(before..).map(|seen| seen.target).collect();
    let watching = ["/health", "/props", "/v1/models"];
    assert!(heard.iter().all(|path| watching.contains(&path.as_str())), "{heard:?}");
}
