//! A llama-server that drafts by its own means (n-grams, a draft model, MTP, EAGLE-3) beside an external drafter: the answers are
//! the plain ones, and the status counts the drafts of both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::harness::drafter::{Drafter, DrafterCounts, Followed, drafted, new_key, perfect};
use crate::harness::llama_server::{LlamaServer, essence, model};
use crate::harness::proxy::Proxy;
use crate::harness::random_model;
use crate::harness::request::with;
use futures_util::future::join_all;
use serde_json::{Value, json};

const EXTERNAL: &str = "draft-external";
/// The least rounding: a batch of several slots is not computed as a single one is.
const PRECISE: [&str; 6] = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"];
/// Log probabilities that differ by more come from another state.
const TOLERANCE: f64 = 1e-2;

const NGRAM: &str =
    "--spec-type ngram-mod --spec-ngram-mod-n-match 3 --spec-ngram-mod-n-min 1 --spec-ngram-mod-n-max 6";
/// Guesses from a single token, so often wrong, and up to 24 tokens long.
const LONG_NGRAM: &str =
    "--spec-type ngram-mod --spec-ngram-mod-n-match 1 --spec-ngram-mod-n-min 1 --spec-ngram-mod-n-max 24";

/// A target whose weights are not quantised: those of the other one amplify what the batch makes of a rounding.
fn target() -> PathBuf {
    model("tightwad-tiny-draft-f16.gguf")
}

/// Requests whose texts repeat themselves, greedy and sampled.
fn bodies() -> Vec<Value> {
    let prompts = [
        "one two three four one two three four one two three four one two",
        "Once upon a time there was a dog. Once upon a time there was a dog. Once upon",
        "def main():\n    print(1)\n    print(1)\n    print(1)\n",
        "a b a b a b a b a b a b a b",
    ];
    let sampling = [
        json!({ "temperature": 0 }),
        json!({ "temperature": 0.7, "seed": 7 }),
        json!({ "temperature": 0 }),
        json!({ "temperature": 1.0, "seed": 9, "repeat_penalty": 1.1 }),
    ];
    prompts
        .iter()
        .zip(sampling)
        .map(|(prompt, sampling)| {
            let body = json!({
                "prompt": prompt, "n_predict": 60, "cache_prompt": false, "ignore_eos": true, "return_tokens": true, "n_probs": 2,
            });
            with(body, sampling)
        })
        .collect()
}

/// Asserts that an answer is the plain one: the same text and tokens, and the same log probabilities but for rounding, which
/// differs with the batch.
fn assert_same(answer: &Value, plain: &Value, what: &str) {
    for field in ["content", "tokens", "stop_type"] {
        assert_eq!(answer[field], plain[field], "{what}");
    }
    let probabilities = |answer: &Value| -> Vec<(Value, f64)> {
        let tokens = answer["completion_probabilities"].as_array().expect("probabilities");
        let each = tokens.iter().map(|token| {
            let logprob = token["logprob"].as_f64().expect("a log probability");
            (token["id"].clone(), logprob)
        });
        each.collect()
    };
    let (all, plain) = (probabilities(answer), probabilities(plain));
    assert_eq!(all.len(), plain.len(), "{what}");
    for ((token, logprob), (plain_token, plain_logprob)) in all.iter().zip(&plain) {
        assert_eq!(token, plain_token, "{what}");
        assert!(
            (logprob - plain_logprob).abs() < TOLERANCE,
            "{what}: {logprob} and {plain_logprob}"
        );
    }
}

/// Offers in some stretches of the text only, and wrong tokens among them. The rest is left to the server.
fn in_stretches(text: &[i32]) -> impl FnMut(&[i32]) -> Vec<i32> + '_ {
    let mut right = perfect(text, 8);
    move |committed| {
        let n = committed.len();
        if n / 12 % 2 == 0 {
            return Vec::new();
        }
        let mut tokens = right(committed);
        for (i, token) in tokens.iter_mut().enumerate() {
            if (n + i) % 7 == 0 {
                *token = if *token == 1000 { 1001 } else { 1000 };
            }
        }
        tokens
    }
}

fn sum(all: &[Followed], name: &str) -> DrafterCounts {
    let mut sum = DrafterCounts::default();
    for counts in all.iter().filter_map(|followed| followed.last.drafters.get(name)) {
        sum.n_steps += counts.n_steps;
        sum.n_drafted += counts.n_drafted;
        sum.n_accepted += counts.n_accepted;
    }
    sum
}

