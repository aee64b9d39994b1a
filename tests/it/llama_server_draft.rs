//! The patched llama-server: an external drafter makes a completion faster and cannot change it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::drafter::{Drafter, Followed, drafted, new_key, perfect, wrong_at_every};
use crate::harness::llama_server::{LlamaServer, essence, target};
use crate::harness::random_model;
use crate::harness::request::with;
use serde_json::{Value, json};

const EXTERNAL: [&str; 4] = ["--spec-draft-external-max", "8", "-np", "1"];

async fn server() -> LlamaServer {
    LlamaServer::start(&target(), &EXTERNAL).await
}

async fn server_with(args: &[&str]) -> LlamaServer {
    LlamaServer::start(&target(), &[&EXTERNAL, args].concat()).await
}

/// A greedy completion without the prompt cache, so that every run begins alike.
fn completion(prompt: &str, n_predict: u32) -> Value {
    json!({
        "prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": false, "return_tokens": true,
    })
}

/// Prompt and answer of a completion that nobody drafts for, in tokens.
async fn text_of(server: &LlamaServer, path: &str, body: &Value) -> Vec<i32> {
    let (_, followed) = drafted(server, path, body, |_| Vec::new()).await;
    assert_eq!(followed.last.n_drafted, 0);
    followed.committed
}

/// Run `body` plain, then with a perfect drafter, then with one that errs: all answers must be the same. What the perfect
/// drafter saw is returned.
async fn assert_same(server: &LlamaServer, path: &str, body: &Value) -> Followed {
    let plain = server.post(path, body).await;
    let text = text_of(server, path, body).await;

    let (answer, perfectly) = drafted(server, path, body, perfect(&text, 8)).await;
    assert_eq!(essence(answer), essence(plain.clone()), "with a perfect drafter");
    assert_eq!(perfectly.committed, text);
    assert_eq!(perfectly.last.n_accepted, perfectly.last.n_drafted);
    assert!(
        perfectly.last.n_accepted > 0,
        "nothing was drafted: {:?}",
        perfectly.last
    );

    let (answer, badly) = drafted(server, path, body, wrong_at_every(5, &text, 8)).await;
    assert_eq!(essence(answer), essence(plain), "with a drafter that errs");
    assert_eq!(badly.committed, text);
    assert!(badly.last.n_accepted > 0, "nothing was accepted: {:?}", badly.last);
    assert!(
        badly.last.n_accepted < badly.last.n_drafted,
        "nothing was rejected: {:?}",
        badly.last
    );

    perfectly
}

#[tokio::test]
async fn a_streamed_answer_leaves_its_connection_to_the_next_request() {
    let server = server().await;
    let body = with(completion("Once upon a time", 5), json!({ "stream": true })).to_string();
    let request = format!(
        "POST /completion HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(server.url().trim_start_matches("http://")).expect("a connection");
    connection
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    for _ in 0..3 {
        connection.write_all(request.as_bytes()).expect("it is open");
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while !answer.ends_with(b"\r\n0\r\n\r\n") {
            let n = connection.read(&mut buffer).expect("an answer");
            assert!(n > 0, "closed after {}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&buffer[..n]);
        }
    }
}

#[tokio::test]
async fn a_perfect_drafter_saves_most_passes_and_does_not_change_the_answer() {
    let server = server().await;
    let body = completion("Once upon a time", 60);
    let followed = assert_same(&server, "/completion", &body).await;
    // 8 at best: the first token comes from the prompt, then up to 9 of a pass; some pass before the drafter is there
    assert!((8..20).contains(&followed.last.n_steps), "{:?}", followed.last);
    assert_eq!(followed.last.n_accepted, 60 - followed.last.n_steps);
    assert_eq!(followed.last.n_prompt, server.tokenize("Once upon a time").await.len());
    assert_eq!(followed.committed.len(), followed.last.n_prompt + 60);
}

#[tokio::test]
async fn sampling_with_a_seed_gives_the_same_answer_with_and_without_a_drafter() {
    let server = server().await;
    for more in [
        json!({ "temperature": 1.0, "seed": 7 }),
        json!({ "temperature": 0.8, "seed": 8, "top_k": 20, "repeat_penalty": 1.3, "dry_multiplier": 0.8 }),
        json!({ "temperature": 1.5, "seed": 9, "mirostat": 2 }),
    ] {
        let body = with(completion("Once upon a time", 60), more);
        assert_same(&server, "/completion", &body).await;
    }
}

#[tokio::test]
async fn log_probabilities_of_accepted_tokens_are_those_of_an_undrafted_run() {
    let server = server().await;
    for more in [
        json!({ "n_probs": 3 }),
        json!({ "n_probs": 3, "temperature": 1.0, "seed": 7 }),
        json!({ "n_probs": 3, "temperature": 1.0, "seed": 7, "post_sampling_probs": true }),
        json!({ "n_probs": 2, "stream": true }),
    ] {
        let body = with(completion("Once upon a time", 40), more);
        assert_same(&server, "/completion", &body).await;
    }
    let chat = json!({
        "messages": [{ "role": "user", "content": "Write a short story about a dog." }],
        "max_tokens": 40, "temperature": 0, "cache_prompt": false, "logprobs": true, "top_logprobs": 2,
    });
    assert_same(&server, "/v1/chat/completions", &chat).await;
    let legacy = json!({ "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "cache_prompt": false, "logprobs": 2 });
    assert_same(&server, "/v1/completions", &legacy).await;
}

#[tokio::test]
async fn every_completion_endpoint_can_be_drafted_for_streamed_or_not() {
    let server = server().await;
    let messages = json!([{ "role": "user", "content": "Count from 1 to 10." }]);
    for stream in [false, true] {
        for (path, body) in [
            (
                "/v1/completions",
                json!({ "prompt": "Once upon a time", "max_tokens": 30 }),
            ),
            (
                "/v1/chat/completions",
                json!({ "messages": messages, "max_tokens": 30 }),
            ),
            (
                "/v1/responses",
                json!({ "input": "Count from 1 to 10.", "max_output_tokens": 30 }),
            ),
            ("/v1/messages", json!({ "messages": messages, "max_tokens": 30 })),
        ] {
            let body = with(
                body,
                json!({ "stream": stream, "temperature": 0, "cache_prompt": false }),
            );
            assert_same(&server, path, &body).await;
        }
    }
}

#[tokio::test]
async fn grammars_schemas_and_tools_constrain_drafted_tokens_too() {
    let server = server().await;
    let schema = json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 20 }, "age": { "type": "integer", "maximum": 99 } },
        "required": ["name", "age"],
    });
    let body = with(completion("A person: ", 60), json!({ "json_schema": schema }));
    assert_same(&server, "/completion", &body).await;

    let body = with(
        completion("Numbers: ", 40),
        json!({ "grammar": "root ::= (\"one\" | \"two\" | \"three\") (\", \" root)?" }),
    );
    assert_same(&server, "/completion", &body).await;

    let body = json!({
        "messages": [{ "role": "user", "content": "What is the weather in Paris?" }],
        "tools": [{ "type": "function", "function": {
            "name": "weather", "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] },
        } }],
        "tool_choice": "required", "max_tokens": 60, "temperature": 0, "cache_prompt": false,
    });
    assert_same(&server, "/v1/chat/completions", &body).await;
}

