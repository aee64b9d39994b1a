//! Servers behind the proxy that are broken or hostile: whatever they answer, the proxy lives, goes on watching, and does
//! not grow.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::harness::fake_upstream::{Act, FakeUpstream, Seen, json as whole, send, stream_head};
use crate::harness::llama_server::{Program, free_port};
use crate::harness::tuned_proxy::TunedProxy;
use crate::harness::wait::eventually;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tightwad::config::{Backend, Upstream};
use tightwad::engine;
use tightwad::upstream::{DraftPiece, LlamaServer, TextPiece, TextServer, WrittenTokens};
use tokio::time::timeout;

/// What the proxy may hold in memory, whatever the servers behind it send. Without requests it holds less than 20 MB.
const MOST_MEMORY: u64 = 120 << 20;

/// Answers as a small llama-server that takes drafts and never has a completion to draft for.
fn llama_server(seen: &Seen) -> Vec<Act> {
    let body: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
    match seen.target.as_str() {
        "/health" => whole("200 OK", r#"{"status":"ok"}"#),
        "/props" => whole("200 OK", &props(&json!(2)).to_string()),
        "/slots" => whole("200 OK", "[]"),
        "/v1/models" => whole("200 OK", r#"{"data":[{"id":"tiny","meta":{"n_vocab":3}}]}"#),
        "/detokenize" => whole("200 OK", r#"{"content":"abc"}"#),
        "/tokenize" => {
            let words = body["content"].as_str().unwrap_or_default().split(' ');
            let tokens: Vec<usize> = words.enumerate().map(|(number, _)| number % 3).collect();
            whole("200 OK", &json!({ "tokens": tokens }).to_string())
        }
        "/draft" => whole(
            "200 OK",
            &json!({ "state": "done", "pos": body["pos"], "tokens": [] }).to_string(),
        ),
        "/completion" => whole(
            "200 OK",
            r#"{"tokens":[1],"stop":true,"stop_type":"eos","tokens_predicted":1}"#,
        ),
        "/v1/chat/completions" => whole("200 OK", r#"{"choices":[]}"#),
        _ => whole("404 Not Found", "{}"),
    }
}

fn props(total_slots: &Value) -> Value {
    json!({
        "total_slots": total_slots, "model_alias": "tiny", "draft_external_max": 8,
        "default_generation_settings": { "n_ctx": 4096 },
    })
}

/// A target that generates one token and then nothing more, so that a drafter has all the time that it wants.
fn waits_for_drafts(seen: &Seen) -> Vec<Act> {
    let body: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
    let is_the_clients = seen
        .header("x-draft-key")
        .is_some_and(|_| seen.target == "/v1/chat/completions");
    match (seen.target.as_str(), body["pos"].as_u64()) {
        _ if is_the_clients => vec![Act::Wait(Duration::from_secs(4)), send(""), Act::Close],
        ("/draft", Some(0)) if body["wait"] == true => {
            let answer = json!({
                "state": "running", "pos": 0, "tokens": [1, 2, 1, 2, 0], "n_prompt": 4, "n_max": 8, "n_steps": 1,
                "step_batch": 1, "step_us": 50_000,
            });
            whole("200 OK", &answer.to_string())
        }
        ("/draft", _) if body["wait"] == true => vec![Act::Hang],
        ("/draft", _) => {
            let answer = json!({
                "state": "running", "pos": body["pos"], "tokens": [], "n_prompt": 4, "n_max": 8, "n_steps": 1,
                "step_batch": 1, "step_us": 50_000,
            });
            whole("200 OK", &answer.to_string())
        }
        _ => llama_server(seen),
    }
}

/// A proxy as a process of its own, so that its memory can be looked at.
struct Process {
    program: Program,
    url: String,
    _folder: tempfile::TempDir,
}

impl Process {
    async fn start(target: &str, draft: &str, backend: &str) -> Self {
        let port = free_port();
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("tightwad.yaml");
        let yaml = format!(
            "proxy: {{ port: {port}, draft: {{ url: \"{draft}\", backend: {backend} }}, target: {{ url: \"{target}\" }} }}\n"
        );
        std::fs::write(&config, yaml).unwrap();
        let args = [
            "TIGHTWAD_LOG=trace",
            env!("CARGO_BIN_EXE_tightwad"),
            "-c",
            config.to_str().unwrap(),
            "proxy",
            "start",
        ];
        let proxy = Self {
            program: Program::start(Path::new("env"), &args),
            url: format!("http://127.0.0.1:{port}"),
            _folder: folder,
        };
        proxy.shows("that it serves", |_| true).await;
        proxy
    }

    async fn status(&self) -> Option<Value> {
        let answer = reqwest::get(format!("{}/v1/tightwad/status", self.url)).await.ok()?;
        answer.json().await.ok()
    }

    async fn shows(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        eventually(Duration::from_secs(20), || async {
            self.status()
                .await
                .filter(|status| is_so(status))
                .ok_or(self.status().await)
        })
        .await
        .unwrap_or_else(|last| panic!("{what}: {last:#?}\n{}", self.program.log()))
    }

    /// The most memory that it ever held, in bytes.
    fn most_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.program.pid())).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("a size");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib << 10
    }

    #[track_caller]
    fn is_small(&self) {
        let memory = self.most_memory();
        assert!(memory < MOST_MEMORY, "{} MB", memory >> 20);
    }

    fn chat(&self, body: &Value) -> reqwest::RequestBuilder {
        reqwest::Client::new()
            .post(format!("{}/v1/chat/completions", self.url))
            .json(body)
    }
}

fn is_usable(status: &Value) -> bool {
    let draft = &status["drafts"][0];
    draft["healthy"] == true && draft["problem"].is_null() && status["measuring"] == false
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drafter_that_tells_absurd_numbers_of_slots_ends_neither_the_proxy_nor_its_watching() {
    let target = FakeUpstream::start(llama_server).await;
    for slots in [
        json!(4_000_000_000_u64),
        json!(9_000_000_000_000_000_000_u64),
        json!(2_000_000_000),
    ] {
        let is_well = Arc::new(AtomicBool::new(false));
        let drafter = FakeUpstream::start({
            let is_well = is_well.clone();
            move |seen| match seen.target.as_str() {
                "/props" if !is_well.load(Ordering::SeqCst) => whole("200 OK", &props(&slots).to_string()),
                _ => llama_server(seen),
            }
        })
        .await;
        let proxy = Process::start(&target.url(), &drafter.url(), "llamacpp").await;
        proxy
            .shows("that the drafter was looked at", |status| {
                status["drafts"][0]["healthy"] == true
            })
            .await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        is_well.store(true, Ordering::SeqCst);
        proxy.shows("that the drafter is usable", is_usable).await;
        drop(drafter);
        proxy
            .shows("that the drafter is gone", |status| {
                status["drafts"][0]["healthy"] == false
            })
            .await;
        proxy.is_small();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_tells_absurd_numbers_ends_neither_the_proxy_nor_its_watching() {
    let drafter = FakeUpstream::start(llama_server).await;
    let huge = 9_000_000_000_000_000_000_u64;
    for (path, answer) in [
        (
            "/props",
            json!({ "total_slots": huge, "draft_external_max": huge, "default_generation_settings": { "n_ctx": huge } }),
        ),
        (
            "/props",
            json!({ "total_slots": 4, "draft_external_max": 2_000_000_000 }),
        ),
        (
            "/draft",
            json!({ "state": "running", "pos": huge, "tokens": [1], "n_steps": huge, "step_n": huge, "step_batch": huge, "n_max": huge }),
        ),
        (
            "/draft",
            json!({ "state": "running", "tokens": [1], "step_n": u64::MAX, "step_us": u64::MAX }),
        ),
        (
            "/draft",
            json!({ "state": "running", "tokens": [1], "step_n": 2_000_000_000, "step_batch": 2_000_000_001 }),
        ),
        (
            "/v1/models",
            json!({ "data": [{ "id": "tiny", "meta": { "n_vocab": huge } }] }),
        ),
    ] {
        let is_well = Arc::new(AtomicBool::new(false));
        let target = FakeUpstream::start({
            let is_well = is_well.clone();
            let steps = AtomicU64::new(0);
            move |seen| {
                if seen.target != path || is_well.load(Ordering::SeqCst) {
                    return llama_server(seen);
                }
                let mut answer = answer.clone();
                if path == "/draft" {
                    let body: Value = serde_json::from_slice(&seen.body).unwrap();
                    let steps = steps.fetch_add(1, Ordering::SeqCst);
                    answer["n_steps"] = json!(steps);
                    answer["pos"] = answer.get("pos").unwrap_or(&body["pos"]).clone();
                    if steps > 100 {
                        answer["state"] = json!("done");
                    }
                }
                whole("200 OK", &answer.to_string())
            }
        })
        .await;
        let proxy = Process::start(&target.url(), &drafter.url(), "llamacpp").await;
        proxy
            .shows("that the target was looked at", |status| {
                status["target"]["healthy"] == true
            })
            .await;
        let body = json!({ "messages": [] });
        for _ in 0..2 {
            let answer = proxy.chat(&body).send().await.expect("an answer");
            assert_eq!(answer.status(), 200);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        is_well.store(true, Ordering::SeqCst);
        proxy.shows("that the drafter is usable", is_usable).await;
        drop(target);
        proxy
            .shows("that the target is gone", |status| status["target"]["healthy"] == false)
            .await;
        proxy.is_small();
    }
}

fn endless() -> Vec<Act> {
    vec![
        send("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"),
        Act::Forever(vec![b' '; 256 << 10]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_an_end_is_given_up_and_is_not_kept_in_memory() {
    for path in ["/health", "/props", "/v1/models", "/detokenize", "/completion"] {
        let target = FakeUpstream::start(waits_for_drafts).await;
        let is_well = Arc::new(AtomicBool::new(false));
        let drafter = FakeUpstream::start({
            let is_well = is_well.clone();
            move |seen| {
                if seen.target == path && !is_well.load(Ordering::SeqCst) {
                    endless()
                } else {
                    llama_server(seen)
                }
            }
        })
        .await;
        let proxy = Process::start(&target.url(), &drafter.url(), "llamacpp").await;
        drafter.has_seen(3).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        proxy.is_small();
        is_well.store(true, Ordering::SeqCst);
        proxy
            .shows("that the drafter is usable", |status| {
                status["drafts"][0]["healthy"] == true && status["drafts"][0]["problem"].is_null()
            })
            .await;
        proxy.is_small();
    }
}

/// A draft server that says this again and again.
async fn endless_drafter(forever: impl Into<Vec<u8>>) -> FakeUpstream {
    let forever = forever.into();
    FakeUpstream::start(move |_| vec![stream_head(), Act::Forever(forever.clone())]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_without_an_end_is_cut_at_what_was_asked_for() {
    let event = |tokens: &[u32]| {
        format!(
            "data: {}\n\n",
            json!({ "tokens": tokens, "stop": false, "tokens_predicted": 1 })
        )
    };
    let draft_of = |server: LlamaServer, at_once| async move {
        let pieces = server.draft(vec![1], &mut WrittenTokens::default(), 4, 0, at_once);
        timeout(Duration::from_secs(5), pieces.collect::<Vec<_>>())
            .await
            .expect("an end")
    };
    for forever in [event(&[7]), event(&[7, 7, 7]), event(&[7; 1000])] {
        let drafter = endless_drafter(forever).await;
        let pieces = draft_of(LlamaServer::new(&drafter.url(), None).unwrap(), false).await;
        let tokens = pieces.iter().flatten().map(|piece| match piece {
            DraftPiece::Tokens(tokens) => tokens.len(),
            DraftPiece::End { .. } => 0,
        });
        assert_eq!(tokens.sum::<usize>(), 4, "{pieces:?}");
        assert!(matches!(pieces.last(), Some(Ok(DraftPiece::End { .. }))), "{pieces:?}");
    }
    for at_once in [false, true] {
        let drafter = endless_drafter("data: ".to_owned() + &"x".repeat(64 << 10)).await;
        let pieces = draft_of(LlamaServer::new(&drafter.url(), None).unwrap(), at_once).await;
        let [Err(error)] = &pieces[..] else {
            panic!("{pieces:?}")
        };
        assert!(error.to_string().contains("longer than"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_without_an_end_from_a_drafter_is_cut_too() {
    let line = json!({ "response": "a".repeat(100), "done": false }).to_string();
    for (forever, is_cut) in [(line.clone() + "\n", true), (line, false)] {
        let drafter = endless_drafter(forever).await;
        let server = TextServer::new(&drafter.url(), None, Backend::Ollama, Some("tiny".to_owned())).unwrap();
        let pieces = timeout(
            Duration::from_secs(5),
            server.complete("so".to_owned(), 4, 0).collect::<Vec<_>>(),
        )
        .await;
        let pieces = pieces.expect("an end");
        assert_eq!(
            matches!(pieces.last(), Some(Ok(TextPiece::End(_)))),
            is_cut,
            "{:?}",
            pieces.last()
        );
        assert_eq!(matches!(pieces.last(), Some(Err(_))), !is_cut, "{:?}", pieces.last());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_leads_no_client_of_the_proxy_to_another_server() {
    let elsewhere = FakeUpstream::start(llama_server).await;
    let to = |url: &str, path: &str| {
        vec![send(format!(
            "HTTP/1.1 307 Temporary Redirect\r\nLocation: {url}{path}\r\nContent-Length: 0\r\n\r\n"
        ))]
    };
    for backend in ["llamacpp", "openai", "ollama"] {
        let url = elsewhere.url();
        let target = FakeUpstream::start(llama_server).await;
        let drafter = FakeUpstream::start(move |seen| to(&url, &seen.target)).await;
        let proxy = Process::start(&target.url(), &drafter.url(), backend).await;
        let status = proxy.shows("a problem", |status| {
            let problem = status["drafts"][0]["problem"].as_str();
            problem.is_some_and(|problem| problem.contains("redirect"))
        });
        let problem = status.await["drafts"][0]["problem"].clone();
        assert!(problem.as_str().unwrap().contains(&elsewhere.url()), "{problem}");
    }
    assert!(elsewhere.seen().is_empty(), "{:?}", elsewhere.seen());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prediction_is_read_no_further_than_the_context() {
    let target = FakeUpstream::start(waits_for_drafts).await;
    let drafter = FakeUpstream::start(llama_server).await;
    let proxy = Process::start(&target.url(), &drafter.url(), "llamacpp").await;
    proxy
        .shows("that the drafter is usable", |status| {
            status["verification"] == "attached"
        })
        .await;
    let before = proxy.most_memory();
    let body = json!({ "messages": [], "prediction": { "type": "content", "content": "so it is ".repeat(1_000_000) } });
    let _ = proxy.chat(&body).send().await;
    let tokenized = target
        .seen()
        .into_iter()
        .filter(|seen| seen.target == "/tokenize")
        .map(|seen| seen.body.len());
    let longest = tokenized.max().expect("the prediction is tokenized");
    assert!(
        longest < 100_000,
        "{longest} bytes of a prediction for a context of 4096 tokens"
    );
    let grown = proxy.most_memory() - before;
    // The request itself, as it came and in the making.
    assert!(grown < 60 << 20, "{} MB", grown >> 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_a_drafted_completion_is_not_logged() {
    let target = FakeUpstream::start(|seen| match seen.target.as_str() {
        "/draft" => {
            let body: Value = serde_json::from_slice(&seen.body).unwrap();
            let refused = json!({ "state": "refused", "pos": body["pos"], "tokens": [], "reason": "it has a picture" });
            whole("200 OK", &refused.to_string())
        }
        _ => waits_for_drafts(seen),
    })
    .await;
    let drafter = FakeUpstream::start(llama_server).await;
    let proxy = Process::start(&target.url(), &drafter.url(), "llamacpp").await;
    proxy
        .shows("that the drafter is usable", |status| {
            status["drafts"][0]["healthy"] == true
        })
        .await;
    let _ = proxy.chat(&json!({ "messages": [] })).send().await;
    let keys: Vec<String> = (target.seen().iter().filter_map(|seen| seen.header("x-draft-key")))
        .map(str::to_owned)
        .collect();
    assert!(!keys.is_empty());
    let log = proxy.program.log();
    assert!(log.contains("TRACE"), "{log}");
    for line in log.lines() {
        assert!(keys.iter().all(|key| !line.contains(key)), "{line}");
    }
}

/// A proxy whose target has to come back to its tasks within a second.
async fn serve(target: &str) -> String {
    let engine = engine::Settings {
        target: Some((Upstream::at(target), None)),
        stall_after: Duration::from_secs(1),
        ..engine::Settings::default()
    };
    TunedProxy::start(target, engine, |_| {}).await.url()
}

async fn becomes(url: &str, status: u16) {
    let ready = eventually(Duration::from_secs(20), || async {
        let answer = reqwest::get(format!("{url}/readyz"))
            .await
            .map_err(|error| error.to_string())?;
        if answer.status() == status {
            Ok(())
        } else {
            Err(format!("{answer:?}"))
        }
    });
    ready.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_answers_how_it_is_but_hangs_over_its_tasks_is_not_ready() {
    let hangs = Arc::new(AtomicBool::new(false));
    let target = FakeUpstream::start({
        let hangs = hangs.clone();
        move |seen| match seen.target.as_str() {
            "/slots" | "/v1/chat/completions" if hangs.load(Ordering::SeqCst) => vec![Act::Hang],
            _ => llama_server(seen),
        }
    })
    .await;
    let slots = || target.seen().iter().filter(|seen| seen.target == "/slots").count();
    let url = serve(&target.url()).await;
    becomes(&url, 200).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(slots(), 0, "a server that nobody uses may sleep");
    hangs.store(true, Ordering::SeqCst);
    let chat = reqwest::Client::new()
        .post(format!("{url}/v1/chat/completions"))
        .body("{}")
        .send();
    let chat = tokio::spawn(chat);
    let began = Instant::now();
    becomes(&url, 503).await;
    assert!(began.elapsed() > Duration::from_secs(1));
    // The client gives up, the target hangs on.
    chat.abort();
    tokio::time::sleep(Duration::from_secs(2)).await;
    becomes(&url, 503).await;
    hangs.store(false, Ordering::SeqCst);
    becomes(&url, 200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn measuring_ends_though_the_target_never_answers_a_drafter() {
    for hangs_at in ["/draft", "/completion"] {
        let target = FakeUpstream::start(move |seen| {
            if seen.target == hangs_at {
                vec![Act::Hang]
            } else {
                llama_server(seen)
            }
        })
        .await;
        let drafter = FakeUpstream::start(llama_server).await;
        let proxy = Process::start(&target.url(), &drafter.url(), "llamacpp").await;
        proxy
            .shows("that it can draft", |status| status["verification"] == "attached")
            .await;
        let measured = eventually(Duration::from_secs(40), || async {
            let status = proxy.status().await.unwrap();
            if status["measuring"] == false {
                Ok(())
            } else {
                Err(status)
            }
        });
        measured.await.unwrap();
    }
}
