//! Connections and bodies that are held.

use std::time::{Duration, Instant};

use super::{CHAT, STREAMED, UNSTREAMED, content, sent};
use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, json, stream_head, wait};
use crate::harness::tuned_proxy::TunedProxy;
use crate::harness::wait::eventually;
use reqwest::StatusCode;
use serde_json::Value;
use tightwad::config::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// All that comes until the other side ends the connection, and how long that took.
pub(super) async fn read_to_end(socket: &mut TcpStream) -> (String, Duration) {
    let began = Instant::now();
    let mut answer = Vec::new();
    // A reset is an end too.
    let read = timeout(Duration::from_secs(8), socket.read_to_end(&mut answer)).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(read.is_ok(), "the connection is still open: {answer}");
    (answer, began.elapsed())
}

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
    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.limits.connections = 2;
        settings.cors_origins = vec!["http://localhost:3000".to_owned()];
    })
    .await;
    let mut running = Vec::new();
    for _ in 0..2 {
        running.push(proxy.post(CHAT, STREAMED).send().await.unwrap());
    }
    let page = "http://localhost:3000";
    let asked = proxy.get("/health").header("origin", page).send();
    let refused = timeout(Duration::from_secs(5), asked).await;
    let refused = refused.expect("an answer in time").unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(
        refused.headers()["access-control-allow-origin"],
        page,
        "a page can read it"
    );
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "too_many_connections");
    // A body that is sent at once, and is larger than the buffers of the connection.
    let large = proxy.post(CHAT, vec![b' '; 4 << 20]).send().await.unwrap();
    assert_eq!(large.status(), StatusCode::SERVICE_UNAVAILABLE);
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
    assert!(left.elapsed() < Duration::from_secs(2), "{:?}", left.elapsed());
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