#[tokio::test]
async fn an_answer_ends_where_it_would_have_ended_in_the_middle_of_a_draft() {
    let server = server().await;
    let body = completion("Once upon a time", 60);
    let long = text_of(&server, "/completion", &body).await;
    let plain = server.post("/completion", &body).await;
    let content = plain["content"].as_str().expect("a text");

    // a stop string that begins within a word somewhere in the text; the drafter would go on
    let stop: String = content.chars().skip(40).take(6).collect();
    let body = with(body, json!({ "stop": [stop] }));
    let plain = server.post("/completion", &body).await;
    assert_eq!(plain["stop_type"], "word");
    let (answer, followed) = drafted(&server, "/completion", &body, perfect(&long, 8)).await;
    assert_eq!(essence(answer), essence(plain.clone()));
    assert!(followed.last.n_accepted > 0);
    let n_generated = plain["tokens"].as_array().expect("tokens").len();
    assert_eq!(
        followed.committed.len() - followed.last.n_prompt,
        n_generated,
        "no token after the stop is committed"
    );

    // n_predict
    for n_predict in [1, 2, 3, 9, 10, 11] {
        let body = completion("Once upon a time", n_predict);
        let plain = server.post("/completion", &body).await;
        let (answer, followed) = drafted(&server, "/completion", &body, perfect(&long, 8)).await;
        assert_eq!(essence(answer), essence(plain), "n_predict {n_predict}");
        assert_eq!(followed.committed.len() - followed.last.n_prompt, n_predict as usize);
    }

    // the end of generation, drafted, with more after it
    let chat = json!({
        "messages": [{ "role": "user", "content": "What is the capital of France?" }],
        "temperature": 0, "cache_prompt": false,
    });
    let plain = server.post("/v1/chat/completions", &chat).await;
    assert_eq!(plain["choices"][0]["finish_reason"], "stop");
    let text = text_of(&server, "/v1/chat/completions", &chat).await;
    let beyond = [&text[..], &[1000; 20]].concat();
    let (answer, followed) = drafted(&server, "/v1/chat/completions", &chat, perfect(&beyond, 8)).await;
    assert_eq!(essence(answer), essence(plain));
    assert_eq!(followed.committed, text);
    assert!(followed.last.n_accepted > 0);
}

#[tokio::test]
async fn an_offer_longer_than_a_step_is_used_up_over_several_steps() {
    let server = server().await;
    let body = completion("Once upon a time", 60);
    let text = text_of(&server, "/completion", &body).await;

    // one offer, before anything is generated; never held
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let (_, followed) = tokio::join!(server.send("/completion", &body, Some(&key)), async {
        // known before the completion is: the offer waits for it
        loop {
            let answer = drafter.call(json!({ "pos": 0, "tokens": text, "wait": true })).await;
            if answer.state != "unknown" {
                break;
            }
        }
        let mut committed = 0;
        loop {
            // a call without tokens leaves the offer as it is
            let answer = drafter.wait(committed).await;
            committed += answer.tokens.len();
            if answer.state == "done" {
                break answer;
            }
        }
    });
    assert_eq!(followed.n_accepted, followed.n_drafted);
    assert!(followed.n_accepted >= 40, "{followed:?}");
    assert!(followed.n_steps < 30, "{followed:?}");
}

