//! Drafters of every quality.

use std::time::Duration;

use super::{CHAT, answers_are_right_with, chat, greedy, same, same_and_drafted, stage, start_draft};
use crate::harness::fake_drafter::FakeDrafter;
use crate::harness::proxy::{Proxy, Record};
use crate::harness::request::with;
use tightwad::config::Upstream;

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
