//! The demo and the chat with real llama-server processes and the tiny models.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::gguf::slow_target;
use crate::harness::llama_server::{free_port, llama_cpp, model, target};
use serde_json::{Value, json};

/// `tightwad` with nothing in the environment that could change what it does.
fn tightwad() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
    command
        .env_remove("TIGHTWAD_CONFIG")
        .env_remove("TIGHTWAD_LOG")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The demo on a free port, until its table is complete.
fn demo(target: &Path) -> Command {
    let mut command = tightwad();
    command.args(["demo", "--once", "--port", &free_port().to_string()]);
    command.arg("--llama-server").arg(llama_cpp().join("bin/llama-server"));
    command.arg("--target-model").arg(target);
    command.arg("--draft-model").arg(model("tightwad-tiny-draft-f16.gguf"));
    command
}

#[test]
fn the_demo_drafts_and_the_drafted_texts_equal_the_plain_ones() {
    let output = demo(&slow_target()).arg("--json").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["equal"], &report["undrafted"]),
        (&json!(true), &json!(false)),
        "{report:#}"
    );
    assert!(report["tokens_per_step"].as_f64().unwrap() > 1.0, "{report:#}");
    for row in report["rows"].as_array().unwrap() {
        assert!(row["tokens"].as_u64().unwrap() > 5, "{row:#}");
    }
}

#[test]
fn the_demo_shows_no_ratio_where_nothing_was_drafted() {
    let no_drafts = ["--", "--spec-draft-external-max", "0"];
    let output = demo(&target()).args(no_drafts).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    // Nobody looks at an empty table for a minute without a word.
    assert!(stderr.contains("warming up, plain: 0 of 30 answers"), "{stderr}");
    let table = String::from_utf8(output.stdout).unwrap();
    let rows = table.lines().filter(|row| row.ends_with(" yes")).collect::<Vec<_>>();
    // Two of each of five kinds, and the total.
    assert_eq!(
        rows.iter().filter(|row| row.contains(" no draft ")).count(),
        11,
        "{table}"
    );
}

#[test]
fn a_demo_that_is_stopped_sums_up_the_rows_until_then_and_exits_130() {
    let mut demo = demo(&slow_target()).spawn().unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines().map(Result::unwrap);
    let row = lines.find(|line| line.starts_with("code ")).unwrap();
    let id = rustix::process::Pid::from_child(&demo);
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    let rest: Vec<String> = lines.collect();
    let total = rest.iter().find(|line| line.starts_with("total "));
    assert!(
        total.is_some_and(|line| line.contains("(ended early)")),
        "{row}\n{rest:?}"
    );
    assert_eq!(demo.wait().unwrap().code(), Some(130));
}

#[test]
fn a_piped_chat_prints_the_answers_and_nothing_else_to_stdout() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    // Greedy, so that it always says the same.
    let yaml = format!(
        "target: {{ port: {port}, slots: 1, threads: 1, api_key: hush, extra_args: [--temp, \"0\"] }}\nproxy: {{}}\n\
         models: {{ tiny: {{ path: {}, ctx_size: 2048 }} }}\nbinaries: {{ llama_server: {}/bin/llama-server }}\n",
        slow_target().display(),
        llama_cpp().display()
    );
    std::fs::write(folder.path().join("tightwad.yaml"), yaml).unwrap();
    // Dropped first, so that nothing of it is left whatever fails below: its child dies with it.
    let mut server = tightwad();
    server
        .current_dir(&folder)
        .args(["run", "target"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut server = server.spawn().unwrap();
    let ready = (0..200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let health = format!("http://127.0.0.1:{port}/health");
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime
            .block_on(reqwest::get(health))
            .is_ok_and(|answer| answer.status().is_success())
    });

    let mut chat = tightwad();
    let mut chat = chat
        .current_dir(&folder)
        .args(["chat", "--direct"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    chat.stdin
        .take()
        .unwrap()
        .write_all(b"What is the capital of France?\n\nCount from 1 to 5.\n")
        .unwrap();
    let output = chat.wait_with_output().unwrap();
    server.kill().unwrap();
    server.wait().unwrap();

    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(ready && output.status.success(), "{stderr}");
    assert_eq!(stdout.lines().count(), 2, "{stdout}");
    assert!(stdout.starts_with("The capital of France is"), "{stdout}");
    assert_eq!(stderr.matches("tok/s").count(), 2, "{stderr}");
}