#[tokio::test]
async fn an_offer_that_contradicts_the_committed_tokens_is_dropped() {
    let server = server().await;
    let body = completion("Once upon a time", 30);
    let text = text_of(&server, "/completion", &body).await;
    // right from the next token on, but it claims another past
    let (_, followed) = drafted(&server, "/completion", &body, |_| Vec::new()).await;
    let n_prompt = followed.last.n_prompt;

    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let ((status, _), last) = tokio::join!(server.send("/completion", &body, Some(&key)), async {
        let mut committed: Vec<i32> = Vec::new();
        loop {
            let answer = drafter.wait(committed.len()).await;
            committed.extend(&answer.tokens);
            if answer.state == "done" {
                break answer;
            }
            let mut lie = text.clone();
            lie[n_prompt - 1] += 1;
            drafter.call(json!({ "pos": 0, "tokens": lie })).await;
            // a gap between the committed tokens and the offer
            let pos = committed.len() + 2;
            let gap = text.get(pos..).unwrap_or_default();
            drafter
                .call(json!({ "pos": pos, "tokens": gap, "n_min": 1, "hold_us": 1000 }))
                .await;
            drafter.call(json!({ "pos": 0, "tokens": lie })).await;
        }
    });
    assert_eq!(status, 200);
    assert_eq!(last.n_accepted, last.n_drafted, "only what fits is verified: {last:?}");
}

#[tokio::test]
async fn the_prompt_is_known_at_launch_and_the_rest_step_by_step() {
    let server = server().await;
    let body = completion("Once upon a time", 20);
    let text = text_of(&server, "/completion", &body).await;
    let (answer, followed) = drafted(&server, "/completion", &body, perfect(&text, 4)).await;

    let first = &followed.answers[0];
    assert_eq!(first.pos, 0);
    assert!(first.tokens.starts_with(&server.tokenize("Once upon a time").await));
    assert!(["waiting", "running"].contains(&first.state.as_str()), "{first:?}");
    for pair in followed.answers.windows(2) {
        assert_eq!(pair[1].pos, pair[0].pos + pair[0].tokens.len());
    }
    for answer in &followed.answers[1..] {
        assert!(
            answer.step_accepted <= answer.step_n && answer.step_n <= 8,
            "{answer:?}"
        );
        assert!(answer.n_max <= 8, "{answer:?}");
    }
    let full = followed
        .answers
        .iter()
        .find(|answer| answer.step_n == 4)
        .expect("a step of 4 drafted tokens");
    assert_eq!(full.tokens.len(), 5);
    assert_eq!(full.step_accepted, 4);
    assert!(full.step_us > 0);
    // the last tokens are still there for a while after the end, and so are the totals
    let key_gone = Drafter::new(&server, &new_key()).call(json!({})).await;
    assert_eq!(key_gone.state, "unknown");
    assert_eq!(followed.last.state, "done");
    assert_eq!(answer["timings"]["draft_n"], followed.last.n_drafted);
    assert_eq!(answer["timings"]["draft_n_accepted"], followed.last.n_accepted);
    assert_eq!(answer["timings"]["predicted_n"], 20);
}

#[tokio::test]
async fn an_unknown_key_is_waited_for_and_the_wait_is_bounded() {
    let server = server().await;
    let drafter = Drafter::new(&server, &new_key());
    let begin = Instant::now();
    assert_eq!(drafter.call(json!({ "pos": 0 })).await.state, "unknown");
    assert!(begin.elapsed() < Duration::from_millis(500));
    assert_eq!(drafter.wait(0).await.state, "unknown");
    assert!(begin.elapsed() >= Duration::from_secs(2));
    assert!(begin.elapsed() < Duration::from_secs(5));

    // a drafter that is there first
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = completion("Once upon a time", 5);
    let ((status, _), answer) = tokio::join!(
        async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            server.send("/completion", &body, Some(&key)).await
        },
        drafter.wait(0)
    );
    assert_eq!(status, 200);
    assert_ne!(answer.state, "unknown");
    assert!(!answer.tokens.is_empty());
}

