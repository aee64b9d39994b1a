//! What drafting costs the proxy itself with a long context: a measurement.
//!
//! `cargo test --release --test it engine_cost:: -- --ignored --nocapture` prints the processor time of the whole proxy (so the
//! relaying of the answer is in it, but not what it costs at all times) per step of the target, for answers of different
//! lengths after the same long prompt. What is spent once per answer, on its prompt, is in the shortest one: a step costs
//! what a longer answer costs more.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::gguf::slow_target;
use crate::harness::llama_server::{LlamaServer, Program, free_port, model};
use crate::harness::wait::eventually;
use serde_json::{Value, json};

/// Tokens of the prompt, and of the answers, the shorter of which are asked for several times: the same answer costs a half
/// more or less from time to time.
const CONTEXT: usize = 16_000;
const ANSWERS: [(usize, usize); 3] = [(64, 4), (256, 4), (1024, 1)];
/// Both models were trained on shorter texts, which makes what they say worse but not cheaper.
const SERVER: [&str; 6] = [
    "-c",
    "20480",
    "-np",
    "1",
    "--override-kv",
    "llama.context_length=int:20480",
];
/// How long the proxy is watched without a request.
const IDLE: Duration = Duration::from_secs(8);
/// The most milliseconds per step.
const MOST: f64 = 1.0;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of some minutes"]
async fn with_16000_tokens_of_context_a_step_costs_less_than_a_millisecond_however_long_the_answer() {
    let target = [&SERVER[..], &["--spec-draft-external-max", "16"]].concat();
    let target = LlamaServer::start(&slow_target(), &target).await;
    // The same model, so that a long draft is often right.
    let draft = LlamaServer::start(&model("tightwad-tiny-target-q8_0.gguf"), &SERVER).await;
    let port = free_port();
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("tightwad.yaml");
    let yaml = format!(
        "proxy: {{ port: {port}, draft: {{ url: \"{}\" }}, target: {{ url: \"{}\" }} }}\n",
        draft.url(),
        target.url()
    );
    std::fs::write(&config, yaml).expect("a config");
    let tightwad = Path::new(env!("CARGO_BIN_EXE_tightwad"));
    let config = config.to_str().expect("a path");
    let proxy = Program::start(tightwad, &["-c", config, "proxy", "start"]);
    let url = format!("http://127.0.0.1:{port}");
    let status = || async {
        let answer = reqwest::get(format!("{url}/v1/tightwad/status")).await.ok()?;
        answer.json::<Value>().await.ok()
    };
    let drafts = || async {
        let status = status().await.unwrap_or_default();
        let drafts = status["verification"] == "attached" && status["drafts"][0]["problem"].is_null();
        if drafts { Ok(()) } else { Err(status) }
    };
    eventually(Duration::from_secs(20), drafts).await.expect("it drafts");
    let measured = || async {
        let status = status().await.unwrap_or_default();
        if status["measuring"] == false {
            Ok(())
        } else {
            Err(status)
        }
    };
    eventually(Duration::from_secs(30), measured)
        .await
        .expect("all is measured");

    let text = target
        .tokenize(&"The fox and the dog went to the market. ".repeat(CONTEXT / 8))
        .await;
    let prompt: Vec<_> = text.into_iter().cycle().take(CONTEXT).collect();
    let ask = |n: usize| {
        let body = json!({ "prompt": prompt, "n_predict": n, "ignore_eos": true, "temperature": 0 });
        let request = reqwest::Client::new().post(format!("{url}/completion")).json(&body);
        async move {
            request
                .send()
                .await
                .expect("an answer")
                .error_for_status()
                .expect("success")
                .bytes()
                .await
        }
    };
    // To look after the servers costs something at all times.
    let (began, before) = (Instant::now(), proxy.cpu_time());
    tokio::time::sleep(IDLE).await;
    let idle = proxy.cpu_time().saturating_sub(before).as_secs_f64() / began.elapsed().as_secs_f64();
    // The first answer pays for reading the prompt.
    ask(16).await.expect("a whole answer");
    let mut costs = Vec::new();
    println!("{:.1} ms per second of nothing to do", idle * 1e3);
    for (n, times) in ANSWERS {
        let counts = |status: &Value| {
            let count = |name: &str| status["counts"][name].as_u64().unwrap_or_default();
            (count("steps"), count("drafted"), count("accepted"))
        };
        let (mut all_steps, mut all_used) = (0.0, Duration::ZERO);
        for _ in 0..times {
            let (before, used) = (counts(&status().await.expect("a status")), proxy.cpu_time());
            let began = Instant::now();
            ask(n).await.expect("a whole answer");
            let used = proxy.cpu_time().saturating_sub(used);
            let used = used.saturating_sub(began.elapsed().mul_f64(idle));
            let after = counts(&status().await.expect("a status"));
            let steps = after.0 - before.0;
            println!(
                "{n} tokens after {CONTEXT}: {steps} steps, {} drafted, {} accepted, {used:?} of processor time",
                after.1 - before.1,
                after.2 - before.2
            );
            all_steps += steps as f64;
            all_used += used;
        }
        costs.push((all_steps / times as f64, all_used.as_secs_f64() * 1e3 / times as f64));
    }
    let of_a_step = |pair: &[(f64, f64)]| (pair[1].1 - pair[0].1) / (pair[1].0 - pair[0].0);
    let of_steps: Vec<f64> = costs.windows(2).map(of_a_step).collect();
    println!("milliseconds for each step more: {of_steps:.2?}");
    assert!(of_steps.iter().all(|cost| *cost < MOST), "{of_steps:?}");
}
