//! What is wrong with a server is told in plain words, with what to do.

use std::time::Duration;

use crate::harness::fake_upstream::{FakeUpstream, json as answer, send};
use crate::harness::llama_server::free_port;
use crate::harness::proxy::Proxy;
use serde_json::Value;

/// What the status tells of the target and the drafter, once it tells it of both.
async fn problems(target: &str, draft: &str, words: [&str; 2]) -> [String; 2] {
    let proxy = Proxy::start(target, Some(draft)).await;
    let problem = |server: &Value| server["problem"].as_str().unwrap_or_default().to_owned();
    let status = proxy
        .shows("both problems", Duration::from_secs(20), |status| {
            problem(&status["target"]).contains(words[0]) && problem(&status["drafts"][0]).contains(words[1])
        })
        .await;
    [problem(&status["target"]), problem(&status["drafts"][0])]
}

#[tokio::test]
async fn a_wrong_key_reads_otherwise_than_a_server_that_does_not_run() {
    let strict =
        FakeUpstream::start(|_| answer("401 Unauthorized", r#"{"error":{"message":"Invalid API Key"}}"#)).await;
    let port = free_port();
    let draft = format!("http://127.0.0.1:{port}");
    let [target, draft] = problems(&strict.url(), &draft, ["401", "nothing listens"]).await;
    assert!(
        target.contains("is up and refuses our key (401: Invalid API Key)") && target.contains("api_key_file"),
        "{target}"
    );
    let words =
        format!("connection refused: nothing listens on 127.0.0.1:{port}; start `tightwad run draft` on that host");
    assert!(draft.ends_with(&words), "{draft}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_told_without_the_words_of_a_library() {
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n{\"a";
    let broken = FakeUpstream::start(move |_| vec![send(chunked), crate::harness::fake_upstream::Act::Close]).await;
    let foreign =
        FakeUpstream::start(|_| vec![send("SSH-2.0-OpenSSH_9\r\n"), crate::harness::fake_upstream::Act::Close]).await;
    let [target, draft] = problems(&broken.url(), &foreign.url(), ["broke off", "HTTP"]).await;
    assert!(target.ends_with("the connection broke off"), "{target}");
    assert!(
        draft.ends_with(&format!("{} does not speak HTTP", foreign.address)),
        "{draft}"
    );
}
