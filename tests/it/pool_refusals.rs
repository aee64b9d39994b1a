//! What keeps a pool from running is said in one sentence, with what to do next.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::fake_agent::{fake_agent, granted, status};
use crate::harness::fake_upstream::{Act, FakeUpstream, json as answer, send, wait};
use crate::harness::llama_server::{Program, answer_of, free_port, llama_cpp, target};
use crate::harness::wait::eventually;
use serde_json::{Value, json};
use tightwad::pool::build;

const SOON: Duration = Duration::from_secs(10);
const PLENTY: u64 = 4 << 30;

/// `tightwad run coordinator` with these workers' agents.
struct Coordinator {
    program: Program,
    url: String,
    _folder: tempfile::TempDir,
}

impl Coordinator {
    fn start<'a>(port: u16, model: &Path, agents: impl IntoIterator<Item = &'a FakeUpstream>) -> Self {
        Self::command(&["run", "coordinator"], port, model, agents)
    }

    /// Another command of its host.
    fn command<'a>(
        command: &[&str],
        port: u16,
        model: &Path,
        agents: impl IntoIterator<Item = &'a FakeUpstream>,
    ) -> Self {
        let worker = |(number, agent): (usize, &FakeUpstream)| {
            let gpu = json!({ "name": "CPU", "vram_gb": 1, "rpc_port": 50_052 + number });
            let name = ["far", "farther"][number];
            json!({ "name": name, "host": "127.0.0.1", "agent_port": agent.address.port(), "gpus": [gpu] })
        };
        let config = json!({
            "coordinator": { "port": port, "backend": "cpu", "slots": 2, "wait_seconds": 2 },
            "workers": agents.into_iter().enumerate().map(worker).collect::<Vec<_>>(),
            "models": { "tiny": { "path": model, "ctx_size": 512, "default": true } },
            "binaries": { "llama_server": llama_cpp().join("bin/llama-server") },
        });
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = folder.path().join("tightwad.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        let args = [&["-c", file.to_str().unwrap()], command].concat();
        Self {
            program: Program::start(Path::new(env!("CARGO_BIN_EXE_tightwad")), &args),
            url: format!("http://127.0.0.1:{port}"),
            _folder: folder,
        }
    }

    /// Its exit code and what it said, once it has ended.
    async fn ended(&mut self) -> (Option<i32>, String) {
        let program = &mut self.program;
        for _ in 0..1000 {
            if !program.is_alive() {
                return (program.exit_code(), program.log());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it still runs: {}", program.log());
    }

    /// Waits until its status tells a problem with these words in it, and sees that clients are told the same. Returns the
    /// status and the code of that refusal.
    async fn tells(&self, words: &[&str]) -> (Value, Value) {
        let says_it = |text: &Value| {
            words
                .iter()
                .all(|word| text.as_str().is_some_and(|text| text.contains(word)))
        };
        let shown = eventually(SOON, || async {
            let answer = reqwest::get(format!("{}/v1/tightwad/status", self.url)).await;
            let status: Value = answer.map_err(|_| Value::Null)?.json().await.map_err(|_| Value::Null)?;
            if says_it(&status["problem"]) {
                Ok(status)
            } else {
                Err(status)
            }
        });
        let status = shown
            .await
            .unwrap_or_else(|status| panic!("no {words:?} in {status:#}\n{}", self.program.log()));
        let ask = reqwest::Client::new().post(format!("{}/v1/completions", self.url));
        let (code, answer) = answer_of(ask.json(&json!({ "prompt": "Once" }))).await;
        assert_eq!(code, 503, "{answer}");
        assert!(says_it(&answer["error"]["message"]), "{answer}");
        (status, answer["error"]["code"].clone())
    }
}

#[tokio::test]
async fn a_worker_with_another_build_is_refused_and_both_builds_are_named() {
    let own = build::build(&llama_cpp().join("bin/llama-server"))
        .await
        .expect("a build");
    let agent = fake_agent("b1", [50_052], PLENTY).await;
    let coordinator = Coordinator::start(free_port(), &target(), [&agent]);
    let own = format!("this coordinator {own}");
    let (_, code) = coordinator
        .tells(&["worker far runs llama.cpp b1", &own, "install the same build"])
        .await;
    // It may be cured on the other host, and is looked at again.
    assert_eq!(code, "model_loading");
    assert!(agent.seen().iter().all(|seen| seen.method == "GET"), "it is not leased");
}

#[tokio::test]
async fn whoever_starts_or_plans_a_pool_is_told_at_once_of_a_worker_with_another_build() {
    let agent = fake_agent("b1", [50_052], PLENTY).await;
    for (command, code) in [("start", 10), ("plan", 0)] {
        let ended = Coordinator::command(&[command], free_port(), &target(), [&agent])
            .ended()
            .await;
        assert_eq!(ended.0, Some(code), "{}", ended.1);
        for words in [
            "worker far runs llama.cpp b1, this coordinator b",
            "install the same build",
        ] {
            assert!(ended.1.contains(words), "{}", ended.1);
        }
    }
}

#[tokio::test]
async fn a_model_that_does_not_fit_is_refused_with_what_would_make_it_fit() {
    let agent = fake_agent("unknown", [50_052], 1 << 20).await;
    let ended = Coordinator::start(free_port(), &target(), [&agent]).ended().await;
    assert_eq!(ended.0, Some(9), "{}", ended.1);
    assert!(
        ended.1.contains("does not fit") && ended.1.contains("it would with"),
        "{}",
        ended.1
    );
}

#[tokio::test]
async fn a_pool_of_more_devices_than_llama_cpp_takes_is_refused_for_good() {
    let agent = fake_agent("unknown", 50_052..50_068, PLENTY).await;
    let ended = Coordinator::start(free_port(), &target(), [&agent]).ended().await;
    assert_eq!(ended.0, Some(3), "{}", ended.1);
    assert!(
        ended.1.contains("16 devices") && ended.1.contains("at most 15"),
        "{}",
        ended.1
    );
}

#[tokio::test]
async fn a_truncated_model_ends_the_program_and_is_named() {
    let broken = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let whole = std::fs::read(target()).unwrap();
    std::fs::write(broken.path(), &whole[..whole.len() / 2]).unwrap();
    let agent = fake_agent("unknown", [50_052], PLENTY).await;
    let ended = Coordinator::start(free_port(), broken.path(), [&agent]).ended().await;
    assert_eq!(ended.0, Some(11), "{}", ended.1);
    let name = broken.path().to_str().unwrap();
    for words in [name, "is truncated", "download it again"] {
        assert!(ended.1.contains(words), "{}", ended.1);
    }
}

#[tokio::test]
async fn a_missing_model_and_a_taken_port_end_the_program_with_a_number_and_a_sentence() {
    let missing = Coordinator::start(free_port(), Path::new("/no/such.gguf"), None)
        .ended()
        .await;
    assert_eq!(missing.0, Some(4), "{}", missing.1);
    assert!(missing.1.contains("/no/such.gguf"), "{}", missing.1);

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let ended = Coordinator::start(port, &target(), []).ended().await;
    assert_eq!(ended.0, Some(5), "{}", ended.1);
    assert!(
        ended.1.contains(&port.to_string()) && ended.1.contains("in use"),
        "{}",
        ended.1
    );
}

#[tokio::test]
async fn leases_are_renewed_while_another_worker_still_starts_its_servers() {
    let quick = fake_agent("unknown", [50_052], PLENTY).await;
    let slow_status = status("unknown", [50_053], PLENTY);
    let slow = FakeUpstream::start(move |seen| match (seen.method.as_str(), seen.target.as_str()) {
        ("GET", "/v1/worker") => answer("200 OK", &slow_status),
        ("POST", "/v1/worker/lease") => [vec![wait(5000)], granted()].concat(),
        _ => vec![send("HTTP/1.1 204 No Content\r\n\r\n")],
    })
    .await;
    let _coordinator = Coordinator::start(free_port(), &target(), [&quick, &slow]);
    let seen =
        |agent: &FakeUpstream, what: &str| agent.seen().iter().filter(|seen| seen.target.ends_with(what)).count();
    let asked = eventually(SOON, || async { (seen(&slow, "/lease") > 0).then_some(()).ok_or(()) });
    asked.await.expect("it is asked for");
    let since = Instant::now();
    let renewed = eventually(SOON, || async { (seen(&quick, "/renew") >= 3).then_some(()).ok_or(()) });
    assert!(renewed.await.is_ok(), "{:?}", quick.seen());
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
}

#[tokio::test]
async fn a_host_that_falls_silent_while_it_is_leased_is_lost_within_seconds() {
    let told = status("unknown", [50_052], PLENTY);
    let leased = std::sync::atomic::AtomicBool::new(false);
    let agent = FakeUpstream::start(move |seen| {
        let silent = leased.fetch_or(seen.method == "POST", std::sync::atomic::Ordering::SeqCst);
        match seen.method.as_str() {
            "GET" if !silent => answer("200 OK", &told),
            _ => vec![Act::Hang],
        }
    })
    .await;
    let coordinator = Coordinator::start(free_port(), &target(), [&agent]);
    coordinator.tells(&["worker far", "does not answer"]).await;
}

#[tokio::test]
async fn what_keeps_a_pool_down_is_logged_once_however_often_it_is_tried_and_asked_for() {
    let coordinator = {
        // Nobody listens at the port of this agent any more.
        let gone = fake_agent("unknown", [50_052], PLENTY).await;
        Coordinator::start(free_port(), &target(), [&gone])
    };
    coordinator.tells(&["worker far does not answer"]).await;
    let client = reqwest::Client::new();
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(8) {
        for path in ["/health", "/v1/models"] {
            let _ = client.get(format!("{}{path}", coordinator.url)).send().await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let log = coordinator.program.log();
    let warnings = log
        .lines()
        .filter(|line| line.contains("WARN") || line.contains("ERROR"));
    // Without their times. The driver and whoever refuses requests may each say it.
    let warnings: Vec<&str> = warnings.filter_map(|line| Some(line.split_once("Z ")?.1)).collect();
    let distinct: std::collections::BTreeSet<_> = warnings.iter().collect();
    assert!(warnings.len() == distinct.len() && warnings.len() <= 3, "{log}");
    let warning = warnings
        .iter()
        .find(|line| line.contains("not ready to start"))
        .expect("a warning");
    assert!(log.lines().count() < 10, "{log}");
    for jargon in ["os error", "tcp connect error"] {
        assert!(!log.contains(jargon), "{log}");
    }
    assert!(
        warning.contains("connection refused: nothing listens on 127.0.0.1:"),
        "{log}"
    );
    assert!(warning.contains("tightwad run worker far"), "{log}");
}
