//! A slot that waits for its drafter.

use std::time::{Duration, Instant};

use super::{completion, server, server_with};
use crate::harness::drafter::{Drafter, new_key};
use serde_json::json;

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

        // an offer ends the wait at once, not after the second for which the slot may be held
        let begin = Instant::now();
        let mut answer = drafter
            .call(json!({ "pos": pos, "tokens": [1000], "n_min": 1, "hold_us": 1_000_000 }))
            .await;
        while answer.tokens.is_empty() {
            answer = drafter.wait(pos).await;
        }
        assert!(begin.elapsed() < Duration::from_millis(700), "{:?}", begin.elapsed());
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
