//! Drafts without a drafter: text that comes again, and what the client predicts.

mod harness;

use std::time::Duration;

use harness::gguf::slow_target;
use harness::llama_server::LlamaServer;
use harness::proxy::{Proxy, Record};
use serde_json::{Value, json};

const TARGET: [&str; 8] = [
    "--spec-draft-external-max",
    "16",
    "-np",
    "1",
    "-c",
    "2048",
    "--threads-http",
    "16",
];

async fn stage() -> (LlamaServer, Proxy) {
    let target = LlamaServer::start(&slow_target(), &TARGET).await;
    let proxy = Proxy::start(target.url(), None).await;
    proxy
        .shows("that drafts can be verified", Duration::from_secs(20), |status| {
            status["verification"] == "attached"
        })
        .await;
    (target, proxy)
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_default()
}

fn tokens_per_step(record: &Record) -> f64 {
    record.generated as f64 / record.steps.max(1) as f64
}

#[tokio::test]
async fn an_answer_that_the_client_predicts_takes_few_steps_and_is_the_targets_own() {
    let (target, proxy) = stage().await;
    let ask = json!({
        "messages": [{ "role": "user", "content": "Write a short story about a fox." }],
        "max_tokens": 100, "temperature": 0, "cache_prompt": false,
    });
    let plain = target.post("/v1/chat/completions", &ask).await;
    for (prediction, fewest) in [
        (content(&plain).to_owned(), 3.0),
        ("Something else entirely.".to_owned(), 0.9),
    ] {
        let mut predicted = ask.clone();
        predicted["prediction"] = json!({ "type": "content", "content": prediction });
        // The first answers teach what a step of each size costs.
        let mut best = 0.0_f64;
        for _ in 0..3 {
            let (answer, record) = proxy.post("/v1/chat/completions", &predicted).await;
            assert_eq!(content(&answer), content(&plain));
            assert_eq!(answer["usage"], plain["usage"]);
            best = best.max(tokens_per_step(&record));
        }
        assert!(
            best > fewest,
            "{best} tokens per step with the prediction {prediction:?}"
        );
    }
}

#[tokio::test]
async fn text_that_stands_in_the_conversation_is_drafted_from_there() {
    let (target, proxy) = stage().await;
    let question = json!({ "role": "user", "content": "Write a short story about a fox." });
    let sampling = json!({ "max_tokens": 100, "temperature": 0, "cache_prompt": false });
    let ask = |messages: Value| {
        let mut body = sampling.clone();
        body["messages"] = messages;
        body
    };
    let first = target.post("/v1/chat/completions", &ask(json!([question]))).await;
    // Asked again, the model says much of it again.
    let told = json!({ "role": "assistant", "content": content(&first) });
    let again = ask(json!([question, told, question]));
    let plain = target.post("/v1/chat/completions", &again).await;
    let mut best = 0.0_f64;
    for _ in 0..3 {
        let (answer, record) = proxy.post("/v1/chat/completions", &again).await;
        assert_eq!(content(&answer), content(&plain));
        best = best.max(tokens_per_step(&record));
    }
    assert!(best > 1.15, "{best} tokens per step, and 1 without drafts");
}
