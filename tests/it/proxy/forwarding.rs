//! What goes through unchanged: requests, answers, streams.

use std::time::{Duration, Instant};

use super::{CHAT, STREAMED};
use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, json, send, stream_head, wait};
use crate::harness::tuned_proxy::TunedProxy;
use futures_util::StreamExt;
use reqwest::Method;

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
