//! Answers in rounds are the target's own: with a stock llama-server (fan-out), and with scripted vLLM and SGLang (scored).

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::harness::fake_drafter::FakeDrafter;
use crate::harness::fake_scoring::{self, Quirks, STORY};
use crate::harness::fake_upstream::FakeUpstream;
use crate::harness::llama_server::{LlamaServer, model, target};
use crate::harness::proxy::{Proxy, Record};
use crate::harness::request::with;
use crate::harness::wait::eventually;
use futures_util::StreamExt;
use serde_json::{Map, Value, json};
use tightwad::config::{Backend, Upstream, VerificationMode};
use tightwad::engine::{Verifier, VerifyRequest};
use tightwad::rounds::FanOut;
use tokio::sync::{Mutex, MutexGuard, OnceCell};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const PATIENCE: Duration = Duration::from_secs(20);
/// Without `--spec-draft-external-max` ours is a stock one.
const STOCK: [&str; 6] = ["-np", "5", "-c", "5120", "--threads-http", "32"];
const DRAFT: [&str; 4] = ["-np", "4", "-c", "4096"];
const PROMPTS: [&str; 5] = [
    "Who are you?",
    "Explain recursion.",
    "Count from 1 to 10.",
    "Write a Python function that checks whether a number is prime.",
    "Tell me a story about a robot.",
];

fn chat(prompt: &str, max_tokens: u32) -> Value {
    json!({
        "messages": [{ "role": "user", "content": prompt }], "max_tokens": max_tokens, "temperature": 0,
        "cache_prompt": false,
    })
}

/// Text, finish reason and usage of an answer, streamed or not.
fn gist(answer: &Value) -> (String, Value, Value) {
    let text = |choice: &Value| {
        let text = [
            &choice["message"]["content"],
            &choice["delta"]["content"],
            &choice["text"],
        ];
        text.into_iter().find_map(Value::as_str).unwrap_or_default().to_owned()
    };
    let one = std::slice::from_ref(answer);
    let events = answer.as_array().map_or(one, Vec::as_slice);
    let all = events.iter().map(|event| text(&event["choices"][0])).collect();
    let last = |pointer: &str| {
        events
            .iter()
            .rev()
            .filter_map(|event| event.pointer(pointer))
            .find(|it| !it.is_null())
    };
    let usage = last("/usage").map(|usage| json!([usage["prompt_tokens"], usage["completion_tokens"]]));
    (
        all,
        last("/choices/0/finish_reason").cloned().unwrap_or_default(),
        usage.unwrap_or_default(),
    )
}

async fn in_rounds(proxy: &Proxy, how: &str) {
    proxy.shows(how, PATIENCE, |status| status["verification"] == how).await;
}

/// What `tightwad verify` says of the drafted answers, if it finds that there are some, and that all are equal.
#[track_caller]
fn verified(target: &str, proxy: &Proxy, options: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
    command.args(["verify", "--json", "--target", target, "--proxy", proxy.url()]);
    command.args(options).stdin(Stdio::null());
    let output = command.env_remove("TIGHTWAD_CONFIG").output().expect("it starts");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}{report:#}");
    report
}

// Fan-out

/// A stock llama-server, a drafter, and the proxy before them.
struct Stage {
    target: LlamaServer,
    draft: LlamaServer,
    proxy: Proxy,
}

async fn fanning_out(target: &LlamaServer, draft: Option<&str>) -> Proxy {
    let upstream = Upstream::at(target.url());
    let proxy = Proxy::before(upstream, draft.map(Upstream::at), VerificationMode::FanOut).await;
    proxy
        .shows("fan-out", PATIENCE, |status| {
            status["verification"] == "fan-out" && (draft.is_none() || status["reason"].is_null())
        })
        .await;
    proxy
}

async fn stage() -> MutexGuard<'static, Stage> {
    static STAGE: OnceCell<Mutex<Stage>> = OnceCell::const_new();
    let stage = STAGE.get_or_init(|| async {
        let (model_of_target, model_of_draft) = (target(), model("tightwad-tiny-draft-f16.gguf"));
        let (target, draft) = tokio::join!(
            LlamaServer::start(&model_of_target, &STOCK),
            LlamaServer::start(&model_of_draft, &DRAFT)
        );
        let proxy = fanning_out(&target, Some(draft.url())).await;
        Mutex::new(Stage { target, draft, proxy })
    });
    stage.await.lock().await
}

