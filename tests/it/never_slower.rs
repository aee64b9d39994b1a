//! Whatever the drafter is like, answers come about as fast as from the target alone: a measurement.
//!
//! The same questions go directly to the target and through the proxy, in turns, and whoever was first is last the next
//! time, so that a machine that slows down slows both of them down. `cargo test --release --test it never_slower:: -- --ignored
//! --nocapture --test-threads 1` prints a line for each drafter.

use std::fmt;
use std::time::Duration;

use crate::harness::fake_drafter::FakeDrafter;
use crate::harness::gguf::deep_target;
use crate::harness::llama_server::{LlamaServer, model};
use crate::harness::proxy::Proxy;
use crate::harness::random_model;
use serde_json::json;
use tightwad::upstream::ChatServer;
use tightwad::upstream::chat::{Answer, Message, Wishes};

/// Blocks that the target has more than the tiny model: a step takes some tens of milliseconds.
const BLOCKS: u32 = 240;
const TARGET: [&str; 4] = ["--spec-draft-external-max", "8", "-np", "1"];
const DRAFT: [&str; 2] = ["-np", "1"];
/// Servers with these share a core.
const ONE_CORE: [&str; 6] = ["-t", "1", "--cpu-mask", "1", "--cpu-strict", "1"];
/// What the models answer at length.
const PROMPTS: [&str; 5] = [
    "Explain recursion.",
    "Write a short story about a dog.",
    "Write a Python function that checks whether a number is prime.",
    "Tell me a story about a robot.",
    "Explain garbage collection.",
];
const MAX_TOKENS: u32 = 80;
/// Least share of the target's own speed that is left with a drafter of no use.
const LEAST: f64 = 0.97;
/// Generating with a drafter is measured for at least so long; what is only to compare with, for less.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_secs(20);

/// Tokens after the first of each answer, and the time that they took.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    tokens: u64,
    duration: Duration,
}

impl Pace {
    fn add(&mut self, answer: &Answer) {
        self.tokens += answer.tokens.saturating_sub(1);
        self.duration += answer.duration;
    }

    fn per_second(self) -> f64 {
        self.tokens as f64 / self.duration.as_secs_f64()
    }
}

/// What came of one drafter.
#[derive(Debug, Default)]
struct Measured {
    plain: Pace,
    drafted_for: Pace,
    drafted: u64,
    accepted: u64,
}

impl Measured {
    fn ratio(&self) -> f64 {
        self.drafted_for.per_second() / self.plain.per_second()
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "plain {:.2} tok/s, with it {:.2} tok/s, ratio {:.3}; {} tokens in {:.0} s, {} drafted, {} accepted",
            self.plain.per_second(),
            self.drafted_for.per_second(),
            self.ratio(),
            self.drafted_for.tokens,
            self.drafted_for.duration.as_secs_f64(),
            self.drafted,
            self.accepted,
        )
    }
}

/// The target, which has answered already: a model that was just loaded is slow at first.
struct Stage {
    target: LlamaServer,
    /// Of an answer of its own.
    pace: Pace,
}

impl Stage {
    async fn set() -> Self {
        Self::with(&TARGET).await
    }

    async fn with(args: &[&str]) -> Self {
        let target = LlamaServer::start(&deep_target(BLOCKS), args).await;
        let alone = server(target.url());
        ask(&alone, PROMPTS[0]).await;
        let mut pace = Pace::default();
        pace.add(&ask(&alone, PROMPTS[0]).await);
        Self { target, pace }
    }

    /// The tokens of all prompts, each with the target's answer.
    async fn texts(&self) -> Vec<Vec<u32>> {
        let mut texts = Vec::new();
        for prompt in PROMPTS {
            let messages = json!({ "messages": [Message::user(prompt)] });
            let templated = self.target.post("/apply-template", &messages).await;
            let content = json!({ "content": templated["prompt"], "add_special": true, "parse_special": true });
            let tokens = self.target.post("/tokenize", &content).await["tokens"].clone();
            let body = json!({
                "prompt": tokens, "n_predict": MAX_TOKENS, "temperature": 0, "cache_prompt": false, "return_tokens": true,
            });
            let answer = self.target.post("/completion", &body).await["tokens"].clone();
            let [mut text, answer] =
                [tokens, answer].map(|tokens| serde_json::from_value::<Vec<u32>>(tokens).expect("tokens"));
            text.extend(answer);
            texts.push(text);
        }
        texts
    }