/// The counts of a completion agree with each other and with what the server reports to the client.
fn assert_adds_up(answer: &Value, followed: &Followed) {
    let last = &followed.last;
    let drafters: &BTreeMap<_, _> = &last.drafters;
    let n_drafted: usize = drafters.values().map(|counts| counts.n_drafted).sum();
    let n_accepted: usize = drafters.values().map(|counts| counts.n_accepted).sum();
    let external = drafters.get(EXTERNAL).copied().unwrap_or_default();
    assert_eq!(
        (last.n_drafted, last.n_accepted),
        (external.n_drafted, external.n_accepted)
    );
    assert_eq!(
        answer["timings"]["draft_n"].as_u64().unwrap_or_default(),
        n_drafted as u64
    );
    assert_eq!(
        last.n_steps + n_accepted,
        60,
        "each step gives a token of its own: {last:?}"
    );
    for answer in &followed.answers {
        assert!(answer.step_by_accepted <= answer.step_by_n, "{answer:?}");
        let (n, accepted) = match answer.step_by.as_deref() {
            Some(EXTERNAL) => (answer.step_by_n, answer.step_by_accepted),
            _ => (0, 0),
        };
        assert_eq!((answer.step_n, answer.step_accepted), (n, accepted), "{answer:?}");
    }
}

/// Texts with drafts of the server (`own`), of an external drafter, and of both equal the plain ones, for 1 to 4 slots. Returns what
/// the status counted with both.
async fn assert_same_texts(model: &Path, own: &str, name: &str) -> [DrafterCounts; 2] {
    let bodies = bodies();
    let plain_server = LlamaServer::start(
        model,
        &[&PRECISE[..], &["-np", "1", "--spec-draft-external-max", "8"]].concat(),
    )
    .await;
    let mut plain = Vec::new();
    let mut texts = Vec::new();
    for body in &bodies {
        let (answer, followed) = drafted(&plain_server, "/completion", body, |_| Vec::new()).await;
        assert!(followed.last.drafters.is_empty(), "{:?}", followed.last);
        plain.push(answer);
        texts.push(followed.committed);
    }
    drop(plain_server);

    let mut counted = [DrafterCounts::default(); 2];
    for n_slots in 1..=4 {
        let args = format!("{own} --spec-draft-external-max 8 -np {n_slots} --kv-unified -c 4096 --threads-http 32");
        let args: Vec<_> = args.split_whitespace().chain(PRECISE).collect();
        let server = LlamaServer::start(model, &args).await;

        let alone = join_all(bodies.iter().map(|body| server.post("/completion", body))).await;
        for (answer, plain) in alone.iter().zip(&plain) {
            assert_same(answer, plain, &format!("{n_slots} slots, own drafts only"));
        }

        let both = bodies
            .iter()
            .zip(&texts)
            .map(|(body, text)| drafted(&server, "/completion", body, in_stretches(text)));
        let (answers, followed): (Vec<_>, Vec<_>) = join_all(both).await.into_iter().unzip();
        for (i, (answer, followed)) in answers.iter().zip(&followed).enumerate() {
            assert_same(
                answer,
                &plain[i],
                &format!("{n_slots} slots, request {i}, drafts of both"),
            );
            assert_eq!(followed.committed, texts[i]);
            assert_adds_up(answer, followed);
        }
        for (counted, name) in counted.iter_mut().zip([EXTERNAL, name]) {
            let more = sum(&followed, name);
            counted.n_steps += more.n_steps;
            counted.n_drafted += more.n_drafted;
            counted.n_accepted += more.n_accepted;
        }
    }
    let [external, own] = counted;
    assert!(
        external.n_accepted > 0 && external.n_accepted < external.n_drafted,
        "external: {external:?}"
    );
    assert!(own.n_drafted > 0 && own.n_accepted <= own.n_drafted, "own: {own:?}");
    counted
}

#[tokio::test]
async fn n_grams_and_an_external_drafter_give_the_plain_texts() {
    let [_, own] = assert_same_texts(&target(), NGRAM, "ngram-mod").await;
    assert!(own.n_accepted > 0, "{own:?}");
}

#[tokio::test]
async fn a_draft_model_and_an_external_drafter_give_the_plain_texts() {
    let draft = model("tightwad-tiny-draft-weak-f16.gguf");
    let own = format!(
        "-md {} --spec-type draft-simple --spec-draft-n-max 4",
        draft.to_str().expect("UTF-8")
    );
    let [_, own] = assert_same_texts(&target(), &own, "draft-simple").await;
    assert!(own.n_accepted > 0, "{own:?}");
}

#[tokio::test]
async fn an_eagle3_head_and_an_external_drafter_give_the_plain_texts() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("eagle3.gguf");
    random_model::eagle3_head(&path);
    let own = format!("-md {} --spec-type draft-eagle3 --spec-draft-n-max 4", path.display());
    assert_same_texts(&target(), &own, "draft-eagle3").await;
}

