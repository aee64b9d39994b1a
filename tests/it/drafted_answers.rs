//! The main job: an answer that was drafted for is the target's own, byte for byte, whatever the drafter does.
//!
//! Every test asks the target directly and through the proxy, and compares.

use std::time::{Duration, Instant};

use crate::harness::fake_drafter::FakeDrafter;
use crate::harness::llama_server::{LlamaServer, essence, free_port, model, target};
use crate::harness::proxy::{Proxy, Record};
use crate::harness::request::with;
use crate::harness::wait::eventually;
use futures_util::StreamExt;
use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use tightwad::config::Upstream;
use tightwad::upstream::{DraftPiece, WrittenTokens};
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

/// A chat as the models read it.
const RAW: &str = "<|im_start|>user\nExplain recursion.<|im_end|>\n<|im_start|>assistant\n";

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
    while begin.elapsed() < Duration::from_secs(30) {
        let (plain, record) = same(target, proxy, path, body).await;
        if record.accepted > 0 && record.steps < record.generated {
            return (plain, record);
        }
        records.push(record);
    }
    panic!("no draft was accepted: {path} {body}: {records:#?}");
}

// What is asked for

#[tokio::test]
async fn the_answers_to_many_prompts_are_the_targets_own() {
    let stage = stage().await;
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        for (sampling, max_tokens) in [(greedy(), 80), (with(sampled(), json!({ "seed": i })), 40)] {
            let body = with(
                with(chat(prompt, max_tokens), sampling),
                json!({ "stream": i % 2 == 0 }),
            );
            stage.same_and_drafted(CHAT, &body).await;
        }
    }
}

#[tokio::test]
async fn with_a_good_drafter_the_target_takes_far_fewer_steps_than_tokens() {
    let stage = stage().await;
    let before = stage.draft.generated().await;
    let mut seen = Vec::new();
    // Where others keep the processor from the drafter, its drafts come late: such a round proves nothing.
    while seen.len() < 4 {
        let (mut steps, mut generated) = (0, 0);
        for prompt in PROMPTS {
            let (_, record) = stage.proxy.post(CHAT, &with(chat(prompt, 80), greedy())).await;
            steps += record.steps;
            generated += record.generated;
        }
        assert!(generated > 500, "{generated} tokens");
        if steps * 10 < generated * 6 {
            // It was not the text itself that was guessed from.
            assert!(stage.draft.generated().await > before + generated / 2);
            return;
        }
        seen.push(format!("{steps} steps for {generated} tokens"));
    }
    panic!("{seen:?}");
}

#[tokio::test]
async fn every_endpoint_gives_the_targets_own_answer_streamed_or_not() {
    let stage = stage().await;
    let messages = chat("Explain recursion.", 40);
    for stream in [false, true] {
        for sampling in [greedy(), sampled()] {
            for (path, body) in [
                (CHAT, messages.clone()),
                ("/v1/messages", messages.clone()),
                (
                    "/v1/responses",
                    json!({ "input": "Explain recursion.", "max_output_tokens": 40 }),
                ),
                ("/v1/completions", json!({ "prompt": RAW, "max_tokens": 40 })),
                (
                    "/completion",
                    json!({ "prompt": RAW, "n_predict": 40, "return_tokens": true }),
                ),
            ] {
                let body = with(with(body, sampling.clone()), json!({ "stream": stream }));
                stage.same_and_drafted(path, &body).await;
            }
        }
    }
}

#[tokio::test]
async fn the_pieces_of_a_stream_make_up_the_whole_answer() {
    let stage = stage().await;
    let body = with(chat("Write a short story about a dog.", 60), sampled());
    let (whole, _) = stage.same_and_drafted(CHAT, &body).await;
    let streamed = with(
        body,
        json!({ "stream": true, "stream_options": { "include_usage": true } }),
    );
    let (events, _) = stage.same_and_drafted(CHAT, &streamed).await;
    let events = events.as_array().expect("events");
    let pieces: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(whole["choices"][0]["message"]["content"], pieces.as_str());
    let reasons: Vec<_> = events
        .iter()
        .map(|event| &event["choices"][0]["finish_reason"])
        .filter(|reason| !reason.is_null())
        .collect();
    assert_eq!(reasons, [&whole["choices"][0]["finish_reason"]]);
    let usage: Vec<_> = events
        .iter()
        .map(|event| &event["usage"])
        .filter(|usage| !usage.is_null())
        .collect();
    assert_eq!(usage, [&whole["usage"]]);
}

