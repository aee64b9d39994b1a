//! What is refused: tokens, bodies, paths.

use super::{CHAT, UNSTREAMED, error_of};
use crate::harness::fake_upstream::{FakeUpstream, json};
use crate::harness::tuned_proxy::TunedProxy;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tightwad::config::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

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
