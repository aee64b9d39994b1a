//! Drafts without a drafter: text that comes again, and what the client predicts.

use std::time::Duration;

use crate::harness::llama_server::LlamaServer;
use crate::harness::proxy::{Proxy, Record};
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
    let target = LlamaServer::far_target(&TARGET).await;
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

/// The accepted and rejected tokens of the prediction, as the client is told.
fn told(usage: &Value, record: &Record) -> (u64, u64) {
    let told = |name: &str| usage["completion_tokens_details"][name].as_u64().unwrap();
    let (accepted, rejected) = (told("accepted_prediction_tokens"), told("rejected_prediction_tokens"));
    assert_eq!(
        (accepted, rejected),
        (record.accepted_prediction_tokens, record.rejected_prediction_tokens)
    );
    assert!(
        accepted <= record.accepted && accepted + rejected <= record.drafted,
        "{record:?}"
    );
    (accepted, rejected)
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
            let details = told(&answer["usage"], &record);
            assert_eq!(
                details.0 > 0,
                fewest > 1.0,
                "{:?} of {prediction:?} accepted",
                details.0
            );
            let mut usage = answer["usage"].clone();
            usage.as_object_mut().unwrap().remove("completion_tokens_details");
            assert_eq!(usage, plain["usage"]);
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

#[tokio::test]
async fn a_streamed_usage_tells_what_came_of_the_prediction() {
    let (target, proxy) = stage().await;
    let ask = json!({
        "messages": [{ "role": "user", "content": "Write a short story about a fox." }],
        "max_tokens": 60, "temperature": 0, "cache_prompt": false,
        "stream": true, "stream_options": { "include_usage": true },
    });
    let texts = |events: &Value| {
        let events = events.as_array().expect("events");
        let text = events
            .iter()
            .map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        text.collect::<String>()
    };
    let plain = target.post("/v1/chat/completions", &ask).await;
    let mut predicted = ask.clone();
    predicted["prediction"] = json!({ "type": "content", "content": texts(&plain) });
    let mut best = 0;
    for _ in 0..3 {
        let (events, record) = proxy.post("/v1/chat/completions", &predicted).await;
        assert_eq!(texts(&events), texts(&plain));
        let with_usage = events
            .as_array()
            .unwrap()
            .iter()
            .filter(|event| event["usage"].is_object());
        let usages: Vec<_> = with_usage.map(|event| &event["usage"]).collect();
        assert_eq!(usages.len(), 1, "{events:#}");
        best = best.max(told(usages[0], &record).0);
    }
    assert!(best > 20, "{best} of 60 tokens accepted from the prediction");

    // All of it stands in the sums.
    let status = proxy.status().await;
    let sum: u64 = status["requests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["accepted_prediction_tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(status["counts"]["accepted_prediction_tokens"], sum);
    let metrics = reqwest::get(format!("{}/metrics", proxy.url()))
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let line = format!("tightwad_accepted_prediction_tokens_total {sum}");
    assert!(metrics.lines().any(|it| it == line), "{line} is not in\n{metrics}");
}

#[tokio::test]
async fn only_who_predicts_is_told_of_predictions() {
    let (target, proxy) = stage().await;
    let ask = json!({
        "messages": [{ "role": "user", "content": "Count from 1 to 40." }],
        "max_tokens": 20, "temperature": 0, "cache_prompt": false,
    });
    let plain = target.post("/v1/chat/completions", &ask).await;
    let (answer, _) = proxy.post("/v1/chat/completions", &ask).await;
    assert_eq!(answer["usage"], plain["usage"]);
    // Text completions have no such member.
    let ask = json!({
        "prompt": "One, two", "max_tokens": 8, "temperature": 0, "cache_prompt": false,
        "prediction": { "type": "content", "content": "three" },
    });
    let (answer, _) = proxy.post("/v1/completions", &ask).await;
    assert!(answer["usage"]["completion_tokens_details"].is_null(), "{answer}");
}
