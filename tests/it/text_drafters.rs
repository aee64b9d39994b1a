//! Drafters that tell text: another vocabulary, Ollama, OpenAI's completion API. What they say becomes tokens of the
//! target, and the answer is the target's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::harness::fake_ollama::{self, FakeOllama, MODEL, piece};
use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, json as whole, stream_head};
use crate::harness::llama_server::{LlamaServer, model};
use crate::harness::proxy::{Proxy, Record};
use crate::harness::request::with;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tightwad::config::{Backend, Secret, Upstream};
use tightwad::upstream::{StreamEnd, TextPiece, TextServer};

const CHAT: &str = "/v1/chat/completions";
const TARGET: [&str; 8] = [
    "--spec-draft-external-max",
    "8",
    "-np",
    "1",
    "-c",
    "2048",
    "--threads-http",
    "16",
];
const DRAFT: [&str; 5] = ["-np", "2", "-c", "2048", "--metrics"];

/// Of these the small model with another vocabulary knows most, too.
const PROMPTS: [&str; 3] = [
    "Count from 1 to 40.",
    "Write a short story about a dog.",
    "Write a short story about a fox.",
];

async fn start_target() -> LlamaServer {
    LlamaServer::far_target(&TARGET).await
}

async fn start_draft(name: &str) -> LlamaServer {
    LlamaServer::start(&model(name), &DRAFT).await
}

fn server(url: &str, backend: Backend) -> Upstream {
    Upstream {
        backend,
        ..Upstream::at(url)
    }
}

fn chat(prompt: &str) -> Value {
    json!({
        "messages": [{ "role": "user", "content": prompt }], "max_tokens": 80, "temperature": 0, "cache_prompt": false,
    })
}

fn chats() -> Vec<Value> {
    PROMPTS.map(chat).to_vec()
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("a text")
}

/// The target's answer comes through the proxy, complete.
async fn same(target: &LlamaServer, proxy: &Proxy, body: &Value) -> Record {
    let plain = target.post(CHAT, body).await;
    let (answer, record) = proxy.post(CHAT, body).await;
    assert_eq!(content(&answer), content(&plain), "{body}: {record:?}");
    assert_eq!(
        answer["usage"]["completion_tokens"],
        plain["usage"]["completion_tokens"]
    );
    record
}

#[derive(Debug, Default)]
struct Sum {
    steps: u64,
    drafted: u64,
    accepted: u64,
    generated: u64,
}

/// Asks for everything and adds up.
async fn sum(target: &LlamaServer, proxy: &Proxy, bodies: &[Value]) -> Sum {
    let mut sum = Sum::default();
    for body in bodies {
        let record = same(target, proxy, body).await;
        sum.steps += record.steps;
        sum.drafted += record.drafted;
        sum.accepted += record.accepted;
        sum.generated += record.generated;
    }
    sum
}

/// Asks until the drafts are good enough: on a busy machine they may come too late, and a proxy that has seen that drafts
/// no more for a while.
async fn drafts_well(target: &LlamaServer, draft: Upstream, bodies: &[Value], is_enough: impl Fn(&Sum) -> bool) {
    let mut seen = Vec::new();
    while seen.len() < 6 {
        let proxy = Proxy::drafting_with(target.url(), [draft.clone()]).await;
        let sum = sum(target, &proxy, bodies).await;
        if is_enough(&sum) {
            return;
        }
        seen.push(sum);
    }
    panic!("{seen:?}");
}

#[tokio::test]
async fn a_llama_server_with_another_vocabulary_drafts_as_text() {
    let (target, draft) = tokio::join!(start_target(), start_draft("tightwad-tiny-draft-othervocab-f16.gguf"));
    drafts_well(&target, server(draft.url(), Backend::Llamacpp), &chats(), |sum| {
        sum.accepted * 3 > sum.drafted && sum.steps * 10 < sum.generated * 9
    })
    .await;
    assert!(draft.generated().await > 0);
}

#[tokio::test]
async fn a_server_drafts_by_openais_completion_api() {
    let (target, draft) = tokio::join!(start_target(), start_draft("tightwad-tiny-draft-f16.gguf"));
    drafts_well(&target, server(draft.url(), Backend::Openai), &chats(), |sum| {
        sum.accepted * 10 > sum.drafted * 5 && sum.steps * 10 < sum.generated * 8
    })
    .await;
    assert!(draft.generated().await > 0);
}

/// The chat as the target reads it, and its answer.
async fn whole_text(target: &LlamaServer, body: &Value) -> String {
    let prompt = target.post("/apply-template", body).await;
    let answer = target.post(CHAT, body).await;
    format!("{}{}", prompt["prompt"].as_str().expect("a prompt"), content(&answer))
}

