//! The pool seen from outside: a coordinator over two CPU workers, with real llama.cpp processes.

use std::time::{Duration, Instant};

use crate::harness::llama_server::{LlamaServer, answer_of, essence, target};
use crate::harness::pool::{Pool, Setup, signal};
use crate::harness::wait::eventually;
use crate::harness::worker::children;
use futures_util::StreamExt;
use rustix::process::Signal;
use serde_json::{Value, json};
use tightwad::upstream::MEASURING;

const CHAT: &str = "/v1/chat/completions";

/// A stream that goes on for some seconds.
fn long_story() -> Value {
    json!({
        "messages": [{ "role": "user", "content": "Tell me a story" }],
        "stream": true, "temperature": 0, "max_tokens": 1900, "ignore_eos": true,
    })
}

/// Reads a stream until it has `enough`, and returns what came so far.
async fn read_until(
    stream: &mut (impl futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Unpin),
    text: &mut String,
    enough: impl Fn(&str) -> bool,
) {
    while !enough(text) {
        match stream.next().await {
            Some(Ok(bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
            Some(Err(error)) => panic!("the stream broke ({error}) after {text}"),
            None => return,
        }
    }
}

/// The last event of a stream that ended with an error.
fn last_error(text: &str) -> Value {
    let last = text.lines().rfind(|line| line.starts_with("data: ")).expect("an event");
    let event: Value = serde_json::from_str(&last["data: ".len()..]).expect("JSON");
    event["error"].clone()
}

#[tokio::test]
async fn answers_over_two_workers_equal_those_of_one_process() {
    let pool = Pool::ready(Setup::default()).await;
    let alone = LlamaServer::start(&target(), &["-c", "8192", "-np", "4", "--alias", "big"]).await;
    let requests = [
        (
            "/v1/completions",
            json!({ "prompt": "The little dog", "max_tokens": 60, "temperature": 0 }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "A", "max_tokens": 40, "temperature": 0.8, "seed": 7, "logprobs": 3 }),
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 30, "temperature": 0 }),
        ),
        ("/tokenize", json!({ "content": "What is it?" })),
    ];
    for (path, body) in requests {
        let (status, over) = answer_of(pool.post(path, &body)).await;
        assert_eq!(status, 200, "{over}");
        let (over, plain) = (essence(over), essence(alone.post(path, &body).await));
        assert_eq!(text_of(&over), text_of(&plain), "{path} {body}");
        assert_eq!(over["usage"], plain["usage"]);
    }
    let status = pool.status().await;
    assert_eq!(status["state"], "ready", "{status:#}");
    let devices = status["devices"].as_array().expect("devices");
    assert!(
        devices.len() == 2 && devices[1].as_str().unwrap().starts_with("two "),
        "{status:#}"
    );
}

/// The text of an answer, or all of one that has none.
fn text_of(answer: &Value) -> Value {
    let choice = &answer["choices"][0];
    [&choice["text"], &choice["message"]["content"]]
        .into_iter()
        .find(|text| !text.is_null())
        .unwrap_or(answer)
        .clone()
}

/// What a model answers to [`Pool::complete`]: its name, the tokens of the prompt in its own vocabulary, and the text.
fn answered(answer: &Value) -> [Value; 3] {
    [
        answer["model"].clone(),
        answer["usage"]["prompt_tokens"].clone(),
        answer["choices"][0]["text"].clone(),
    ]
}

/// What `big` and `other` answer, in this order; `big` is loaded again after it. The pool must have one slot: texts of
/// requests that share a batch may differ where two tokens are about equally likely.
async fn both_answers(pool: &Pool) -> [[Value; 3]; 2] {
    let big = answered(&pool.complete("big").await.1);
    let lines = pool.swap("other").await;
    assert_eq!(lines.last().unwrap()["done"], true, "{lines:?}");
    assert!(lines.iter().any(|line| line["state"] == "loading"), "{lines:?}");
    let other = answered(&pool.complete("other").await.1);
    assert_eq!((&big[0], &other[0]), (&json!("big"), &json!("other")));
    assert!(
        big[1] != other[1] && big[2] != other[2],
        "the test cannot tell the models apart"
    );
    assert_eq!(pool.swap("big").await.last().unwrap()["done"], true);
    [big, other]
}

