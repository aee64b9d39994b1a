//! Clients that hold what they were given, web pages of others, and text that is meant for a log: tried against the proxy,
//! the worker's agent and the coordinator.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, json, send, stream_head, wait};
use crate::harness::llama_server::{Program, answer_of, free_port};
use crate::harness::pool::{Pool, Setup};
use crate::harness::tuned_proxy::TunedProxy;
use crate::harness::wait::eventually;
use crate::harness::worker::{self, lease_request};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json as value};
use tempfile::TempDir;
use tightwad::config::Secret;
use tightwad::pool::agent_client::AgentClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const CHAT: &str = "/v1/chat/completions";
const UNSTREAMED: &str = r#"{"messages":[]}"#;
const STREAMED: &str = r#"{"messages":[],"stream":true}"#;
const EVIL: &str = "https://evil.example";

/// A target that answers everything with an empty object.
async fn content() -> FakeUpstream {
    FakeUpstream::start(|_| json("200 OK", "{}")).await
}

/// A connection to `address` on which `text` has been sent.
async fn sent(address: &str, text: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(text.as_bytes()).await.unwrap();
    socket
}

/// All that comes until the other side ends the connection, and how long that took.
async fn read_to_end(socket: &mut TcpStream) -> (String, Duration) {
    let began = Instant::now();
    let mut answer = Vec::new();
    // A reset is an end too.
    let read = timeout(Duration::from_secs(8), socket.read_to_end(&mut answer)).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(read.is_ok(), "the connection is still open: {answer}");
    (answer, began.elapsed())
}

// Connections that are held

#[tokio::test]
async fn permission_is_given_without_waiting_for_a_body() {
    let target = content().await;
    for token in [None, Some(Secret::new("s3cret"))] {
        let proxy = TunedProxy::before(&target.url(), |settings| settings.auth_token = token).await;
        let head = format!(
            "OPTIONS {CHAT} HTTP/1.1\r\nHost: {}\r\nContent-Length: 9000\r\n\r\n{{",
            proxy.address
        );
        let mut socket = sent(&proxy.address, &head).await;
        let (answer, took) = read_to_end(&mut socket).await;
        assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
    assert!(target.seen().is_empty(), "it is answered by the proxy");
}

#[tokio::test]
async fn idle_connections_lock_nobody_out() {
    let target = content().await;
    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.limits.connections = 20;
        settings.limits.per_peer = 20;
    })
    .await;
    let mut idle = Vec::new();
    for number in 0..60 {
        // Half of them have begun a head.
        let text = if number % 2 == 0 { "" } else { "GET / HTTP/1.1\r\nHo" };
        idle.push(sent(&proxy.address, text).await);
    }
    let answer = timeout(Duration::from_secs(5), proxy.get("/v1/models").send()).await;
    assert_eq!(answer.expect("an answer in time").unwrap().status(), 200);
    let (rest, _) = read_to_end(&mut idle[0]).await;
    assert_eq!(rest, "", "the oldest ones made room");
}

#[tokio::test]
async fn where_every_connection_is_at_work_the_next_client_is_told_to_come_again() {
    let target = FakeUpstream::start(|_| vec![stream_head(), chunk("data: 1\n\n"), Act::Hang]).await;
    let proxy = TunedProxy::before(&target.url(), |settings| settings.limits.connections = 2).await;
    let mut running = Vec::new();
    for _ in 0..2 {
        running.push(proxy.post(CHAT, STREAMED).send().await.unwrap());
    }
    let refused = timeout(Duration::from_secs(5), proxy.get("/health").send()).await;
    let refused = refused.expect("an answer in time").unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers().contains_key("retry-after"));
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "too_many_connections");
    drop(running);
    let free = eventually(Duration::from_secs(5), || async {
        let status = proxy.get("/health").send().await.unwrap().status();
        if status == 200 { Ok(()) } else { Err(status) }
    });
    free.await.unwrap();
}

