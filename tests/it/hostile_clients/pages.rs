//! Web pages of other servers.

use std::time::Duration;

use super::{CHAT, EVIL, Run, UNSTREAMED, content, sent};
use crate::harness::fake_upstream::{FakeUpstream, send};
use crate::harness::llama_server::{answer_of, free_port};
use crate::harness::pool::{Pool, Setup};
use crate::harness::tuned_proxy::TunedProxy;
use crate::harness::wait::eventually;
use crate::harness::worker::{self, lease_request};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json as value};
use tightwad::config::Secret;
use tightwad::pool::agent_client::AgentClient;
use tokio::time::timeout;

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
