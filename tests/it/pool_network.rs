//! A pool over a network: one of its two workers is another host, in a network namespace of its own.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::gguf::slow_target;
use crate::harness::llama_server::{LlamaServer, Program, answer_of, llama_cpp, model};
use crate::harness::network::{FarHost, is_own};
use crate::harness::wait::eventually;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tightwad::bench::Relay;

/// In a network of its own a test need not ask which ports are free, below those that connections take for themselves.
const POOL: &str = "http://127.0.0.1:8080";
const AGENT: u16 = 15_051;
const RPC: u16 = 15_052;
const TIGHTWAD: &str = env!("CARGO_BIN_EXE_tightwad");

fn worker(name: &str, (host, port): (&str, u16), agent: u16) -> Value {
    json!({
        "name": name, "host": host, "backend": "cpu", "agent_port": agent, "cache_gb": 0, "agent_token": "secret",
        "gpus": [{ "name": "CPU", "vram_gb": 1, "rpc_port": port }], "extra_args": ["-t", "1"],
    })
}

/// A cluster file; [`Cluster::new`]: of two workers, of which the far one is `far`.
struct Cluster {
    file: PathBuf,
    _folder: tempfile::TempDir,
}

impl Cluster {
    fn new(far: (&str, u16), agents: bool) -> Self {
        let agent = if agents { AGENT } else { 0 };
        Self::of(&json!([
            worker("near", ("127.0.0.1", RPC), agent),
            worker("far", far, agent)
        ]))
    }

    fn of(workers: &Value) -> Self {
        let config = json!({
            "coordinator": { "port": 8080, "backend": "cpu", "slots": 2, "threads": 1 },
            "workers": workers,
            "models": { "big": { "path": slow_target(), "ctx_size": 2048, "default": true } },
            "binaries": {
                "llama_server": llama_cpp().join("bin/llama-server"), "rpc_server": llama_cpp().join("bin/ggml-rpc-server"),
            },
        });
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = folder.path().join("tightwad.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        Self { file, _folder: folder }
    }

    fn args<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        [&["-c", self.file.to_str().unwrap()], args].concat()
    }

    fn run(&self, part: &[&str]) -> Program {
        let command = self.command("near", part);
        let args: Vec<&str> = command.iter().map(String::as_str).collect();
        Program::start(Path::new("env"), &args)
    }

    /// The arguments of `env` that run a part on a host, whose user has folders of their own.
    fn command(&self, host: &str, part: &[&str]) -> Vec<String> {
        let folder = self.file.with_file_name(host);
        std::fs::create_dir_all(&folder).unwrap();
        let folders = ["XDG_RUNTIME_DIR", "XDG_STATE_HOME"].map(|name| format!("{name}={}", folder.display()));
        let args = self.args(&[&["run"], part].concat());
        let args = [TIGHTWAD].into_iter().chain(args).map(str::to_owned);
        folders.into_iter().chain(args).collect()
    }
}

async fn becomes_ready(coordinator: &Program, within: Duration) {
    let ready = eventually(within, || async {
        let answer = reqwest::get(format!("{POOL}/health")).await;
        answer
            .is_ok_and(|answer| answer.status().is_success())
            .then_some(())
            .ok_or(())
    });
    assert!(ready.await.is_ok(), "{}", coordinator.log());
}

/// A measurement: each trip between the coordinator and one of the two workers takes 5 ms, and what drafts is beside the
/// coordinator. Where the kernel has no netem a relay holds the bytes back.
///
/// `cargo test --test it pool_network:: -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement; it needs a machine that does nothing else"]
async fn drafts_make_a_pool_with_a_far_worker_at_least_twice_as_fast() {
    const TRIP: Duration = Duration::from_millis(5);
    if !is_own("drafts_make_a_pool_with_a_far_worker_at_least_twice_as_fast") {
        return;
    }
    let host = FarHost::new().await;
    let rpc_server = llama_cpp().join("bin/ggml-rpc-server");
    let port = RPC.to_string();
    let serve = |at| ["-H", at, "-p", &port, "--device", "CPU", "-t", "1"];
    let _near = Program::start(&rpc_server, &serve("127.0.0.1"));
    let _far = host.start(&rpc_server, &serve(FarHost::ADDRESS));
    let mut relay = None;
    if let Err(why) = host.delay(TRIP) {
        println!("a relay delays the bytes, since the network cannot: {why}");
        let url = format!("http://{}:{RPC}", FarHost::ADDRESS);
        relay = Some(Relay::start(&url, 2 * TRIP).await.unwrap());
    }
    let far = relay
        .as_ref()
        .map(|relay| relay.url().rsplit(':').next().unwrap().parse().unwrap());
    let cluster = Cluster::new(far.map_or((FarHost::ADDRESS, RPC), |port| ("127.0.0.1", port)), false);
    let coordinator = cluster.run(&["coordinator"]);
    becomes_ready(&coordinator, Duration::from_secs(60)).await;
    let draft = LlamaServer::start(&model("tightwad-tiny-draft-f16.gguf"), &["-np", "2", "-c", "4096"]).await;

    let servers = ["bench", "--target", POOL, "--draft", draft.url()];
    let options = ["--kinds", "code,list", "--max-tokens", "60", "--rounds", "1", "--json"];
    let output = tokio::process::Command::new(TIGHTWAD)
        .args(servers)
        .args(options)
        .env_remove("TIGHTWAD_CONFIG")
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut speed_up = 0.0;
    for group in report["kinds"].as_array().unwrap().iter().chain([&report["total"]]) {
        for mode in group["modes"].as_array().unwrap() {
            println!(
                "{} {}: {} tokens/s, {} tokens per step, × {}",
                group["kind"], mode["mode"], mode["tokens_per_second"], mode["tokens_per_step"], mode["speed_up"]
            );
            speed_up = mode["speed_up"].as_f64().unwrap_or(speed_up);
        }
    }
    assert!(report["equal"] == true && speed_up >= 2.0, "{report:#}");
}