#[tokio::test]
async fn half_a_head_is_waited_for_only_so_long() {
    let target = content().await;
    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.limits.head_time = Duration::from_millis(300);
        settings.limits.idle_time = Duration::from_millis(900);
    })
    .await;
    let mut half = sent(&proxy.address, "GET /v1/models HTTP/1.1\r\nHost: 127").await;
    let mut silent = sent(&proxy.address, "").await;
    let began = Instant::now();
    read_to_end(&mut half).await;
    let head = began.elapsed();
    read_to_end(&mut silent).await;
    let idle = began.elapsed();
    assert!((0.25..0.85).contains(&head.as_secs_f32()), "{head:?}");
    assert!((0.85..3.0).contains(&idle.as_secs_f32()), "{idle:?}");

    // Between two requests as before the first, and no longer while an answer is awaited.
    let slow = FakeUpstream::start(|_| [vec![wait(1500)], json("200 OK", "{}")].concat()).await;
    let proxy = TunedProxy::before(&slow.url(), |settings| {
        settings.limits.head_time = Duration::from_millis(300);
        settings.limits.idle_time = Duration::from_millis(500);
    })
    .await;
    let text = format!("GET /props HTTP/1.1\r\nHost: {}\r\n\r\n", proxy.address);
    let mut socket = sent(&proxy.address, &text).await;
    let (answer, took) = read_to_end(&mut socket).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!((1.9..4.0).contains(&took.as_secs_f32()), "{took:?}");
}

#[tokio::test]
async fn a_body_that_comes_too_slowly_is_cut_and_one_that_comes_steadily_is_not() {
    let target = content().await;
    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.limits.body_grace = Duration::from_millis(300);
        settings.limits.body_rate = 1000;
    })
    .await;
    let head = |length: usize| {
        format!(
            "POST {CHAT} HTTP/1.1\r\nHost: {}\r\nContent-Length: {length}\r\n\r\n",
            proxy.address
        )
    };
    let mut socket = sent(&proxy.address, &format!("{}{{", head(9000))).await;
    let (answer, took) = read_to_end(&mut socket).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("came too slowly"), "{answer}");
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert!(target.seen().is_empty());

    // 200 bytes each 50 ms are four times the least.
    let mut steady = sent(&proxy.address, &head(3000)).await;
    for _ in 0..15 {
        steady.write_all(&[b' '; 198]).await.unwrap();
        steady.write_all(b"  ").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut start = [0; 12];
    timeout(Duration::from_secs(5), steady.read_exact(&mut start))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&start, b"HTTP/1.1 400", "blanks are no request");
}

#[tokio::test]
async fn unfinished_bodies_take_no_more_memory_than_is_set_aside_for_them() {
    let target = content().await;
    let proxy = TunedProxy::before(&target.url(), |settings| settings.limits.body_memory = 1_000_000).await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {}\r\nContent-Length: 9000000\r\n\r\n",
        proxy.address
    );
    let part = " ".repeat(300_000);
    let mut unfinished = Vec::new();
    for _ in 0..3 {
        unfinished.push(sent(&proxy.address, &format!("{head}{part}")).await);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let large = format!("{{\"messages\":[],\"x\":\"{part}\"}}");
    let refused = timeout(Duration::from_secs(5), proxy.post(CHAT, large.clone()).send()).await;
    let refused = refused.expect("an answer in time").unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers().contains_key("retry-after"));
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "overloaded", "{body}");
    assert_eq!(
        proxy.post(CHAT, UNSTREAMED).send().await.unwrap().status(),
        200,
        "a small one"
    );
    drop(unfinished);
    let free = eventually(Duration::from_secs(5), || async {
        let status = proxy.post(CHAT, large.clone()).send().await.unwrap().status();
        if status == 200 { Ok(()) } else { Err(status) }
    });
    free.await.unwrap();
}

// Clients that have sent all

