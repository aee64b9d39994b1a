//! Targets that are slow, fail or close their connections.

use super::{CHAT, COMMENT, STREAMED, UNSTREAMED, error_of, nobody, quick};
use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, json, send, stream_head, wait};
use crate::harness::tuned_proxy::TunedProxy;
use reqwest::StatusCode;
use serde_json::Value;

#[tokio::test]
async fn a_stream_that_is_slow_to_begin_is_kept_alive_and_then_arrives_whole() {
    let target = FakeUpstream::start(|_| {
        vec![
            wait(600),
            stream_head(),
            chunk("data: 1\n\n"),
            chunk("data: [DONE]\n\n"),
            Act::EndChunks,
        ]
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), quick).await;
    let response = proxy.post(CHAT, STREAMED).send().await.unwrap();
    assert!(target.sent().is_empty(), "the client waited for the target");
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    let comments = text.matches(COMMENT).count();
    assert!(comments >= 2, "{text}");
    assert_eq!(text, format!("{}data: 1\n\ndata: [DONE]\n\n", COMMENT.repeat(comments)));
    assert_eq!(target.seen().len(), 1);
}

#[tokio::test]
async fn comments_fill_the_silence_between_events_and_never_inside_one() {
    let target = FakeUpstream::start(|_| {
        vec![
            stream_head(),
            chunk("data: {\"a\""),
            wait(350),
            chunk(":1}\n"),
            wait(350),
            chunk("\n"),
            wait(250),
            chunk("data: 2\n\n"),
            Act::EndChunks,
        ]
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), quick).await;
    let text = proxy.post(CHAT, STREAMED).send().await.unwrap().text().await.unwrap();
    let comments = text.matches(COMMENT).count();
    assert!(comments >= 1, "{text}");
    assert_eq!(
        text,
        format!("data: {{\"a\":1}}\n\n{}data: 2\n\n", COMMENT.repeat(comments))
    );
}

