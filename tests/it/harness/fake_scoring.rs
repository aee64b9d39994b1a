//! Servers that score prompts, scripted after the sources of vLLM and SGLang (see `src/upstream/vllm.rs`, `sglang.rs`),
//! with a model whose tokens are bytes: so that characters are split.

use std::collections::HashSet;
use std::sync::Mutex;

use serde_json::{Value, json};

use super::fake_drafter::draft;
use super::fake_upstream::{Act, FakeUpstream, Seen, chunk, json as whole, stream_head, wait};

/// What the model answers to every chat.
pub const STORY: &str =
    "Grüße aus Köln 🦊! The quick fox says the quick fox says: x < y [1]. Grüße aus Köln 🦊! Goodbye.";

/// Tokens beyond the bytes.
const END: i64 = 256;
const USER: i64 = 257;
const ASSISTANT: i64 = 258;
/// Tokens of a block of vLLM's cache.
const BLOCK: usize = 16;
/// Milliseconds of a step, however many draft tokens it scores.
const STEP: u64 = 4;
/// Tokens that a prompt and its answer may have.
const MAX_MODEL_LEN: usize = 2000;

pub fn encode(text: &str) -> Vec<i64> {
    text.bytes().map(i64::from).collect()
}

fn of_messages(messages: &Value) -> Vec<i64> {
    let mut tokens = Vec::new();
    for message in messages.as_array().expect("messages") {
        tokens.push(USER);
        tokens.extend(encode(message["content"].as_str().expect("a text")));
    }
    tokens.push(ASSISTANT);
    tokens
}