#[tokio::test]
async fn a_client_that_ends_its_side_after_its_request_gets_its_answer() {
    let target = FakeUpstream::start(|seen| match seen.body.as_slice() {
        body if body == STREAMED.as_bytes() => {
            vec![
                stream_head(),
                chunk("data: 1\n\n"),
                wait(300),
                chunk("data: 2\n\n"),
                Act::EndChunks,
            ]
        }
        _ => [vec![wait(400)], json("200 OK", r#"{"late":true}"#)].concat(),
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    for (method, path, body, expected) in [
        ("GET", "/health", "", "\"ok\""),
        ("POST", CHAT, UNSTREAMED, r#"{"late":true}"#),
        ("POST", CHAT, STREAMED, "data: 2\n\n"),
    ] {
        let text = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n{body}",
            proxy.address,
            body.len()
        );
        let mut socket = sent(&proxy.address, &text).await;
        socket.shutdown().await.unwrap();
        let (answer, _) = read_to_end(&mut socket).await;
        let answer = answer.trim_start_matches("HTTP/1.1 100 Continue\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        assert!(answer.contains(expected), "{path}: {answer}");
    }
    assert_eq!(target.left(), 0);
}

#[tokio::test]
async fn a_client_that_has_ended_its_side_and_then_leaves_is_seen_by_the_target_soon() {
    let target = FakeUpstream::start(|_| vec![Act::Hang]).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let text = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n{UNSTREAMED}",
        proxy.address,
        UNSTREAMED.len()
    );
    // All at once: it is not there any more when the target gets its request.
    let mut socket = sent(&proxy.address, &text).await;
    target.has_seen(1).await;
    socket.shutdown().await.unwrap();
    drop(socket);
    let left = Instant::now();
    target.was_left().await;
    assert!(left.elapsed() < Duration::from_millis(500), "{:?}", left.elapsed());
}

#[tokio::test]
async fn a_body_that_is_cut_off_is_not_waited_for() {
    let target = content().await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let text = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {}\r\nContent-Length: 9\r\n\r\n{{",
        proxy.address
    );
    let mut socket = sent(&proxy.address, &text).await;
    socket.shutdown().await.unwrap();
    let (_, took) = read_to_end(&mut socket).await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(target.seen().is_empty());
}

// Web pages

/// A target that lets every page read its answers, as llama-server does.
async fn careless() -> FakeUpstream {
    FakeUpstream::start(|seen| {
        let origin = seen.header("origin").unwrap_or("*").to_owned();
        let cors = format!("Access-Control-Allow-Origin: {origin}\r\nAccess-Control-Allow-Credentials: true\r\n");
        vec![send(format!(
            "HTTP/1.1 200 OK\r\n{cors}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}"
        ))]
    })
    .await
}

fn cors_headers(answer: &reqwest::Response) -> Vec<String> {
    let names = answer.headers().keys().map(ToString::to_string);
    names.filter(|name| name.starts_with("access-control-")).collect()
}

#[tokio::test]
async fn a_page_of_another_server_cannot_use_a_proxy_without_a_token() {
    let target = careless().await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let rebound = format!("evil.example:{}", proxy.address.split_once(':').unwrap().1);
    for (method, path) in [
        (Method::GET, "/v1/models"),
        (Method::POST, CHAT),
        (Method::GET, "/health"),
        (Method::GET, "/v1/tightwad/status"),
        (Method::GET, "/metrics"),
        (Method::OPTIONS, CHAT),
    ] {
        for (name, value) in [("origin", EVIL), ("origin", "null"), ("host", &*rebound)] {
            let request = proxy.request(method.clone(), path).body(UNSTREAMED);
            let answer = request.header(name, value).send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::FORBIDDEN, "{method} {path} {value}");
            assert_eq!(cors_headers(&answer), [""; 0], "{method} {path} {value}");
            let body: Value = answer.json().await.unwrap();
            assert!(
                body["error"]["message"]
                    .as_str()
                    .unwrap()
                    .contains("`proxy.cors_origins`"),
                "{body}"
            );
        }
    }
    assert!(target.seen().is_empty(), "{:?}", target.seen());
    // Its own pages, and programs, which send no origin.
    let own = format!("http://{}", proxy.address);
    for origin in [None, Some(own)] {
        let mut request = proxy.post(CHAT, UNSTREAMED);
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(cors_headers(&answer), [""; 0]);
    }
}

#[tokio::test]
async fn with_a_token_a_page_reads_answers_only_where_it_is_allowed_to() {
    let target = careless().await;
    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.auth_token = Some(Secret::new("s3cret"));
        settings.cors_origins = vec!["http://localhost:3000".to_owned()];
    })
    .await;
    let answer = proxy
        .post(CHAT, UNSTREAMED)
        .bearer_auth("s3cret")
        .header("origin", EVIL)
        .header("host", "ai.example.net")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(cors_headers(&answer), [""; 0]);
    let asks = |origin: &'static str| {
        proxy
            .request(Method::OPTIONS, CHAT)
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header(
                "access-control-request-headers",
                "authorization,content-type,x-stainless-os",
            )
            .send()
    };
    let refused = asks(EVIL).await.unwrap();
    assert_eq!((refused.status().as_u16(), cors_headers(&refused)), (204, Vec::new()));
    let allowed = asks("http://localhost:3000").await.unwrap();
    assert_eq!(allowed.status(), 204);
    let header = |answer: &reqwest::Response, name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(
        header(&allowed, "access-control-allow-headers"),
        "authorization,content-type,x-stainless-os"
    );
    assert!(header(&allowed, "access-control-allow-methods").contains("POST"));
    // Every answer can be read, also a refusal of ours.
    for (request, status) in [
        (proxy.post(CHAT, UNSTREAMED).bearer_auth("s3cret"), 200),
        (proxy.post(CHAT, UNSTREAMED), 401),
        (proxy.post(CHAT, "{").bearer_auth("s3cret"), 400),
        (proxy.get("/draft").bearer_auth("s3cret"), 404),
        (proxy.post("/metrics", "").bearer_auth("s3cret"), 405),
        (proxy.get("/v1/tightwad/status").bearer_auth("s3cret"), 200),
        (proxy.get("/readyz"), 503),
    ] {
        let answer = request.header("origin", "http://localhost:3000").send().await.unwrap();
        assert_eq!(answer.status(), status);
        assert_eq!(header(&answer, "access-control-allow-origin"), "http://localhost:3000");
        assert!(header(&answer, "vary").contains("Origin"));
        assert!(!answer.headers().contains_key("access-control-allow-credentials"));
    }
}

#[tokio::test]
async fn a_proxy_that_all_pages_may_use_says_so_and_takes_no_credentials_of_theirs() {
    let target = careless().await;
    let proxy = TunedProxy::before(&target.url(), |settings| settings.cors_origins = vec!["*".to_owned()]).await;
    let answer = proxy
        .post(CHAT, UNSTREAMED)
        .header("origin", EVIL)
        .header("host", "ai.example.net")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["access-control-allow-origin"], "*");
    assert!(!answer.headers().contains_key("access-control-allow-credentials"));
}

