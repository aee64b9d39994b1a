//! Which model answers, by the name in the request: the rows of "Which model answers" in `docs/reference/endpoints.md`.

use serde_json::{Value, json};
use tightwad::config::{Backend, Upstream, VerificationMode};

use crate::harness::fake_upstream::{FakeUpstream, json as answer};
use crate::harness::llama_server::{LlamaServer, answer_of, model, target};
use crate::harness::pool::{Pool, Setup};
use crate::harness::proxy::Proxy;

const COMPLETIONS: &str = "/v1/completions";

async fn ask(url: &str, path: &str, name: Option<&str>) -> (u16, Value) {
    let mut body = json!({ "prompt": "Once", "input": "Once", "max_tokens": 2 });
    if let Some(name) = name {
        body["model"] = json!(name);
    }
    answer_of(reqwest::Client::new().post(format!("{url}{path}")).json(&body)).await
}

/// Expects that the model of a name answers a completion.
async fn answers(url: &str, name: Option<&str>, answering: &str) {
    let (status, answer) = ask(url, COMPLETIONS, name).await;
    assert_eq!(
        (status, &answer["model"]),
        (200, &json!(answering)),
        "{name:?}: {answer}"
    );
}

/// Expects that a completion and an embedding are refused, and returns the message.
async fn refused(url: &str, name: &str, code: &str) -> String {
    let mut message = String::new();
    for path in ["/v1/embeddings", COMPLETIONS] {
        let (status, answer) = ask(url, path, Some(name)).await;
        assert_eq!(
            (status, &answer["error"]["code"]),
            (404, &json!(code)),
            "{path} {name}: {answer}"
        );
        answer["error"]["message"].as_str().unwrap().clone_into(&mut message);
    }
    message
}

fn drafter(name: &str) -> Upstream {
    Upstream {
        model_name: Some(name.to_owned()),
        ..Upstream::at("http://127.0.0.1:9")
    }
}

#[tokio::test]
async fn a_proxy_over_one_model_answers_any_name_but_the_drafters() {
    let server = LlamaServer::start(&target(), &["--alias", "big"]).await;
    let proxy = Proxy::start_with(server.url(), [drafter("small")]).await;
    for name in [None, Some("big"), Some("gpt-4o")] {
        answers(proxy.url(), name, "big").await;
    }
    let message = refused(proxy.url(), "small", "model_not_found").await;
    assert!(message.contains("`small` only drafts"), "{message}");
}

#[tokio::test]
async fn a_target_of_another_kind_decides_itself() {
    let target = FakeUpstream::start(|_| answer("200 OK", "{}")).await;
    for backend in [Backend::Ollama, Backend::Vllm, Backend::Sglang, Backend::Openai] {
        let upstream = Upstream {
            backend,
            ..Upstream::at(target.url())
        };
        let proxy = Proxy::before(upstream, [drafter("small")], VerificationMode::None).await;
        for name in ["small", "any other"] {
            assert_eq!(
                ask(proxy.url(), COMPLETIONS, Some(name)).await.0,
                200,
                "{backend:?} {name}"
            );
        }
    }
}

#[tokio::test]
async fn a_pool_of_one_model_answers_any_name_but_the_drafters() {
    let pool = Pool::ready(Setup {
        drafter: Some("other"),
        ..Setup::default()
    })
    .await;
    for name in [None, Some("big"), Some("gpt-4o")] {
        answers(pool.url(), name, "big").await;
    }
    let message = refused(pool.url(), "other", "model_not_found").await;
    assert!(message.contains("`other` only drafts"), "{message}");
}

#[tokio::test]
async fn a_pool_of_several_models_answers_their_names_only() {
    let small = json!({ "path": model("tightwad-tiny-draft-f16.gguf"), "ctx_size": 512 });
    let pool = Pool::ready(Setup {
        models: json!({ "small": small }),
        drafter: Some("small"),
        ..Setup::default()
    })
    .await;
    for name in [None, Some("big")] {
        answers(pool.url(), name, "big").await;
    }
    let message = refused(pool.url(), "other", "model_not_loaded").await;
    assert!(message.contains("tightwad swap other"), "{message}");
    let message = refused(pool.url(), "gpt-4o", "model_not_found").await;
    assert!(message.contains("`big`, `other`"), "{message}");
    let message = refused(pool.url(), "small", "model_not_found").await;
    assert!(message.contains("`small` only drafts"), "{message}");
}
