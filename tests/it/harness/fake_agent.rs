//! A worker's agent that says what a test wants of it, with no server behind it.

use serde_json::{Value, json};

use super::fake_upstream::{Act, FakeUpstream, json as answer, send};

/// How it answers who asks for the worker.
pub fn granted() -> Vec<Act> {
    answer("200 OK", r#"{"id":"1","expires_seconds":10}"#)
}

/// An agent that tells this build, and a device with so many free bytes on each of its ports; it lends itself to anybody.
pub async fn fake_agent(build: &str, ports: impl IntoIterator<Item = u16>, free_bytes: u64) -> FakeUpstream {
    let status = status(build, ports, free_bytes);
    FakeUpstream::start(move |seen| match (seen.method.as_str(), seen.target.as_str()) {
        ("GET", "/v1/worker") => answer("200 OK", &status),
        ("POST", "/v1/worker/lease") => granted(),
        _ => vec![send("HTTP/1.1 204 No Content\r\n\r\n")],
    })
    .await
}

/// What such an agent tells of itself.
pub fn status(build: &str, ports: impl IntoIterator<Item = u16>, free_bytes: u64) -> String {
    let endpoint = |port: u16| {
        let device =
            json!({ "name": "CPU", "description": "a CPU", "total_bytes": free_bytes, "free_bytes": free_bytes });
        json!({ "port": port, "state": "idle", "devices": [device] })
    };
    let endpoints: Vec<Value> = ports.into_iter().map(endpoint).collect();
    json!({
        "name": "far", "build": build, "protocol": null, "lease": null, "cache_bytes": 0, "cache_quota_bytes": 0,
        "last_lines": [], "endpoints": endpoints,
    })
    .to_string()
}
