//! Random schedules of requests at several slots: each drafted answer is the one that the same request gets alone, from a server
//! that drafts nothing. Some servers also draft by their own means.
//!
//! The suite runs a few schedules per model. The long form is
//! `TIGHTWAD_SCHEDULES=300 cargo test --test it draft_schedules:: -- --nocapture`.

use std::path::Path;
use std::time::Duration;

use crate::harness::drafter::{Drafter, new_key};
use crate::harness::llama_server::LlamaServer;
use crate::harness::random_model;
use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

/// The seed of all schedules.
const SEED: u64 = 15;
/// Schedules per model without `TIGHTWAD_SCHEDULES`.
const FEW: usize = 8;
/// Schedules that one server runs in turn, with what the earlier ones left in its slots.
const PER_SERVER: usize = 2;
/// Log probabilities that differ by more come from another state: rounding differs with the batch, but by much less.
const TOLERANCE: f64 = 2e-3;
/// Ordinary tokens of the tiny models' vocabulary.
const TOKENS: std::ops::Range<i32> = 300..4000;

/// One request of a schedule.
struct Planned {
    body: Value,
    /// When it arrives.
    delay: Duration,
    /// When its client goes away, counted from its arrival.
    patience: Option<Duration>,
    /// How long the target waits for each offer; no drafter attaches without.
    hold: Option<Duration>,
    seed: u64,
}

/// Counts of one model.
#[derive(Debug, Default)]
struct Tally {
    compared: usize,
    /// Answers that part at two tokens that are equally likely but for rounding.
    ties: usize,
    drafted: u64,
    accepted: u64,
    largest_difference: f64,
    wrong: Vec<String>,
}

fn how_many() -> usize {
    std::env::var("TIGHTWAD_SCHEDULES").map_or(FEW, |n| n.parse().expect("TIGHTWAD_SCHEDULES is a number"))
}

/// Server arguments: 2 to 8 slots, one cache or a cache per slot, batches of 32 to 512 tokens.
fn server_args(random: &mut StdRng) -> Vec<String> {
    let n_slots = random.random_range(2..=8);
    let n_batch = *[32, 64, 128, 256, 512].choose(random).expect("a batch size");
    let n_micro = n_batch.min(*[32, 64, 128, 512].choose(random).expect("a micro batch size"));
    let is_unified = random.random_bool(0.6);
    let unified = if is_unified { "--kv-unified" } else { "--no-kv-unified" };
    let args = format!(
        "--spec-draft-external-max 16 -np {n_slots} {unified} -c {} -b {n_batch} -ub {n_micro} -fa off -ctk f32 -ctv f32 \
         --threads-http 64",
        n_slots * 2048,
    );
    args.split_whitespace().map(str::to_owned).collect()
}

fn random_tokens(random: &mut StdRng, n: usize) -> Vec<i32> {
    (0..n).map(|_| random.random_range(TOKENS)).collect()
}

/// Requests that arrive within a quarter of a second. `earlier` are prompts that may be continued.
fn schedule(random: &mut StdRng, n_slots: usize, earlier: &mut Vec<Vec<i32>>) -> Vec<Planned> {
    let n_requests = random.random_range(2..=n_slots + 2);
    let requests = (0..n_requests).map(|_| {
        let n_prompt = if random.random_bool(0.5) { 60 } else { 1500 };
        let n_prompt = random.random_range(1..=n_prompt);
        let mut prompt = random_tokens(random, n_prompt);
        if random.random_bool(0.3)
            && let Some(earlier) = earlier.choose(random)
        {
            let n_kept = random.random_range(0..=earlier.len()).min(n_prompt);
            prompt[..n_kept].copy_from_slice(&earlier[..n_kept]);
        }
        earlier.push(prompt.clone());
        let mut body = json!({
            "prompt": prompt, "n_predict": random.random_range(4..=60), "n_probs": 3, "ignore_eos": true,
            "cache_prompt": random.random_bool(0.7), "return_tokens": true,
            "temperature": if random.random_bool(0.5) { 0.0 } else { 1.0 }, "seed": random.random_range(1..1000),
        });
        if random.random_bool(0.5) {
            body["id_slot"] = json!(random.random_range(0..n_slots));
        }
        Planned {
            body,
            delay: Duration::from_millis(random.random_range(0..250)),
            patience: random
                .random_bool(0.15)
                .then(|| Duration::from_millis(random.random_range(1..200))),
            hold: random
                .random_bool(0.7)
                .then(|| Duration::from_millis(random.random_range(0..100))),
            seed: random.random(),
        }
    });
    requests.collect()
}