#[tokio::test]
async fn what_ollama_says_is_offered_in_the_tokens_that_the_target_would_choose() {
    let target = start_target().await;
    let mut texts = Vec::new();
    for prompt in PROMPTS {
        texts.push(whole_text(&target, &chat(prompt)).await);
    }
    let ollama = FakeOllama::knowing(texts).await;
    drafts_well(&target, server(&ollama.url(), Backend::Ollama), &chats(), |sum| {
        sum.accepted * 100 > sum.drafted * 95 && sum.steps * 10 < sum.generated * 6
    })
    .await;
    for (seen, request) in ollama.asked() {
        assert!(request.raw, "no template is put around the text");
        assert_eq!(request.options["temperature"], 0);
        assert_eq!(seen.header("authorization"), None);
    }
    let (asked, connections) = ollama.server.on_connections("/api/generate");
    // The others had enough words before the end of the answer.
    let given_up = ollama.server.left();
    assert!(
        connections <= given_up + asked * 3 / 4,
        "{asked} drafts, {given_up} given up, on {connections} connections"
    );
}

#[tokio::test]
async fn text_with_characters_of_many_tokens_is_drafted_whole() {
    let target = start_target().await;
    // The target is made to say what it would not, in characters that are bytes to it: it has no choice of tokens.
    let said = "\u{65e5}\u{672c}\u{8a9e}\u{1f600}\u{1f389}\u{e9}\u{8a9e}\u{672c}\u{65e5}".repeat(3);
    let grammar = format!("root ::= \"{said}\"");
    let body = with(
        chat("Sag etwas \u{1f600} \u{65e5}\u{672c}\u{8a9e}!"),
        json!({ "grammar": grammar, "max_tokens": 200 }),
    );
    let text = whole_text(&target, &body).await;
    assert!(text.ends_with(&said), "{text}");
    let ollama = FakeOllama::knowing(vec![text]).await;
    drafts_well(&target, server(&ollama.url(), Backend::Ollama), &[body], |sum| {
        sum.accepted * 100 > sum.drafted * 90 && sum.steps * 10 < sum.generated * 7
    })
    .await;
}