#[tokio::test]
async fn the_status_the_answer_and_the_usage_count_alike() {
    let stage = stage().await;
    let body = with(chat("Count from 1 to 10.", 50), greedy());
    let (answer, record) = stage.proxy.post(CHAT, &body).await;
    assert_eq!(answer["timings"]["predicted_n"], record.generated, "{record:?}");
    assert_eq!(answer["usage"]["completion_tokens"], record.generated, "{record:?}");
    if record.drafted > 0 {
        assert_eq!(answer["timings"]["draft_n"], record.drafted, "{record:?}");
        assert_eq!(answer["timings"]["draft_n_accepted"], record.accepted, "{record:?}");
    }
}

#[tokio::test]
async fn schemas_grammars_and_tool_calls_constrain_drafted_tokens_too() {
    let stage = stage().await;
    // A real drafter, which knows nothing of the constraints, would seldom be right.
    let draft = FakeDrafter::remembering(&stage.draft).await;
    let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
    let schema = json!({
        "type": "object",
        "properties": { "answer": { "type": "string", "maxLength": 120 }, "sure": { "type": "boolean" } },
        "required": ["answer", "sure"],
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema } });
    let tool = json!({ "type": "function", "function": {
        "name": "count_words",
        "parameters": { "type": "object", "properties": { "text": { "type": "string", "maxLength": 80 } }, "required": ["text"] },
    } });
    for sampling in [greedy(), sampled()] {
        for stream in [false, true] {
            let more = with(sampling.clone(), json!({ "stream": stream }));

            let body = with(
                with(chat("Explain recursion.", 120), json!({ "response_format": format })),
                more.clone(),
            );
            let (answer, _) = same_and_drafted(&stage.target, &proxy, CHAT, &body).await;
            if !stream {
                let choice = &answer["choices"][0];
                assert_eq!(choice["finish_reason"], "stop", "{answer}");
                let content: Value = choice["message"]["content"]
                    .as_str()
                    .expect("text")
                    .parse()
                    .expect("JSON");
                assert!(content["sure"].is_boolean(), "{content}");
            }

            // The call is begun already: the model would not think of it.
            let messages = json!([
                { "role": "user", "content": "What is recursion?" },
                { "role": "assistant", "content": "<tool_call>\n" },
            ]);
            let body = json!({ "messages": messages, "tools": [tool], "tool_choice": "required", "max_tokens": 80 });
            let (answer, _) = same_and_drafted(&stage.target, &proxy, CHAT, &with(body, more.clone())).await;
            if !stream {
                let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
                assert_eq!(call["name"], "count_words", "{answer}");
            }

            let grammar = r#"root ::= ("Monday" | "Tuesday" | "Friday") (", " root)?"#;
            let body = json!({ "prompt": "Monday, Tuesday, Friday, Monday, ", "n_predict": 40, "grammar": grammar });
            same_and_drafted(&stage.target, &proxy, "/completion", &with(body, more)).await;
        }
    }
}