/// The same answer must come from the target and through the proxy.
async fn same(target: &LlamaServer, proxy: &Proxy, path: &str, body: &Value) -> Record {
    let plain = target.post(path, body).await;
    let (answer, record) = proxy.post(path, body).await;
    assert_eq!(gist(&answer), gist(&plain), "{path} {body}: {record:?}");
    record
}

#[tokio::test]
async fn a_stock_llama_server_says_the_same_in_rounds() {
    let stage = stage().await;
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        let raw = format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n");
        let options = json!({ "stream": true, "stream_options": { "include_usage": true } });
        let options = if i % 2 == 0 { options } else { json!({}) };
        let completion = json!({ "prompt": raw, "max_tokens": 60, "temperature": 0, "cache_prompt": false });
        for (path, body) in [(CHAT, chat(prompt, 60)), (COMPLETIONS, completion)] {
            let record = same(&stage.target, &stage.proxy, path, &with(body, options.clone())).await;
            assert!(record.steps > 0, "it is not the target that answered: {record:?}");
        }
    }
}

#[tokio::test]
async fn a_stock_llama_server_verifies_drafts_and_takes_fewer_rounds_than_tokens() {
    let stage = stage().await;
    let client = tightwad::upstream::LlamaServer::new(stage.target.url(), None).expect("a client");
    let rounds = FanOut::new(client);
    let sampling = Map::from_iter([("temperature".to_owned(), json!(0))]);
    let raw = "<|im_start|>user\nExplain recursion.<|im_end|>\n<|im_start|>assistant\n";
    let prompt = stage.target.tokenize(raw).await;
    let verify = async |context: &[i32], draft: &[i32], n| {
        let ask = VerifyRequest {
            answer: "one",
            context,
            draft,
            n,
            sampling: &sampling,
        };
        rounds.verify(ask).await.expect("a verdict")
    };
    let own = verify(&prompt, &[], 41).await.next;
    assert_eq!(own.len(), 41);
    // Four tokens at a time, of which every eleventh is wrong.
    let (mut said, mut asked) = (0, 0);
    while said < 41 {
        let context = [&prompt[..], &own[..said]].concat();
        let mut draft = own[said..].iter().copied().take(4).collect::<Vec<i32>>();
        let mut right = draft.len();
        for (i, token) in draft.iter_mut().enumerate() {
            if (said + i) % 11 == 10 {
                *token += 1;
                right = right.min(i);
            }
        }
        if draft.is_empty() {
            break;
        }
        let verdict = verify(&context, &draft, 1).await;
        assert_eq!((verdict.judged, verdict.accepted), (draft.len(), right));
        if let Some(next) = own.get(said + right) {
            assert_eq!(verdict.next, [*next]);
        }
        said += right + 1;
        asked += 1;
    }
    assert!(asked <= 14, "{asked} rounds for 41 tokens");
}

#[tokio::test]
async fn stop_strings_and_limits_end_the_answer_where_the_target_would() {
    let stage = stage().await;
    let whole = stage.target.post(CHAT, &chat("Explain recursion.", 60)).await;
    let text = gist(&whole).0;
    let words: Vec<&str> = text.split_whitespace().collect();
    let stops = [
        json!(words[5]),
        json!([format!("{} {}", words[8], words[9]), "never there"]),
        json!([&text[20..23]]),
    ];
    for stream in [false, true] {
        for stop in &stops {
            let body = with(
                chat("Explain recursion.", 60),
                json!({ "stop": stop, "stream": stream }),
            );
            same(&stage.target, &stage.proxy, CHAT, &body).await;
        }
        for max_tokens in [1, 2, 7] {
            let body = with(chat("Explain recursion.", max_tokens), json!({ "stream": stream }));
            let record = same(&stage.target, &stage.proxy, CHAT, &body).await;
            assert_eq!(record.generated, u64::from(max_tokens), "{record:?}");
        }
    }
}

