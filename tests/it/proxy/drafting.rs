//! Keys of drafted completions, and the measured agreement with a drafter.

use std::time::Duration;

use super::{CHAT, STREAMED, UNSTREAMED, error_of, nobody, patched};
use crate::harness::fake_upstream::{Act, FakeUpstream, Seen, chunk, json, stream_head, until, wait};
use crate::harness::tuned_proxy::TunedProxy;
use reqwest::StatusCode;
use serde_json::Value;
use tightwad::config::Upstream;
use tightwad::proxy::Settings;

#[tokio::test]
async fn a_completion_carries_the_key_of_its_drafting_which_ends_with_the_client() {
    let target = patched(|seen| match seen.target.as_str() {
        CHAT => vec![stream_head(), chunk("data: 1\n\n"), Act::Hang],
        _ => json("200 OK", "{}"),
    })
    .await;
    let proxy = TunedProxy::drafting(&target.url(), &nobody().await, |_| {}).await;
    proxy.is("verification", "attached").await;
    let response = proxy
        .post(CHAT, STREAMED)
        .header("x-draft-key", "guessed")
        .send()
        .await
        .unwrap();
    let seen = target.seen().into_iter().find(|seen| seen.target == CHAT).unwrap();
    let key = seen.header("x-draft-key").unwrap().to_owned();
    assert_eq!(key.len(), 32, "{key}");
    assert_eq!(seen.headers.iter().filter(|(name, _)| name == "x-draft-key").count(), 1);
    assert_eq!(seen.body, STREAMED.as_bytes());
    let asked = || {
        let names_key = |seen: &Seen| seen.target == "/draft" && String::from_utf8_lossy(&seen.body).contains(&key);
        target.seen().iter().filter(|seen| names_key(seen)).count()
    };
    until("the target to be asked for the completion", || asked() > 0).await;
    drop(response);
    target.was_left().await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let last = asked();
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(asked(), last, "drafts for a completion that is over");

    proxy.get("/v1/models").send().await.unwrap();
    let models = target.seen().into_iter().find(|seen| seen.target == "/v1/models");
    assert_eq!(models.unwrap().header("x-draft-key"), None);
}

#[tokio::test]
async fn without_fallback_completions_wait_for_the_drafter_and_nothing_else_does() {
    let target = patched(|_| json("200 OK", "{}")).await;
    let draft = nobody().await;
    let proxy = TunedProxy::drafting(&target.url(), &draft, |settings| {
        settings.fallback_on_draft_failure = false;
    })
    .await;
    proxy.is("verification", "attached").await;
    let response = proxy.post(CHAT, UNSTREAMED).send().await.unwrap();
    assert!(response.headers().contains_key("retry-after"));
    let error = error_of(response, StatusCode::SERVICE_UNAVAILABLE).await;
    assert_eq!(error["code"], "draft_unavailable");
    assert!(error["message"].as_str().unwrap().contains(&draft), "{error}");
    assert_eq!(proxy.post("/v1/embeddings", "{}").send().await.unwrap().status(), 200);

    let proxy = TunedProxy::drafting(&target.url(), &draft, |_| {}).await;
    proxy.is("verification", "attached").await;
    assert_eq!(proxy.post(CHAT, UNSTREAMED).send().await.unwrap().status(), 200);
}

/// A target that streams `text` word by word.
async fn says(text: &'static str) -> FakeUpstream {
    FakeUpstream::start(move |_| {
        let words = text.split_inclusive(' ').map(|word| {
            let event = serde_json::json!({ "choices": [{ "delta": { "content": word } }] });
            chunk(format!("data: {event}\n\n"))
        });
        let end = [chunk("data: [DONE]\n\n"), Act::EndChunks];
        std::iter::once(stream_head()).chain(words).chain(end).collect()
    })
    .await
}

fn measuring(drafter: &FakeUpstream) -> impl FnOnce(&mut Settings) + use<> {
    let drafter = Upstream {
        model_name: Some("small".into()),
        ..Upstream::at(drafter.url())
    };
    |settings| settings.measure_agreement_with = Some(drafter)
}

#[tokio::test]
async fn the_status_tells_how_far_the_drafter_agrees_with_a_target_that_cannot_verify() {
    let target = says("The quick brown fox").await;
    let drafter = FakeUpstream::start(|_| {
        json(
            "200 OK",
            r#"{"choices":[{"message":{"content":"The quick red fox"},"finish_reason":"stop"}]}"#,
        )
    })
    .await;
    let proxy = TunedProxy::before(&target.url(), measuring(&drafter)).await;
    assert_eq!(proxy.status().await["agreement"]["share"], Value::Null);

    let body = r#"{"messages":[{"role":"user","content":"Go on."}],"model":"big","stream":true,"temperature":0.9}"#;
    let answer = proxy.post(CHAT, body).send().await.unwrap().text().await.unwrap();
    assert!(answer.ends_with("data: [DONE]\n\n"), "{answer}");
    drafter.has_seen(1).await;
    let asked = drafter.only();
    assert_eq!(
        (asked.target.as_str(), target.only().body.as_slice()),
        (CHAT, body.as_bytes())
    );
    let asked: Value = serde_json::from_slice(&asked.body).unwrap();
    let expected = serde_json::json!({
        "messages": [{ "role": "user", "content": "Go on." }], "model": "small", "stream": false, "temperature": 0,
        "max_tokens": 64,
    });
    assert_eq!(asked, expected);

    let mut measured = Value::Null;
    for _ in 0..200 {
        measured = proxy.status().await["agreement"].clone();
        if measured["answers"] == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // "The quick " is common; the drafter's text has 17 characters.
    assert_eq!((&measured["answers"], &measured["characters"]), (&1.into(), &17.into()));
    assert!(
        (measured["share"].as_f64().unwrap() - 10.0 / 17.0).abs() < 1e-9,
        "{measured}"
    );
}

#[tokio::test]
async fn a_drafter_that_hangs_delays_no_answer_and_is_left_alone_when_the_next_request_comes() {
    let target = FakeUpstream::start(|seen| {
        let mut answer = json("200 OK", r#"{"choices":[{"text":"one two"}]}"#);
        if seen.number > 0 {
            answer.insert(0, wait(300));
        }
        answer
    })
    .await;
    let drafter = FakeUpstream::start(|_| vec![Act::Hang]).await;
    let proxy = TunedProxy::before(&target.url(), measuring(&drafter)).await;
    let ask = || async {
        let answer = proxy
            .post("/v1/completions", r#"{"prompt":"Count."}"#)
            .send()
            .await
            .unwrap();
        assert_eq!(answer.text().await.unwrap(), r#"{"choices":[{"text":"one two"}]}"#);
    };
    ask().await;
    drafter.has_seen(1).await;
    let (left, ()) = tokio::join!(drafter.was_left(), ask());
    assert!(left.elapsed() < Duration::from_secs(1));
    assert_eq!(proxy.status().await["agreement"]["answers"], 0);
}