#[tokio::test]
async fn log_probabilities_are_the_targets_own_to_the_last_digit() {
    let stage = stage().await;
    for sampling in [greedy(), sampled()] {
        let body = with(
            chat("Explain recursion.", 40),
            json!({ "logprobs": true, "top_logprobs": 3 }),
        );
        let (answer, _) = stage.same_and_drafted(CHAT, &with(body, sampling.clone())).await;
        let listed = answer["choices"][0]["logprobs"]["content"].as_array().map(Vec::len);
        assert_eq!(listed, Some(40), "{answer}");

        let body = json!({ "prompt": RAW, "n_predict": 40, "n_probs": 3, "stream": true });
        stage
            .same_and_drafted("/completion", &with(body, sampling.clone()))
            .await;

        let body = json!({ "prompt": RAW, "max_tokens": 40, "logprobs": 2 });
        stage.same_and_drafted("/v1/completions", &with(body, sampling)).await;
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_wherever_it_falls_among_the_steps() {
    let stage = stage().await;
    let body = with(chat("Explain recursion.", 80), greedy());
    let (plain, _) = stage.same_and_drafted(CHAT, &body).await;
    let text = plain["choices"][0]["message"]["content"].as_str().expect("a text");
    // Longer than a token and begun inside of one: wherever the steps end, some of these lie across.
    for (i, begin) in (60..150).step_by(13).enumerate() {
        let stop = &text[begin..begin + 9];
        let body = with(body.clone(), json!({ "stop": [stop], "stream": i % 2 == 1 }));
        let (answer, _) = stage.same_and_drafted(CHAT, &body).await;
        if i % 2 == 0 {
            let choice = &answer["choices"][0];
            assert_eq!(choice["finish_reason"], "stop");
            let before = text.split(stop).next();
            assert_eq!(choice["message"]["content"].as_str(), before, "{stop:?}");
        }
    }
}

#[tokio::test]
async fn characters_that_are_split_over_tokens_arrive_whole() {
    let stage = stage().await;
    // A drafter that is right about all the rest.
    let draft = start_draft("tightwad-tiny-target-q8_0.gguf").await;
    let proxy = Proxy::drafting(stage.target.url(), draft.url()).await;
    for text in ["\u{1f600}", "\u{65e5}\u{672c}\u{8a9e}", "\u{1f389}"] {
        let tokens = stage.target.tokenize(text).await.len();
        assert!(tokens > text.chars().count(), "{text} is not split");
    }
    // Between what both models would say anyway, the target is made to say these.
    let grammar = r#"root ::= "Recursion is a technique in which a function calls itself \U0001F600\u65e5\u672c\u8a9e to solve a
        smaller version of the same problem. \U0001F389\u00e9 Every recursive function needs a base case""#;
    let grammar = grammar.split_whitespace().collect::<Vec<_>>().join(" ");
    // At a higher temperature the target spells the same text in tokens that no drafter would expect.
    let sampled = json!({ "temperature": 0.2, "seed": 1234, "cache_prompt": false });
    for sampling in [greedy(), sampled] {
        for stream in [false, true] {
            let body = with(
                with(chat("Explain recursion.", 80), sampling.clone()),
                json!({ "grammar": grammar }),
            );
            let body = with(body, json!({ "stream": stream }));
            let (answer, _) = same_and_drafted(&stage.target, &proxy, CHAT, &body).await;
            if !stream {
                let content = answer["choices"][0]["message"]["content"].as_str().expect("a text");
                assert!(
                    content.contains(" itself \u{1f600}\u{65e5}\u{672c}\u{8a9e} to solve"),
                    "{content}"
                );
                assert!(
                    content.contains(" problem. \u{1f389}\u{e9} Every recursive"),
                    "{content}"
                );
            }
        }
    }
}

#[tokio::test]
async fn drafts_that_begin_and_end_inside_of_characters_are_used() {
    let stage = stage().await;
    // It knows the target's mind, since it is the same model, without what slows the target down.
    let draft = start_draft("tightwad-tiny-target-q8_0.gguf").await;
    let proxy = Proxy::drafting(stage.target.url(), draft.url()).await;
    let prompt = "\u{65e5}\u{672c}\u{8a9e}\u{1f600}".repeat(8);
    for sampling in [greedy(), sampled()] {
        for stream in [false, true] {
            let body = json!({ "prompt": prompt, "n_predict": 60, "return_tokens": true, "stream": stream });
            same_and_drafted(&stage.target, &proxy, "/completion", &with(body, sampling.clone())).await;
        }
    }
}

#[tokio::test]
async fn a_draft_has_as_many_tokens_as_were_asked_for_wherever_that_cuts_a_character() {
    let draft = start_draft("tightwad-tiny-target-q8_0.gguf").await;
    let client = tightwad::upstream::LlamaServer::new(draft.url(), None).expect("a client");
    let drafted = async |prefix: &[i32], n: usize, at_once: bool| {
        let pieces = client.draft(prefix.to_vec(), &mut WrittenTokens::default(), n, 0, at_once);
        let tokens = |piece| match piece {
            Ok(DraftPiece::Tokens(tokens)) => tokens.into_iter().map(|(token, _)| token).collect(),
            Ok(DraftPiece::End { .. }) => Vec::new(),
            Err(error) => panic!("{error}"),
        };
        let pieces: Vec<Vec<i32>> = pieces.map(tokens).collect().await;
        pieces.concat()
    };
    let mut characters = draft.tokenize(&"\u{65e5}\u{672c}\u{8a9e}\u{1f600}".repeat(8)).await;
    // Behind the first half of one the model says a character of three tokens.
    characters.truncate(characters.len() - 2);
    let letters = draft.tokenize("Count from 1 to 30. 1, 2, 3, 4, 5, 6,").await;
    for n in 1..8 {
        let whole = drafted(&characters, n, true).await;
        assert_eq!(whole.len(), n);
        assert_eq!(drafted(&characters, n, false).await, whole);
        // Where nothing is missing nothing is asked for twice.
        let before = draft.generated().await;
        assert_eq!(drafted(&letters, n, false).await.len(), n);
        assert_eq!(draft.generated().await - before, n as u64);
    }
}

#[tokio::test]
async fn an_answer_has_as_many_tokens_as_it_may_wherever_that_cuts_a_draft() {
    // Both models say much the same to this, at length.
    const PROMPT: &str = "Write a Python class Stack.";
    let stage = stage().await;
    // What short answers are drafted for is what was learnt from longer ones.
    stage.same_and_drafted(CHAT, &with(chat(PROMPT, 120), greedy())).await;
    let mut accepted = 0;
    for max_tokens in [1, 2, 3, 5, 9, 15, 24, 33, 43] {
        for stream in [false, true] {
            let body = with(chat(PROMPT, max_tokens), greedy());
            let body = with(body, json!({ "stream": stream }));
            let (answer, record) = stage.same(CHAT, &body).await;
            assert_eq!(record.generated, u64::from(max_tokens), "{record:?}");
            accepted += record.accepted;
            if max_tokens == 1 {
                assert_eq!(record.drafted, 0, "{record:?}");
            }
            if !stream {
                assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
                assert_eq!(answer["choices"][0]["finish_reason"], "length");
            }
        }
    }
    assert!(accepted > 10, "{accepted} drafted tokens in all");
}

#[tokio::test]
async fn several_choices_are_answered_without_drafts() {
    let stage = stage().await;
    let body = with(with(chat("Explain recursion.", 40), sampled()), json!({ "n": 2 }));
    let (plain, record) = stage.same(CHAT, &body).await;
    assert_eq!(plain["choices"].as_array().map(Vec::len), Some(2));
    assert_eq!(record.drafted, 0, "{record:?}");
}

#[tokio::test]
async fn four_clients_at_once_each_get_their_own_answer() {
    let stage = stage().await;
    // Short prompts, which come to the same however they are split.
    let mut bodies = Vec::new();
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        let sampling = if i % 3 == 0 { sampled() } else { greedy() };
        let body = with(with(chat(prompt, 60), sampling), json!({ "stream": i % 2 == 0 }));
        let plain = stage.target.post(CHAT, &body).await;
        bodies.push((body, plain));
    }
    let mut accepted = 0;
    for four in bodies.chunks(4) {
        let answers = join_all(four.iter().map(|(body, _)| stage.proxy.post(CHAT, body))).await;
        for ((body, plain), (answer, record)) in four.iter().zip(answers) {
            is_the_targets_own(body, answer, plain, &record);
            accepted += record.accepted;
        }
    }
    assert!(accepted > 10, "{accepted} drafted tokens in all");
}

// What the drafter does

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

fn sum(records: &[Record], count: impl Fn(&Record) -> u64) -> u64 {
    records.iter().map(count).sum()
}

#[tokio::test]
async fn a_weak_drafter_helps_where_it_can_and_harms_nowhere() {
    let stage = stage().await;
    let draft = start_draft("tightwad-tiny-draft-weak-f16.gguf").await;
    let proxy = Proxy::drafting(stage.target.url(), draft.url()).await;
    // Stories it tells much like the target does.
    let body = with(chat("Write a short story about a dog.", 80), greedy());
    let (_, record) = same_and_drafted(&stage.target, &proxy, CHAT, &body).await;
    assert!(record.accepted < record.drafted, "{record:?}");
    answers_are_right_with(&stage.target, &proxy).await;
}

#[tokio::test]
async fn nonsense_from_the_drafter_changes_nothing() {
    let stage = stage().await;
    let draft = FakeDrafter::nonsense(&stage.draft).await;
    let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
    let records = answers_are_right_with(&stage.target, &proxy).await;
    let drafted = sum(&records, |record| record.drafted);
    assert!(sum(&records, |record| record.accepted) * 5 <= drafted, "{records:?}");
    assert!(draft.asked() > 0);
}

#[tokio::test]
async fn of_several_drafters_the_good_one_is_used() {
    let stage = stage().await;
    let nonsense = FakeDrafter::nonsense(&stage.draft).await;
    let hung = FakeDrafter::hangs(&stage.draft).await;
    let drafts = [&nonsense.url(), &hung.url(), stage.draft.url()].map(Upstream::at);
    let proxy = Proxy::drafting_with(stage.target.url(), drafts).await;
    let body = with(chat("Explain recursion.", 64), greedy());
    same_and_drafted(&stage.target, &proxy, CHAT, &body).await;
    assert!(nonsense.asked() > 0 && hung.asked() > 0);
    let drafts = &proxy.status().await["drafts"];
    let agreement = |number: usize| drafts[number]["outlook"]["agreement"].as_f64();
    assert!(agreement(0).unwrap_or_default() < 0.1, "{drafts}");
    assert!(agreement(1).is_none(), "{drafts}");
    assert!(agreement(2).is_some_and(|agreement| agreement > 0.3), "{drafts}");
}

#[tokio::test]
async fn a_drafter_that_sees_the_end_everywhere_does_not_end_an_answer() {
    let stage = stage().await;
    let draft = FakeDrafter::ends_at_once(&stage.draft).await;
    let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
    answers_are_right_with(&stage.target, &proxy).await;
    assert!(draft.asked() > 0);
}

#[tokio::test]
async fn a_drafter_that_never_answers_is_not_waited_for() {
    let stage = stage().await;
    let draft = FakeDrafter::hangs(&stage.draft).await;
    let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
    answers_are_right_with(&stage.target, &proxy).await;
    assert!(draft.asked() > 0);
}

#[tokio::test]
async fn a_drafter_that_falls_silent_after_two_tokens_is_not_waited_for() {
    let stage = stage().await;
    let draft = FakeDrafter::stalls(&stage.draft).await;
    let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
    answers_are_right_with(&stage.target, &proxy).await;
    assert!(draft.asked() > 0);
}

#[tokio::test]
async fn a_draft_that_came_to_its_end_leaves_its_connection_to_the_next() {
    let stage = stage().await;
    let draft = FakeDrafter::nonsense(&stage.draft).await;
    let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
    answers_are_right_with(&stage.target, &proxy).await;
    let given_up = draft.server.left();
    let (asked, connections) = draft.server.on_connections("/completion");
    // Others ask for health and the like at the same time, and answers that are seldom asked for find theirs closed.
    assert!(
        connections <= given_up + asked / 4 + 3,
        "{asked} drafts, {given_up} given up, on {connections} connections"
    );
}

/// To take in each token by itself costs the proxy more than all else that it does.
#[tokio::test]
async fn a_draft_that_is_there_long_before_the_targets_step_ends_comes_in_one_piece() {
    let stage = stage().await;
    let draft = FakeDrafter::remembering(&stage.draft).await;
    let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
    let body = with(chat("Explain recursion.", 80), greedy());
    for _ in 0..12 {
        same(&stage.target, &proxy, CHAT, &body).await;
        if draft.requests().iter().any(|request| !request.stream) {
            return;
        }
    }
    panic!("none of {} drafts", draft.asked());
}

#[tokio::test]
async fn a_drafter_that_errs_or_breaks_off_is_left_alone_and_costs_nothing() {
    let stage = stage().await;
    for draft in [
        FakeDrafter::errs(&stage.draft).await,
        FakeDrafter::breaks_off(&stage.draft).await,
    ] {
        let proxy = Proxy::drafting(stage.target.url(), &draft.url()).await;
        answers_are_right_with(&stage.target, &proxy).await;
        let asked = draft.asked();
        assert!((1..100).contains(&asked), "asked {asked} times");
    }
}

#[tokio::test]
async fn a_drafter_that_takes_connections_and_says_nothing_keeps_nobody_waiting() {
    let stage = stage().await;
    for draft in [FakeDrafter::deaf().await, FakeDrafter::secretive(&stage.draft).await] {
        let proxy = Proxy::start(stage.target.url(), Some(&draft.url())).await;
        proxy
            .shows("that the target is up", Duration::from_secs(3), |status| {
                status["target"]["healthy"] == true && status["verification"] == "attached"
            })
            .await;
        proxy.settles().await;
        answers_are_right_with(&stage.target, &proxy).await;
        assert_eq!(draft.asked(), 0);
    }
}

#[tokio::test]
async fn a_drafter_with_another_vocabulary_drafts_as_text() {
    let draft = start_draft("tightwad-tiny-draft-othervocab-f16.gguf").await;
    let stage = stage().await;
    let proxy = Proxy::drafting(stage.target.url(), draft.url()).await;
    let status = proxy.status().await;
    let problem = status["drafts"][0]["problem"].as_str().expect("what is odd about it");
    for words in ["drafts as text", "2048 tokens", "4096 tokens", "family"] {
        assert!(problem.contains(words), "{problem}");
    }
    answers_are_right_with(&stage.target, &proxy).await;
    assert!(draft.generated().await > 0);
}

#[tokio::test]
async fn without_a_drafter_the_answers_are_right_too() {
    let stage = stage().await;
    let proxy = Proxy::start(stage.target.url(), None).await;
    let status = proxy
        .shows("the target", Duration::from_secs(20), |status| {
            status["target"]["healthy"] == true
        })
        .await;
    assert!(status["drafts"] == serde_json::json!([]), "{status}");
    assert!(
        status["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("no drafter")),
        "{status}"
    );
    proxy.settles().await;
    answers_are_right_with(&stage.target, &proxy).await;
}

/// An answer that takes a second or more.
fn long(stream: bool) -> Value {
    with(
        json!({ "prompt": "Once upon a time", "n_predict": 250, "ignore_eos": true, "stream": stream }),
        greedy(),
    )
}

/// The data of a stream as it comes.
struct Streaming {
    id: String,
    bytes: futures_util::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    text: String,
}

impl Streaming {
    async fn begin(proxy: &Proxy, path: &str, body: &Value) -> Self {
        let (id, request) = proxy.request(path, body);
        let answer = request.send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
        Self {
            id,
            bytes: answer.bytes_stream().boxed(),
            text: String::new(),
        }
    }

    fn events(&self) -> Vec<Value> {
        let Value::Array(events) = crate::harness::llama_server::events(&self.text) else {
            panic!("no events: {}", self.text)
        };
        events
    }

    /// Reads until there are so many events.
    async fn read(&mut self, events: usize) {
        while self.events().len() < events {
            let bytes = self.bytes.next().await.expect("it goes on").expect("it holds");
            self.text.push_str(std::str::from_utf8(&bytes).expect("UTF-8"));
        }
    }

    async fn read_all(&mut self) {
        while let Some(bytes) = self.bytes.next().await {
            self.text
                .push_str(std::str::from_utf8(&bytes.expect("it holds")).expect("UTF-8"));
        }
    }
}

/// Asks until the drafter is used and drafts are accepted; all answers until then must be right as well.
async fn is_drafted_again(target: &LlamaServer, draft: &LlamaServer, proxy: &Proxy, within: Duration) {
    let body = with(chat("Explain recursion.", 60), greedy());
    let plain = target.post(CHAT, &body).await;
    let before = draft.generated().await;
    let drafted = eventually(within, || async {
        let (answer, record) = proxy.post(CHAT, &body).await;
        is_the_targets_own(&body, answer, &plain, &record);
        if record.accepted > 0 && draft.generated().await > before {
            Ok(())
        } else {
            Err(record)
        }
    });
    if let Err(record) = drafted.await {
        panic!("not drafted again within {within:?}: {record:?}");
    }
}

#[tokio::test]
async fn a_drafter_that_dies_in_mid_answer_is_not_missed_and_drafts_again_when_it_is_back() {
    let stage = stage().await;
    let plain = stage.target.post("/completion", &long(true)).await;
    let port = free_port();
    let name = model("tightwad-tiny-draft-f16.gguf");
    let draft = LlamaServer::start_at(port, &name, &DRAFT).await;
    let proxy = Proxy::drafting(stage.target.url(), draft.url()).await;

    let mut streaming = Streaming::begin(&proxy, "/completion", &long(true)).await;
    streaming.read(60).await;
    drop(draft);
    streaming.read_all().await;
    let record = proxy.record(&streaming.id).await;
    assert_eq!(record.outcome, "finished");
    assert!(record.accepted > 0, "{record:?}");
    is_the_targets_own(&long(true), Value::Array(streaming.events()), &plain, &record);

    proxy
        .shows("that the drafter is down", Duration::from_secs(5), |status| {
            status["drafts"][0]["healthy"] == false
        })
        .await;
    answers_are_right_with(&stage.target, &proxy).await;

    let draft = LlamaServer::start_at(port, &name, &DRAFT).await;
    is_drafted_again(&stage.target, &draft, &proxy, Duration::from_secs(5)).await;
}

// What the clients do

#[tokio::test]
async fn ten_clients_that_vanish_in_mid_stream_leave_both_servers_idle_within_a_second() {
    let slots = ["-np", "10", "-c", "5120", "--threads-http", "40", "--metrics"];
    let args = [&TARGET[..], &slots].concat();
    let name = model("tightwad-tiny-draft-f16.gguf");
    let (target, draft) = tokio::join!(LlamaServer::far_target(&args), LlamaServer::start(&name, &slots));
    let proxy = Proxy::drafting(target.url(), draft.url()).await;

    let begin = |i: usize| {
        let body = with(
            long(true),
            json!({ "prompt": format!("Story {i}: Once upon a time"), "n_predict": 450 }),
        );
        let proxy = &proxy;
        async move {
            let mut streaming = Streaming::begin(proxy, "/completion", &body).await;
            streaming.read(40).await;
            streaming
        }
    };
    // The first one is drafted for, before there is a crowd.
    let mut clients = vec![begin(0).await];
    clients.extend(join_all((1..10).map(begin)).await);
    assert_eq!(proxy.status().await["in_flight"], 10);
    assert_eq!(target.busy_slots().await, 10);

    let before = target.generated().await;
    drop(clients);
    let gone = Instant::now();
    let idle = eventually(Duration::from_secs(1), || async {
        let in_flight = proxy.status().await["in_flight"].clone();
        let busy = (target.busy_slots().await, draft.busy_slots().await, in_flight);
        if busy == (0, 0, json!(0)) { Ok(()) } else { Err(busy) }
    });
    if let Err(busy) = idle.await {
        panic!("busy slots of target and drafter, requests in flight: {busy:?}");
    }
    assert!(gone.elapsed() < Duration::from_millis(1500), "{:?}", gone.elapsed());
    // They did not just come to their ends.
    let generated = target.generated().await - before;
    assert!(generated < 10 * 450 / 2, "{generated} tokens were generated");
    assert!(target.is_alive() && draft.is_alive());
    let status = proxy.status().await;
    let outcomes: Vec<_> = status["requests"]
        .as_array()
        .expect("requests")
        .iter()
        .map(|it| &it["outcome"])
        .collect();
    assert_eq!(outcomes, ["cancelled"; 10]);
    assert!(
        status["counts"]["accepted"].as_u64() > Some(0),
        "nothing was drafted: {status:#}"
    );
    is_drafted_again(&target, &draft, &proxy, Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_client_that_vanishes_frees_the_drafter_though_the_target_says_nothing() {
    let (target, real) = tokio::join!(start_target(), start_draft("tightwad-tiny-draft-f16.gguf"));
    let draft = FakeDrafter::hangs(&real).await;
    let proxy = Proxy::drafting(target.url(), &draft.url()).await;
    let mut client = Streaming::begin(&proxy, "/completion", &with(long(true), json!({ "n_predict": 450 }))).await;
    client.read(5).await;
    // Stopped while a stream of the drafter is open: nobody but the client can end it for some seconds.
    let stopped = eventually(Duration::from_secs(10), || async {
        target.signal(Signal::STOP);
        let one = eventually(Duration::from_millis(300), || async {
            (draft.unended() == 1).then_some(()).ok_or(())
        });
        let one = one.await;
        if one.is_err() {
            target.signal(Signal::CONT);
        }
        one
    });
    stopped.await.expect("a draft is asked for");

    drop(client);
    let freed = eventually(Duration::from_secs(1), || async {
        match draft.unended() {
            0 => Ok(()),
            unended => Err(unended),
        }
    });
    let freed = freed.await;
    target.signal(Signal::CONT);
    assert_eq!(freed, Ok(()), "drafts are still asked for");
    let idle = eventually(Duration::from_secs(2), || async {
        match target.busy_slots().await {
            0 => Ok(()),
            busy => Err(busy),
        }
    });
    assert_eq!(idle.await, Ok(()), "slots of the target are still busy");
}

// What the target does

#[tokio::test]
async fn a_target_that_cannot_verify_is_passed_through_and_the_status_says_why() {
    let draft = start_draft("tightwad-tiny-draft-f16.gguf").await;
    let stock = LlamaServer::start(&target(), &["-np", "2"]).await;
    let proxy = Proxy::start(stock.url(), Some(draft.url())).await;
    let status = proxy
        .shows("the target", Duration::from_secs(20), |status| {
            status["target"]["healthy"] == true
        })
        .await;
    assert_eq!(status["verification"], "none");
    let reason = status["reason"].as_str().expect("a reason");
    assert!(reason.contains("--spec-draft-external-max"), "{reason}");
    for stream in [false, true] {
        let body = with(
            with(chat("Explain recursion.", 40), sampled()),
            json!({ "stream": stream }),
        );
        let (_, record) = same(&stock, &proxy, CHAT, &body).await;
        assert_eq!((record.steps, record.drafted), (0, 0), "{record:?}");
    }
}

#[tokio::test]
async fn a_target_that_comes_late_or_dies_is_drafted_for_when_it_is_there() {
    let draft = start_draft("tightwad-tiny-draft-f16.gguf").await;
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    let proxy = Proxy::start(&url, Some(draft.url())).await;
    let body = with(chat("Explain recursion.", 60), greedy());

    let (_, request) = proxy.request(CHAT, &body);
    let refused = request.send().await.expect("an answer");
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    let message: Value = refused.json().await.expect("JSON");
    assert_eq!(message["error"]["code"], "target_unreachable", "{message}");

    let target = LlamaServer::far_target_at(port, &TARGET).await;
    is_drafted_again(&target, &draft, &proxy, Duration::from_secs(5)).await;

    let mut streaming = Streaming::begin(&proxy, "/completion", &long(true)).await;
    streaming.read(20).await;
    drop(target);
    streaming.read_all().await;
    let events = streaming.events();
    let error = &events.last().expect("events")["error"];
    assert_eq!(error["code"], "target_broke_off", "{error}");
    assert_eq!(proxy.record(&streaming.id).await.outcome, "failed");
    let (_, request) = proxy.request(CHAT, &body);
    assert_eq!(request.send().await.expect("an answer").status(), 503);

    let target = LlamaServer::far_target_at(port, &TARGET).await;
    is_drafted_again(&target, &draft, &proxy, Duration::from_secs(5)).await;
}
