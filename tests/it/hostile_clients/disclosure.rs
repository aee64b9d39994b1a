//! What strangers learn, and what they write into the log.

use std::time::Duration;

use super::{CHAT, Run, UNSTREAMED, content, sent};
use crate::harness::llama_server::{answer_of, free_port};
use crate::harness::pool::{Pool, Setup};
use crate::harness::tuned_proxy::TunedProxy;
use crate::harness::wait::eventually;
use serde_json::{Value, json as value};
use tightwad::config::Secret;
use tokio::time::timeout;

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