#[tokio::test]
async fn an_ollama_that_fails_costs_the_answer_nothing() {
    let target = start_target().await;
    let broken = vec![
        fake_ollama::head(),
        piece("1,"),
        chunk("{\"response\": \"2, \n"),
        Act::EndChunks,
    ];
    let error = chunk("{\"error\":\"llama runner process has terminated\",\"status\":500}\n");
    let faults = [
        ("hangs", vec![Act::Hang]),
        ("stalls", vec![fake_ollama::head(), piece("1, 2, 3"), Act::Hang]),
        ("breaks off", vec![fake_ollama::head(), piece("1, 2, 3"), Act::Close]),
        ("closes", vec![Act::Close]),
        ("sends broken JSON", broken),
        (
            "sends an error in its stream",
            vec![fake_ollama::head(), piece("1, 2"), error, Act::EndChunks],
        ),
        (
            "is overloaded",
            whole("503 Service Unavailable", r#"{"error":"server busy"}"#),
        ),
        (
            "sends half a character",
            fake_ollama::answer(&["1, \u{fffd}".into(), "2, ".into()], "length"),
        ),
        ("says nothing", fake_ollama::answer(&[], "length")),
        ("thinks that all is said", fake_ollama::answer(&[], "stop")),
        (
            "says something else",
            fake_ollama::answer(&vec!["\u{1f600} no ".into(); 20], "length"),
        ),
    ];
    for (what, acts) in faults {
        let ollama = FakeOllama::at_first(acts.clone(), acts).await;
        let proxy = Proxy::drafting_with(target.url(), [server(&ollama.url(), Backend::Ollama)]).await;
        for prompt in &PROMPTS[..2] {
            let record = same(&target, &proxy, &chat(prompt)).await;
            assert!(record.generated > 0, "{what}: {record:?}");
        }
        let asked = ollama.asked().len();
        // Twice per step at most, for 160 tokens.
        assert!((1..320).contains(&asked), "{what}: asked {asked} times");
    }
}

#[tokio::test]
async fn an_ollama_that_goes_away_is_used_again_when_it_is_back() {
    let target = start_target().await;
    let text = whole_text(&target, &chat(PROMPTS[0])).await;
    let ollama = FakeOllama::knowing(vec![text]).await;
    let proxy = Proxy::drafting_with(target.url(), [server(&ollama.url(), Backend::Ollama)]).await;
    ollama.has_model.store(false, Ordering::SeqCst);
    let status = proxy
        .shows("that the model is missing", Duration::from_secs(5), |status| {
            status["drafts"][0]["healthy"] == false
        })
        .await;
    let problem = status["drafts"][0]["problem"].as_str().expect("a problem");
    assert!(problem.contains(&format!("model '{MODEL}' not found")), "{problem}");
    same(&target, &proxy, &chat(PROMPTS[0])).await;
    ollama.has_model.store(true, Ordering::SeqCst);
    proxy
        .shows("that it is back", Duration::from_secs(5), |status| {
            status["drafts"][0]["healthy"] == true
        })
        .await;
    let asked = ollama.asked().len();
    // Where drafts came too late before, the next answers may go without.
    for _ in 0..8 {
        same(&target, &proxy, &chat(PROMPTS[0])).await;
        if ollama.asked().len() > asked {
            return;
        }
    }
    panic!("it is not asked again");
}

#[tokio::test]
async fn a_server_with_several_models_needs_the_name_of_one() {
    let target = start_target().await;
    let models = json!({ "object": "list", "data": [{ "id": "a" }, { "id": "b" }] }).to_string();
    let openai = FakeUpstream::start(move |seen| match seen.target.as_str() {
        "/v1/models" => whole("200 OK", &models),
        _ => whole("400 Bad Request", r#"{"error":{"message":"no"}}"#),
    })
    .await;
    let proxy = Proxy::start_with(target.url(), Some(server(&openai.url(), Backend::Openai))).await;
    let status = proxy
        .shows("what is missing", Duration::from_secs(10), |status| {
            status["drafts"][0]["problem"]
                .as_str()
                .is_some_and(|problem| problem.contains("`model_name`"))
        })
        .await;
    assert_eq!(status["drafts"][0]["healthy"], false, "{status}");
    same(&target, &proxy, &chat(PROMPTS[0])).await;
}

#[tokio::test]
async fn the_only_model_of_a_server_is_the_one_that_it_has_now() {
    let restarted = Arc::new(AtomicBool::new(false));
    let model = {
        let restarted = restarted.clone();
        move || if restarted.load(Ordering::SeqCst) { "new" } else { "old" }
    };
    let upstream = FakeUpstream::start(move |seen| {
        if seen.target == "/v1/models" {
            let models = json!({ "object": "list", "data": [{ "id": model() }] });
            return whole("200 OK", &models.to_string());
        }
        let body: Value = serde_json::from_slice(&seen.body).expect("JSON");
        if body["model"] != model() {
            return whole("404 Not Found", r#"{"error":{"message":"The model does not exist."}}"#);
        }
        vec![stream_head(), chunk("data: [DONE]\n\n"), Act::EndChunks]
    })
    .await;
    let server = TextServer::new(&upstream.url(), None, Backend::Vllm, None).expect("a client");
    let drafts = || async {
        server
            .complete("One,".into(), 7, 0)
            .all(|piece| std::future::ready(piece.is_ok()))
            .await
    };
    server.ready().await.expect("it is there");
    assert!(drafts().await);
    restarted.store(true, Ordering::SeqCst);
    assert!(!drafts().await);
    server.ready().await.expect("it is back");
    assert!(drafts().await);
}

#[tokio::test]
async fn an_openai_server_is_sent_the_key_and_the_model_and_its_bytes_may_be_cut_anywhere() {
    let events = "data: {\"choices\":[{\"text\":\" gr\u{fc}n\u{1f600}\",\"finish_reason\":null}]}\n\n\
                  data: {\"choices\":[{\"text\":\".\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    let mut acts = vec![stream_head()];
    acts.extend(events.as_bytes().chunks(1).map(chunk));
    acts.push(Act::EndChunks);
    for backend in [Backend::Openai, Backend::Vllm, Backend::Sglang] {
        let upstream = FakeUpstream::start({
            let acts = acts.clone();
            move |_| acts.clone()
        })
        .await;
        let key = Some(Secret::new("the-key"));
        let server = TextServer::new(&upstream.url(), key, backend, Some("small".into())).expect("a client");
        let pieces: Vec<_> = server.complete("Wie ist es?".into(), 7, 0).collect().await;
        let pieces: Vec<TextPiece> = pieces.into_iter().map(|piece| piece.expect("no error")).collect();
        let text = |text: &str| TextPiece::Text(text.to_owned());
        assert_eq!(
            pieces,
            [
                text(" gr\u{fc}n\u{1f600}"),
                text("."),
                TextPiece::End(StreamEnd::EndOfText)
            ]
        );
        let seen = upstream.only();
        assert_eq!(
            (seen.method.as_str(), seen.target.as_str()),
            ("POST", "/v1/completions")
        );
        assert_eq!(seen.header("authorization"), Some("Bearer the-key"));
        let body: Value = serde_json::from_slice(&seen.body).expect("JSON");
        let expected = json!({
            "model": "small", "prompt": "Wie ist es?", "max_tokens": 7, "temperature": 0, "stream": true,
        });
        assert_eq!(body, expected);
    }
}
