use std::time::{Duration, Instant};
use tightwad::config::{Upstream, Backend, MaxDraftTokens};
use tightwad::engine::{Engine, Settings};
fn up(url: &str) -> Upstream { Upstream { url: url.into(), model_name: None, backend: Backend::Llamacpp, api_key: None, api_key_file: None } }
#[tokio::main]
async fn main() {
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let a: Vec<String> = std::env::args().collect();
    let (t, d) = (a[1].clone(), a[2].clone());
    let cap = a.get(3).map_or(MaxDraftTokens::Auto, |n| MaxDraftTokens::AtMost(n.parse().unwrap()));
    let engine = Engine::start(Settings { draft: Some((up(&d), None)), target: Some((up(&t), None)), max_draft_tokens: cap }).unwrap();
    while !engine.can_draft() { tokio::time::sleep(Duration::from_millis(50)).await; }
    println!("{}", serde_json::to_string(&engine.status()).unwrap());
    let http = reqwest::Client::new();
    let prompts = ["Write a Python function that adds two numbers.", "What is the capital of France?", "Count from one to twenty.", "Anna has 3 apples and buys 4 more. How many apples does she have?", "Write a short story about a fox."];
    let rounds: usize = a.get(4).map_or(2, |n| n.parse().unwrap());
    let (mut tp, mut td, mut np, mut nd) = (0.0, 0.0, 0, 0);
    for round in 0..rounds { for p in prompts {
        let body = serde_json::json!({"messages":[{"role":"user","content":p}],"max_tokens":120,"temperature":0});
        let mut texts = vec![]; let mut line = String::new();
        for drafted in [false, true] {
            let at = if drafted { engine.attach() } else { None };
            let mut r = http.post(format!("{t}/v1/chat/completions")).json(&body);
            if let Some(at) = &at { r = r.header("X-Draft-Key", at.key()); }
            let s = Instant::now();
            let v: serde_json::Value = r.send().await.unwrap().json().await.unwrap();
            let el = s.elapsed().as_secs_f64();
            let n = v["usage"]["completion_tokens"].as_u64().unwrap();
            let tps = v["timings"]["predicted_per_second"].as_f64().unwrap_or(0.0);
            texts.push(v["choices"][0]["message"]["content"].as_str().unwrap().to_owned());
            line += &format!("{} n={n} {tps:.1} tok/s ({el:.2}s) ", if drafted {"drafted"} else {"plain"});
            if drafted { if round > 0 || rounds == 1 { td += n as f64 / tps; nd += n; } let c = at.unwrap().settle().await; line += &format!("steps {} drafted {} accepted {} gen {}", c.steps, c.drafted, c.accepted, c.generated); }
            else if round > 0 || rounds == 1 { tp += n as f64 / tps; np += n; }
        }
        println!("{:.20} {line} same={}", p, texts[0]==texts[1]);
    } }
    println!("plain {:.2} tok/s drafted {:.2} ratio {:.2}", np as f64/tp, nd as f64/td, nd as f64/td/(np as f64/tp));
    println!("{}", serde_json::to_string(&engine.status().counts).unwrap());
}