#[tokio::test]
async fn a_worker_whose_cable_is_pulled_is_named_and_used_again_once_it_is_back() {
    if !is_own("a_worker_whose_cable_is_pulled_is_named_and_used_again_once_it_is_back") {
        return;
    }
    let host = FarHost::new().await;
    let cluster = Cluster::new((FarHost::ADDRESS, RPC), true);
    let _near = cluster.run(&["worker", "near"]);
    let _far = host.start(Path::new(TIGHTWAD), &cluster.args(&["run", "worker", "far"]));
    let coordinator = cluster.run(&["coordinator"]);
    becomes_ready(&coordinator, Duration::from_secs(30)).await;
    let client = reqwest::Client::new();
    let completion = |tokens: u32, stream: bool| {
        let body = json!({
            "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": stream,
        });
        client.post(format!("{POOL}/v1/completions")).json(&body)
    };
    let expected = answer_of(completion(20, false)).await.1["choices"][0]["text"].clone();
    // Of a cable that is out for longer than a lease lasts, the server ends meanwhile.
    for looks in [4, 1] {
        let mut stream = completion(1900, true).send().await.unwrap().bytes_stream();
        let mut text = String::from_utf8_lossy(&stream.next().await.unwrap().unwrap()).into_owned();
        host.unplug();
        let since = Instant::now();
        while let Some(bytes) = stream.next().await {
            text.push_str(&String::from_utf8_lossy(&bytes.unwrap()));
        }
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
        let last = text.lines().rfind(|line| line.starts_with("data: ")).unwrap();
        assert!(last.contains("worker_lost") && last.contains("worker far"), "{last}");

        for _ in 0..looks {
            tokio::time::sleep(Duration::from_secs(3)).await;
            let asked = Instant::now();
            let status = answer_of(client.get(format!("{POOL}/v1/tightwad/status"))).await.1;
            assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
            let problem = status["problem"].as_str().unwrap_or_default();
            assert!(
                status["state"] != "ready" && problem.contains("worker far"),
                "{status:#}"
            );
            assert_eq!(status["devices"], json!([]), "no model is on them");
        }
        host.plug();
        becomes_ready(&coordinator, Duration::from_secs(15)).await;
        let (status, answer) = answer_of(completion(20, false)).await;
        assert_eq!((status, &answer["choices"][0]["text"]), (200, &expected), "{answer}");
    }
}

#[tokio::test]
async fn two_coordinators_with_one_host_name_and_port_do_not_evict_each_other() {
    if !is_own("two_coordinators_with_one_host_name_and_port_do_not_evict_each_other") {
        return;
    }
    let host = FarHost::new().await;
    // The worker is at this side of the cable, and both coordinators are called after the one machine that this is.
    let cluster = Cluster::of(&json!([worker("near", ("10.77.0.1", RPC), AGENT)]));
    let worker = cluster.run(&["worker", "near"]);
    let near = cluster.run(&["coordinator"]);
    becomes_ready(&near, Duration::from_secs(30)).await;
    let lease = async || {
        let request = reqwest::Client::new().get(format!("http://10.77.0.1:{AGENT}/v1/worker"));
        answer_of(request.bearer_auth("secret")).await.1["lease"].clone()
    };
    let before = lease().await;
    let command = cluster.command("far", &["coordinator"]);
    let far = host.start(
        Path::new("env"),
        &command.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    let refused = eventually(Duration::from_secs(10), || async {
        let log = far.log();
        if log.contains("worker near is leased by the coordinator") {
            Ok(())
        } else {
            Err(log)
        }
    });
    let refused = refused.await;
    assert_eq!(before, lease().await, "{refused:?}\n{}", worker.log());
    refused.expect("the second coordinator says who has the worker");
    let (status, answer) = answer_of(reqwest::Client::new().get(format!("{POOL}/health"))).await;
    assert_eq!(status, 200, "{answer}");
}