#[tokio::test]
async fn a_hybrid_model_with_multi_token_prediction_gives_the_plain_texts_beside_an_external_drafter() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("mtp.gguf");
    random_model::multi_token_prediction(&path);
    assert_same_texts(&path, "--spec-type draft-mtp --spec-draft-n-max 3", "draft-mtp").await;
}

#[tokio::test]
async fn a_prediction_layer_goes_on_rightly_after_offers_that_were_accepted_or_rejected() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("counting.gguf");
    random_model::counting(&path);
    let args = "--spec-type draft-mtp --spec-draft-n-max 1 --spec-draft-external-max 8 -np 1";
    let server = LlamaServer::start(&path, &args.split(' ').collect::<Vec<_>>()).await;
    let body = json!({ "prompt": [1000, 1001, 1002], "n_predict": 120, "temperature": 0, "cache_prompt": false });
    let text: Vec<i32> = (1000..1123).collect();
    let (_, followed) = drafted(&server, "/completion", &body, in_stretches(&text)).await;
    assert_eq!(followed.committed, text);
    let external = followed.last.drafters[EXTERNAL];
    assert!(
        external.n_accepted > 20 && external.n_accepted < external.n_drafted,
        "{external:?}"
    );
    let own = followed.last.drafters["draft-mtp"];
    assert!(own.n_steps > 20, "{own:?}");
    assert_eq!(own.n_accepted, own.n_drafted);
}

#[tokio::test]
async fn own_drafts_longer_than_the_snapshots_of_a_hybrid_model_give_the_plain_texts() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("hybrid.gguf");
    random_model::hybrid(&path);
    let [_, own] = assert_same_texts(&path, LONG_NGRAM, "ngram-mod").await;
    assert!(own.n_accepted > 0 && own.n_accepted < own.n_drafted, "{own:?}");
}

#[tokio::test]
async fn a_recurrent_model_gives_the_plain_texts_with_both() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("recurrent.gguf");
    random_model::recurrent(&path);
    let [_, own] = assert_same_texts(&path, LONG_NGRAM, "ngram-mod").await;
    assert!(own.n_accepted > 0 && own.n_accepted < own.n_drafted, "{own:?}");
}

#[tokio::test]
async fn a_model_with_a_sliding_window_gives_the_plain_texts_with_both() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("sliding_window.gguf");
    random_model::sliding_window(&path);
    let [_, own] = assert_same_texts(&path, LONG_NGRAM, "ngram-mod").await;
    assert!(own.n_accepted > 0 && own.n_accepted < own.n_drafted, "{own:?}");
}

#[tokio::test]
async fn through_the_proxy_answers_are_plain_and_the_drafter_helps_a_target_that_drafts_by_itself() {
    let mut args = vec!["--spec-draft-external-max", "8", "-np", "1", "--threads-http", "32"];
    let plain = LlamaServer::far_target(&args).await;
    args.extend(NGRAM.split(' '));
    let target = LlamaServer::far_target(&args).await;
    let draft = LlamaServer::start(&model("tightwad-tiny-draft-f16.gguf"), &["-np", "1"]).await;
    let proxy = Proxy::drafting(target.url(), draft.url()).await;
    let begin = Instant::now();
    let (mut external, mut own) = (0, 0);
    while external == 0 || own == 0 {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{external} and {own} drafted tokens accepted"
        );
        for prompt in [
            "Count from 1 to 10.",
            "Write a Rust function that adds two numbers.",
            "Explain recursion.",
        ] {
            for sampling in [json!({ "temperature": 0 }), json!({ "temperature": 0.8, "seed": 5 })] {
                let body = json!({
                    "messages": [{ "role": "user", "content": prompt }], "max_tokens": 60, "cache_prompt": false,
                });
                let body = with(body, sampling);
                let expected = essence(plain.post("/v1/chat/completions", &body).await);
                let (answer, record) = proxy.post("/v1/chat/completions", &body).await;
                assert_eq!(essence(answer), expected, "{record:?}");
                external += record.accepted;
                // n-grams of that answer are remembered
                let answer = target.post("/v1/chat/completions", &body).await;
                own += answer["timings"]["draft_n_accepted"].as_u64().unwrap_or_default();
                assert_eq!(essence(answer), expected, "without the proxy");
            }
        }
    }
}