#[tokio::test]
async fn under_a_swap_every_request_is_answered_by_the_model_it_named() {
    let setup = Setup {
        coordinator: json!({ "swap_on_request": true, "slots": 1 }),
        ..Setup::default()
    };
    let pool = Pool::ready(setup).await;
    let expected = both_answers(&pool).await;
    let asks = (0..16).map(|client| {
        let (pool, expected) = (&pool, &expected[client % 2]);
        async move {
            for _ in 0..3 {
                let (status, answer) = pool.complete(["big", "other"][client % 2]).await;
                assert_eq!(status, 200, "{answer}");
                assert_eq!(answered(&answer), *expected);
            }
        }
    });
    futures_util::future::join_all(asks).await;
    let (_, models) = pool.get("/v1/models").await;
    let loaded = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|model| model["status"]["value"] == "loaded");
    assert_eq!(loaded.count(), 1, "{models}");
}

#[tokio::test]
async fn while_a_command_swaps_every_request_is_answered_by_the_model_it_named_or_refused() {
    let pool = Pool::ready(Setup {
        coordinator: json!({ "slots": 1 }),
        ..Setup::default()
    })
    .await;
    let expected = both_answers(&pool).await;
    // Those who ask for the old model go on until it is gone, and those who ask for the new one until it is there.
    let asks = (0..16).map(|client| {
        let (pool, expected) = (&pool, &expected[client % 2]);
        async move {
            let (name, last) = [("big", 404), ("other", 200)][client % 2];
            let mut asked = 0;
            loop {
                let (status, answer) = pool.complete(name).await;
                match status {
                    200 => assert_eq!(answered(&answer), *expected),
                    404 => assert_eq!(answer["error"]["code"], "model_not_loaded", "{answer}"),
                    _ => panic!("{status} {answer}"),
                }
                asked += 1;
                if status == last {
                    return asked;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    let starts = async || pool.status().await["starts"].as_u64().unwrap();
    let before = starts().await;
    let swap = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (lines, same) = tokio::join!(pool.swap("other"), pool.swap("other"));
        assert_eq!(same.last().unwrap()["done"], true, "{same:?}");
        lines
    };
    let all = futures_util::future::join(futures_util::future::join_all(asks), swap);
    let (asked, lines) = tokio::time::timeout(Duration::from_secs(30), all)
        .await
        .expect("it ends");
    assert_eq!(lines.last().unwrap()["done"], true, "{lines:?}");
    assert!(
        asked.iter().all(|asked| *asked > 1),
        "nobody asked before and after: {asked:?}"
    );
    assert_eq!(starts().await, before + 1, "equal commands share one load");
}

#[tokio::test]
async fn a_swap_to_a_missing_or_broken_file_leaves_the_old_model_serving() {
    let broken = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let whole = std::fs::read(target()).unwrap();
    std::fs::write(broken.path(), &whole[..whole.len() / 2]).unwrap();
    let models = json!({ "broken": { "path": broken.path() }, "missing": { "path": "/no/such.gguf" } });
    let pool = Pool::ready(Setup {
        models,
        ..Setup::default()
    })
    .await;
    let before = pool.status().await["pid"].clone();
    for (model, word) in [
        ("broken", broken.path().to_str().unwrap()),
        ("missing", "/no/such.gguf"),
    ] {
        let lines = pool.swap(model).await;
        let error = lines.last().unwrap()["error"]["message"]
            .as_str()
            .expect("an error")
            .to_owned();
        assert!(error.contains(model) && error.contains(word), "{error}");
    }
    let (status, answer) = pool.complete("big").await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(pool.status().await["pid"], before, "it was never stopped");

    let (status, answer) = pool.complete("other").await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (404, &json!("model_not_loaded")),
        "{answer}"
    );
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("tightwad swap other"),
        "{answer}"
    );
    let (status, _) = answer_of(pool.post("/v1/tightwad/swap", &json!({ "model": "nonsense" }))).await;
    assert_eq!(status, 404);
    let (status, answer) = pool.complete("nonsense").await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (404, &json!("model_not_found")),
        "{answer}"
    );
    assert!(
        answer["error"]["message"].as_str().unwrap().contains("`big`, `"),
        "{answer}"
    );
    // What a page in a browser may send to anybody.
    let form = reqwest::Client::new().post(format!("{}/v1/tightwad/swap", pool.url()));
    let form = form.header("content-type", "text/plain").body(r#"{"model":"other"}"#);
    assert_eq!(answer_of(form).await.0, 415);
}

#[tokio::test]
async fn a_model_that_passes_its_check_and_dies_as_it_loads_gives_way_to_the_one_before() {
    let models = json!({ "doomed": { "path": target(), "extra_args": ["--no-such-option"] } });
    let pool = Pool::ready(Setup {
        models,
        ..Setup::default()
    })
    .await;
    let lines = pool.swap("doomed").await;
    let error = lines.last().unwrap()["error"].clone();
    assert_eq!(error["code"], "model_failed", "{lines:?}");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("--no-such-option") && message.contains("extra_args"),
        "{message}"
    );
    pool.becomes_ready(Duration::from_secs(15)).await;
    assert_eq!(pool.complete("big").await.0, 200);
    let failed = &pool.status().await["last_failure"];
    assert_eq!(failed["model"], "doomed", "{failed}");
}

#[tokio::test]
async fn a_swap_counts_on_the_memory_that_the_old_model_leaves() {
    let pool = Pool::ready(Setup {
        own_gpu: true,
        ..Setup::default()
    })
    .await;
    let lines = pool.swap("other").await;
    assert_eq!(lines.last().unwrap()["done"], true, "{lines:?}");
    assert_eq!(pool.complete("other").await.0, 200);
}

#[tokio::test]
async fn a_coordinator_whose_gpu_is_lost_says_what_to_do_and_starts_when_it_is_back() {
    let mut pool = Pool::without_coordinator(Setup {
        own_gpu: true,
        ..Setup::default()
    });
    pool.lose_gpu(true);
    pool.start_coordinator();
    let told = eventually(Duration::from_secs(10), || async {
        let answer = reqwest::get(format!("{}/v1/tightwad/status", pool.url())).await;
        let text = match answer {
            Ok(answer) => answer.text().await.unwrap(),
            Err(error) => error.to_string(), // it does not listen yet
        };
        if text.contains("no CUDA device") {
            Ok(text)
        } else {
            Err(text)
        }
    });
    let told = told.await.unwrap();
    assert!(told.contains("version mismatch") && told.contains("reboot"), "{told}");
    let starts = children(pool.coordinator.as_ref().unwrap().pid());
    assert!(starts.is_empty(), "nothing is started: {starts:?}");
    pool.lose_gpu(false);
    pool.becomes_ready(Duration::from_secs(30)).await;
}

#[tokio::test]
async fn a_stream_that_waits_for_a_slot_is_begun_with_comments() {
    let pool = Pool::ready(Setup {
        coordinator: json!({ "slots": 1 }),
        ..Setup::default()
    })
    .await;
    let first = pool.post(CHAT, &long_story()).send().await.unwrap();
    let (mut stream, mut text) = (first.bytes_stream(), String::new());
    read_until(&mut stream, &mut text, |text| text.contains("data: ")).await;
    let body = json!({ "prompt": "Once", "stream": true, "max_tokens": 2 });
    let second = pool.post("/v1/completions", &body).send().await.unwrap();
    let second = second.text().await.unwrap();
    assert!(
        second.starts_with(": waiting for a slot\n\n") && second.ends_with("data: [DONE]\n\n"),
        "{second}"
    );
}

#[tokio::test]
async fn a_swap_whose_client_hangs_up_before_anything_came_of_it_is_taken_back() {
    let setup = Setup {
        coordinator: json!({ "drain_seconds": 60 }),
        ..Setup::default()
    };
    let pool = Pool::ready(setup).await;
    let answer = pool.post(CHAT, &long_story()).send().await.unwrap();
    let (mut stream, mut text) = (answer.bytes_stream(), String::new());
    read_until(&mut stream, &mut text, |text| text.contains("data: ")).await;
    let swap = pool
        .post("/v1/tightwad/swap", &json!({ "model": "other" }))
        .send()
        .await
        .unwrap();
    let (mut lines, mut told) = (swap.bytes_stream(), String::new());
    read_until(&mut lines, &mut told, |told| told.contains("draining")).await;
    drop(lines);
    read_until(&mut stream, &mut text, |_| false).await;
    assert!(text.ends_with("data: [DONE]\n\n"), "it was not disturbed");
    let status = pool.status().await;
    assert_eq!(
        (&status["state"], &status["model"]),
        (&json!("ready"), &json!("big")),
        "{status:#}"
    );
}

#[tokio::test]
async fn a_swap_ends_what_only_measures_and_does_not_wait_for_it() {
    let pool = Pool::ready(Setup {
        coordinator: json!({ "drain_seconds": 60 }),
        ..Setup::default()
    })
    .await;
    let measuring = pool.post(
        "/completion",
        &json!({ "prompt": "Once", "n_predict": 1900, "ignore_eos": true, "stream": true }),
    );
    let answer = measuring.header(MEASURING, "1").send().await.unwrap();
    let (mut stream, mut text) = (answer.bytes_stream(), String::new());
    read_until(&mut stream, &mut text, |text| text.contains("data: ")).await;
    assert_eq!(pool.status().await["running"], 0, "nobody waits for its text");
    let lines = pool.swap("other").await;
    assert_eq!(lines.last().unwrap()["done"], true, "{lines:?}");
    assert!(lines.iter().all(|line| line["state"] != "draining"), "{lines:?}");
    read_until(&mut stream, &mut text, |_| false).await;
    assert!(
        !text.contains("[DONE]") && !text.contains("\"stop\":true"),
        "it was ended: {text}"
    );
}

#[tokio::test]
async fn a_worker_killed_in_mid_answer_is_named_and_used_again_once_it_is_back() {
    let mut pool = Pool::ready(Setup::default()).await;
    for _ in 0..2 {
        let answer = pool.post(CHAT, &long_story()).send().await.unwrap();
        let (mut stream, mut text) = (answer.bytes_stream(), String::new());
        read_until(&mut stream, &mut text, |text| text.contains("data: ")).await;
        signal(pool.workers[1].as_ref().unwrap().pid(), Signal::KILL);
        let killed = Instant::now();
        read_until(&mut stream, &mut text, |_| false).await;
        assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
        let error = last_error(&text);
        assert_eq!(error["code"], "worker_lost", "{error}");
        assert!(error["message"].as_str().unwrap().contains("worker two"), "{error}");

        let asked = Instant::now();
        let status = pool.status().await;
        assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
        assert_ne!(status["state"], "ready", "{status:#}");
        pool.start_worker(1);
        pool.becomes_ready(Duration::from_secs(15)).await;
        let (status, answer) = pool.complete("big").await;
        assert_eq!(status, 200, "{answer}");
    }
}

#[tokio::test]
async fn a_host_that_freezes_in_mid_answer_is_lost_within_five_seconds() {
    let pool = Pool::ready(Setup::default()).await;
    let answer = pool.post(CHAT, &long_story()).send().await.unwrap();
    let (mut stream, mut text) = (answer.bytes_stream(), String::new());
    read_until(&mut stream, &mut text, |text| text.contains("data: ")).await;
    let frozen = [pool.rpc_server(0), pool.workers[0].as_ref().unwrap().pid()];
    for pid in frozen {
        signal(pid, Signal::STOP);
    }
    let since = Instant::now();
    read_until(&mut stream, &mut text, |_| false).await;
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    let error = last_error(&text);
    assert!(error["message"].as_str().unwrap().contains("worker one"), "{error}");
    for pid in frozen {
        signal(pid, Signal::CONT);
    }
    pool.becomes_ready(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn a_server_that_is_stopped_under_a_living_agent_is_noticed_too() {
    let pool = Pool::ready(Setup::default()).await;
    let answer = pool.post(CHAT, &long_story()).send().await.unwrap();
    let (mut stream, mut text) = (answer.bytes_stream(), String::new());
    read_until(&mut stream, &mut text, |text| text.contains("data: ")).await;
    signal(pool.rpc_server(1), Signal::STOP);
    let since = Instant::now();
    read_until(&mut stream, &mut text, |_| false).await;
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert!(
        last_error(&text)["message"].as_str().unwrap().contains("worker two"),
        "{text}"
    );
    // Its successor is a fresh process, so that nobody has to wake it.
    pool.becomes_ready(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn a_server_that_dies_while_nobody_asks_costs_nobody_an_answer() {
    let pool = Pool::ready(Setup::default()).await;
    let starts = pool.status().await["starts"].as_u64();
    signal(pool.rpc_server(1), Signal::KILL);
    let again = eventually(Duration::from_secs(10), || async {
        let status = pool.status().await;
        if status["starts"].as_u64() > starts {
            Ok(())
        } else {
            Err(status)
        }
    });
    again.await.expect("another server is started");
    assert_eq!(pool.complete("big").await.0, 200);
}

#[tokio::test]
async fn workers_without_agents_are_used_and_a_silent_one_is_noticed_by_its_tokens() {
    let coordinator = json!({ "stall_seconds": 2 });
    let mut pool = Pool::start(Setup {
        coordinator,
        by_hand: true,
        ..Setup::default()
    });
    pool.becomes_ready(Duration::from_secs(15)).await;
    let answer = pool.post(CHAT, &long_story()).send().await.unwrap();
    let (mut stream, mut text) = (answer.bytes_stream(), String::new());
    read_until(&mut stream, &mut text, |text| text.contains("data: ")).await;
    signal(pool.workers[1].as_ref().unwrap().pid(), Signal::STOP);
    read_until(&mut stream, &mut text, |_| false).await;
    assert!(
        last_error(&text)["message"]
            .as_str()
            .unwrap()
            .contains("nothing has moved for 2"),
        "{text}"
    );
    let named = eventually(Duration::from_secs(10), || async {
        let status = pool.status().await;
        let problem = status["problem"].as_str().unwrap_or_default();
        if problem.contains("worker two") {
            Ok(())
        } else {
            Err(status)
        }
    });
    named.await.expect("the one that does not answer is named");
    pool.workers[1] = None;
    pool.start_worker(1);
    pool.becomes_ready(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn a_coordinator_that_is_killed_takes_its_workers_over_when_it_is_back() {
    let mut pool = Pool::ready(Setup::default()).await;
    for _ in 0..2 {
        signal(pool.coordinator.as_ref().unwrap().pid(), Signal::KILL);
        drop(pool.coordinator.take());
        pool.start_coordinator();
        pool.becomes_ready(Duration::from_secs(9)).await;
        assert_eq!(pool.complete("big").await.0, 200);
    }
    signal(pool.coordinator.as_ref().unwrap().pid(), Signal::TERM);
    let returned = eventually(Duration::from_secs(5), || async {
        let leases = [pool.lease(0).await, pool.lease(1).await];
        if leases.iter().all(Value::is_null) {
            Ok(())
        } else {
            Err(leases)
        }
    });
    returned.await.expect("all leases are returned at once");
    let ended = eventually(Duration::from_secs(5), || async {
        let answer = reqwest::get(format!("{}/health", pool.url())).await;
        answer.map_or(Ok(()), |_| Err(()))
    });
    ended.await.expect("it ends");
}

#[tokio::test]
async fn requests_wait_for_a_slow_load_with_comments_or_are_told_to_come_again() {
    let setup = Setup {
        coordinator: json!({ "wait_seconds": 6 }),
        slow: 4.5,
        ..Setup::default()
    };
    let pool = Pool::start(setup);
    let up = eventually(Duration::from_secs(10), || async { reqwest::get(pool.url()).await });
    up.await.expect("the front answers at once");
    let story = json!({ "prompt": "Once", "stream": true, "max_tokens": 4, "temperature": 0 });
    let streamed = async {
        let answer = pool.post("/v1/completions", &story).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.text().await.unwrap()
    };
    let (streamed, plain, health) = tokio::join!(streamed, pool.complete("big"), pool.get("/health"));
    assert!(
        streamed.starts_with(": ") && streamed.matches("\n: ").count() >= 1,
        "{streamed}"
    );
    assert!(
        streamed.contains("data: {") && streamed.ends_with("data: [DONE]\n\n"),
        "{streamed}"
    );
    assert_eq!(plain.0, 200, "{}", plain.1);
    assert_eq!(health.0, 503, "{}", health.1);
}

#[tokio::test]
async fn who_has_waited_long_enough_is_told_how_far_the_load_is() {
    let setup = Setup {
        coordinator: json!({ "wait_seconds": 2 }),
        slow: 20.0,
        ..Setup::default()
    };
    let pool = Pool::start(setup);
    let up = eventually(Duration::from_secs(10), || async { reqwest::get(pool.url()).await });
    up.await.expect("the front answers at once");
    let plain = async {
        let body = json!({ "prompt": "Once" });
        let answer = pool.post("/v1/completions", &body).send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["retry-after"]),
            (503, &"5".parse().unwrap())
        );
        answer.json::<Value>().await.unwrap()
    };
    let streamed = async {
        let body = json!({ "prompt": "Once", "stream": true });
        pool.post("/v1/completions", &body)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap()
    };
    let (plain, streamed) = tokio::join!(plain, streamed);
    assert_eq!(plain["error"]["type"], "model_loading", "{plain}");
    assert_eq!(plain["loading"]["model"], "big", "{plain}");
    assert_eq!(plain["loading"]["state"], "loading", "{plain}");
    assert_eq!(last_error(&streamed)["code"], "model_loading", "{streamed}");
}

#[tokio::test]
async fn only_who_knows_the_key_is_served_and_the_server_behind_has_another() {
    let pool = Pool::ready(Setup {
        coordinator: json!({ "api_key": "right" }),
        ..Setup::default()
    })
    .await;
    let body = json!({ "prompt": "Once", "max_tokens": 2 });
    for path in ["/v1/completions", "/draft", "/v1/tightwad/swap"] {
        for key in [None, Some("wrong")] {
            let mut request = pool.post(path, &body);
            if let Some(key) = key {
                request = request.bearer_auth(key);
            }
            assert_eq!(answer_of(request).await.0, 401, "{path} {key:?}");
        }
    }
    for path in ["/v1/tightwad/status", "/metrics", "/props", "/v1/models"] {
        assert_eq!(pool.get(path).await.0, 401, "{path}");
    }
    assert_eq!(pool.get("/health").await.0, 200);
    let (status, answer) = answer_of(pool.post("/v1/completions", &body).bearer_auth("right")).await;
    assert_eq!(status, 200, "{answer}");
    let props = reqwest::Client::new()
        .get(format!("{}/props", pool.url()))
        .bearer_auth("right");
    let (status, props) = answer_of(props).await;
    assert_eq!(status, 200);
    assert!(
        props["draft_external_max"].as_u64().is_some_and(|max| max > 0),
        "{props}"
    );
}
