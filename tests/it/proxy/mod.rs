//! The proxy seen from outside: real sockets on both sides, a scripted target behind.

mod drafting;
mod forwarding;
mod leaving;
mod refusals;
mod status;
mod targets;

use std::time::Duration;

use crate::harness::fake_upstream::{Act, FakeUpstream, Seen, json};
use reqwest::StatusCode;
use serde_json::Value;
use tightwad::proxy::Settings;
use tokio::net::TcpListener;

const CHAT: &str = "/v1/chat/completions";
const COMMENT: &str = ": waiting for the target\n\n";
const STREAMED: &str = r#"{"messages":[],"stream":true}"#;
const UNSTREAMED: &str = r#"{"messages":[]}"#;

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