#[tokio::test]
async fn an_offer_that_fits_goes_before_the_servers_own_draft() {
    let args: Vec<_> = NGRAM
        .split_whitespace()
        .chain(["--spec-draft-external-max", "8", "-np", "1"])
        .collect();
    let server = LlamaServer::start(&target(), &args).await;
    let body = &bodies()[0];
    // n-grams of earlier answers are remembered
    server.post("/completion", body).await;
    let (_, followed) = drafted(&server, "/completion", body, |_| Vec::new()).await;
    let own = followed.last.drafters["ngram-mod"];
    assert!(own.n_drafted > 0 && followed.last.n_drafted == 0, "{:?}", followed.last);
    let text = followed.committed;
    let (_, followed) = drafted(&server, "/completion", body, perfect(&text, 8)).await;
    let counts = &followed.last.drafters;
    assert!(counts[EXTERNAL].n_accepted >= 48, "{counts:?}");
    assert!(counts.get("ngram-mod").is_none_or(|own| own.n_steps <= 2), "{counts:?}");
}

#[tokio::test]
async fn drafts_that_are_not_compared_with_samples_exclude_an_external_drafter() {
    let draft = model("tightwad-tiny-draft-weak-f16.gguf");
    let args = [
        "-md",
        draft.to_str().expect("UTF-8"),
        "--spec-type",
        "draft-simple",
        "--spec-draft-sampling",
        "probabilistic",
        "--spec-draft-external-max",
        "8",
    ];
    let server = LlamaServer::start(&target(), &args).await;
    let (_, followed) = drafted(&server, "/completion", &bodies()[1], |_| vec![1]).await;
    assert_eq!(followed.last.state, "refused");
    let reason = followed.last.reason.expect("a reason");
    assert!(reason.contains("--spec-draft-sampling"), "{reason}");
}

#[tokio::test]
async fn the_type_alone_turns_external_drafting_on() {
    let server = LlamaServer::start(&target(), &["--spec-type", "draft-external,ngram-mod"]).await;
    assert_eq!(server.get("/props").await["draft_external_max"], 16);
}

#[tokio::test]
async fn of_several_offers_the_first_that_fits_is_verified() {
    let server = LlamaServer::start(&target(), &["--spec-draft-external-max", "8", "-np", "1"]).await;
    let body = &bodies()[0];
    let (_, followed) = drafted(&server, "/completion", body, |_| Vec::new()).await;
    let (text, n_prompt) = (followed.committed, followed.last.n_prompt);

    // `n` right tokens, then wrong ones
    let right_for = |n: usize| {
        let mut tokens = text[n_prompt..].to_vec();
        for token in &mut tokens[n..] {
            *token = if *token == 1000 { 1001 } else { 1000 };
        }
        tokens
    };
    for main_offer in [json!(right_for(0)), json!(null)] {
        // the only offers: those that are right for longer come later
        let offers = json!({
            "pos": n_prompt, "tokens": main_offer,
            "alternatives": [
                { "tokens": right_for(1) },
                { "pos": n_prompt + 1, "tokens": right_for(2)[1..] },
                { "pos": n_prompt + 2, "tokens": right_for(60)[2..] },
            ],
        });
        let last = loop {
            let key = new_key();
            let drafter = Drafter::new(&server, &key);
            let request = async {
                // the drafter is to be there first
                tokio::time::sleep(Duration::from_millis(20)).await;
                server.send("/completion", body, Some(&key)).await
            };
            let (_, last) = tokio::join!(request, async {
                let mut n = drafter.attach().await.tokens.len();
                let in_time = n == n_prompt;
                drafter.call(offers.clone()).await;
                loop {
                    let answer = drafter.wait(n).await;
                    n += answer.tokens.len();
                    if answer.state == "done" {
                        break in_time.then_some(answer);
                    }
                }
            });
            // on a busy machine it comes too late nevertheless
            if let Some(last) = last {
                break last;
            }
        };
        // The prompt gives the first token, two steps reject all, and the others accept all of the last offer.
        assert_eq!(
            (last.pos + last.tokens.len(), last.n_accepted),
            (n_prompt + 60, 57 - 7),
            "{last:?}"
        );
        assert_eq!(last.n_steps, 3 + 7, "{last:?}");
    }

    for wrong in [
        json!({ "alternatives": 1 }),
        json!({ "alternatives": [[1]] }),
        json!({ "alternatives": [{ "pos": -1, "tokens": [1] }] }),
        json!({ "alternatives": [{ "tokens": [100_000] }] }),
        json!({ "alternatives": vec![json!({ "tokens": [] }); 33] }),
    ] {
        let body = with(wrong, json!({ "key": "a" }));
        let (status, answer) = server.send("/draft", &body, None).await;
        assert_eq!(status, 400, "{body}: {answer}");
    }
}