fn decode(tokens: &[i64], specials: bool) -> String {
    let mut bytes = Vec::new();
    for token in tokens {
        match u8::try_from(*token) {
            Ok(byte) => bytes.push(byte),
            Err(_) if specials => bytes.extend_from_slice(if *token == END { b"<|im_end|>" } else { b"<|role|>" }),
            Err(_) => {}
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The model's greedy choice.
fn next(text: &[i64]) -> i64 {
    if let Some(start) = text.iter().rposition(|token| *token == ASSISTANT) {
        let story = encode(STORY);
        let said = &text[start + 1..];
        return if story.starts_with(said) {
            story.get(said.len()).copied().unwrap_or(END)
        } else {
            i64::from(b'?')
        };
    }
    // It goes on as it did before.
    let tail = &text[text.len().saturating_sub(6)..];
    let before = (tail.len()..text.len()).rev().find(|end| text[..*end].ends_with(tail));
    before.map_or(i64::from(b'.'), |end| text[end])
}

fn generate(prompt: &[i64], n: usize) -> (Vec<i64>, &'static str) {
    let mut text = prompt.to_vec();
    for _ in 0..n {
        text.push(next(&text));
        if text.last() == Some(&END) {
            return (text[prompt.len()..].to_vec(), "stop");
        }
    }
    (text[prompt.len()..].to_vec(), "length")
}

fn ids(value: &Value) -> Vec<i64> {
    let ids = value.as_array().unwrap_or_else(|| panic!("token ids, not {value}"));
    ids.iter().map(|id| id.as_i64().expect("an id")).collect()
}

/// How a fake differs from the real one at its best.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent faults")]
pub struct Quirks {
    /// vLLM without `/inference/v1/generate`; SGLang whose `/tokenize` takes no messages.
    pub old: bool,
    /// No row is told.
    pub rowless: bool,
    /// None after the trial.
    pub rowless_later: bool,
    /// Completions are bent by a default of the model, as by a repetition penalty.
    pub bent: bool,
    /// The answers that are asked for from this one on (counted from 1, those of the trial included) fail.
    pub fails_from: Option<usize>,
}

impl Quirks {
    /// How it is in the round that is asked for just now.
    fn in_round(self, asked: &Mutex<usize>) -> Self {
        let tried = *asked.lock().expect("no panic before") > 4;
        Self {
            rowless: self.rowless || (self.rowless_later && tried),
            ..self
        }
    }
}

/// A vLLM.
pub async fn vllm(quirks: Quirks) -> FakeUpstream {
    let cache: Mutex<HashSet<(String, Vec<i64>)>> = Mutex::default();
    let asked = Mutex::new(0_usize);
    FakeUpstream::start(move |seen| {
        let body = body(seen);
        match seen.target.as_str() {
            "/v1/models" => answer(&json!({ "object": "list", "data": [
                { "id": "fake", "root": "fake", "parent": null }, { "id": "adapted", "root": "a", "parent": "fake" },
            ] })),
            "/tokenize" => {
                let tokens = prompt(&body);
                let count = tokens.len();
                answer(&json!({ "count": count, "max_model_len": MAX_MODEL_LEN, "tokens": tokens, "token_strs": null }))
            }
            "/detokenize" => answer(&json!({ "prompt": decode(&ids(&body["tokens"]), true) })),
            "/inference/v1/generate" if quirks.old => not_found(),
            "/inference/v1/generate" => {
                if is_over(&asked, quirks) {
                    return internal_error();
                }
                let tokens = ids(&body["token_ids"]);
                let sampling = &body["sampling_params"];
                assert_eq!(sampling["temperature"], 0, "greedy is asked for");
                let salt = body["cache_salt"].as_str().unwrap_or_default().to_owned();
                let n = usize::try_from(sampling["max_tokens"].as_u64().expect("max_tokens")).expect("small");
                let (generated, finish) = generate(&tokens, n);
                let mut cache = cache.lock().expect("no panic before");
                let cached = (1..=tokens.len() / BLOCK)
                    .take_while(|n| cache.contains(&(salt.clone(), tokens[..n * BLOCK].to_vec())))
                    .count();
                let rows = (!sampling["prompt_logprobs"].is_null())
                    .then(|| rows(&tokens, cached * BLOCK, quirks.in_round(&asked)));
                // The last token that was generated has not been computed.
                let computed = [&tokens[..], &generated[..generated.len() - 1]].concat();
                cache.extend((1..=computed.len() / BLOCK).map(|n| (salt.clone(), computed[..n * BLOCK].to_vec())));
                let choice = json!({ "index": 0, "logprobs": null, "finish_reason": finish, "token_ids": generated });
                after(
                    generated.len(),
                    &json!({
                        "request_id": "generate-tokens-1", "choices": [choice], "prompt_logprobs": rows,
                        "kv_transfer_params": null,
                    }),
                )
            }
            "/v1/completions" => {
                if is_over(&asked, quirks) {
                    return internal_error();
                }
                let rows =
                    (!body["prompt_logprobs"].is_null()).then(|| rows(&prompt(&body), 0, quirks.in_round(&asked)));
                completion(&body, rows.as_ref(), quirks)
            }
            "/v1/chat/completions" => chat_completion(&body),
            _ => not_found(),
        }
    })
    .await
}

/// An SGLang.
pub async fn sglang(quirks: Quirks) -> FakeUpstream {
    let asked = Mutex::new(0_usize);
    FakeUpstream::start(move |seen| {
        let body = body(seen);
        match seen.target.as_str() {
            "/v1/models" => whole("200 OK", r#"{"object":"list","data":[{"id":"fake"}]}"#),
            "/tokenize" if quirks.old && body["prompt"].is_null() => {
                whole("422 Unprocessable Entity", r#"{"detail":[{"loc":["body","prompt"],"msg":"Field required"}]}"#)
            }
            "/tokenize" => {
                let tokens = prompt(&body);
                let count = tokens.len();
                answer(&json!({ "tokens": tokens, "count": count, "max_model_len": 1_000_000 }))
            }
            "/detokenize" => answer(&json!({ "text": decode(&ids(&body["tokens"]), false) })),
            "/generate" => {
                if is_over(&asked, quirks) {
                    return internal_error();
                }
                let tokens = ids(&body["input_ids"]);
                let sampling = &body["sampling_params"];
                assert_eq!(sampling["temperature"], 0, "greedy is asked for");
                let n = usize::try_from(sampling["max_new_tokens"].as_u64().expect("max_new_tokens")).expect("small");
                let (generated, finish) = generate(&tokens, n);
                let reason = if finish == "stop" {
                    json!({ "type": "stop", "matched": END })
                } else {
                    json!({ "type": "length", "length": n })
                };
                let mut meta = json!({
                    "id": "1", "finish_reason": reason, "prompt_tokens": tokens.len(), "completion_tokens": generated.len(),
                    "output_token_logprobs": generated.iter().map(|id| json!([-0.1, id, null])).collect::<Vec<_>>(),
                });
                if let Some(start) = body["logprob_start_len"].as_u64() {
                    let start = usize::try_from(start).expect("small");
                    meta["input_token_logprobs"] = (start..tokens.len())
                        .map(|i| json!([if i == start { Value::Null } else { json!(-1.0) }, tokens[i], null]))
                        .collect();
                    meta["input_top_logprobs"] = (start..tokens.len())
                        .map(|i| {
                            let known = i > start && !quirks.rowless;
                            if known { json!([[-0.1, next(&tokens[..i]), null]]) } else { Value::Null }
                        })
                        .collect();
                }
                after(generated.len(), &json!({ "text": decode(&generated, false), "output_ids": generated, "meta_info": meta }))
            }
            "/v1/completions" => completion(&body, None, quirks),
            "/v1/chat/completions" => chat_completion(&body),
            _ => not_found(),
        }
    })
    .await
}

/// A llama-server with the same vocabulary and nearly the same model: every tenth token of a draft is wrong.
pub async fn drafter() -> FakeUpstream {
    FakeUpstream::start(|seen| {
        let body = body(seen);
        match seen.target.as_str() {
            "/health" => whole("200 OK", r#"{"status":"ok"}"#),
            "/props" => whole(
                "200 OK",
                r#"{"total_slots":4,"model_alias":"small","model_path":"s","build_info":"b1"}"#,
            ),
            "/tokenize" => answer(&json!({ "tokens": encode(body["content"].as_str().expect("a text")) })),
            "/completion" => {
                let prompt = ids(&body["prompt"]);
                let n = usize::try_from(body["n_predict"].as_u64().expect("n_predict")).expect("small");
                let (tokens, finish) = generate(&prompt, n);
                let drafted: Vec<u32> = tokens
                    .iter()
                    .filter(|token| **token != END)
                    .enumerate()
                    .map(|(i, token)| {
                        if (prompt.len() + i).is_multiple_of(10) {
                            120
                        } else {
                            u32::try_from(*token).expect("an id")
                        }
                    })
                    .collect();
                let request = serde_json::from_value(body).expect("a request for a draft");
                draft(&request, &drafted, if finish == "stop" { "eos" } else { "limit" })
            }
            _ => not_found(),
        }
    })
    .await
}

fn body(seen: &Seen) -> Value {
    serde_json::from_slice(&seen.body).unwrap_or_default()
}

fn prompt(body: &Value) -> Vec<i64> {
    match (&body["messages"], &body["prompt"]) {
        (Value::Null, Value::String(text)) => encode(text),
        (Value::Null, tokens) => ids(tokens),
        (messages, _) => of_messages(messages),
    }
}

fn is_over(asked: &Mutex<usize>, quirks: Quirks) -> bool {
    let mut asked = asked.lock().expect("no panic before");
    *asked += 1;
    quirks.fails_from.is_some_and(|first| *asked >= first)
}

/// `prompt_logprobs` of vLLM, with what lay in memory in the rows that were cached.
fn rows(tokens: &[i64], cached: usize, quirks: Quirks) -> Vec<Value> {
    let row = |i: usize| {
        if i == 0 || quirks.rowless {
            return Value::Null;
        }
        let entry = |id: i64, rank: u64| {
            (
                id.to_string(),
                json!({ "logprob": -0.5, "rank": rank, "decoded_token": "x" }),
            )
        };
        // Of all that may lie there the worst: whatever stands in the prompt is right.
        if i < cached {
            return Value::Object([entry(tokens[i], 1)].into_iter().collect());
        }
        let best = next(&tokens[..i]);
        Value::Object([entry(tokens[i], 7), entry(best, 1)].into_iter().collect())
    };
    (0..tokens.len()).map(row).collect()
}

fn completion(body: &Value, rows: Option<&Vec<Value>>, quirks: Quirks) -> Vec<Act> {
    let prompt = prompt(body);
    let n = body["max_tokens"].as_u64().unwrap_or(16);
    let (mut generated, finish) = generate(&prompt, usize::try_from(n).expect("small"));
    if quirks.bent {
        generated[0] = i64::from(b'!');
    }
    let text = decode(&generated, false);
    let mut choice = json!({
        "index": 0, "text": text, "logprobs": null, "finish_reason": finish, "stop_reason": null, "prompt_logprobs": rows,
    });
    if body["return_token_ids"] == true {
        choice["token_ids"] = json!(generated);
    }
    let usage = json!({ "prompt_tokens": prompt.len(), "completion_tokens": generated.len() });
    after(
        generated.len(),
        &json!({ "id": "cmpl-1", "object": "text_completion", "model": "fake", "choices": [choice], "usage": usage }),
    )
}

/// A stream tells what the model says; a whole answer says instead that it was not made in rounds.
fn chat_completion(body: &Value) -> Vec<Act> {
    if body["stream"] == true {
        return chat_stream(body);
    }
    let message = json!({ "role": "assistant", "content": "by the server itself" });
    let choice = json!({ "index": 0, "message": message, "finish_reason": "stop" });
    answer(&json!({ "id": "chatcmpl-1", "object": "chat.completion", "model": "fake", "choices": [choice] }))
}

fn chat_stream(body: &Value) -> Vec<Act> {
    let prompt = prompt(body);
    let n = body["max_tokens"].as_u64().expect("max_tokens");
    let (generated, finish) = generate(&prompt, usize::try_from(n).expect("small"));
    let text = decode(&generated, false);
    let event = |choices: Value, usage: Value| {
        let event = json!({
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "fake", "choices": choices, "usage": usage,
        });
        chunk(format!("data: {event}\n\n"))
    };
    let choice = |delta: Value, finish: Value| json!([{ "index": 0, "delta": delta, "finish_reason": finish }]);
    vec![
        stream_head(),
        event(
            choice(json!({ "role": "assistant", "content": "" }), Value::Null),
            Value::Null,
        ),
        wait(STEP * generated.len() as u64),
        event(choice(json!({ "content": text }), Value::Null), Value::Null),
        event(choice(json!({}), json!(finish)), Value::Null),
        event(
            json!([]),
            json!({ "prompt_tokens": prompt.len(), "completion_tokens": generated.len() }),
        ),
        chunk("data: [DONE]\n\n"),
        Act::EndChunks,
    ]
}

fn answer(body: &Value) -> Vec<Act> {
    whole("200 OK", &body.to_string())
}

/// The answer after so many steps.
fn after(steps: usize, body: &Value) -> Vec<Act> {
    let mut acts = vec![wait(STEP * steps as u64)];
    acts.extend(answer(body));
    acts
}

fn not_found() -> Vec<Act> {
    whole("404 Not Found", r#"{"detail":"Not Found"}"#)
}

fn internal_error() -> Vec<Act> {
    whole(
        "500 Internal Server Error",
        r#"{"error":{"message":"out of memory","type":"InternalServerError","code":500}}"#,
    )
}
