//! Models whose memory cannot simply be cut: recurrent, hybrid, with a sliding window.

use std::collections::BTreeSet;
use std::path::Path;

use super::{EXTERNAL, assert_same, assert_same_second_turn, completion, text_of};
use crate::harness::drafter::{drafted, perfect, wrong_at_every};
use crate::harness::llama_server::LlamaServer;
use crate::harness::random_model;
use crate::harness::request::with;
use serde_json::json;

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
