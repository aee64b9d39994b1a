//! The rendered files of a cluster of four hosts, run on one machine: what its units would run answers.

use std::path::Path;
use std::time::Duration;

use crate::harness::cluster::Cluster;
use serde_json::json;

/// Long enough for a machine with other things to do.
const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn the_roles_of_a_rendered_cluster_answer_with_drafts_and_from_the_pool_each_from_its_own_file() {
    let rendered = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rendered");
    let mut cluster = Cluster::start(&rendered);
    cluster
        .shows("proxy", "that it drafts", SOON, |status| {
            status["verification"] == "attached" && status["drafts"][0]["healthy"] == true && status["reason"].is_null()
        })
        .await;
    let body = json!({ "prompt": "let größe = numbers[42].unwrap();", "max_tokens": 256, "temperature": 0, "ignore_eos": true });
    let (status, drafted) = cluster.post("proxy", "/v1/completions", &body).await;
    assert_eq!(
        (status, &drafted["usage"]["completion_tokens"]),
        (200, &json!(256)),
        "{drafted}"
    );
    cluster
        .shows("proxy", "drafts that were kept", SOON, |status| {
            status["counts"]["accepted"].as_u64() > Some(0)
        })
        .await;

    cluster
        .shows("coordinator", "that its model answers", SOON, |status| {
            status["state"] == "ready"
        })
        .await;
    let (status, pooled) = cluster.post("coordinator", "/v1/completions", &body).await;
    assert_eq!(
        (status, &pooled["usage"]["completion_tokens"]),
        (200, &json!(256)),
        "{pooled}"
    );
    let (_, pool) = cluster.get("coordinator", "/v1/tightwad/status").await;
    assert_eq!(pool["workers"][0]["name"], cluster.config["workers"][0]["name"]);
}
