//! Several slots and queued completions.

use std::time::{Duration, Instant};

use super::{completion, server, server_with, text_of};
use crate::harness::drafter::{Drafter, drafted, new_key, perfect, wrong_at_every};
use crate::harness::llama_server::{LlamaServer, target};
use crate::harness::request::with;
use serde_json::json;

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
