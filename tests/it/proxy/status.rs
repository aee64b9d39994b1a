//! Status, metrics and readiness.

use std::time::Duration;

use super::{CHAT, STREAMED, nobody, patched};
use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, json, stream_head, wait};
use crate::harness::tuned_proxy::TunedProxy;

#[tokio::test]
async fn the_status_tells_of_the_last_requests() {
    let role = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\n";
    let token = "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n";
    let target =
        FakeUpstream::start(move |_| vec![stream_head(), chunk(role), wait(30), chunk(token), Act::EndChunks]).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy
        .post("/v1/chat/completions?x=1", STREAMED)
        .header("x-request-id", "abc")
        .send()
        .await
        .unwrap();
    response.bytes().await.unwrap();
    assert_eq!(proxy.outcome().await, "finished");
    let status = proxy.status().await;
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["verification"], "none");
    assert_eq!(status["counts"]["steps"], 0);
    let request = &status["requests"][0];
    assert_eq!(request["id"], "abc");
    assert_eq!(request["path"], CHAT);
    assert_eq!(request["status"], 200);
    assert_eq!(request["streamed"], true);
    let (ttft, duration) = (
        request["ttft_ms"].as_f64().unwrap(),
        request["duration_ms"].as_f64().unwrap(),
    );
    // Its first event has a role and no token.
    assert!((25.0..1000.0).contains(&ttft) && ttft <= duration, "{request}");
    // It was only forwarded: nobody has counted.
    for count in ["steps", "drafted", "accepted", "generated"] {
        assert_eq!(request.get(count), None, "{request}");
    }
}

#[tokio::test]
async fn a_request_counts_as_in_flight_until_its_last_byte() {
    let target = FakeUpstream::start(|_| vec![stream_head(), chunk("data: 1\n\n"), Act::Hang]).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy.post(CHAT, STREAMED).send().await.unwrap();
    assert_eq!(proxy.status().await["in_flight"], 1);
    drop(response);
    target.was_left().await;
    assert_eq!(proxy.outcome().await, "cancelled");
    assert_eq!(proxy.status().await["in_flight"], 0);
}

#[tokio::test]
async fn labels_of_metrics_do_not_grow_with_what_clients_ask_for() {
    let target = FakeUpstream::start(|_| json("404 Not Found", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    for i in 0..10 {
        proxy.get(&format!("/scan/{i}")).send().await.unwrap();
    }
    proxy.outcome().await;
    let response = proxy.get("/metrics").send().await.unwrap();
    assert!(
        response.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("application/openmetrics-text")
    );
    let metrics = response.text().await.unwrap();
    assert!(
        metrics.contains(r#"tightwad_requests_total{path="other",outcome="failed"} 10"#),
        "{metrics}"
    );
    assert!(!metrics.contains("scan"), "{metrics}");
}

#[tokio::test]
async fn it_is_ready_while_the_target_answers() {
    let target = patched(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::drafting(&target.url(), &nobody().await, |_| {}).await;
    proxy.is("verification", "attached").await;
    assert_eq!(proxy.get("/readyz").send().await.unwrap().status(), 200);
    drop(target);
    for _ in 0..100 {
        let ready = proxy.get("/readyz").send().await.unwrap();
        if ready.status() == 503 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it still calls itself ready");
}
