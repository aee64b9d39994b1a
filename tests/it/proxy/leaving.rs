//! Clients that go away, and a proxy that ends.

use std::time::{Duration, Instant};

use super::{CHAT, COMMENT, STREAMED, UNSTREAMED, quick};
use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, send, stream_head, until, wait};
use crate::harness::tuned_proxy::TunedProxy;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Closing a connection is noticed within this time.
const SOON: Duration = Duration::from_secs(2);

async fn leaves_during(script: impl Fn() -> Vec<Act> + Send + Sync + 'static, body: &str, reads: &str) {
    let target = FakeUpstream::start(move |_| script()).await;
    let proxy = TunedProxy::before(&target.url(), quick).await;
    let mut socket = TcpStream::connect(&proxy.address).await.unwrap();
    let request = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(request.as_bytes()).await.unwrap();
    target.has_seen(1).await;
    let mut got = String::new();
    while !got.contains(reads) {
        let mut bytes = [0; 1024];
        let count = socket.read(&mut bytes).await.unwrap();
        assert!(count > 0, "{got}");
        got.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
    tokio::time::sleep(Duration::from_millis(30)).await;
    let gone = Instant::now();
    drop(socket);
    let noticed = target.was_left().await.duration_since(gone);
    assert!(noticed < SOON, "noticed after {noticed:?}");
    assert_eq!(proxy.outcome().await, "cancelled");
    assert_eq!(proxy.status().await["in_flight"], 0);
    let metrics = proxy.get("/metrics").send().await.unwrap().text().await.unwrap();
    let line = format!(r#"tightwad_requests_total{{path="{CHAT}",outcome="cancelled"}} 1"#);
    assert!(metrics.contains(&line), "{metrics}");
}

#[tokio::test]
async fn a_client_that_leaves_a_silent_stream_is_seen_by_the_target_at_once() {
    let script = || vec![stream_head(), chunk("data: 1\n\n"), Act::Hang];
    leaves_during(script, STREAMED, "data: 1").await;
}

#[tokio::test]
async fn a_client_that_leaves_before_an_answer_is_seen_by_the_target_at_once() {
    leaves_during(|| vec![Act::Hang], UNSTREAMED, "").await;
}

#[tokio::test]
async fn a_client_that_leaves_while_it_is_kept_waiting_is_seen_by_the_target_at_once() {
    leaves_during(|| vec![Act::Hang], STREAMED, COMMENT).await;
}

#[tokio::test]
async fn a_client_that_leaves_an_unstreamed_answer_is_seen_by_the_target_at_once() {
    let script = || vec![send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"), Act::Hang];
    leaves_during(script, UNSTREAMED, "half").await;
}

#[tokio::test]
async fn a_running_answer_ends_before_the_proxy_does() {
    let target = FakeUpstream::start(|_| {
        vec![
            stream_head(),
            chunk("data: 1\n\n"),
            wait(300),
            chunk("data: 2\n\n"),
            Act::EndChunks,
        ]
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy.post(CHAT, STREAMED).send().await.unwrap();
    proxy.shutdown.cancel();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(
        TcpStream::connect(&proxy.address).await.is_err(),
        "still takes connections"
    );
    assert_eq!(response.text().await.unwrap(), "data: 1\n\ndata: 2\n\n");
    tokio::time::timeout(SOON, proxy.ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stream_that_takes_too_long_ends_with_an_error_event_when_the_proxy_ends() {
    let target = FakeUpstream::start(|_| vec![stream_head(), chunk("data: 1\n\n"), Act::Hang]).await;
    let proxy = TunedProxy::before(&target.url(), |settings| settings.drain = Duration::from_millis(200)).await;
    let response = proxy.post(CHAT, STREAMED).send().await.unwrap();
    proxy.shutdown.cancel();
    let text = tokio::time::timeout(SOON, response.text()).await;
    let text = text.expect("it is not cut").unwrap();
    let event = text.strip_prefix("data: 1\n\ndata: ").expect("an event");
    let event: Value = serde_json::from_str(event).unwrap();
    assert_eq!(event["error"]["code"], "shutting_down", "{event}");
    target.was_left().await;
    tokio::time::timeout(SOON, proxy.ended).await.unwrap().unwrap();
    until("the connections to end", || target.open() == 0).await;
}

#[tokio::test]
async fn an_answer_that_takes_too_long_is_cut_when_the_proxy_ends() {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    let target = FakeUpstream::start(move |_| vec![Act::Send(head.into()), chunk("{"), Act::Hang]).await;
    let proxy = TunedProxy::before(&target.url(), |settings| settings.drain = Duration::from_millis(200)).await;
    let response = proxy.post(CHAT, "{}").send().await.unwrap();
    proxy.shutdown.cancel();
    let text = tokio::time::timeout(SOON, response.text()).await;
    assert!(
        text.expect("it is not cut").is_err(),
        "a cut answer looks like a whole one"
    );
    target.was_left().await;
    tokio::time::timeout(SOON, proxy.ended).await.unwrap().unwrap();
    until("the connections to end", || target.open() == 0).await;
}
