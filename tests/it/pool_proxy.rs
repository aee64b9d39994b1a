//! The proxy before a pool: drafts for a model that is split over two workers, and that may be another one at any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::harness::fake_upstream::{FakeUpstream, json as answer};
use crate::harness::far_device::FarDevice;
use crate::harness::gguf::slow_target;
use crate::harness::llama_server::{LlamaServer, answer_of, model};
use crate::harness::pool::{Pool, Setup};
use crate::harness::proxy::Proxy;
use crate::harness::wait::eventually;
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";

/// A pool whose `big` drafts pay for, on any processor: half of it is far away, and it takes milliseconds per token. `other`
/// is quick.
async fn far_pool() -> Pool {
    Pool::ready(Setup {
        models: json!({ "big": { "path": slow_target() }, "other": { "extra_args": ["--device", "none"] } }),
        far: Some(FarDevice::start().await),
        ..Setup::default()
    })
    .await
}

async fn small_model() -> LlamaServer {
    LlamaServer::start(&model("tightwad-tiny-draft-f16.gguf"), &["-np", "4"]).await
}

#[tokio::test]
async fn drafted_answers_of_a_pool_equal_its_plain_ones() {
    let pool = far_pool().await;
    let draft = small_model().await;
    let proxy = Proxy::drafting(pool.url(), draft.url()).await;
    let (mut accepted, mut steps, mut generated) = (0, 0, 0);
    for prompt in ["Once upon a time", "The little dog", "def main():"] {
        let body = json!({ "prompt": prompt, "max_tokens": 100, "temperature": 0 });
        let (status, plain) = answer_of(pool.post(COMPLETIONS, &body)).await;
        assert_eq!(status, 200, "{plain}");
        let (through, record) = proxy.post(COMPLETIONS, &body).await;
        assert_eq!(through["choices"][0]["text"], plain["choices"][0]["text"], "{prompt}");
        (accepted, steps, generated) = (
            accepted + record.accepted,
            steps + record.steps,
            generated + record.generated,
        );
    }
    assert!(accepted > 0 && steps < generated, "{:#}", proxy.status().await);
}

#[tokio::test]
async fn after_a_swap_the_proxy_knows_the_new_model_and_not_the_old() {
    let pool = far_pool().await;
    let draft = small_model().await;
    let proxy = Proxy::drafting(pool.url(), draft.url()).await;
    let plain_step = |status: &Value| status["step_ms"]["0"].as_f64();
    let slow = plain_step(&proxy.status().await).expect("it was measured");

    assert_eq!(pool.swap("other").await.last().unwrap()["done"], true);
    let as_text = |status: &Value| {
        let problem = status["drafts"][0]["problem"].as_str().unwrap_or_default();
        // On a busy machine the steps of the tiny model are quicker than a call, and then none is timed.
        problem.contains("it drafts as text") && plain_step(status).is_none_or(|step| step < slow / 2.0)
    };
    let within = Duration::from_secs(20);
    proxy
        .shows("another vocabulary and no slow steps", within, as_text)
        .await;
    let body = json!({ "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0 });
    let (_, plain) = answer_of(pool.post(COMPLETIONS, &body)).await;
    let (through, _) = proxy.post(COMPLETIONS, &body).await;
    assert_eq!(through["choices"][0]["text"], plain["choices"][0]["text"]);

    assert_eq!(pool.swap("big").await.last().unwrap()["done"], true);
    let as_before = |status: &Value| {
        status["drafts"][0]["problem"].is_null() && plain_step(status).is_some_and(|step| step > slow / 2.0)
    };
    proxy.shows("the first model again", within, as_before).await;
    proxy.settles().await;
    let (_, record) = proxy.post(COMPLETIONS, &body).await;
    assert!(record.accepted > 0, "{record:?}");
}

#[tokio::test]
async fn a_target_that_was_never_seen_down_is_measured_again_when_its_model_is_another_one() {
    let model = Arc::new(AtomicUsize::new(1));
    let target = FakeUpstream::start({
        let model = Arc::clone(&model);
        move |seen| match seen.target.as_str() {
            "/health" => answer("200 OK", "{}"),
            "/props" => {
                let model = model.load(Ordering::SeqCst);
                let props = json!({ "total_slots": 1, "model_alias": format!("m{model}"), "draft_external_max": 8 });
                answer("200 OK", &props.to_string())
            }
            _ => answer("404 Not Found", "{}"),
        }
    })
    .await;
    let _proxy = Proxy::start(&target.url(), None).await;
    // Each measuring gives up at its first call, which is refused.
    let measured = |times: usize| {
        let target = &target;
        eventually(Duration::from_secs(5), move || async move {
            let calls = target.seen().iter().filter(|seen| seen.target == "/draft").count();
            if calls == times { Ok(()) } else { Err(calls) }
        })
    };
    assert_eq!(measured(1).await, Ok(()));
    let looks = target.seen().iter().filter(|seen| seen.target == "/props").count();
    let again = eventually(Duration::from_secs(5), || async {
        let now = target.seen().iter().filter(|seen| seen.target == "/props").count();
        if now > looks + 1 { Ok(()) } else { Err(()) }
    });
    again.await.expect("it looks again and again");
    assert_eq!(measured(1).await, Ok(()), "the same model is measured once");
    model.store(2, Ordering::SeqCst);
    assert_eq!(measured(2).await, Ok(()));
}
