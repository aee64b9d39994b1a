//! The proxy seen from outside: real sockets on both sides, a scripted target behind.

use std::time::{Duration, Instant};

use crate::harness::fake_upstream::{Act, FakeUpstream, Seen, chunk, json, send, stream_head, until, wait};
use crate::harness::tuned_proxy::TunedProxy;
use futures_util::StreamExt;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tightwad::config::{Secret, Upstream};
use tightwad::proxy::Settings;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const CHAT: &str = "/v1/chat/completions";
const COMMENT: &str = ": waiting for the target\n\n";
const STREAMED: &str = r#"{"messages":[],"stream":true}"#;
const UNSTREAMED: &str = r#"{"messages":[]}"#;

/// Closing a connection is noticed within this time.
const SOON: Duration = Duration::from_secs(2);

fn quick(settings: &mut Settings) {
    settings.keepalive = Some(Duration::from_millis(100));
}

async fn error_of(response: reqwest::Response, status: StatusCode) -> Value {
    assert_eq!(response.status(), status);
    let body: Value = response.json().await.unwrap();
    let error = body["error"].clone();
    assert!(error["message"].is_string() && error["type"].is_string(), "{body}");
    error
}

// What goes through

#[tokio::test]
async fn a_request_body_arrives_byte_for_byte() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let body = "\r\n {\t\"a\" : 1, \"a\":2 ,\"t\\u0065xt\":\"\\ud83d\\ude00 \u{1f600} \\/\", \"n\": 1.0e0, \"big\":123456789012345678901234567890 } \n";
    proxy
        .post(CHAT, body)
        .header("content-type", "application/json; odd")
        .send()
        .await
        .unwrap();
    let seen = target.only();
    assert_eq!(String::from_utf8(seen.body.clone()).unwrap(), body);
    assert_eq!(seen.header("content-type"), Some("application/json; odd"));
    assert_eq!(seen.header("host"), Some(target.address.to_string().as_str()));
}

#[tokio::test]
async fn every_path_method_and_query_of_the_target_is_reachable() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    for (method, path) in [
        ("GET", "/v1/models"),
        ("GET", "/props"),
        ("GET", "/slots?fail_on_no_slot=1&x=%20y"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/v1/audio/speech?x=1"),
        ("DELETE", "/v1/files/abc"),
        ("PUT", "/never/heard%2Fof"),
        ("PATCH", "/"),
    ] {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let body = if method == Method::GET { "" } else { "not json" };
        let response = proxy.request(method.clone(), path).body(body).send().await.unwrap();
        assert_eq!(response.status(), 200, "{method} {path}");
        let seen = target.seen().pop().unwrap();
        assert_eq!((seen.method.as_str(), seen.target.as_str()), (method.as_str(), path));
        assert_eq!(seen.body, body.as_bytes());
    }
}