/// Offers 1 to 16 tokens at a time: those of `text` as far as the last one that is right, then others.
async fn draft(drafter: &Drafter, text: &[i32], hold: Duration, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut n_committed = 0;
    let mut offer = Vec::new();
    loop {
        let call = json!({
            "pos": n_committed, "tokens": offer, "n_min": offer.len().max(1), "hold_us": hold.as_micros(), "wait": true,
        });
        let answer = drafter.call(call).await;
        n_committed += answer.tokens.len();
        if answer.state == "done" || answer.state == "refused" {
            return;
        }
        let n_offered = random.random_range(1..=16);
        let n_right = random.random_range(0..=n_offered);
        let rest = text.get(n_committed..).unwrap_or_default();
        offer = rest[..n_right.min(rest.len())].to_vec();
        while offer.len() < n_offered {
            let right = rest.get(offer.len());
            offer.push(random.random_range(TOKENS));
            if offer.last() == right {
                offer.pop();
            }
        }
    }
}

/// The answer, unless the client went away.
async fn answered(server: &LlamaServer, planned: &Planned, alone: &Value) -> Option<Value> {
    tokio::time::sleep(planned.delay).await;
    let mut text: Vec<i32> = serde_json::from_value(planned.body["prompt"].clone()).expect("a prompt");
    text.extend(tokens_of(alone));
    let key = new_key();
    let drafter = Drafter::new(server, &key);
    let request = async {
        let key = planned.hold.map(|_| key.as_str());
        let (status, answer) = server.send("/completion", &planned.body, key).await;
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let drafting = async {
        if let Some(hold) = planned.hold {
            draft(&drafter, &text, hold, planned.seed).await;
        }
        std::future::pending::<()>().await;
    };
    let patience = async {
        match planned.patience {
            Some(patience) => tokio::time::sleep(patience).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        answer = request => Some(answer),
        () = drafting => None,
        () = patience => None,
    }
}

fn tokens_of(answer: &Value) -> Vec<i32> {
    serde_json::from_value(answer["tokens"].clone()).expect("tokens")
}

impl Tally {
    /// Compare `answer` to the one of the same request `alone`, token by token and by the log probabilities of the three
    /// most likely ones.
    fn compare(&mut self, context: &str, alone: &Value, answer: &Value) {
        self.compared += 1;
        self.drafted += answer["timings"]["draft_n"].as_u64().unwrap_or_default();
        self.accepted += answer["timings"]["draft_n_accepted"].as_u64().unwrap_or_default();
        // llama-server leaves out those of a token after which the text ends inside a character; of all tokens, with some texts.
        let steps = |answer: &Value| {
            let steps = answer["completion_probabilities"].as_array();
            steps.cloned().unwrap_or_default()
        };
        let texts = (tokens_of(alone), tokens_of(answer));
        let (alone, answer) = (steps(alone), steps(answer));
        for (i, (expected, got)) in alone.iter().zip(&answer).enumerate() {
            let logprobs = |step: &Value| -> Vec<f64> {
                let top = step["top_logprobs"].as_array().expect("the most likely ones");
                top.iter()
                    .map(|one| one["logprob"].as_f64().expect("a number"))
                    .collect()
            };
            let differences = logprobs(expected)
                .into_iter()
                .zip(logprobs(got))
                .map(|(a, b)| (a - b).abs());
            let difference = differences.fold(0.0, f64::max);
            self.largest_difference = self.largest_difference.max(difference);
            if difference > TOLERANCE {
                self.wrong
                    .push(format!("{context}: token {i} of {}, off by {difference}", alone.len()));
                return;
            }
            if expected["id"] != got["id"] {
                self.ties += 1;
                return;
            }
        }
        if texts.0 != texts.1 {
            self.wrong
                .push(format!("{context}: the tokens {:?}, not {:?}", texts.1, texts.0));
        }
    }
}

/// `own` are the arguments for the server's own drafts.
async fn assert_exact(name: &str, write_model: fn(&Path), own: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    write_model(&path);
    let mut random = StdRng::seed_from_u64(SEED);
    let n_schedules = how_many();
    let mut tally = Tally::default();
    for first in (0..n_schedules).step_by(PER_SERVER) {
        let args = server_args(&mut random);
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        let plain = if own.is_empty() {
            None
        } else {
            let plain = LlamaServer::start(&path, &args).await;
            args.extend(own.split(' '));
            Some(plain)
        };
        let server = LlamaServer::start(&path, &args).await;
        let props = server.get("/props").await;
        let n_slots = props["total_slots"]
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .expect("slots");
        let mut earlier = Vec::new();
        for i in first..n_schedules.min(first + PER_SERVER) {
            let requests = schedule(&mut random, n_slots, &mut earlier);
            let mut alone = Vec::new();
            for planned in &requests {
                let body = crate::harness::request::with(
                    planned.body.clone(),
                    json!({ "cache_prompt": false, "id_slot": -1 }),
                );
                if let Some(plain) = &plain {
                    alone.push(plain.post("/completion", &body).await);
                    // n-grams of the answer are remembered
                    let answer = server.post("/completion", &body).await;
                    let context = format!("schedule {i}, alone, {}", args.join(" "));
                    tally.compare(&context, alone.last().expect("the plain answer"), &answer);
                } else {
                    alone.push(server.post("/completion", &body).await);
                }
            }
            let answers = join_all(
                requests
                    .iter()
                    .zip(&alone)
                    .map(|(planned, alone)| answered(&server, planned, alone)),
            );
            for (j, (answer, alone)) in answers.await.into_iter().zip(&alone).enumerate() {
                if let Some(answer) = answer {
                    let prompt = requests[j].body["prompt"].as_array().map_or(0, Vec::len);
                    let context = format!(
                        "schedule {i}, request {j} of {} ({prompt} tokens), {}",
                        requests.len(),
                        args.join(" ")
                    );
                    tally.compare(&context, alone, &answer);
                }
            }
        }
    }
    println!(
        "{name}: {} wrong of {} answers in {n_schedules} schedules, {} of {} drafted tokens accepted, {} ties, log probabilities differ by {:.1e} at most",
        tally.wrong.len(),
        tally.compared,
        tally.accepted,
        tally.drafted,
        tally.ties,
        tally.largest_difference,
    );
    assert!(tally.wrong.is_empty(), "{name}:\n{}", tally.wrong.join("\n"));
    assert!(tally.accepted > 0 && tally.accepted < tally.drafted, "{tally:?}");
    assert!(tally.ties * 50 <= tally.compared, "{tally:?}");
}

/// Slot 2 generates, slot 1 is drafted for with two right and four wrong tokens at a time, and in the middle of it a long
/// prompt arrives at slot 0: a pass of several micro batches, with the drafted slot in the first one.
async fn assert_a_prompt_changes_nothing(write_model: fn(&Path)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    write_model(&path);
    let args = "--spec-draft-external-max 8 -np 3 --kv-unified -c 8192 -b 64 -ub 64 -fa off -ctk f32 -ctv f32";
    let server = LlamaServer::start(&path, &args.split(' ').collect::<Vec<_>>()).await;
    let mut random = StdRng::seed_from_u64(SEED);
    for _ in 0..3 {
        let bodies = [(0, 900, 8), (1, 8, 60), (2, 8, 200)].map(|(slot, n_prompt, n_predict)| {
            json!({
                "prompt": random_tokens(&mut random, n_prompt), "n_predict": n_predict, "id_slot": slot, "seed": 1,
                "temperature": 1.0, "cache_prompt": false, "return_tokens": true, "ignore_eos": true,
            })
        });
        let mut alone = Vec::new();
        for body in &bodies {
            alone.push(tokens_of(&server.post("/completion", body).await));
        }
        let mut text: Vec<i32> = serde_json::from_value(bodies[1]["prompt"].clone()).expect("a prompt");
        text.extend(&alone[1]);
        let (started, starts) = tokio::sync::oneshot::channel();
        let mut started = Some(started);
        let late = async {
            starts.await.expect("the drafted answer has begun");
            server.post("/completion", &bodies[0]).await
        };
        let next = |committed: &[i32]| {
            if committed.len() > 20
                && let Some(started) = started.take()
            {
                started.send(()).expect("the prompt is waiting");
            }
            let right = text.iter().skip(committed.len()).take(2).copied();
            right.chain([1000, 1001, 1002, 1003]).collect()
        };
        let (late, drafted, other) = tokio::join!(
            late,
            crate::harness::drafter::drafted(&server, "/completion", &bodies[1], next),
            server.post("/completion", &bodies[2])
        );
        assert_eq!(drafted.1.committed, text, "the drafted answer");
        assert_eq!(tokens_of(&late), alone[0], "the answer to the long prompt");
        assert_eq!(tokens_of(&other), alone[2], "the answer of the other slot");
    }
}

#[tokio::test]
async fn a_prompt_in_mid_answer_leaves_a_drafted_slot_with_short_convolutions_alone() {
    assert_a_prompt_changes_nothing(random_model::hybrid).await;
}

#[tokio::test]
async fn a_prompt_in_mid_answer_leaves_a_drafted_slot_with_linear_attention_alone() {
    assert_a_prompt_changes_nothing(random_model::linear_attention).await;
}

#[tokio::test]
async fn a_prompt_in_mid_answer_leaves_a_drafted_slot_with_state_spaces_alone() {
    assert_a_prompt_changes_nothing(random_model::state_space).await;
}

#[tokio::test]
async fn drafted_answers_of_a_model_with_short_convolutions_are_exact_in_any_schedule() {
    assert_exact("lfm2", random_model::hybrid, "").await;
}

#[tokio::test]
async fn drafted_answers_of_a_model_with_linear_attention_are_exact_in_any_schedule() {
    assert_exact("qwen35", random_model::linear_attention, "").await;
}

#[tokio::test]
async fn drafted_answers_of_a_model_with_state_spaces_are_exact_in_any_schedule() {
    assert_exact("nemotron_h", random_model::state_space, "").await;
}

#[tokio::test]
async fn drafted_answers_of_a_model_with_a_sliding_window_are_exact_in_any_schedule() {
    assert_exact("gemma3", random_model::sliding_window, "").await;
}

/// Guesses from a single token, so often wrong, and longer than the snapshots of a recurrent state.
const NGRAM: &str =
    "--spec-type ngram-mod --spec-ngram-mod-n-match 1 --spec-ngram-mod-n-min 1 --spec-ngram-mod-n-max 24";

#[tokio::test]
async fn drafts_of_n_grams_and_others_are_exact_with_short_convolutions() {
    assert_exact("lfm2, n-grams", random_model::hybrid, NGRAM).await;
}

#[tokio::test]
async fn drafts_of_n_grams_and_others_are_exact_with_a_state_that_is_restored_whole() {
    assert_exact("mamba, n-grams", random_model::recurrent, NGRAM).await;
}

#[tokio::test]
async fn drafts_of_a_prediction_layer_and_others_are_exact_with_linear_attention() {
    let own = "--spec-type draft-mtp --spec-draft-n-max 4";
    assert_exact("qwen35, MTP", random_model::multi_token_prediction, own).await;
}

#[tokio::test]
async fn drafts_of_n_grams_and_a_prediction_layer_are_exact_with_linear_attention() {
    let own = format!("{NGRAM} --spec-type draft-mtp --spec-draft-n-max 4");
    assert_exact("qwen35, n-grams and MTP", random_model::multi_token_prediction, &own).await;
}

#[tokio::test]
async fn drafts_of_n_grams_and_others_are_exact_with_a_sliding_window() {
    assert_exact("gemma3, n-grams", random_model::sliding_window, NGRAM).await;
}