    /// Asks with and without the drafter until so long was generated with it. The first answers count: what the proxy has
    /// to learn of a drafter is part of its price.
    async fn measure(&self, name: &str, draft: Option<&str>, at_least: Duration) -> Measured {
        let proxy = Proxy::start(self.target.url(), draft).await;
        proxy
            .shows("what it thinks of the drafter", Duration::from_secs(20), |status| {
                let mut drafts = status["drafts"].as_array().into_iter().flatten();
                let reason = status["reason"].as_str().unwrap_or_default();
                status["verification"] == "attached"
                    && drafts.all(|draft| draft["healthy"] == true)
                    && !reason.contains("being compared")
            })
            .await;
        proxy.settles().await;
        let (alone, through) = (server(self.target.url()), server(proxy.url()));
        let mut measured = Measured::default();
        for (prompt, turn) in PROMPTS.into_iter().cycle().zip(0..) {
            if measured.drafted_for.duration >= at_least {
                break;
            }
            let (plain, drafted_for) = if turn % 2 == 0 {
                let plain = ask(&alone, prompt).await;
                (plain, ask(&through, prompt).await)
            } else {
                let drafted_for = ask(&through, prompt).await;
                (ask(&alone, prompt).await, drafted_for)
            };
            assert_eq!(drafted_for.text, plain.text, "{name}: {prompt}");
            measured.plain.add(&plain);
            measured.drafted_for.add(&drafted_for);
            let counts = drafted_for.drafting.expect("a llama-server's counts");
            measured.drafted += counts.drafted;
            measured.accepted += counts.accepted;
        }
        println!("{name}: {measured}");
        measured
    }

    async fn costs_nothing(&self, name: &str, draft: &str) {
        let measured = self.measure(name, Some(draft), LONG).await;
        assert!(measured.ratio() >= LEAST, "{name}: {measured}");
    }
}

fn server(url: &str) -> ChatServer {
    ChatServer::new(url, None, None).expect("a client")
}

async fn ask(server: &ChatServer, prompt: &str) -> Answer {
    let wishes = Wishes {
        max_tokens: Some(MAX_TOKENS),
        temperature: Some(0.0),
        forget_prompt: true,
        ..Wishes::default()
    };
    let answer = server.chat(&[Message::user(prompt)], None, wishes, |_| Ok(())).await;
    answer.unwrap_or_else(|error| panic!("{prompt}: {error}"))
}

#[tokio::test]
#[ignore = "a measurement of some minutes"]
async fn random_weights_cost_nothing() {
    let stage = Stage::set().await;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let weights = folder.path().join("random.gguf");
    random_model::sliding_window(&weights);
    let draft = LlamaServer::start(&weights, &DRAFT).await;
    stage.costs_nothing("random weights", draft.url()).await;
}

#[tokio::test]
#[ignore = "a measurement of some minutes"]
async fn another_vocabulary_costs_nothing() {
    let stage = Stage::set().await;
    let draft = LlamaServer::start(&model("tightwad-tiny-draft-othervocab-f16.gguf"), &DRAFT).await;
    stage.costs_nothing("another vocabulary", draft.url()).await;
}

#[tokio::test]
#[ignore = "a measurement of some minutes"]
async fn a_drafter_that_hangs_costs_nothing() {
    let stage = Stage::set().await;
    let draft = FakeDrafter::hangs(&stage.target).await;
    stage.costs_nothing("hung", &draft.url()).await;
    assert!(draft.asked() > 0);
}

#[tokio::test]
#[ignore = "a measurement of some minutes"]
async fn a_drafter_ten_times_slower_than_the_target_costs_nothing() {
    let stage = Stage::set().await;
    let pause = Duration::from_secs_f64(10.0 / stage.pace.per_second());
    let draft = FakeDrafter::dawdles(&stage.target, stage.texts().await, pause).await;
    let name = format!("right, a token each {} ms", pause.as_millis());
    stage.costs_nothing(&name, &draft.url()).await;
    assert!(draft.asked() > 0);
}

/// Right, and as much work as the target itself: whatever it drafts is taken from the target.
#[tokio::test]
#[ignore = "a measurement of some minutes"]
async fn a_drafter_as_slow_as_the_target_on_the_same_core_costs_nothing() {
    let stage = Stage::with(&[&TARGET[..], &ONE_CORE].concat()).await;
    let draft = LlamaServer::start(&deep_target(BLOCKS), &[&DRAFT[..], &ONE_CORE].concat()).await;
    stage
        .costs_nothing("as slow as the target, on its core", draft.url())
        .await;
}

/// To compare with: text that comes again is drafted beside every drafter.
#[tokio::test]
#[ignore = "a measurement of some minutes"]
async fn no_drafter_costs_nothing() {
    let stage = Stage::set().await;
    let measured = stage.measure("none, only text that comes again", None, SHORT).await;
    assert!(measured.ratio() >= LEAST, "{measured}");
}

/// To compare with: this target is worth drafting for, and the measurement shows it.
#[tokio::test]
#[ignore = "a measurement of some minutes"]
async fn a_good_drafter_gains() {
    let stage = Stage::set().await;
    let draft = LlamaServer::start(&model("tightwad-tiny-draft-f16.gguf"), &DRAFT).await;
    let measured = stage.measure("good", Some(draft.url()), SHORT).await;
    assert!(measured.ratio() > 1.2, "{measured}");
}
