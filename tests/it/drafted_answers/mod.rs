//! The main job: an answer that was drafted for is the target's own, byte for byte, whatever the drafter does.
//!
//! Every test asks the target directly and through the proxy, and compares.

mod drafters;
mod outages;
mod texts;

use std::time::{Duration, Instant};

use crate::harness::llama_server::{LlamaServer, essence, model};
use crate::harness::proxy::{Proxy, Record};
use crate::harness::request::with;
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard, OnceCell};

const CHAT: &str = "/v1/chat/completions";
const TARGET: [&str; 10] = [
    "--spec-draft-external-max",
    "8",
    "-np",
    "4",
    "-c",
    "2048",
    "--threads-http",
    "32",
    // The one in the model knows no tools.
    "--chat-template-file",
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/harness/tools.jinja"),
];
const DRAFT: [&str; 7] = ["-np", "4", "-c", "2048", "--threads-http", "32", "--metrics"];

/// Prompts that the models know, of many kinds.
const PROMPTS: [&str; 12] = [
    "Who are you?",
    "Explain recursion.",
    "What is a hash table?",
    "Count from 1 to 10.",
    "Write a Python function that checks whether a number is prime.",
    "Write a Rust function that adds two numbers.",
    "List the planets of the solar system.",
    "List the days of the week.",
    "Write a short story about a dog.",
    "What is speculative decoding?",
    "Tell me a story about a robot.",
    "Explain garbage collection.",
];

/// A target, a good drafter, and the proxy before them.
struct Stage {
    target: LlamaServer,
    draft: LlamaServer,
    proxy: Proxy,
}

/// The stage that most tests share, one after the other. A target that reads several prompts at once may split them
/// differently into batches, with logits that differ in the last digits, and so answer differently, drafter or not.
async fn stage() -> MutexGuard<'static, Stage> {
    static STAGE: OnceCell<Mutex<Stage>> = OnceCell::const_new();
    let stage = STAGE.get_or_init(|| async {
        let (target, draft) = tokio::join!(start_target(), start_draft("tightwad-tiny-draft-f16.gguf"));
        let proxy = Proxy::drafting(target.url(), draft.url()).await;
        Mutex::new(Stage { target, draft, proxy })
    });
    stage.await.lock().await
}

impl Stage {
    async fn same(&self, path: &str, body: &Value) -> (Value, Record) {
        same(&self.target, &self.proxy, path, body).await
    }

    async fn same_and_drafted(&self, path: &str, body: &Value) -> (Value, Record) {
        same_and_drafted(&self.target, &self.proxy, path, body).await
    }
}

async fn start_target() -> LlamaServer {
    LlamaServer::far_target(&TARGET).await
}

async fn start_draft(name: &str) -> LlamaServer {
    LlamaServer::start(&model(name), &DRAFT).await
}

/// Every run begins alike: nothing of an earlier prompt is taken over.
fn greedy() -> Value {
    json!({ "temperature": 0, "cache_prompt": false })
}

fn sampled() -> Value {
    json!({
        "temperature": 0.8, "top_p": 0.95, "min_p": 0.02, "repeat_penalty": 1.1, "seed": 1234, "cache_prompt": false,
    })
}

fn chat(prompt: &str, max_tokens: u32) -> Value {
    json!({ "messages": [{ "role": "user", "content": prompt }], "max_tokens": max_tokens })
}

/// Asks the target alone and through the proxy: the same answer must come back.
async fn same(target: &LlamaServer, proxy: &Proxy, path: &str, body: &Value) -> (Value, Record) {
    let plain = target.post(path, body).await;
    let (answer, record) = proxy.post(path, body).await;
    is_the_targets_own(body, answer, &plain, &record);
    (plain, record)
}

/// Where two answers differ first, if they do, and how.
fn first_difference(place: &str, left: &Value, right: &Value) -> Option<String> {
    match (left, right) {
        _ if left == right => None,
        (Value::Object(ours), Value::Object(theirs)) if ours.keys().eq(theirs.keys()) => ours
            .iter()
            .find_map(|(key, value)| first_difference(&format!("{place}/{key}"), value, &theirs[key])),
        (Value::Array(ours), Value::Array(theirs)) if !ours.is_empty() && !theirs.is_empty() => ours
            .iter()
            .zip(theirs)
            .enumerate()
            .find_map(|(i, (ours, theirs))| first_difference(&format!("{place}/{i}"), ours, theirs))
            .or_else(|| {
                Some(format!(
                    "{place} has {} elements instead of {}",
                    ours.len(),
                    theirs.len()
                ))
            }),
        _ => Some(format!("{place} is {left} instead of {right}")),
    }
}

fn is_the_targets_own(body: &Value, answer: Value, plain: &Value, record: &Record) {
    let path = &record.path;
    let (answer, plain) = (essence(answer), essence(plain.clone()));
    if let Some(difference) = first_difference("", &answer, &plain) {
        panic!("{path} {body}: {record:?}: {difference}");
    }
    assert_eq!(record.streamed, body["stream"] == true, "{record:?}");
    assert!(record.accepted <= record.drafted, "{record:?}");
    // Of the last step's draft more may have been right than the answer had room for.
    let most = record.steps + record.accepted;
    assert!(
        (most.saturating_sub(8)..=most).contains(&record.generated),
        "{record:?}"
    );
}

/// As [`same`], and draft tokens must be in the answer.
async fn same_and_drafted(target: &LlamaServer, proxy: &Proxy, path: &str, body: &Value) -> (Value, Record) {
    // On a busy machine a short answer may be over before its first draft is there, or drafting may not pay for a while.
    let begin = Instant::now();
    let mut records = Vec::new();
    while begin.elapsed() < Duration::from_secs(90) {
        let (plain, record) = same(target, proxy, path, body).await;
        if record.accepted > 0 && record.steps < record.generated {
            return (plain, record);
        }
        records.push(record);
    }
    panic!("no draft was accepted: {path} {body}: {records:#?}");
}

/// Whatever the drafter does: the answers are the target's own, and come about as soon. Returns what was recorded.
async fn answers_are_right_with(target: &LlamaServer, proxy: &Proxy) -> Vec<Record> {
    let mut records = Vec::new();
    for (i, prompt) in PROMPTS[..4].iter().enumerate() {
        let sampling = if i % 2 == 0 { greedy() } else { sampled() };
        let body = with(with(chat(prompt, 60), sampling), json!({ "stream": i >= 2 }));
        let begun = Instant::now();
        let plain = target.post(CHAT, &body).await;
        let alone = begun.elapsed();
        let (answer, record) = proxy.post(CHAT, &body).await;
        is_the_targets_own(&body, answer, &plain, &record);
        let bound = 3 * alone + Duration::from_secs(2);
        assert!(
            record.duration_ms < bound.as_secs_f64() * 1e3,
            "{alone:?} alone: {record:?}"
        );
        records.push(record);
    }
    records
}

// What the target does