#[tokio::test]
async fn an_unstreamed_answer_is_waited_for_in_silence() {
    let target = FakeUpstream::start(|_| {
        let mut acts = vec![wait(350)];
        acts.extend(json("200 OK", r#"{"late":true}"#));
        acts
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), quick).await;
    let response = proxy.post(CHAT, UNSTREAMED).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(response.text().await.unwrap(), r#"{"late":true}"#);
}

#[tokio::test]
async fn a_targets_own_error_comes_back_as_it_is() {
    let body = r#"{ "error" : {"code":400,"message":"no","type":"invalid_request_error","n_ctx":256}}"#;
    let target = FakeUpstream::start(move |_| json("400 Bad Request", body)).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy.post(CHAT, STREAMED).send().await.unwrap();
    assert_eq!(response.status(), 400);
    assert_eq!(response.text().await.unwrap(), body);
}

#[tokio::test]
async fn a_late_error_travels_in_the_stream_in_the_clients_dialect() {
    let late = |_: &_| {
        let mut acts = vec![wait(150)];
        acts.extend(json(
            "400 Bad Request",
            "{\n\"error\": {\"message\":\"too long\",\"n_ctx\":256}}",
        ));
        acts
    };
    let target = FakeUpstream::start(late).await;
    let proxy = TunedProxy::before(&target.url(), quick).await;
    let text = proxy.post(CHAT, STREAMED).send().await.unwrap().text().await.unwrap();
    assert_eq!(
        text,
        format!("{COMMENT}data: {{\"error\":{{\"message\":\"too long\",\"n_ctx\":256}}}}\n\n")
    );
    let text = proxy
        .post("/v1/messages", STREAMED)
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let error = "event: error\ndata: {\"error\":{\"message\":\"too long\",\"n_ctx\":256},\"type\":\"error\"}\n\n";
    assert_eq!(text, format!("{COMMENT}{error}"));
    assert_eq!(proxy.outcome().await, "failed");
}

#[tokio::test]
async fn a_target_that_streams_something_else_is_told_apart_from_one_that_streams() {
    let target = FakeUpstream::start(|_| [vec![wait(150)], json("200 OK", "{}")].concat()).await;
    let proxy = TunedProxy::before(&target.url(), quick).await;
    let request = proxy.post(CHAT, STREAMED).header("accept-encoding", "gzip");
    let text = request.send().await.unwrap().text().await.unwrap();
    let event = text.trim_start_matches(COMMENT).strip_prefix("data: ").unwrap();
    let error = &serde_json::from_str::<Value>(event).unwrap()["error"];
    assert_eq!(error["code"], "target_did_not_stream");
    // A compressed stream would be another one that nothing can be put into.
    assert_eq!(target.only().header("accept-encoding"), None);
    let request = proxy.post(CHAT, UNSTREAMED).header("accept-encoding", "gzip");
    assert_eq!(request.send().await.unwrap().text().await.unwrap(), "{}");
    assert_eq!(target.seen()[1].header("accept-encoding"), Some("gzip"));
}

#[tokio::test]
async fn a_target_that_dies_before_it_answers_ends_a_waiting_stream_with_an_error() {
    let target = FakeUpstream::start(|_| vec![wait(1200), Act::Close]).await;
    let proxy = TunedProxy::before(&target.url(), quick).await;
    let text = proxy.post(CHAT, STREAMED).send().await.unwrap().text().await.unwrap();
    let event = text.trim_start_matches(COMMENT);
    let data: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(data["error"]["code"], "target_broke_off");
    assert_eq!(target.seen().len(), 1, "what dies over our request is not tried again");
}

#[tokio::test]
async fn a_target_that_dies_in_a_stream_ends_it_with_an_error_and_not_silently() {
    for (last, ended) in [("data: 1\n\n", "data: 1\n\n"), ("data: {\"hal", "data: {\"hal\n\n")] {
        let target = FakeUpstream::start(move |_| vec![stream_head(), chunk(last), wait(20), Act::Close]).await;
        let proxy = TunedProxy::before(&target.url(), |_| {}).await;
        let text = proxy.post(CHAT, STREAMED).send().await.unwrap().text().await.unwrap();
        let event = text.strip_prefix(ended).unwrap().strip_prefix("data: ").unwrap();
        let error = &serde_json::from_str::<Value>(event.strip_suffix("\n\n").unwrap()).unwrap()["error"];
        assert_eq!(error["code"], "target_broke_off");
        assert!(error["message"].as_str().unwrap().contains(&target.url()), "{error}");
        assert_eq!(proxy.outcome().await, "failed");
        assert_eq!(target.seen().len(), 1);
    }
}

#[tokio::test]
async fn a_target_that_dies_in_an_unstreamed_answer_breaks_the_clients_connection_too() {
    for head in ["Content-Length: 100", "Transfer-Encoding: chunked"] {
        let head = format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n");
        let target =
            FakeUpstream::start(move |_| vec![send(head.clone()), send("4\r\nhalf\r\n"), wait(20), Act::Close]).await;
        let proxy = TunedProxy::before(&target.url(), |_| {}).await;
        let response = proxy.post(CHAT, UNSTREAMED).send().await.unwrap();
        assert!(response.bytes().await.is_err(), "half an answer looks like a whole one");
        assert_eq!(proxy.outcome().await, "failed");
        assert_eq!(target.seen().len(), 1);
    }
}

#[tokio::test]
async fn a_target_that_is_down_is_named_with_what_to_do() {
    let nobody = nobody().await;
    let proxy = TunedProxy::before(&nobody, |_| {}).await;
    for body in [STREAMED, UNSTREAMED] {
        let response = proxy.post(CHAT, body).send().await.unwrap();
        assert_eq!(response.headers()["retry-after"], "5");
        let error = error_of(response, StatusCode::SERVICE_UNAVAILABLE).await;
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(&nobody) && message.contains("start it"), "{message}");
        assert_eq!(error["code"], "target_unreachable");
    }
    let health = proxy.get("/health").send().await.unwrap();
    assert_eq!(health.status(), 200);
    let ready = proxy.get("/readyz").send().await.unwrap();
    assert_eq!(ready.status(), 503);
    assert!(ready.json::<Value>().await.unwrap()["reason"].is_string());
}

#[tokio::test]
async fn a_request_that_meets_a_closed_connection_is_sent_once_more_on_a_fresh_one() {
    // Closes the connection over the second request that comes on it, as a server does whose patience just ran out.
    let target = FakeUpstream::start(|seen| match seen.number {
        1 => vec![Act::Close],
        _ => json("200 OK", "{}"),
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    for _ in 0..2 {
        let response = proxy.post(CHAT, UNSTREAMED).send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.bytes().await.unwrap();
    }
    let seen = target.seen();
    assert_eq!(seen.iter().map(|it| it.connection).collect::<Vec<_>>(), [0, 0, 1]);
    assert_eq!(seen[1].body, seen[2].body);
    assert_eq!(seen[1].header("x-request-id"), seen[2].header("x-request-id"));
}

#[tokio::test]
async fn a_request_whose_own_connection_closes_is_not_sent_again() {
    let target = FakeUpstream::start(|_| vec![Act::Close]).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy.post(CHAT, UNSTREAMED).send().await.unwrap();
    let error = error_of(response, StatusCode::BAD_GATEWAY).await;
    assert_eq!(error["code"], "target_broke_off");
    assert_eq!(target.seen().len(), 1);
}

#[tokio::test]
async fn a_request_is_not_sent_a_third_time() {
    let target = FakeUpstream::start(|seen| match seen.number {
        0 => json("200 OK", "{}"),
        _ => vec![Act::Close],
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy.post(CHAT, UNSTREAMED).send().await.unwrap();
    assert_eq!(response.bytes().await.unwrap(), "{}");
    let response = proxy.post(CHAT, UNSTREAMED).send().await.unwrap();
    let error = error_of(response, StatusCode::BAD_GATEWAY).await;
    assert_eq!(error["code"], "target_broke_off");
    assert_eq!(target.seen().len(), 3);
}

#[tokio::test]
async fn as_many_connections_to_the_target_stay_open_as_are_used() {
    let target = FakeUpstream::start(|_| [vec![wait(20)], json("200 OK", "{}")].concat()).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    for _ in 0..5 {
        let answers = (0..24).map(|_| proxy.post(CHAT, UNSTREAMED).send());
        for answer in futures_util::future::join_all(answers).await {
            assert_eq!(answer.unwrap().bytes().await.unwrap(), "{}");
        }
    }
    assert_eq!(target.seen().len(), 120);
    let opened = target.accepted();
    assert!(opened <= 30, "{opened} connections for 24 requests at a time");
}
