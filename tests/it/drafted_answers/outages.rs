//! Drafters, targets and clients that go away.

use std::time::{Duration, Instant};

use super::{
    CHAT, DRAFT, TARGET, answers_are_right_with, chat, greedy, is_the_targets_own, same, sampled, stage, start_draft,
    start_target,
};
use crate::harness::fake_drafter::FakeDrafter;
use crate::harness::llama_server::{LlamaServer, free_port, model, target};
use crate::harness::proxy::Proxy;
use crate::harness::request::with;
use crate::harness::wait::eventually;
use futures_util::StreamExt;
use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};

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