// Tokens, and what is told without one

#[tokio::test]
async fn the_token_may_come_as_azures_clients_send_it_and_stays_with_the_proxy() {
    let target = content().await;
    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.auth_token = Some(Secret::new("s3cret"));
    })
    .await;
    for (key, status) in [("s3cret", 200), ("wrong", 401)] {
        let request = proxy.post(CHAT, UNSTREAMED).header("api-key", key);
        assert_eq!(request.send().await.unwrap().status(), status);
    }
    assert_eq!(target.only().header("api-key"), None);
}

#[tokio::test]
async fn why_the_proxy_is_not_ready_is_told_only_to_those_who_know_the_token() {
    let target = content().await;
    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.auth_token = Some(Secret::new("s3cret"));
    })
    .await;
    let stranger = proxy.get("/readyz").send().await.unwrap();
    assert_eq!(stranger.status(), 503);
    assert_eq!(
        stranger.json::<Value>().await.unwrap(),
        value!({ "status": "not ready" })
    );
    let known: Value = proxy
        .get("/readyz")
        .bearer_auth("s3cret")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert!(known["reason"].is_string(), "{known}");
}

// The programs, with their logs

/// `tightwad run …` with a config and folders of its own.
struct Run {
    program: Program,
    _folder: TempDir,
}

