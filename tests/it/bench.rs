//! `bench` and `verify` with real llama-server processes and the tiny models.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, json as answer_in_json, stream_head, until, wait};
use crate::harness::gguf::slow_target;
use crate::harness::llama_server::{LlamaServer, free_port, llama_cpp, model};
use crate::harness::proxy::Proxy;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tightwad::upstream::ChatServer;
use tightwad::upstream::chat::{Message, Wishes};

/// `tightwad` with nothing in the environment that could change what it does.
fn tightwad(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tightwad"))
        .args(args)
        .env_remove("TIGHTWAD_CONFIG")
        .env_remove("TIGHTWAD_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// What it printed, if it ended with this code.
#[track_caller]
fn printed(output: &Output, code: i32) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A target that takes drafts, and a draft.
async fn pair() -> (LlamaServer, LlamaServer) {
    let drafts = ["--spec-draft-external-max", "16", "--metrics", "-np", "2", "-c", "4096"];
    let target = LlamaServer::far_target(&drafts).await;
    let draft = LlamaServer::start(&model("tightwad-tiny-draft-f16.gguf"), &["-np", "2", "-c", "4096"]).await;
    (target, draft)
}

fn mode<'a>(group: &'a Value, name: &str) -> &'a Value {
    let modes = group["modes"].as_array().unwrap();
    modes.iter().find(|mode| mode["mode"] == name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_drafts_gets_equal_texts_and_tells_all_figures_of_each_kind() {
    let (target, draft) = pair().await;
    let servers = ["bench", "--target", target.url(), "--draft", draft.url()];
    let options = ["--kinds", "code,creative", "--rounds", "1", "--json"];
    let report = printed(&tightwad(&[&servers[..], &options[..]].concat()), 0);
    assert_eq!(report["equal"], true, "{report:#}");
    let kinds = report["kinds"].as_array().unwrap();
    assert_eq!(
        (kinds[0]["kind"].as_str(), kinds[1]["kind"].as_str()),
        (Some("code"), Some("creative"))
    );
    for group in kinds.iter().chain([&report["total"]]) {
        let (plain, attached) = (mode(group, "plain"), mode(group, "attached"));
        assert_eq!(
            (plain["requests"].as_u64(), &attached["differing"]),
            (attached["requests"].as_u64(), &Value::from(0))
        );
        assert_eq!(plain["tokens"], attached["tokens"], "{group:#}");
        for figure in [
            "tokens_per_second",
            "tokens_per_second_median",
            "tokens_per_second_p95",
            "ttft_ms_median",
            "speed_up",
        ] {
            assert!(attached[figure].as_f64().unwrap() > 0.0, "{figure}: {group:#}");
        }
        assert!(
            (plain["tokens_per_step"].as_f64().unwrap() - 1.0).abs() < 1e-9,
            "{group:#}"
        );
        let count = |name: &str| attached["acceptance"][name].as_u64().unwrap();
        assert_eq!(count("wasted"), count("drafted") - count("accepted"));
        let by_position = attached["acceptance"]["by_position"].as_array().unwrap();
        // What was kept at all positions is what was kept.
        let shares: f64 = by_position.iter().map(|share| share.as_f64().unwrap()).sum();
        assert!(
            (shares * count("drafts") as f64 - count("accepted") as f64).abs() < 1e-6,
            "{group:#}"
        );
    }
    // Not of each kind: so quick a target may well be better off alone for a while.
    let attached = mode(&report["total"], "attached");
    assert!(
        attached["acceptance"]["drafted"].as_u64().unwrap() > 0 && attached["tokens_per_step"].as_f64().unwrap() > 1.0,
        "{report:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_shows_no_speed_up_where_nothing_was_drafted() {
    let target = LlamaServer::far_target(&["-np", "1"]).await;
    let options = ["bench", "--target", target.url(), "--rounds", "1", "--max-tokens", "8"];
    let output = tightwad(&[&options[..], &["--kinds", "chat,list"]].concat());
    let table = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<&str> = table.split("\n\n").nth(1).unwrap().lines().collect();
    let attached = rows.iter().filter(|row| row.contains(" attached "));
    // Of both kinds and in total.
    assert_eq!(attached.filter(|row| row.contains(" no draft ")).count(), 3, "{table}");
    assert!(rows.iter().all(|row| row.len() == rows[0].len()), "{table}");
    assert!(!table.contains("predicted"), "{table}");
    let output = tightwad(&[&options[..], &["--kinds", "chat", "--clients", "2"]].concat());
    let table = String::from_utf8(output.stdout).unwrap();
    let together = table.lines().find(|line| line.starts_with("attached: all clients"));
    assert!(together.unwrap().contains(" tok/s (no draft), "), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_with_a_delay_a_context_and_clients_drafts_too() {
    let (target, draft) = pair().await;
    let servers = ["bench", "--target", target.url(), "--draft", draft.url()];
    let options = ["--kinds", "creative", "--rounds", "1", "--json", "--temperature", "0.7"];
    let more = ["--delay", "5", "--context", "300", "--clients", "2"];
    let report = printed(&tightwad(&[&servers[..], &options[..], &more[..]].concat()), 0);
    let (plain, attached) = (mode(&report["total"], "plain"), mode(&report["total"], "attached"));
    assert!(attached["acceptance"]["drafted"].as_u64().unwrap() > 0, "{report:#}");
    assert!(plain["ttft_ms_median"].as_f64().unwrap() >= 5.0, "{report:#}");
    for figures in [plain, attached] {
        for figure in ["throughput_tokens_per_second", "slowest_client_tokens_per_second"] {
            assert!(figures[figure].as_f64().unwrap() > 0.0, "{figure}: {report:#}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_sends_what_the_prompts_predict_when_asked_to() {
    let target = LlamaServer::far_target(&["--spec-draft-external-max", "16", "--metrics", "-np", "2"]).await;
    let question = "Write a short story about a fox.";
    let ask = json!({ "messages": [{ "role": "user", "content": question }], "max_tokens": 80, "temperature": 0 });
    let answer = target.post("/v1/chat/completions", &ask).await;
    let line = json!({
        "kind": "edit", "prompt": question, "prediction": answer["choices"][0]["message"]["content"],
    });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    std::fs::write(&file, format!("{line}\n")).unwrap();
    let options = ["bench", "--target", target.url(), "--prompts", file.to_str().unwrap()];
    let more = ["--max-tokens", "80", "--rounds", "3", "--json"];
    let without = printed(&tightwad(&[&options[..], &more[..]].concat()), 0);
    let with = printed(&tightwad(&[&options[..], &more[..], &["--prediction"]].concat()), 0);
    let accepted = |report: &Value| {
        mode(&report["total"], "attached")["acceptance"]["accepted"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(with["settings"]["prediction"], true);
    assert!(
        accepted(&with) > 100 && accepted(&with) > 2 * accepted(&without),
        "of 240 tokens {} and {} without",
        accepted(&with),
        accepted(&without)
    );
    let none = tightwad(&["bench", "--target", target.url(), "--kinds", "chat", "--prediction"]);
    assert_eq!(none.status.code(), Some(2));
}

#[test]
fn bench_compares_with_the_own_drafting_of_a_llama_server_that_it_starts_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let (target_port, draft_port, proxy_port) = (free_port(), free_port(), free_port());
    let yaml = format!(
        "proxy: {{ port: {proxy_port} }}\n\
         target: {{ port: {target_port}, slots: 1, threads: 1, model: big, api_key: hush }}\n\
         draft: {{ port: {draft_port}, slots: 1, threads: 1, model: small }}\n\
         models:\n  big: {{ path: {}, ctx_size: 2048 }}\n  small: {{ path: {}, ctx_size: 2048 }}\n\
         binaries: {{ llama_server: {}/bin/llama-server }}\n",
        slow_target().display(),
        model("tightwad-tiny-draft-f16.gguf").display(),
        llama_cpp().display()
    );
    let config = folder.path().join("cluster.yaml");
    std::fs::write(&config, yaml).unwrap();
    let config = config.to_str().unwrap();
    let parts = [&["run", "target"][..], &["run", "draft"], &["proxy", "start"]];
    // Their children die with them, and they with this test.
    let _running: Vec<Killed> = parts
        .iter()
        .map(|part| Killed::start(config, part, folder.path()))
        .collect();
    assert!(
        (0..300).any(|_| {
            std::thread::sleep(Duration::from_millis(100));
            let status = tightwad(&["-c", config, "proxy", "status", "--json"]);
            let status: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
            status["verification"] == "attached" && status["reason"].is_null()
        }),
        "the proxy does not draft"
    );

    let options = ["--kinds", "creative", "--rounds", "1", "--json", "--own-draft"];
    let report = printed(&tightwad(&[&["-c", config, "bench"], &options[..]].concat()), 0);
    assert_eq!(report["equal"], true, "{report:#}");
    assert_eq!(report["own_draft"]["tried"].as_array().unwrap().len(), 8, "{report:#}");
    for name in ["attached", "own-draft"] {
        let acceptance = &mode(&report["total"], name)["acceptance"];
        assert!(acceptance["drafted"].as_u64().unwrap() > 0, "{name}: {report:#}");
        assert!(
            acceptance["by_position"][0].as_f64().unwrap() > 0.0,
            "{name}: {report:#}"
        );
    }
    let verified = tightwad(&["-c", config, "verify", "--count", "3"]);
    let text = String::from_utf8(verified.stdout).unwrap();
    assert_eq!(verified.status.code(), Some(0), "{text}");
    assert!(text.contains("temperature 0.8: 3 of 3 answers equal"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_the_drafted_answers_equal_token_by_token() {
    let (target, draft) = pair().await;
    let servers = ["verify", "--target", target.url(), "--draft", draft.url()];
    let report = printed(
        &tightwad(&[&servers[..], &["--max-tokens", "24", "--json"]].concat()),
        0,
    );
    assert_eq!(report["equal"], true, "{report:#}");
    assert!(report["accepted"].as_u64().unwrap() > 0, "{report:#}");
    for at in report["temperatures"].as_array().unwrap() {
        assert_eq!(at["prompts"], at["equal"]);
        assert!(at["prompts"].as_u64().unwrap() >= 35, "{at:#}");
        assert_eq!(at["token_equal_rate"], 1.0, "{at:#}");
        assert_eq!(at["by_token"], true, "{at:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_and_bench_show_and_fail_with_answers_that_differ() {
    let (target, draft) = pair().await;
    let drafts = ["--spec-draft-external-max", "16"];
    let other = LlamaServer::start(&model("tightwad-tiny-draft-weak-f16.gguf"), &drafts).await;
    let proxy = Proxy::drafting(other.url(), draft.url()).await;
    let servers = [
        "--target",
        target.url(),
        "--proxy",
        proxy.url(),
        "--kinds",
        "chat,creative",
        "--json",
    ];
    let report = printed(&tightwad(&[&["verify"], &servers[..]].concat()), 1);
    assert_eq!(report["equal"], false, "{report:#}");
    let at = &report["temperatures"][0];
    assert!(at["token_equal_rate"].as_f64().unwrap() < 1.0, "{at:#}");
    let divergence = &at["divergences"][0];
    assert!(divergence["token"].is_u64(), "{divergence:#}");
    assert_ne!(divergence["plain"], divergence["drafted"]);
    let report = printed(&tightwad(&[&["bench", "--rounds", "1"], &servers[..]].concat()), 1);
    assert!(
        mode(&report["total"], "attached")["differing"].as_u64().unwrap() > 0,
        "{report:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_without_a_draft_compares_nothing_says_why_and_exits_12() {
    let target = LlamaServer::far_target(&["-np", "1"]).await;
    let options = ["--count", "1", "--max-tokens", "8", "--json"];
    let output = tightwad(&[&["verify", "--target", target.url()], &options[..]].concat());
    let report = printed(&output, 12);
    assert_eq!((&report["equal"], &report["drafted"]), (&json!(true), &json!(0)));
    let stderr = String::from_utf8_lossy(&output.stderr);
    let why = report["undrafted"].as_str().unwrap();
    assert!(
        stderr.contains(&format!("nothing was drafted, so nothing was compared: {why}; ")),
        "{stderr}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_and_verify_say_that_the_draft_is_down() {
    let target = LlamaServer::far_target(&["-np", "1", "--spec-draft-external-max", "16"]).await;
    let servers = [
        "--target",
        target.url(),
        "--draft",
        "http://127.0.0.1:1",
        "--max-tokens",
        "4",
    ];
    for (command, code) in [
        (&["bench", "--kinds", "chat", "--rounds", "1"][..], 13),
        (&["verify", "--count", "1"], 12),
    ] {
        let output = tightwad(&[command, &servers[..], &["--json"]].concat());
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let why = report["undrafted"].as_str().unwrap_or_default();
        assert!(why.contains("the draft http://127.0.0.1:1: "), "{report:#}");
    }
}

/// A target that takes so many milliseconds for each answer, and no drafts.
async fn undrafted_target(milliseconds: u64) -> FakeUpstream {
    mortal_target(usize::MAX, milliseconds).await
}

/// ... and gives no more than so many answers.
async fn mortal_target(answers: usize, milliseconds: u64) -> FakeUpstream {
    let given = AtomicUsize::new(0);
    FakeUpstream::start(move |seen| match seen.target.as_str() {
        "/v1/chat/completions" if given.fetch_add(1, Ordering::Relaxed) < answers => {
            [vec![wait(milliseconds)], streamed(wait(0))].concat()
        }
        "/v1/chat/completions" => vec![Act::Close],
        "/v1/models" | "/health" => answer_in_json("200 OK", r#"{"data":[{"id":"big"}]}"#),
        _ => answer_in_json("404 Not Found", "{}"),
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_and_verify_tell_a_log_now_and_then_how_far_they_are_and_how_long_it_will_take() {
    let target = undrafted_target(1700).await;
    let url = target.url();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    std::fs::write(&file, r#"{"kind":"chat","prompt":"Hello"}"#).unwrap();
    let servers = ["--target", &url, "--prompts", file.to_str().unwrap()];
    // Two modes, each three times after one time that does not count; and two, each once after once, at two temperatures.
    let commands = [&["bench", "--rounds", "3"][..], &["verify"]];
    std::thread::scope(|scope| {
        for command in commands {
            scope.spawn(move || {
                let output = tightwad(&[command, &servers[..]].concat());
                let stderr = String::from_utf8_lossy(&output.stderr);
                let place = |part: &str| stderr.find(part).unwrap_or_else(|| panic!("{part} is not in {stderr}"));
                let begun = place("warming up, plain: 0 of 8 answers\n");
                assert!(place("looking at the servers\n") < begun && begun < place(" of 8 answers, about "));
                assert_eq!(stderr.matches(" of 8 answers").count(), 2, "{stderr}");
            });
        }
    });
}

/// How `tightwad` ended on this signal, which it got when a target that takes so long for each answer had been asked
/// this often.
async fn interrupted(args: &[&str], signal: Signal, milliseconds: u64, questions: usize) -> Output {
    let target = undrafted_target(milliseconds).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
    command.args(args).args(["--target", &target.url()]);
    command.env_remove("TIGHTWAD_CONFIG").env_remove("TIGHTWAD_LOG");
    let running = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let running = running.spawn().unwrap();
    let chats = || target.seen().iter().filter(|seen| seen.method == "POST").count();
    until("the questions", || chats() >= questions).await;
    kill_process(Pid::from_raw(running.id().cast_signed()).unwrap(), signal).unwrap();
    running.wait_with_output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_prints_the_table_of_what_was_measured_on_ctrl_c_and_exits_130() {
    let output = interrupted(
        &["bench", "--rounds", "60000", "--kinds", "chat,list"],
        Signal::INT,
        20,
        60,
    )
    .await;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(
        stderr.ends_with("error: interrupted before all was asked\n"),
        "{stderr}"
    );
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains(", ended before all was asked\n"), "{table}");
    assert!(table.contains("\ntotal      plain "), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_bench_and_verify_print_as_json_when_they_are_stopped_says_that_it_is_not_complete() {
    let options = ["bench", "--rounds", "60000", "--clients", "2", "--json"];
    let report = printed(&interrupted(&options, Signal::TERM, 5, 60).await, 130);
    assert_eq!(report["complete"], false, "{report:#}");
    let modes = ["plain", "attached"].map(|name| mode(&report["total"], name)["requests"].as_u64().unwrap());
    assert!(modes[0] > 0 && modes[0] == modes[1], "{report:#}");
    let report = printed(&interrupted(&["verify", "--json"], Signal::INT, 5, 60).await, 130);
    assert_eq!(report["complete"], false, "{report:#}");
    assert!(report["temperatures"][0]["prompts"].as_u64().unwrap() > 0, "{report:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_that_is_stopped_before_the_first_answers_prints_nothing_and_exits_130() {
    let output = interrupted(&["bench"], Signal::INT, 60_000, 1).await;
    assert_eq!((output.status.code(), output.stdout), (Some(130), Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bench_or_verify_whose_server_dies_keeps_the_figures_until_then() {
    for command in [&["bench", "--rounds", "60000"][..], &["verify"]] {
        // After the warming up, which asks for each of seven kinds twice.
        let target = mortal_target(40, 0).await;
        let url = target.url();
        let output = tightwad(&[command, &["--target", &url, "--json"]].concat());
        let report = printed(&output, 6);
        assert_eq!(report["complete"], false, "{report:#}");
        // 13 both ways.
        let answers = match report["temperatures"].get(0) {
            Some(verified) => &verified["prompts"],
            None => &mode(&report["total"], "attached")["requests"],
        };
        assert_eq!(answers, 13, "{report:#}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            stderr.contains("error: ") && !stderr.contains("interrupted"),
            "{stderr}"
        );
    }
}

/// The whole answer of a chat, and `after` behind its last event.
fn streamed(after: Act) -> Vec<Act> {
    let events = [r#"data: {"choices":[{"delta":{"content":"Hi"}}]}"#, "data: [DONE]"];
    let events = events.map(|event| chunk(format!("{event}\n\n")));
    [stream_head()]
        .into_iter()
        .chain(events)
        .chain([after, Act::EndChunks])
        .collect()
}

async fn answer_of(url: &str) -> String {
    let server = ChatServer::new(url, None, None).unwrap();
    let answer = server
        .chat(&[Message::user("Hello")], None, Wishes::default(), |_| Ok(()))
        .await;
    answer.unwrap().text
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_finished_in_the_status_of_the_proxy_and_not_cancelled() {
    let target = FakeUpstream::start(|_| streamed(wait(50))).await;
    let proxy = Proxy::start(&target.url(), None).await;
    assert_eq!(answer_of(proxy.url()).await, "Hi");
    let has_ended = |status: &Value| !status["requests"].as_array().unwrap().is_empty();
    let status = proxy.shows("the request", Duration::from_secs(5), has_ended).await;
    assert_eq!(status["requests"][0]["outcome"], "finished", "{status:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_complete_though_its_server_does_not_end_the_stream() {
    let server = FakeUpstream::start(|_| streamed(Act::Hang)).await;
    let answer = tokio::time::timeout(Duration::from_secs(5), answer_of(&server.url())).await;
    assert_eq!(answer.unwrap(), "Hi");
}

#[test]
fn a_target_that_is_down_is_named_and_exits_6() {
    let url = format!("http://127.0.0.1:{}", free_port());
    for command in ["bench", "verify"] {
        let output = tightwad(&[command, "--target", &url]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(6), "{stderr}");
        assert!(stderr.contains(&url), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_does_not_run_is_named_with_how_to_start_it() {
    let target = undrafted_target(1).await;
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("tightwad.yaml");
    let proxy = free_port();
    let yaml = format!("proxy: {{ port: {proxy}, target: {{ url: \"{}\" }} }}\n", target.url());
    std::fs::write(&config, yaml).unwrap();
    for command in ["bench", "verify"] {
        let output = tightwad(&["-c", config.to_str().unwrap(), command]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(6), "{stderr}");
        assert!(
            stderr.contains(&format!("127.0.0.1:{proxy};")) && stderr.contains("`tightwad proxy start`"),
            "{stderr}"
        );
    }
}

#[test]
fn a_draft_for_a_proxy_that_runs_already_exits_2() {
    let draft = [
        "bench",
        "--proxy",
        "http://127.0.0.1:1",
        "--draft",
        "http://127.0.0.1:1",
    ];
    assert_eq!(tightwad(&draft).status.code(), Some(2));
}

#[test]
fn a_kind_that_is_none_exits_2_and_a_file_that_is_missing_4() {
    let kinds = tightwad(&["bench", "--target", "http://127.0.0.1:9", "--kinds", "prose"]);
    assert_eq!(kinds.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&kinds.stderr).contains("code, chat, list"));
    let file = tightwad(&["bench", "--target", "http://127.0.0.1:9", "--prompts", "/nowhere.jsonl"]);
    assert_eq!(file.status.code(), Some(4));
}

/// `tightwad` in the background, killed at the end of the test.
struct Killed(std::process::Child);

impl Killed {
    fn start(config: &str, part: &[&str], runtime: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
        command
            .args(["-c", config])
            .args(part)
            .env("XDG_RUNTIME_DIR", runtime)
            .env_remove("TIGHTWAD_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
