//! The calls between drafter and target: keys, positions, offers, errors.

use std::time::{Duration, Instant};

use super::{completion, server, server_with, text_of};
use crate::harness::drafter::{Drafter, drafted, new_key, perfect};
use crate::harness::llama_server::{LlamaServer, target};
use crate::harness::request::with;
use serde_json::json;

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