impl Run {
    /// Runs `part` after `before` in a shell.
    fn start(before: &str, part: &[&str], config: &str) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = folder.path().join("tightwad.yaml");
        std::fs::write(&file, config).unwrap();
        let home = folder.path().display();
        let script = format!(
            "{before}; export XDG_RUNTIME_DIR={home} XDG_STATE_HOME={home}; exec {} -c {} run \"$@\"",
            env!("CARGO_BIN_EXE_tightwad"),
            file.display()
        );
        let args: Vec<&str> = ["-c", &script, "sh"].into_iter().chain(part.iter().copied()).collect();
        Self {
            program: Program::start(Path::new("sh"), &args),
            _folder: folder,
        }
    }

    /// Waits until it listens.
    async fn listens(&self, port: u16) -> String {
        let address = format!("127.0.0.1:{port}");
        let up = eventually(Duration::from_secs(10), || TcpStream::connect(address.clone())).await;
        assert!(up.is_ok(), "{}", self.program.log());
        address
    }

    fn limit(&self) -> String {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", self.program.pid())).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        line.split_whitespace().nth(3).unwrap().to_owned()
    }
}

fn nobody() -> String {
    format!("http://127.0.0.1:{}", free_port())
}

#[tokio::test]
async fn the_proxy_takes_as_many_descriptors_as_it_may_have_and_lives_with_few() {
    let port = free_port();
    let config = format!("proxy: {{ port: {port}, target: {{ url: \"{}\" }} }}", nobody());
    let run = Run::start("ulimit -n 128; ulimit -S -n 40", &["proxy"], &config);
    let address = run.listens(port).await;
    let raised = eventually(Duration::from_secs(5), || async {
        if run.limit() == "128" { Ok(()) } else { Err(run.limit()) }
    });
    raised.await.unwrap();
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(sent(&address, "GET / HTTP/1.1\r\n").await);
    }
    let asked = reqwest::get(format!("http://{address}/health"));
    let answer = timeout(Duration::from_secs(5), asked).await.expect("an answer in time");
    assert_eq!(answer.unwrap().status(), 200, "{}", run.program.log());
}

#[tokio::test]
async fn a_long_path_is_a_short_line_in_the_log_and_a_target_that_is_down_one_warning() {
    let port = free_port();
    let config = format!(
        "proxy: {{ port: {port}, auth_token: s3cret, target: {{ url: \"{}\" }} }}",
        nobody()
    );
    let run = Run::start(":", &["proxy"], &config);
    let address = run.listens(port).await;
    let path = "/x".repeat(30_000);
    let refused = reqwest::get(format!("http://{address}{path}")).await.unwrap();
    assert_eq!(refused.status(), 401);
    let client = reqwest::Client::new();
    for _ in 0..5 {
        let request = client.post(format!("http://{address}{CHAT}")).bearer_auth("s3cret");
        assert_eq!(request.body(UNSTREAMED).send().await.unwrap().status(), 503);
    }
    let log = run.program.log();
    let longest = log.lines().map(str::len).max().unwrap();
    assert!(log.contains("no or a wrong token") && longest < 600, "{longest}");
    let warnings = log
        .lines()
        .filter(|line| line.contains("cannot be reached") && line.contains("refused"));
    assert_eq!(warnings.count(), 1, "{log}");
}