#[tokio::test]
async fn a_queued_completion_is_waiting_until_a_slot_is_free() {
    let server = server().await;
    let blocker = completion("Once upon a time", 60);
    let queued = completion("There was a dog", 10);
    let (first_key, second_key) = (new_key(), new_key());
    let (first, second) = (Drafter::new(&server, &first_key), Drafter::new(&server, &second_key));
    let first_has_the_slot = tokio::sync::Notify::new();

    tokio::join!(
        server.send("/completion", &blocker, Some(&first_key)),
        async {
            first_has_the_slot.notified().await;
            server.send("/completion", &queued, Some(&second_key)).await
        },
        async {
            first.attach().await;
            first_has_the_slot.notify_one();
            let begin = Instant::now();
            loop {
                first.hold_on(0).await;
                let answer = second.call(json!({ "pos": 0 })).await;
                if answer.state == "waiting" {
                    assert!(answer.tokens.is_empty(), "{answer:?}");
                    break;
                }
                assert_eq!(answer.state, "unknown");
                assert!(begin.elapsed() < Duration::from_secs(20));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // let go: the held-back call is answered with the prompt when the slot is launched
            first.call(json!({ "n_min": 0 })).await;
            let answer = second.wait(0).await;
            assert!(!answer.tokens.is_empty(), "{answer:?}");
        }
    );
}

#[tokio::test]
async fn a_completion_that_cannot_be_drafted_for_says_why() {
    let server = server_with(&["-np", "2"]).await;
    let several = with(completion("Once", 5), json!({ "n": 2 }));
    let prompts = with(completion("Once", 5), json!({ "prompt": ["Once", "Twice"] }));
    for body in [several, prompts] {
        let (answer, followed) = drafted(&server, "/completion", &body, |_| vec![1]).await;
        assert_eq!(answer.as_array().map(Vec::len), Some(2), "{answer}");
        assert_eq!(followed.last.state, "refused");
        assert_eq!(
            followed.last.reason.as_deref(),
            Some("the request asks for several completions")
        );
    }
}

#[tokio::test]
async fn a_server_that_drafts_by_itself_does_so_where_nothing_is_offered() {
    let draft = crate::harness::llama_server::model("tightwad-tiny-draft-f16.gguf");
    let own = [
        "-md",
        draft.to_str().expect("UTF-8"),
        "--spec-type",
        "draft-simple",
        "--spec-draft-n-max",
        "4",
    ];
    let server = server_with(&own).await;
    let body = completion("Once upon a time", 40);
    let (answer, followed) = drafted(&server, "/completion", &body, |_| Vec::new()).await;
    assert_eq!(followed.last.n_drafted, 0);
    assert!(answer["timings"]["draft_n_accepted"].as_u64() > Some(0), "{answer}");

    let without = LlamaServer::start(&target(), &[&["-np", "1"], &own[..]].concat()).await;
    let plain = without.post("/completion", &body).await;
    assert_eq!(plain["content"], answer["content"]);
    assert_eq!(
        plain["timings"]["draft_n_accepted"],
        answer["timings"]["draft_n_accepted"]
    );
}

#[tokio::test]
async fn a_request_without_a_drafter_gets_nothing_of_what_was_offered_to_an_earlier_one() {
    let server = server().await;
    let body = completion("Once upon a time", 20);
    let text = text_of(&server, "/completion", &body).await;
    let (_, followed) = drafted(&server, "/completion", &body, perfect(&text, 8)).await;
    assert!(followed.last.n_accepted > 0);
    let plain = server.post("/completion", &body).await;
    assert_eq!(plain["timings"]["draft_n"], Value::Null, "{plain}");
}

#[tokio::test]
async fn without_the_option_nobody_can_draft_and_the_key_is_ignored() {
    let server = LlamaServer::start(&target(), &["-np", "1"]).await;
    assert_eq!(server.get("/props").await["draft_external_max"], 0);
    let (status, answer) = server.send("/draft", &json!({ "key": "a" }), None).await;
    assert_eq!(status, 501);
    assert!(
        answer["error"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("--spec-draft-external-max")),
        "{answer}"
    );
    let (status, _) = server.send("/completion", &completion("Once", 5), Some("a")).await;
    assert_eq!(status, 200);

    let with_option = self::server().await;
    assert_eq!(with_option.get("/props").await["draft_external_max"], 8);
}

#[tokio::test]
async fn a_key_belongs_to_one_completion_at_a_time() {
    let server = server_with(&["-np", "2"]).await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = completion("Once upon a time", 200);
    let ((status, _), ()) = tokio::join!(server.send("/completion", &body, Some(&key)), async {
        drafter.attach().await;
        for path in ["/completion", "/v1/completions"] {
            drafter.hold_on(0).await;
            let (status, answer) = server.send(path, &completion("Once", 5), Some(&key)).await;
            assert_eq!(status, 400, "{answer}");
            assert!(
                answer["error"]["message"]
                    .as_str()
                    .is_some_and(|text| text.contains("X-Draft-Key")),
                "{answer}"
            );
        }
        drafter.call(json!({ "n_min": 0 })).await;
    });
    assert_eq!(status, 200);
    // free again
    let (status, _) = server.send("/completion", &completion("Once", 5), Some(&key)).await;
    assert_eq!(status, 200);

    for bad in [String::new(), "x".repeat(129)] {
        let (status, answer) = server.send("/completion", &completion("Once", 5), Some(&bad)).await;
        assert_eq!(status, 400, "{answer}");
    }
    let (status, _) = server
        .send("/completion", &completion("Once", 5), Some(&"x".repeat(128)))
        .await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn bad_input_is_answered_with_400_and_names_the_field() {
    let server = server().await;
    for (body, field) in [
        (json!([]), "object"),
        (json!({}), "key"),
        (json!({ "key": "" }), "key"),
        (json!({ "key": 1 }), "key"),
        (json!({ "key": "a", "pos": -1 }), "pos"),
        (json!({ "key": "a", "pos": 1.5 }), "pos"),
        (json!({ "key": "a", "pos": 1_u64 << 40 }), "pos"),
        (json!({ "key": "a", "pos": u64::MAX }), "pos"),
        (json!({ "key": "a", "tokens": "b" }), "tokens"),
        (json!({ "key": "a", "tokens": [1, 4096] }), "tokens[1]"),
        (json!({ "key": "a", "tokens": [-1] }), "tokens[0]"),
        (json!({ "key": "a", "tokens": [1.0] }), "tokens[0]"),
        (json!({ "key": "a", "tokens": [null] }), "tokens[0]"),
        (json!({ "key": "a", "tokens": [u64::MAX] }), "tokens[0]"),
        (json!({ "key": "a", "n_min": -1 }), "n_min"),
        (json!({ "key": "a", "hold_us": "x" }), "hold_us"),
        (json!({ "key": "a", "wait": 1 }), "wait"),
    ] {
        let (status, answer) = server.send("/draft", &body, None).await;
        assert_eq!(status, 400, "{body}: {answer}");
        let message = answer["error"]["message"].as_str().expect("a message");
        assert!(message.contains(field), "{body}: {message}");
    }
    let broken = reqwest::Client::new()
        .post(format!("{}/draft", server.url()))
        .body("{\"key\":")
        .send()
        .await;
    assert_eq!(broken.expect("an answer").status(), 400);

    // huge, but right
    let huge =
        json!({ "key": "a", "pos": i32::MAX, "tokens": vec![1; 10_000], "n_min": i32::MAX, "hold_us": i64::MAX });
    assert_eq!(server.send("/draft", &huge, None).await.0, 200);
    let body = completion("Once upon a time", 20);
    let plain = server.post("/completion", &body).await;
    let (answer, _) = drafted(&server, "/completion", &body, |committed| {
        // all kinds of nonsense in the vocabulary: control tokens, the end of text, repetitions
        (0..50).map(|i| (i * 7 + committed[0] * 13) % 5).collect()
    })
    .await;
    assert_eq!(answer["content"], plain["content"]);
    assert!(server.is_alive());
}

#[tokio::test]
async fn several_slots_are_drafted_for_at_once() {
    // 3 x 9 tokens do not fit a batch of 20: the drafts have to share it
    for batch in ["512", "20"] {
        let server = LlamaServer::start(
            &target(),
            &["--spec-draft-external-max", "8", "-np", "3", "-b", batch, "-ub", batch],
        )
        .await;
        let bodies = ["Once upon a time", "There was a dog", "def main():"].map(|prompt| completion(prompt, 50));
        let mut texts = Vec::new();
        for body in &bodies {
            texts.push(text_of(&server, "/completion", body).await);
        }
        let (one, two, three) = tokio::join!(
            drafted(&server, "/completion", &bodies[0], perfect(&texts[0], 8)),
            drafted(&server, "/completion", &bodies[1], wrong_at_every(3, &texts[1], 8)),
            drafted(&server, "/completion", &bodies[2], perfect(&texts[2], 3)),
        );
        for ((_, followed), text) in [one, two, three].into_iter().zip(&texts) {
            assert_eq!(&followed.committed, text, "batch {batch}");
            assert!(followed.last.n_accepted > 0, "batch {batch}: {:?}", followed.last);
        }
        assert!(server.is_alive());
    }
}

#[tokio::test]
async fn slots_that_share_one_cache_can_fill_it_with_drafts_around() {
    let server = LlamaServer::start(
        &target(),
        &["--spec-draft-external-max", "8", "-np", "2", "-kvu", "-c", "256"],
    )
    .await;
    let bodies = ["Once upon a time", "There was a dog"].map(|prompt| completion(prompt, 100));
    let mut texts = Vec::new();
    for body in &bodies {
        texts.push(text_of(&server, "/completion", body).await);
    }
    let (one, two) = tokio::join!(
        drafted(&server, "/completion", &bodies[0], perfect(&texts[0], 8)),
        drafted(&server, "/completion", &bodies[1], perfect(&texts[1], 8)),
    );
    assert_eq!(one.1.committed, texts[0]);
    assert_eq!(two.1.committed, texts[1]);

    // more than fits: whatever becomes of these two, the next one is served
    let bodies = ["Once upon a time", "There was a dog"]
        .map(|prompt| with(completion(prompt, 250), json!({ "ignore_eos": true })));
    let (key_one, key_two) = (new_key(), new_key());
    let (one, two) = (Drafter::new(&server, &key_one), Drafter::new(&server, &key_two));
    tokio::join!(
        server.send("/completion", &bodies[0], Some(&key_one)),
        server.send("/completion", &bodies[1], Some(&key_two)),
        one.run(perfect(&texts[0], 8)),
        two.run(|_| vec![1000; 8]),
    );
    assert!(server.is_alive());
    assert_eq!(
        server.post("/completion", &completion("Once", 3)).await["tokens"]
            .as_array()
            .map(Vec::len),
        Some(3)
    );
}

#[tokio::test]
async fn a_held_slot_waits_without_spinning_until_it_is_offered_something() {
    let server = server().await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = completion("Once upon a time", 40);
    let ((status, _), ()) = tokio::join!(server.send("/completion", &body, Some(&key)), async {
        // held from here on: the drafter promises a token and does not deliver
        let mut pos = drafter.attach().await.tokens.len();
        pos += drafter.hold_on(pos).await.tokens.len();
        let cpu = server.cpu_time();
        let begin = Instant::now();
        let mut n_steps = 0;
        while begin.elapsed() < Duration::from_millis(1500) {
            let answer = drafter.hold_on(pos).await;
            pos += answer.tokens.len();
            n_steps = answer.n_steps;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(n_steps < 10, "it was held: {n_steps}");
        let cpu = server.cpu_time().saturating_sub(cpu);
        assert!(
            cpu < Duration::from_millis(300),
            "{cpu:?} of CPU time in 1.5 s of waiting"
        );

        // an offer ends the wait at once
        let begin = Instant::now();
        let mut answer = drafter
            .call(json!({ "pos": pos, "tokens": [1000], "n_min": 1, "hold_us": 1_000_000 }))
            .await;
        while answer.tokens.is_empty() {
            answer = drafter.wait(pos).await;
        }
        assert!(begin.elapsed() < Duration::from_millis(300), "{:?}", begin.elapsed());
        drafter.call(json!({ "n_min": 0 })).await;
    });
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_held_slot_does_not_hold_up_the_others() {
    let server = server_with(&["-np", "2"]).await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = completion("Once upon a time", 400);
    let ((status, _), ()) = tokio::join!(server.send("/completion", &body, Some(&key)), async {
        let pos = drafter.attach().await.tokens.len();
        drafter.hold_on(pos).await;
        let others = Instant::now();
        let answer = server.post("/completion", &completion("There was a dog", 40)).await;
        assert_eq!(answer["tokens"].as_array().map(Vec::len), Some(40));
        // Alone the slot would be held for up to a second before each step.
        assert!(
            others.elapsed() < Duration::from_millis(700),
            "the other slot was held up: {:?}",
            others.elapsed()
        );
        drafter.call(json!({ "n_min": 0 })).await;
    });
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_drafter_that_falls_silent_is_not_waited_for() {
    let server = server().await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = completion("Once upon a time", 60);
    let begin = Instant::now();
    let ((status, answer), ()) = tokio::join!(server.send("/completion", &body, Some(&key)), async {
        drafter.attach().await;
    });
    assert_eq!(status, 200);
    assert!(
        begin.elapsed() > Duration::from_millis(800),
        "it was held: {:?}",
        begin.elapsed()
    );
    assert_eq!(answer["tokens"].as_array().map(Vec::len), Some(60));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_held_back_call_ends_with_the_completion_that_is_cancelled() {
    let server = server().await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = with(completion("Once upon a time", 500), json!({ "stream": true }));
    let url = format!("{}/completion", server.url());
    let client = reqwest::Client::new();
    let request = client.post(url).header("X-Draft-Key", &key).json(&body).send();
    let (stream, answer) = tokio::join!(request, drafter.attach());
    let stream = stream.expect("an answer");
    let (answer, ()) = tokio::join!(
        async {
            let mut pos = answer.tokens.len();
            loop {
                // the drafter is alive and slow: the slot is held all the time
                let more = json!({ "pos": pos, "tokens": [], "n_min": 1, "hold_us": 1_000_000, "wait": true });
                let answer = drafter.call(more).await;
                pos += answer.tokens.len();
                if answer.state == "done" {
                    break answer;
                }
            }
        },
        async { drop(stream) }
    );
    assert!(answer.n_steps < 100, "{answer:?}");
    // the slot is free
    assert_eq!(
        server.post("/completion", &completion("Once", 3)).await["tokens"]
            .as_array()
            .map(Vec::len),
        Some(3)
    );
}

#[tokio::test]
async fn a_server_that_stops_lets_its_drafters_go() {
    let server = server().await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = completion("Once upon a time", 500);
    let stop = async {
        let mut pos = drafter.attach().await.tokens.len();
        // the slot has its first token and is held
        loop {
            let answer = drafter.hold_on(pos).await;
            pos += answer.tokens.len();
            if answer.n_steps > 0 {
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        server.signal(rustix::process::Signal::TERM);
        // far ahead: nothing but the end answers it
        let call = json!({ "key": key, "pos": pos + 1000, "wait": true });
        let _ = reqwest::Client::new()
            .post(format!("{}/draft", server.url()))
            .json(&call)
            .send()
            .await;
    };
    let stopped = async {
        tokio::select! {
            // the client goes away with it
            _ = server.send("/completion", &body, Some(&key)) => {}
            () = stop => {}
        }
    };
    tokio::time::timeout(Duration::from_secs(10), stopped)
        .await
        .expect("the held-back call was answered");
    let begin = Instant::now();
    while server.is_alive() {
        assert!(begin.elapsed() < Duration::from_secs(10), "it still runs");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_context_shift_keeps_the_drafter_in_step() {
    let server = server_with(&["-c", "256", "--context-shift"]).await;
    let body = with(completion("Once upon a time", 500), json!({ "ignore_eos": true }));
    let plain = server.post("/completion", &body).await;
    assert_eq!(plain["truncated"], true, "the context was shifted");
    let followed = assert_same(&server, "/completion", &body).await;
    assert!(followed.last.n_steps < 150, "{:?}", followed.last);
}

#[tokio::test]
async fn without_context_shift_an_answer_ends_at_the_same_token() {
    let server = server_with(&["-c", "256"]).await;
    let body = with(completion("Once upon a time", 500), json!({ "ignore_eos": true }));
    let plain = server.post("/completion", &body).await;
    assert_eq!(plain["truncated"], true);
    assert_same(&server, "/completion", &body).await;
}

/// Two turns of a conversation: the second must find the same in the memory, whether the first was drafted for or not.
async fn assert_same_second_turn(server: &LlamaServer) {
    let cached = json!({ "cache_prompt": true, "ignore_eos": true });
    let first = with(completion("Once upon a time", 30), cached.clone());
    let text = text_of(server, "/completion", &first).await;
    // the tokens themselves, since another text may be tokenised in another way
    let prompt = [&text[..], &[1000, 1001, 1002]].concat();
    let second = with(with(completion("", 30), json!({ "prompt": prompt })), cached);

    // nothing is left of an earlier prompt
    let forget = completion("x", 1);
    server.post("/completion", &forget).await;
    server.post("/completion", &first).await;
    let plain = server.post("/completion", &second).await;

    for step in [3, 4, 5, 1000] {
        server.post("/completion", &forget).await;
        let (_, followed) = drafted(server, "/completion", &first, wrong_at_every(step, &text, 8)).await;
        assert_eq!(followed.committed, text);
        assert!(followed.last.n_accepted > 0);
        let after_drafts = server.post("/completion", &second).await;
        assert_eq!(after_drafts["tokens"], plain["tokens"], "wrong at every {step}");
        assert_eq!(
            after_drafts["timings"]["cache_n"], plain["timings"]["cache_n"],
            "wrong at every {step}"
        );
    }
}

#[tokio::test]
async fn the_memory_holds_the_same_after_a_drafted_answer() {
    let server = server().await;
    assert_same_second_turn(&server).await;
}

/// A model whose state is rolled back by snapshots.
async fn assert_rolls_back(write_model: fn(&Path)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    write_model(&path);
    let server = LlamaServer::start(&path, &EXTERNAL).await;
    for seed in 1..4 {
        let sampled = json!({ "temperature": 1.0, "seed": seed, "ignore_eos": true });
        let body = with(completion("Once upon a time", 60), sampled);
        let followed = assert_same(&server, "/completion", &body).await;
        assert!(followed.last.n_steps < 20, "{:?}", followed.last);
        let distinct: BTreeSet<_> = followed.committed.iter().collect();
        assert!(
            distinct.len() > 20,
            "too dull a text to show a wrong state: {:?}",
            followed.committed
        );
    }
    assert_same_second_turn(&server).await;
}

#[tokio::test]
async fn a_model_with_short_convolutions_is_drafted_for_and_rolled_back() {
    assert_rolls_back(random_model::hybrid).await;
}

#[tokio::test]
async fn a_model_with_linear_attention_is_drafted_for_and_rolled_back() {
    assert_rolls_back(random_model::linear_attention).await;
}

#[tokio::test]
async fn several_hybrid_slots_are_drafted_for_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("hybrid.gguf");
    random_model::hybrid(&path);
    // a micro batch that is barely large enough
    for micro in ["512", "12"] {
        let server = LlamaServer::start(&path, &["--spec-draft-external-max", "8", "-np", "3", "-ub", micro]).await;
        let bodies = ["Once upon a time", "There was a dog", "def main():"]
            .map(|prompt| with(completion(prompt, 40), json!({ "ignore_eos": true })));
        let mut texts = Vec::new();
        for body in &bodies {
            texts.push(text_of(&server, "/completion", body).await);
        }
        let (one, two, three) = tokio::join!(
            drafted(&server, "/completion", &bodies[0], perfect(&texts[0], 8)),
            drafted(&server, "/completion", &bodies[1], wrong_at_every(3, &texts[1], 8)),
            drafted(&server, "/completion", &bodies[2], wrong_at_every(2, &texts[2], 5)),
        );
        for ((_, followed), text) in [one, two, three].into_iter().zip(&texts) {
            assert_eq!(&followed.committed, text, "micro batch {micro}");
            assert!(followed.last.n_drafted > 0);
        }
    }
}

#[tokio::test]
async fn a_draft_larger_than_the_micro_batch_is_capped_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("hybrid.gguf");
    random_model::hybrid(&path);
    let server = LlamaServer::start(&path, &["--spec-draft-external-max", "64", "-np", "1", "-ub", "16"]).await;
    assert_eq!(server.get("/props").await["draft_external_max"], 14);
    let body = with(completion("Once upon a time", 60), json!({ "ignore_eos": true }));
    let text = text_of(&server, "/completion", &body).await;
    let (_, followed) = drafted(&server, "/completion", &body, perfect(&text, 64)).await;
    assert_eq!(followed.committed, text);
    assert!(followed.answers.iter().all(|answer| answer.step_n <= 14));
    assert!(followed.last.n_accepted > 0);
}

#[tokio::test]
async fn a_purely_recurrent_model_is_drafted_for_with_checkpoints() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("recurrent.gguf");
    random_model::recurrent(&path);
    let server = LlamaServer::start(&path, &EXTERNAL).await;
    for seed in 1..4 {
        let sampled = json!({ "temperature": 1.0, "seed": seed, "ignore_eos": true });
        assert_same(
            &server,
            "/completion",
            &with(completion("Once upon a time", 60), sampled),
        )
        .await;
    }
}

#[tokio::test]
async fn a_model_with_a_sliding_window_is_drafted_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("sliding_window.gguf");
    random_model::sliding_window(&path);
    let server = LlamaServer::start(&path, &EXTERNAL).await;
    for seed in 1..4 {
        // much longer than the window of 16 tokens
        let body = with(
            completion("Once upon a time", 400),
            json!({ "temperature": 0.7, "seed": seed, "ignore_eos": true }),
        );
        let followed = assert_same(&server, "/completion", &body).await;
        assert!(followed.last.n_steps < 60, "{:?}", followed.last);
    }
}

#[tokio::test]
async fn a_drafter_that_holds_and_never_offers_is_waited_for_three_times() {
    let server = server().await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = completion("Once upon a time", 60);
    let begin = Instant::now();
    let ((status, _), ()) = tokio::join!(server.send("/completion", &body, Some(&key)), async {
        let mut pos = drafter.attach().await.tokens.len();
        loop {
            let answer = drafter.hold_on(pos).await;
            pos += answer.tokens.len();
            if answer.state == "done" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert_eq!(status, 200);
    let elapsed = begin.elapsed();
    assert!(elapsed > Duration::from_secs(2), "it was held: {elapsed:?}");
    assert!(
        elapsed < Duration::from_secs(8),
        "it was held again and again: {elapsed:?}"
    );
}

#[tokio::test]
async fn the_tokens_of_an_answer_that_ended_are_forgotten_after_a_while() {
    let server = server().await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let (status, _) = server
        .send("/completion", &completion("Once upon a time", 5), Some(&key))
        .await;
    assert_eq!(status, 200);
    assert_eq!(drafter.call(json!({ "pos": 0 })).await.state, "done");
    tokio::time::sleep(Duration::from_secs(11)).await;
    let answer = drafter.call(json!({ "pos": 0 })).await;
    assert_eq!(answer.state, "unknown");
    assert!(answer.tokens.is_empty());
}

#[tokio::test]
async fn an_offer_that_no_context_could_take_is_refused() {
    let server = server().await;
    let (status, answer) = server
        .send("/draft", &json!({ "key": "a", "tokens": vec![1000; 100_000] }), None)
        .await;
    assert_eq!(status, 400, "{answer}");
}

#[tokio::test]
async fn a_drafter_keeps_its_connection_for_more_than_a_hundred_calls() {
    let server = server().await;
    let body = json!({ "key": "a" }).to_string();
    let request = format!(
        "POST /draft HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(server.url().trim_start_matches("http://")).expect("a connection");
    connection
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    for i in 0..250 {
        connection.write_all(request.as_bytes()).expect("it is open");
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while !answer.ends_with(b"}") {
            let n = connection.read(&mut buffer).expect("an answer");
            assert!(n > 0, "closed after {i} calls");
            answer.extend_from_slice(&buffer[..n]);
        }
    }
}

#[tokio::test]
async fn a_batch_too_small_for_a_draft_is_said_to_be_that() {
    let server = server_with(&["-ub", "2"]).await;
    assert_eq!(server.get("/props").await["draft_external_max"], 0);
    let (status, answer) = server.send("/draft", &json!({ "key": "a" }), None).await;
    assert_eq!(status, 501, "{answer}");
    assert!(
        answer["error"]["message"]
            .as_str()
            .is_some_and(|message| message.contains("-ub")),
        "{answer}"
    );
}

#[tokio::test]
async fn a_sampler_looks_back_no_further_than_the_context() {
    let server = server().await;
    let body = json!({ "repeat_last_n": 500_000_000, "dry_penalty_last_n": 500_000_000, "dry_multiplier": 0.5, "repeat_penalty": 1.1 });
    server
        .post("/completion", &with(completion("Once upon a time", 5), body))
        .await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak: u64 = peak
        .and_then(|peak| peak.trim().strip_suffix(" kB")?.parse().ok())
        .expect("the peak of its memory");
    assert!(peak < 500_000, "{peak} kB");
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_slot_while_a_stream_goes_on() {
    let server = server_with(&["-np", "2", "--context-shift"]).await;
    let endless = with(completion("Once upon a time", 100_000), json!({ "ignore_eos": true }));
    let stream = reqwest::Client::new()
        .post(format!("{}/completion", server.url()))
        .json(&with(endless.clone(), json!({ "stream": true })))
        .send()
        .await
        .expect("a stream");
    let reading = tokio::spawn(stream.bytes());
    let given_up = tokio::time::timeout(Duration::from_millis(300), server.send("/completion", &endless, None)).await;
    assert!(given_up.is_err(), "the answer is not to be there yet");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (slots, streaming) = (server.busy_slots().await, !reading.is_finished());
    assert!(streaming, "the stream is to be still under way");
    assert_eq!(slots, 1, "the slot of the one that went away is busy");
}

#[tokio::test]
async fn a_request_for_a_slot_in_use_leaves_its_answer_alone() {
    let server = server_with(&["-np", "2", "-fa", "off"]).await;
    let body = with(
        completion("Once upon a time", 200),
        json!({ "ignore_eos": true, "id_slot": 0 }),
    );
    let other = with(
        completion("def main(): print all the words that begin with a", 5),
        json!({ "id_slot": 0 }),
    );
    let other = with(other, json!({ "cache_prompt": true }));
    // the server keeps its prompt for later when the slot gets another one
    server.post("/completion", &other).await;
    let alone = server.post("/completion", &body).await;
    let (answer, other) = tokio::join!(server.post("/completion", &body), async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        server.post("/completion", &other).await
    });
    assert_eq!(answer["tokens"], alone["tokens"]);
    assert_eq!(other["tokens"].as_array().map(Vec::len), Some(5));
}

#[tokio::test]
async fn counters_and_usage_add_up() {
    let server = server_with(&["--metrics"]).await;
    let body = json!({
        "messages": [{ "role": "user", "content": "Count from 1 to 10." }],
        "max_tokens": 40, "temperature": 0, "cache_prompt": false,
    });
    let text = text_of(&server, "/v1/chat/completions", &body).await;
    let (answer, followed) = drafted(&server, "/v1/chat/completions", &body, wrong_at_every(7, &text, 8)).await;
    assert_eq!(answer["usage"]["completion_tokens"], 40);
    assert_eq!(answer["usage"]["prompt_tokens"], followed.last.n_prompt);
    let last = &followed.last;
    assert_eq!(answer["timings"]["draft_n"], last.n_drafted);
    assert_eq!(answer["timings"]["draft_n_accepted"], last.n_accepted);
    // every pass gives one token of its own
    assert_eq!(last.n_steps + last.n_accepted, 40);

    let metrics = server.get_text("/metrics").await;
    let counter = |name: &str| {
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
        line.parse::<usize>().expect("a number")
    };
    assert_eq!(counter("llamacpp:spec_decode_num_draft_tokens_total"), last.n_drafted);
    assert_eq!(
        counter("llamacpp:spec_decode_num_accepted_tokens_total"),
        last.n_accepted
    );
    // of all runs, those to which the drafter came late included
    let n_predicted = counter("llamacpp:tokens_predicted_total");
    assert!(n_predicted >= 80 && n_predicted % 40 == 0, "{n_predicted}");
}

#[tokio::test]
async fn an_api_key_guards_the_draft_endpoint() {
    let server = server_with(&["--api-key", "secret"]).await;
    let (status, _) = server.send("/draft", &json!({ "key": "a" }), None).await;
    assert_eq!(status, 401);
    let answer = reqwest::Client::new()
        .post(format!("{}/draft", server.url()))
        .bearer_auth("secret")
        .json(&json!({ "key": "a" }))
        .send()
        .await
        .expect("an answer");
    assert_eq!(answer.status(), 200);
}
