//! Requests of a fuzzer and of smugglers.

use std::net::SocketAddr;
use std::time::Duration;

use super::ProxyProcess;
use crate::harness::fake_upstream::{FakeUpstream, json as answer};
use crate::harness::pool::{Pool, Setup};
use crate::harness::proxy::Proxy;
use futures_util::stream::{self, StreamExt};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A request that is not answered by then is one that has yet to end.
const SOON: Duration = Duration::from_millis(100);
/// Longest wait for the end of a connection.
const ANSWER: Duration = Duration::from_secs(20);
/// Exchanges at the same time.
const AT_ONCE: usize = 8;

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

/// Requests to mutate. `n_predict` is that of the one with llama-server's own names.
fn requests(n_predict: i32) -> [String; 4] {
    let chat =
        json!({ "model": "m", "messages": [{ "role": "user", "content": "hé" }], "max_tokens": 5, "stream": false });
    let legacy =
        json!({ "prompt": [1, 2, 3], "n_predict": n_predict, "stop": ["\u{0}"], "logit_bias": { "1": -100.5 } });
    [
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
    ]
}

/// Sends `count` mutated requests, and counts those that are answered. `is_fine` judges the status of each.
async fn answered(address: SocketAddr, requests: &[String], count: usize, is_fine: impl Fn(u16) -> bool) -> usize {
    let mut random = StdRng::seed_from_u64(15);
    let mutated: Vec<Vec<u8>> = (0..count)
        .map(|number| mutated(&mut random, &requests[number % requests.len()]))
        .collect();
    let exchanges = mutated.into_iter().map(|bytes| async move {
        let answer = exchange(address, &bytes, SOON).await;
        (bytes, answer)
    });
    let mut answered = 0;
    let mut exchanges = stream::iter(exchanges).buffer_unordered(AT_ONCE);
    while let Some((bytes, answer)) = exchanges.next().await {
        if let Some(status) = status(&answer) {
            let (sent, got) = (String::from_utf8_lossy(&bytes), String::from_utf8_lossy(&answer));
            assert!(is_fine(status), "{sent}\n{got}");
            answered += 1;
        }
    }
    answered
}

#[tokio::test]
async fn no_mutated_request_makes_the_proxy_fail() {
    let target = target().await;
    let proxy = Proxy::start(&target.url(), None).await;
    let address: SocketAddr = proxy.url().trim_start_matches("http://").parse().unwrap();
    let requests = requests(-1);
    let answered = answered(address, &requests, 300, |status| status < 500).await;
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
async fn no_mutated_request_makes_the_coordinator_fail() {
    let pool = Pool::ready(Setup::default()).await;
    let address: SocketAddr = pool.url().trim_start_matches("http://").parse().unwrap();
    // The pool has a real model.
    let requests = requests(4).map(|request| request.replace(r#""model":"m""#, r#""model":"big""#));
    let answered = answered(address, &requests, 300, |status| status < 500).await;
    assert!(answered > 150, "{answered} of 300 were answered");
    let answer = exchange(address, requests[1].as_bytes(), ANSWER).await;
    assert_eq!(status(&answer), Some(200), "{}", String::from_utf8_lossy(&answer));
    let status = pool.status().await;
    assert_eq!(status["starts"], 1, "the server was not started again: {status}");
    let log = pool.coordinator.as_ref().unwrap().log();
    assert!(!log.contains("panicked"), "{log}");
}

#[tokio::test]
async fn nothing_is_smuggled_past_the_token() {
    let target = target().await;
    let proxy = ProxyProcess::start(json!({ "auth_token": "hush", "target": { "url": target.url() } })).await;
    let address = proxy.address;

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