#[tokio::test]
async fn no_page_and_no_idle_client_takes_a_worker_away() {
    let (agent, rpc) = (free_port(), free_port());
    let config = worker::config(agent, &[rpc], "cache_gb: 0");
    let config = config.replace(&format!("agent_token: {}, ", worker::TOKEN), "");
    assert!(!config.contains("agent_token"), "{config}");
    let run = Run::start("ulimit -n 256", &["worker"], &config);
    let address = run.listens(agent).await;
    let url = format!("http://{address}/v1/worker/lease");
    let client = reqwest::Client::new();
    let body = value!({ "holder": "evil", "epoch": 9_000_000_000_000_u64 }).to_string();
    for (name, text, status) in [
        ("content-type", "text/plain", 415),
        ("origin", EVIL, 403),
        ("host", "evil.example", 403),
    ] {
        let mut request = client.post(&url).body(body.clone()).header(name, text);
        if name != "content-type" {
            request = request.header("content-type", "application/json");
        }
        let (answered, answer) = answer_of(request).await;
        assert_eq!(answered, status, "{name}: {answer}");
        assert!(answer["error"].is_string(), "{answer}");
    }
    let mut held = Vec::new();
    for _ in 0..300 {
        held.push(sent(&address, "GET /v1/worker HTTP/1.1\r\nHost: 127").await);
    }
    let asked = AgentClient::at("w", format!("http://{address}"), None).unwrap();
    let status = timeout(Duration::from_secs(5), asked.status()).await.expect("in time");
    assert_eq!(status.unwrap().lease, None, "{}", run.program.log());
    let lease = asked.lease(&lease_request("own", 1)).await.unwrap();
    asked.renew(&lease.id).await.unwrap();
    asked.give_back(&lease.id).await.unwrap();
}

#[tokio::test]
async fn a_pool_that_is_down_tells_strangers_nothing_and_its_log_little() {
    let mut pool = Pool::without_coordinator(Setup {
        coordinator: value!({ "api_key": "right", "wait_seconds": 1 }),
        ..Setup::default()
    });
    pool.workers = [None, None];
    pool.start_coordinator();
    let up = eventually(Duration::from_secs(10), || {
        reqwest::get(format!("{}/health", pool.url()))
    });
    let (status, body) = (up.await.unwrap().status(), pool.get("/health").await.1);
    assert_eq!(status, 503);
    assert_eq!(
        body,
        value!({ "error": {
            "message": "no model is ready: ask again later",
            "type": "model_loading", "code": "model_loading", "param": null,
        }})
    );
    let get = |path: &str| {
        reqwest::Client::new()
            .get(format!("{}{path}", pool.url()))
            .bearer_auth("right")
    };
    let why = eventually(Duration::from_secs(10), || async {
        let body = answer_of(get("/health")).await.1.to_string();
        if body.contains("worker one") { Ok(()) } else { Err(body) }
    });
    why.await.unwrap();
    for _ in 0..10 {
        assert_eq!(answer_of(get("/props")).await.0, 503);
    }
    let name = format!("no\nWARN forged {}", "x".repeat(60_000));
    for path in ["/v1/completions", "/v1/tightwad/swap"] {
        let request = pool
            .post(path, &value!({ "model": name, "prompt": "a" }))
            .bearer_auth("right");
        let (status, answer) = answer_of(request).await;
        assert_eq!(status, 404, "{answer}");
        assert!(answer.to_string().len() < 1000, "{}", answer.to_string().len());
    }
    let log = pool.coordinator.as_ref().unwrap().log();
    assert!(!log.lines().any(|line| line.starts_with("WARN forged")), "{log}");
    assert!(log.lines().all(|line| line.len() < 1000));
    let refused = log.lines().filter(|line| line.contains("is not ready yet")).count();
    assert!((1..=3).contains(&refused), "{refused}: {log}");
}

#[tokio::test]
async fn no_page_swaps_a_pools_model() {
    let mut pool = Pool::without_coordinator(Setup::default());
    pool.workers = [None, None];
    pool.start_coordinator();
    let up = eventually(Duration::from_secs(10), || {
        reqwest::get(format!("{}/health", pool.url()))
    });
    up.await.unwrap();
    for (name, text) in [("origin", EVIL), ("host", "evil.example")] {
        let request = pool
            .post("/v1/tightwad/swap", &value!({ "model": "other" }))
            .header(name, text);
        assert_eq!(answer_of(request).await.0, 403);
        let request = reqwest::Client::new().get(format!("{}/v1/tightwad/status", pool.url()));
        assert_eq!(answer_of(request.header(name, text)).await.0, 403);
    }
    let log = pool.coordinator.as_ref().unwrap().log();
    assert!(log.contains("`coordinator.cors_origins`"), "{log}");
    assert_eq!(pool.get("/v1/tightwad/status").await.0, 200);
}