#[tokio::test]
async fn an_answer_comes_back_with_its_status_headers_and_bytes() {
    let target = FakeUpstream::start(|_| {
        vec![
            send("HTTP/1.1 418 Teapot\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\nX-Odd: a\r\nX-Odd: b\r\n"),
            send("Set-Cookie: c=1\r\nKeep-Alive: timeout=5\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n\r\n\x1f\x08\0\n\""),
        ]
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy.post("/v1/embeddings", "{}").send().await.unwrap();
    assert_eq!(response.status(), 418);
    let headers = response.headers().clone();
    assert_eq!(headers["content-encoding"], "gzip");
    assert_eq!(headers["content-length"], "5");
    assert_eq!(headers.get_all("x-odd").iter().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(headers["set-cookie"], "c=1");
    for name in ["keep-alive", "x-hop", "connection"] {
        assert!(!headers.contains_key(name), "{name}");
    }
    assert_eq!(response.bytes().await.unwrap().as_ref(), b"\x1f\x08\0\n\"");
    assert_eq!(proxy.outcome().await, "failed");
}

#[tokio::test]
async fn the_bytes_of_a_stream_arrive_unchanged_and_undelayed() {
    const PIECES: [&str; 7] = [
        "data: {\"a\":",
        "1}\n",
        "\n",
        "da",
        "ta: \u{1f600} [DONE]\r\n\r\n",
        ": odd\n\nevent: x\n",
        "data: y\n\n",
    ];
    let target = FakeUpstream::start(|_| {
        let mut acts = vec![stream_head()];
        acts.extend(PIECES.iter().flat_map(|piece| [chunk(*piece), wait(150)]));
        acts.push(Act::EndChunks);
        acts
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy.post(CHAT, STREAMED).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    let mut bytes = response.bytes_stream();
    let mut came = Vec::new();
    while let Some(piece) = bytes.next().await {
        came.push((Instant::now(), piece.unwrap()));
    }
    let texts: Vec<_> = came
        .iter()
        .map(|(_, piece)| std::str::from_utf8(piece).unwrap())
        .collect();
    assert_eq!(texts, PIECES);
    // The head was sent first, so piece i is number i + 1; it must be here before the next one is sent.
    let sent = target.sent();
    for (i, (then, _)) in came.iter().enumerate() {
        let next = sent[i + 2];
        assert!(
            *then < next,
            "piece {i} came {:?} after the next was sent",
            then.duration_since(next)
        );
    }
    assert_eq!(proxy.outcome().await, "finished");
}

#[tokio::test]
async fn fifty_streams_run_side_by_side_and_none_gets_anothers_bytes() {
    let target = FakeUpstream::start(|seen| {
        let name = String::from_utf8_lossy(&seen.body).into_owned();
        let mut acts = vec![stream_head()];
        acts.extend((0..20).flat_map(|i| [wait(5), chunk(format!("data: {i} {name}\n\n"))]));
        acts.push(Act::EndChunks);
        acts
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let begun = Instant::now();
    let answers = (0..50).map(|i| {
        let body = format!(r#"{{"user":"{i}","stream":true}}"#);
        let answer = proxy.post(CHAT, body.clone()).send();
        async { (body, answer.await.unwrap().text().await.unwrap()) }
    });
    let answers = futures_util::future::join_all(answers).await;
    for (body, text) in answers {
        let events: Vec<_> = (0..20).map(|i| format!("data: {i} {body}\n\n")).collect();
        assert_eq!(text, events.concat());
    }
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "one after another: {:?}",
        begun.elapsed()
    );
    assert_eq!(proxy.status().await["in_flight"], 0);
}

#[tokio::test]
async fn a_head_request_gets_the_head_and_no_body() {
    let target = FakeUpstream::start(|_| vec![send("HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n")]).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy.request(Method::HEAD, "/v1/models").send().await.unwrap();
    assert_eq!(response.headers()["content-length"], "1234");
    assert_eq!(target.only().method, "HEAD");
    assert_eq!(proxy.outcome().await, "finished");
}

#[tokio::test]
async fn a_request_keeps_its_id_and_gets_one_if_it_has_none() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let response = proxy
        .get("/v1/models")
        .header("x-request-id", "mine-1")
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-1");
    assert_eq!(target.seen()[0].header("x-request-id"), Some("mine-1"));
    for odd in ["", "a b", "<script>", &"x".repeat(200)] {
        let response = proxy
            .get("/v1/models")
            .header("x-request-id", odd)
            .send()
            .await
            .unwrap();
        let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        assert_eq!(id.len(), 32, "{odd} became {id}");
        assert_eq!(target.seen().pop().unwrap().header("x-request-id"), Some(id.as_str()));
    }
}

#[tokio::test]
async fn clients_reach_no_drafts_and_name_no_draft_key() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    for path in ["/draft", "/draft?x", "/%64raft", "//draft", "/x/../draft"] {
        // A raw request: a client library would tidy the path up.
        let mut socket = TcpStream::connect(&proxy.address).await.unwrap();
        let request =
            format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 404 "), "{path}: {answer}");
    }
    assert!(target.seen().is_empty(), "{:?}", target.seen());
    proxy
        .post(CHAT, UNSTREAMED)
        .header("x-draft-key", "guessed")
        .send()
        .await
        .unwrap();
    assert_eq!(target.only().header("x-draft-key"), None);
}

// Clients that go away

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

// Waiting

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

// Targets that fail

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

// What is refused

#[tokio::test]
async fn a_body_over_the_limit_is_refused_before_the_target_hears_of_it() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let huge = vec![b' '; 100 * 1024 * 1024];
    let error = error_of(
        proxy.post(CHAT, huge).send().await.unwrap(),
        StatusCode::PAYLOAD_TOO_LARGE,
    )
    .await;
    assert!(error["message"].as_str().unwrap().contains("67108864 bytes"), "{error}");

    let pieces = futures_util::stream::iter((0..65).map(|_| Ok::<_, std::io::Error>(vec![b' '; 1024 * 1024])));
    let chunked = reqwest::Body::wrap_stream(pieces);
    error_of(
        proxy.post("/v1/embeddings", chunked).send().await.unwrap(),
        StatusCode::PAYLOAD_TOO_LARGE,
    )
    .await;
    assert!(target.seen().is_empty());

    let most = vec![b' '; 64 * 1024 * 1024];
    assert_eq!(
        proxy
            .post("/v1/embeddings", most.clone())
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
    assert!(target.only().body == most);
}

#[tokio::test]
async fn a_body_that_cannot_be_answered_is_refused_with_what_is_wrong() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |settings| settings.max_tokens_limit = Some(100)).await;
    for (body, param, says) in [
        ("{\"messages\": [}", None, "line 1 column 15"),
        ("", None, "line 1 column 0"),
        ("[]", None, "JSON object"),
        (r#"{"max_tokens": "7"}"#, Some("max_tokens"), "whole number"),
        (
            r#"{"max_completion_tokens": 1.5}"#,
            Some("max_completion_tokens"),
            "1.5",
        ),
        (r#"{"n_predict": -2}"#, Some("n_predict"), "-2"),
        (
            r#"{"max_output_tokens": 101}"#,
            Some("max_output_tokens"),
            "at most 100",
        ),
        (r#"{"max_tokens": -1}"#, Some("max_tokens"), "at most 100"),
    ] {
        let error = error_of(proxy.post(CHAT, body).send().await.unwrap(), StatusCode::BAD_REQUEST).await;
        assert_eq!(error["param"].as_str(), param, "{body}");
        assert!(error["message"].as_str().unwrap().contains(says), "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert!(target.seen().is_empty());
    assert_eq!(
        proxy
            .post(CHAT, r#"{"max_tokens": 100}"#)
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
}

#[tokio::test]
async fn without_the_token_nothing_but_the_health_is_told() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.auth_token = Some(Secret::new("s3cret"));
    })
    .await;
    for path in [
        "/v1/models",
        "/metrics",
        "/v1/tightwad/status",
        "/draft",
        "/%68ealth",
        "/health/",
    ] {
        for (name, value) in [
            ("x-nothing", &b""[..]),
            ("authorization", b"Bearer wrong"),
            ("authorization", b"Bearer s3cret\xff\xc3\xa9"),
            ("x-api-key", b"\xc3\xa9"),
            ("authorization", b"s3cret"),
        ] {
            let value = reqwest::header::HeaderValue::from_bytes(value).unwrap();
            let response = proxy.get(path).header(name, value).send().await.unwrap();
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            error_of(response, StatusCode::UNAUTHORIZED).await;
        }
    }
    assert!(target.seen().is_empty());
    assert_eq!(proxy.get("/health").send().await.unwrap().status(), 200);
    assert_eq!(
        proxy
            .get("/v1/models")
            .bearer_auth("s3cret")
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
    assert_eq!(
        proxy
            .get("/metrics")
            .header("x-api-key", "s3cret")
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
}

#[tokio::test]
async fn the_target_gets_its_own_key_and_never_the_clients_token() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let both = |proxy: &TunedProxy| {
        proxy
            .get("/v1/models")
            .bearer_auth("s3cret")
            .header("x-api-key", "s3cret")
            .send()
    };
    let credentials = || {
        let seen = target.seen().pop().unwrap();
        (
            seen.header("authorization").map(str::to_owned),
            seen.header("x-api-key").map(str::to_owned),
        )
    };

    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.auth_token = Some(Secret::new("s3cret"));
    })
    .await;
    both(&proxy).await.unwrap();
    assert_eq!(credentials(), (None, None));

    let proxy = TunedProxy::before(&target.url(), |settings| {
        settings.auth_token = Some(Secret::new("s3cret"));
        settings.target_api_key = Some(Secret::new("targets"));
    })
    .await;
    both(&proxy).await.unwrap();
    assert_eq!(credentials(), (Some("Bearer targets".into()), None));
    let seen = target.seen().len();
    let permission = proxy.request(Method::OPTIONS, CHAT).send().await.unwrap();
    assert_eq!(permission.status(), 204);
    assert_eq!(target.seen().len(), seen, "nobody has shown a token");

    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    both(&proxy).await.unwrap();
    assert_eq!(credentials(), (Some("Bearer s3cret".into()), Some("s3cret".into())));
}

#[tokio::test]
async fn errors_speak_anthropics_dialect_on_anthropics_path() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let body: Value = proxy
        .post("/v1/messages", "{")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(body["type"], "error");
    assert_eq!(body["error"]["type"], "invalid_request_error");
}

// What can be seen

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
async fn our_own_endpoints_take_get_and_head_only() {
    let target = FakeUpstream::start(|_| json("200 OK", "{}")).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    assert_eq!(
        proxy.request(Method::HEAD, "/health").send().await.unwrap().status(),
        200
    );
    error_of(
        proxy.post("/metrics", "").send().await.unwrap(),
        StatusCode::METHOD_NOT_ALLOWED,
    )
    .await;
    assert!(target.seen().is_empty());
}

// Drafting

/// A target with our patch that is asked for drafts, and answers completions as `script` says.
async fn patched(script: impl Fn(&Seen) -> Vec<Act> + Send + Sync + 'static) -> FakeUpstream {
    FakeUpstream::start(move |seen| match seen.target.as_str() {
        "/health" => json("200 OK", r#"{"status":"ok"}"#),
        "/props" => json("200 OK", r#"{"total_slots":4,"draft_external_max":8}"#),
        "/draft" => json("200 OK", r#"{"state":"unknown"}"#),
        _ => script(seen),
    })
    .await
}

/// An address where nobody listens.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn a_completion_carries_the_key_of_its_drafting_which_ends_with_the_client() {
    let target = patched(|seen| match seen.target.as_str() {
        CHAT => vec![stream_head(), chunk("data: 1\n\n"), Act::Hang],
        _ => json("200 OK", "{}"),
    })
    .await;
    let proxy = TunedProxy::drafting(&target.url(), &nobody().await, |_| {}).await;
    proxy.is("verification", "attached").await;
    let response = proxy
        .post(CHAT, STREAMED)
        .header("x-draft-key", "guessed")
        .send()
        .await
        .unwrap();
    let seen = target.seen().into_iter().find(|seen| seen.target == CHAT).unwrap();
    let key = seen.header("x-draft-key").unwrap().to_owned();
    assert_eq!(key.len(), 32, "{key}");
    assert_eq!(seen.headers.iter().filter(|(name, _)| name == "x-draft-key").count(), 1);
    assert_eq!(seen.body, STREAMED.as_bytes());
    let asked = || {
        let names_key = |seen: &Seen| seen.target == "/draft" && String::from_utf8_lossy(&seen.body).contains(&key);
        target.seen().iter().filter(|seen| names_key(seen)).count()
    };
    until("the target to be asked for the completion", || asked() > 0).await;
    drop(response);
    target.was_left().await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let last = asked();
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(asked(), last, "drafts for a completion that is over");

    proxy.get("/v1/models").send().await.unwrap();
    let models = target.seen().into_iter().find(|seen| seen.target == "/v1/models");
    assert_eq!(models.unwrap().header("x-draft-key"), None);
}

#[tokio::test]
async fn without_fallback_completions_wait_for_the_drafter_and_nothing_else_does() {
    let target = patched(|_| json("200 OK", "{}")).await;
    let draft = nobody().await;
    let proxy = TunedProxy::drafting(&target.url(), &draft, |settings| {
        settings.fallback_on_draft_failure = false;
    })
    .await;
    proxy.is("verification", "attached").await;
    let response = proxy.post(CHAT, UNSTREAMED).send().await.unwrap();
    assert!(response.headers().contains_key("retry-after"));
    let error = error_of(response, StatusCode::SERVICE_UNAVAILABLE).await;
    assert_eq!(error["code"], "draft_unavailable");
    assert!(error["message"].as_str().unwrap().contains(&draft), "{error}");
    assert_eq!(proxy.post("/v1/embeddings", "{}").send().await.unwrap().status(), 200);

    let proxy = TunedProxy::drafting(&target.url(), &draft, |_| {}).await;
    proxy.is("verification", "attached").await;
    assert_eq!(proxy.post(CHAT, UNSTREAMED).send().await.unwrap().status(), 200);
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

// The end

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

/// Run it with `cargo test --release --test it proxy:: -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: wants an idle machine and a release build"]
async fn the_proxy_adds_less_than_a_millisecond_to_the_first_byte() {
    let target = FakeUpstream::start(|_| vec![stream_head(), chunk("data: 1\n\n"), Act::EndChunks]).await;
    let proxy = TunedProxy::before(&target.url(), |_| {}).await;
    let message = "All work and no play makes a dull boy. ".repeat(200);
    let body = format!(r#"{{"messages":[{{"role":"user","content":"{message}"}}],"stream":true}}"#);
    let (mut direct, mut through) = (Vec::new(), Vec::new());
    for _ in 0..1000 {
        for (url, times) in [
            (target.url(), &mut direct),
            (format!("http://{}", proxy.address), &mut through),
        ] {
            let begun = Instant::now();
            let response = proxy
                .client
                .post(format!("{url}{CHAT}"))
                .body(body.clone())
                .send()
                .await
                .unwrap();
            let mut bytes = response.bytes_stream();
            bytes.next().await.unwrap().unwrap();
            times.push(begun.elapsed());
            while bytes.next().await.is_some() {}
        }
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        (times[times.len() / 2], times[times.len() * 99 / 100])
    };
    let (direct, through) = (median(&mut direct), median(&mut through));
    println!("first byte, median and 99th percentile: direct {direct:?}, through the proxy {through:?}");
    assert!(through.0 < direct.0 + Duration::from_millis(1));
}

// What is measured beside

/// A target that streams `text` word by word.
async fn says(text: &'static str) -> FakeUpstream {
    FakeUpstream::start(move |_| {
        let words = text.split_inclusive(' ').map(|word| {
            let event = serde_json::json!({ "choices": [{ "delta": { "content": word } }] });
            chunk(format!("data: {event}\n\n"))
        });
        let end = [chunk("data: [DONE]\n\n"), Act::EndChunks];
        std::iter::once(stream_head()).chain(words).chain(end).collect()
    })
    .await
}

fn measuring(drafter: &FakeUpstream) -> impl FnOnce(&mut Settings) + use<> {
    let drafter = Upstream {
        model_name: Some("small".into()),
        ..Upstream::at(drafter.url())
    };
    |settings| settings.measure_agreement_with = Some(drafter)
}

#[tokio::test]
async fn the_status_tells_how_far_the_drafter_agrees_with_a_target_that_cannot_verify() {
    let target = says("The quick brown fox").await;
    let drafter = FakeUpstream::start(|_| {
        json(
            "200 OK",
            r#"{"choices":[{"message":{"content":"The quick red fox"},"finish_reason":"stop"}]}"#,
        )
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), measuring(&drafter)).await;
    assert_eq!(proxy.status().await["agreement"]["share"], Value::Null);

    let body = r#"{"messages":[{"role":"user","content":"Go on."}],"model":"big","stream":true,"temperature":0.9}"#;
    let answer = proxy.post(CHAT, body).send().await.unwrap().text().await.unwrap();
    assert!(answer.ends_with("data: [DONE]\n\n"), "{answer}");
    drafter.has_seen(1).await;
    let asked = drafter.only();
    assert_eq!(
        (asked.target.as_str(), target.only().body.as_slice()),
        (CHAT, body.as_bytes())
    );
    let asked: Value = serde_json::from_slice(&asked.body).unwrap();
    let expected = serde_json::json!({
        "messages": [{ "role": "user", "content": "Go on." }], "model": "small", "stream": false, "temperature": 0,
        "max_tokens": 64,
    });
    assert_eq!(asked, expected);

    let mut measured = Value::Null;
    for _ in 0..200 {
        measured = proxy.status().await["agreement"].clone();
        if measured["answers"] == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // "The quick " is common; the drafter's text has 17 characters.
    assert_eq!((&measured["answers"], &measured["characters"]), (&1.into(), &17.into()));
    assert!(
        (measured["share"].as_f64().unwrap() - 10.0 / 17.0).abs() < 1e-9,
        "{measured}"
    );
}

#[tokio::test]
async fn a_drafter_that_hangs_delays_no_answer_and_is_left_alone_when_the_next_request_comes() {
    let target = FakeUpstream::start(|seen| {
        let mut answer = json("200 OK", r#"{"choices":[{"text":"one two"}]}"#);
        if seen.number > 0 {
            answer.insert(0, wait(300));
        }
        answer
    })
    .await;
    let drafter = FakeUpstream::start(|_| vec![Act::Hang]).await;
    let proxy = TunedProxy::before(&target.url(), measuring(&drafter)).await;
    let ask = || async {
        let answer = proxy
            .post("/v1/completions", r#"{"prompt":"Count."}"#)
            .send()
            .await
            .unwrap();
        assert_eq!(answer.text().await.unwrap(), r#"{"choices":[{"text":"one two"}]}"#);
    };
    ask().await;
    drafter.has_seen(1).await;
    let (left, ()) = tokio::join!(drafter.was_left(), ask());
    assert!(left.elapsed() < Duration::from_secs(1));
    assert_eq!(proxy.status().await["agreement"]["answers"], 0);
}