#[tokio::test]
async fn what_rounds_cannot_do_the_target_does_itself() {
    let stage = stage().await;
    for more in [
        json!({ "temperature": 0.8, "seed": 7 }),
        json!({ "logprobs": true }),
        json!({ "response_format": { "type": "json_object" } }),
        json!({ "repeat_penalty": 1.1 }),
    ] {
        let body = with(chat("Who are you?", 20), more);
        let record = same(&stage.target, &stage.proxy, CHAT, &body).await;
        assert_eq!(record.steps, 0, "{body}: {record:?}");
    }
    let (status, answer, _) = stage
        .proxy
        .send(CHAT, &json!({ "messages": 5, "temperature": 0 }))
        .await;
    assert!(status >= 400, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_compares_what_a_stock_llama_server_says_in_rounds() {
    let model_of_draft = model("tightwad-tiny-draft-f16.gguf");
    let (target, draft) = tokio::join!(
        LlamaServer::far_target(&STOCK),
        LlamaServer::start(&model_of_draft, &DRAFT)
    );
    let proxy = fanning_out(&target, Some(draft.url())).await;
    // On a busy machine the drafts for a few short answers may all come too late.
    let accepted = (0..5).any(|_| {
        let report = verified(target.url(), &proxy, &["--count", "3", "--max-tokens", "32"]);
        report["accepted"].as_u64() > Some(0)
    });
    assert!(accepted, "no draft was accepted");
}

#[tokio::test]
async fn any_drafter_leaves_the_text_as_it_is() {
    let stage = stage().await;
    for draft in [
        FakeDrafter::nonsense(&stage.draft).await,
        FakeDrafter::hangs(&stage.draft).await,
        FakeDrafter::breaks_off(&stage.draft).await,
        FakeDrafter::ends_at_once(&stage.draft).await,
    ] {
        let proxy = fanning_out(&stage.target, Some(&draft.url())).await;
        let record = same(&stage.target, &proxy, CHAT, &chat("List the days of the week.", 50)).await;
        assert!(record.steps > 0, "{record:?}");
    }
    let alone = fanning_out(&stage.target, None).await;
    let record = same(&stage.target, &alone, CHAT, &chat("List the days of the week.", 50)).await;
    assert!(record.steps > 0, "{record:?}");
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_target() {
    let stage = stage().await;
    let body = with(chat("Tell me a story about a robot.", 900), json!({ "stream": true }));
    let (id, request) = stage.proxy.request(CHAT, &body);
    let mut stream = request.send().await.expect("an answer").bytes_stream();
    assert!(stream.next().await.is_some_and(|chunk| chunk.is_ok()));
    drop(stream);
    let idle = eventually(Duration::from_secs(5), || async {
        match stage.target.busy_slots().await {
            0 => Ok(()),
            busy => Err(busy),
        }
    });
    idle.await.expect("no slot is busy");
    assert_eq!(stage.proxy.record(&id).await.outcome, "cancelled");
}

#[tokio::test]
async fn a_way_to_verify_that_the_target_has_not_is_refused_with_what_to_do() {
    let target = LlamaServer::start(&target(), &["-np", "1"]).await;
    for (mode, words) in [
        (VerificationMode::FanOut, "-np 5"),
        (VerificationMode::Scored, "needs vLLM or SGLang"),
        (VerificationMode::Auto, "--spec-draft-external-max"),
        (VerificationMode::None, "`proxy.verification` is none"),
    ] {
        let proxy = Proxy::before(Upstream::at(target.url()), None, mode).await;
        let status = proxy
            .shows(words, PATIENCE, |status| {
                status["reason"].as_str().is_some_and(|reason| reason.contains(words))
            })
            .await;
        assert_eq!(status["verification"], "none", "{status:#}");
        let (_, record) = proxy.post(CHAT, &chat("Who are you?", 5)).await;
        assert_eq!(record.steps, 0, "{record:?}");
    }
}

#[tokio::test]
async fn a_drafter_with_another_vocabulary_is_not_used_and_the_status_says_so() {
    let (model_of_target, model_of_draft) = (target(), model("tightwad-tiny-draft-othervocab-f16.gguf"));
    let (target, draft) = tokio::join!(
        LlamaServer::start(&model_of_target, &STOCK),
        LlamaServer::start(&model_of_draft, &DRAFT)
    );
    let upstream = Upstream::at(target.url());
    let proxy = Proxy::before(upstream, Some(Upstream::at(draft.url())), VerificationMode::FanOut).await;
    in_rounds(&proxy, "fan-out").await;
    is_not_used(&proxy, "could draft as text only").await;
    same(&target, &proxy, CHAT, &chat("Who are you?", 5)).await;
}

/// The status says why the only drafter cannot be used, though it is up.
async fn is_not_used(proxy: &Proxy, why: &str) {
    let says = |value: &Value| value.as_str().is_some_and(|text| text.contains(why));
    let status = proxy
        .shows(why, PATIENCE, |status| {
            says(&status["drafts"][0]["problem"]) && says(&status["reason"])
        })
        .await;
    assert_eq!(status["drafts"][0]["healthy"], true, "{status:#}");
}

// Scored

async fn scoring(server: &FakeUpstream, backend: Backend, draft: Option<&FakeUpstream>) -> Proxy {
    let upstream = Upstream {
        backend,
        ..Upstream::at(server.url())
    };
    let draft = draft.map(|draft| Upstream::at(draft.url()));
    let proxy = Proxy::before(upstream, draft.clone(), VerificationMode::Auto).await;
    in_rounds(&proxy, "scored").await;
    if draft.is_some() {
        proxy
            .shows("a drafter", PATIENCE, |status| {
                status["drafts"][0]["healthy"] == true && status["reason"].is_null()
            })
            .await;
    }
    proxy
}

/// The story is told whole, and in parts that stop strings and limits leave of it.
async fn tells_the_story(proxy: &Proxy, drafted: bool) {
    for stream in [false, true] {
        let options = json!({ "stream": stream });
        let options = if stream {
            with(options, json!({ "stream_options": { "include_usage": true } }))
        } else {
            options
        };
        let n_prompt = "Hello".len() + 2;
        let (answer, record) = proxy.post(CHAT, &with(chat("Hello", 300), options.clone())).await;
        let usage = json!([n_prompt, STORY.len() + 1]);
        assert_eq!(gist(&answer), (STORY.to_owned(), json!("stop"), usage), "{record:?}");
        assert_eq!(record.generated, STORY.len() as u64 + 1, "{record:?}");
        if drafted {
            assert!(
                record.accepted > 20 && record.steps * 2 < record.generated,
                "{record:?}"
            );
        }
        // Ends inside of the fox.
        let fox = STORY.find('🦊').expect("a fox");
        let body = with(chat("Hello", u32::try_from(fox + 2).expect("short")), options.clone());
        let (answer, _) = proxy.post(CHAT, &body).await;
        let usage = json!([n_prompt, fox + 2]);
        assert_eq!(gist(&answer), (STORY[..fox].to_owned(), json!("length"), usage));

        let body = with(
            chat("Hello", 300),
            with(options, json!({ "stop": ["fox says:", "[1"] })),
        );
        let (answer, _) = proxy.post(CHAT, &body).await;
        let end = STORY.find("fox says:").expect("it is there");
        let usage = json!([n_prompt, end + "fox says:".len()]);
        assert_eq!(gist(&answer), (STORY[..end].to_owned(), json!("stop"), usage));
    }
}

#[tokio::test]
async fn vllm_is_asked_for_the_likeliest_tokens_and_says_the_same_in_fewer_steps() {
    let (server, draft) = tokio::join!(fake_scoring::vllm(Quirks::default()), fake_scoring::drafter());
    let proxy = scoring(&server, Backend::Vllm, Some(&draft)).await;
    tells_the_story(&proxy, true).await;
    // The same again: what the first answers have cached must not be read for rows.
    tells_the_story(&proxy, true).await;
    let named = with(chat("Hello", 300), json!({ "model": "fake" }));
    let (answer, _) = proxy.post(CHAT, &named).await;
    assert_eq!((gist(&answer).0.as_str(), &answer["model"]), (STORY, &json!("fake")));
    let seen = server.seen();
    assert!(
        seen.iter().all(|seen| seen.target != CHAT),
        "an answer was not made in rounds"
    );
}

#[tokio::test]
async fn a_drafter_that_tells_text_only_is_not_used_and_the_status_says_so() {
    let (server, draft) = tokio::join!(fake_scoring::vllm(Quirks::default()), fake_scoring::drafter());
    for backend in [Backend::Openai, Backend::Vllm, Backend::Sglang] {
        let target = Upstream {
            backend: Backend::Vllm,
            ..Upstream::at(server.url())
        };
        let draft = Upstream {
            backend,
            model_name: Some("small".into()),
            ..Upstream::at(draft.url())
        };
        let proxy = Proxy::before(target, Some(draft), VerificationMode::Auto).await;
        in_rounds(&proxy, "scored").await;
        is_not_used(&proxy, "drafts as text").await;
        tells_the_story(&proxy, false).await;
    }
    assert!(
        draft
            .seen()
            .iter()
            .all(|seen| seen.target != "/completion" && seen.target != COMPLETIONS)
    );
}

#[tokio::test]
async fn what_the_server_has_cached_of_a_draft_is_not_taken_for_its_verdict() {
    let draft = fake_scoring::drafter().await;
    // In the first answer a bracket is not known to be ordinary; where it lies in a block of the cache depends on the prompt.
    for n in 36..40 {
        let server = fake_scoring::vllm(Quirks::default()).await;
        let proxy = scoring(&server, Backend::Vllm, Some(&draft)).await;
        let (answer, record) = proxy.post(CHAT, &chat(&"Hello, Tightwad! ".repeat(3)[..n], 300)).await;
        assert_eq!(gist(&answer).0, STORY, "{n}: {record:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_counts_the_drafts_of_answers_in_rounds() {
    let (server, draft) = tokio::join!(fake_scoring::vllm(Quirks::default()), fake_scoring::drafter());
    let proxy = scoring(&server, Backend::Vllm, Some(&draft)).await;
    let report = verified(&server.url(), &proxy, &["--count", "2"]);
    let drafted = |at: usize| report["temperatures"][at]["accepted"].as_u64().expect("a count");
    // Of two answers; with chance there are no rounds.
    assert!(drafted(0) > 40 && drafted(1) == 0, "{report:#}");
}

#[tokio::test]
async fn an_adapter_of_the_model_answers_for_itself() {
    let server = fake_scoring::vllm(Quirks::default()).await;
    let proxy = scoring(&server, Backend::Vllm, None).await;
    let adapted = with(chat("Hello", 300), json!({ "model": "adapted" }));
    let (answer, record) = proxy.post(CHAT, &adapted).await;
    assert_eq!((gist(&answer).0.as_str(), record.steps), ("by the server itself", 0));
}

#[tokio::test]
async fn an_old_vllm_is_asked_through_its_completions() {
    let draft = fake_scoring::drafter().await;
    let old = Quirks {
        old: true,
        ..Quirks::default()
    };
    let server = fake_scoring::vllm(old).await;
    let proxy = scoring(&server, Backend::Vllm, Some(&draft)).await;
    tells_the_story(&proxy, true).await;
    let alone = scoring(&server, Backend::Vllm, None).await;
    tells_the_story(&alone, false).await;
}

#[tokio::test]
async fn rows_that_go_missing_cost_speed_and_nothing_else() {
    let draft = fake_scoring::drafter().await;
    let later = Quirks {
        rowless_later: true,
        ..Quirks::default()
    };
    let server = fake_scoring::vllm(later).await;
    let proxy = scoring(&server, Backend::Vllm, Some(&draft)).await;
    tells_the_story(&proxy, false).await;
}

#[tokio::test]
async fn a_server_that_does_not_verify_exactly_is_left_alone_and_the_status_says_so() {
    for (backend, quirks, words) in [
        (
            Backend::Vllm,
            Quirks {
                bent: true,
                ..Quirks::default()
            },
            "--generation-config vllm",
        ),
        (
            Backend::Vllm,
            Quirks {
                rowless: true,
                ..Quirks::default()
            },
            "a right draft",
        ),
        (
            Backend::Sglang,
            Quirks {
                bent: true,
                ..Quirks::default()
            },
            "--sampling-defaults openai",
        ),
    ] {
        let server = match backend {
            Backend::Sglang => fake_scoring::sglang(quirks).await,
            _ => fake_scoring::vllm(quirks).await,
        };
        let upstream = Upstream {
            backend,
            ..Upstream::at(server.url())
        };
        let proxy = Proxy::before(upstream, None, VerificationMode::Auto).await;
        let status = proxy
            .shows(words, PATIENCE, |status| {
                status["reason"].as_str().is_some_and(|reason| reason.contains(words))
            })
            .await;
        assert_eq!(status["verification"], "none", "{status:#}");
        let (answer, record) = proxy.post(CHAT, &chat("Hello", 100)).await;
        assert_eq!((gist(&answer).0.as_str(), record.steps), ("by the server itself", 0));
    }
}

#[tokio::test]
async fn sglang_is_asked_for_the_likeliest_tokens_and_says_the_same_in_fewer_steps() {
    let (server, draft) = tokio::join!(fake_scoring::sglang(Quirks::default()), fake_scoring::drafter());
    let proxy = scoring(&server, Backend::Sglang, Some(&draft)).await;
    tells_the_story(&proxy, true).await;
    // How long an answer may be is not known here without a limit.
    let mut body = chat("Hello", 1);
    body.as_object_mut().expect("an object").remove("max_tokens");
    let (answer, record) = proxy.post(CHAT, &body).await;
    assert_eq!((gist(&answer).0.as_str(), record.steps), ("by the server itself", 0));
}

#[tokio::test]
async fn an_old_sglang_answers_chats_itself_and_completions_in_rounds() {
    let old = Quirks {
        old: true,
        ..Quirks::default()
    };
    let server = fake_scoring::sglang(old).await;
    let proxy = scoring(&server, Backend::Sglang, None).await;
    let (answer, record) = proxy.post(CHAT, &chat("Hello", 100)).await;
    assert_eq!((gist(&answer).0.as_str(), record.steps), ("by the server itself", 0));
    let body = json!({ "prompt": "la la la la la la", "temperature": 0 });
    let (answer, record) = proxy.post(COMPLETIONS, &body).await;
    assert_eq!(
        gist(&answer),
        (" la la la la la ".into(), json!("length"), json!([17, 16]))
    );
    assert!(record.accepted > 0, "{record:?}");
}

#[tokio::test]
async fn an_error_in_the_middle_travels_in_the_stream_and_a_whole_answer_is_left_to_the_target() {
    // Four are the trial's.
    let fails = Quirks {
        fails_from: Some(8),
        ..Quirks::default()
    };
    let server = fake_scoring::vllm(fails).await;
    let proxy = scoring(&server, Backend::Vllm, None).await;
    let body = with(chat("Hello", 300), json!({ "stream": true }));
    let (status, events, record) = proxy.send(CHAT, &body).await;
    assert_eq!((status, record.outcome.as_str()), (200, "failed"), "{events}");
    let events = events.as_array().expect("events");
    let error = events.last().map(|event| event["error"]["message"].to_string());
    assert!(error.is_some_and(|error| error.contains("out of memory")), "{events:?}");
    let told = gist(&json!(events)).0;
    assert!(!told.is_empty() && STORY.starts_with(&told), "{told}");
    let (answer, record) = proxy.post(CHAT, &chat("Hello", 300)).await;
    assert_eq!(gist(&answer).0, "by the server itself", "{record:?}");
}

#[tokio::test]
async fn a_server_that_is_gone_is_said_to_be() {
    let server = fake_scoring::vllm(Quirks::default()).await;
    let proxy = scoring(&server, Backend::Vllm, None).await;
    drop(server);
    let (status, answer, _) = proxy.send(CHAT, &chat("Hello", 300)).await;
    assert_eq!(status, 503, "{answer}");
    proxy
        .shows("that it is down", PATIENCE, |status| {
            status["verification"] == "none" && status["target"]["healthy"] == false
        })
        .await;
}
