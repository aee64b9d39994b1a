//! Each part as a systemd unit: what it tells systemd, what it takes from it, what it leaves in the journal.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::llama_server::{LlamaServer, Program, free_port, llama_cpp, model, target};
use crate::harness::notify_socket::NotifySocket;
use crate::harness::wait::eventually;
use crate::harness::worker::{TOKEN, children, config as worker_config, is_listening, lease_request, send};
use rustix::process::Signal;
use serde_json::{Value, json};
use tightwad::config::Secret;
use tightwad::pool::agent_client::AgentClient;

/// Long enough for a machine with other things to do, and less than systemd waits.
const SOON: Duration = Duration::from_secs(20);

/// Writes a config into the socket's folder, and returns its path.
fn write(unit: &NotifySocket, config: &str) -> String {
    let file = unit.folder().join("cluster.yaml");
    fs::write(&file, config).unwrap();
    file.to_str().unwrap().to_owned()
}

/// Asks it to end as systemd does: it says so, and ends well.
async fn ends_well(unit: &mut NotifySocket, program: &mut Program) {
    send(program.pid(), Signal::TERM);
    unit.hears("that it stops", |line| line == "STOPPING=1").await;
    assert_eq!(exit_code(program).await, Some(0), "{}", program.log());
}

async fn exit_code(program: &mut Program) -> Option<i32> {
    let give_up = Instant::now() + SOON;
    while program.is_alive() {
        assert!(Instant::now() < give_up, "it still runs:\n{}", program.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    program.exit_code()
}

/// What a process was started with.
fn environment(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/environ")).unwrap();
    String::from_utf8_lossy(&bytes).replace('\0', "\n")
}

/// The only child of a process that is no longer this binary itself, and what that was started with.
async fn environment_of_child(parent: u32) -> String {
    let child = eventually(SOON, || async {
        let became = |pid: &u32| {
            let exe = fs::read_link(format!("/proc/{pid}/exe"));
            exe.is_ok_and(|exe| exe.starts_with(llama_cpp()))
        };
        children(parent).into_iter().find(became).ok_or(())
    });
    environment(child.await.unwrap())
}

fn is_of_this_process_alone(environment: &str) -> bool {
    !environment.contains("NOTIFY_SOCKET=") && !environment.contains("WATCHDOG_")
}

/// A llama-server that begins when a file is there.
fn gated_llama_server(folder: &Path) -> (PathBuf, PathBuf) {
    let (script, gate) = (folder.join("llama-server"), folder.join("gate"));
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *--port*) while [ ! -e {} ]; do sleep 0.02; done;; esac\nexec {} \"$@\"\n",
        gate.display(),
        llama_cpp().join("bin/llama-server").display()
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    (script, gate)
}

async fn get(url: &str, token: Option<&str>) -> Option<u16> {
    let mut request = reqwest::Client::new().get(url);
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    request.send().await.ok().map(|answer| answer.status().as_u16())
}

#[tokio::test]
async fn a_target_is_ready_when_its_model_answers_and_not_before() {
    let mut unit = NotifySocket::bind();
    let (llama_server, gate) = gated_llama_server(unit.folder());
    let port = free_port();
    let config = json!({
        "target": { "port": port, "threads": 1 },
        "models": { "tiny": { "path": target(), "ctx_size": 512 } },
        "binaries": { "llama_server": llama_server },
    });
    let config = write(&unit, &config.to_string());
    let mut program = unit.run(&[], &["-c", &config, "run", "target"]);
    unit.hears_status("loading tiny").await;
    unit.hears_life().await;
    assert!(!unit.heard_ready(), "{:?}", unit.heard);

    fs::write(&gate, "").unwrap();
    unit.hears_ready().await;
    let health = format!("http://127.0.0.1:{port}/health");
    assert_eq!(get(&health, None).await, Some(200));
    unit.hears_status("tiny serves").await;
    assert!(is_of_this_process_alone(&environment_of_child(program.pid()).await));

    // Its server dies, and comes back.
    let server = children(program.pid())[0];
    send(server, Signal::KILL);
    let status = unit.hears_status("attempt 2").await;
    assert!(status.contains("restarting"), "{status}");
    unit.hears_status("tiny serves").await;
    ends_well(&mut unit, &mut program).await;
    assert_eq!(unit.heard.iter().filter(|line| *line == "READY=1").count(), 1);
}

#[tokio::test]
async fn a_draft_that_cannot_start_says_why_and_is_never_ready() {
    let mut unit = NotifySocket::bind();
    let config = json!({
        "draft": { "port": free_port() },
        "models": { "tiny": { "path": "/no/such.gguf" } },
        "binaries": { "llama_server": llama_cpp().join("bin/llama-server") },
    });
    let config = write(&unit, &config.to_string());
    let mut program = unit.run(&[], &["-c", &config, "run", "draft"]);
    unit.hears_status("/no/such.gguf does not exist").await;
    assert_eq!(exit_code(&mut program).await, Some(4));
    assert!(!unit.heard_ready());
}

#[tokio::test]
async fn a_worker_is_ready_when_its_agent_answers_and_says_who_has_it() {
    let mut unit = NotifySocket::bind();
    let (agent, rpc) = (free_port(), free_port());
    let config = write(&unit, &worker_config(agent, &[rpc], "cache_gb: 0"));
    let mut program = unit.run(&[], &["-c", &config, "run", "worker"]);
    unit.hears_ready().await;
    let client = AgentClient::at("w", format!("http://127.0.0.1:{agent}"), Some(Secret::new(TOKEN))).expect("a client");
    client.status().await.unwrap();
    unit.hears_status("waits for a coordinator").await;
    unit.hears_life().await;

    let lease = client.lease(&lease_request("server:8080", 1)).await.unwrap();
    unit.hears_status("leased by server:8080").await;
    assert!(is_of_this_process_alone(&environment_of_child(program.pid()).await));
    client.give_back(&lease.id).await.unwrap();
    unit.hears_status("waits for a coordinator").await;
    ends_well(&mut unit, &mut program).await;
}

#[tokio::test]
async fn a_worker_without_an_agent_is_ready_when_its_server_listens() {
    let mut unit = NotifySocket::bind();
    let rpc = free_port();
    let config = write(&unit, &worker_config(0, &[rpc], "cache_gb: 0"));
    let mut program = unit.run(&[], &["-c", &config, "run", "worker"]);
    unit.hears_ready().await;
    assert!(is_listening(rpc));
    unit.hears_status("listens").await;
    ends_well(&mut unit, &mut program).await;
}

#[tokio::test]
async fn a_proxy_is_ready_without_its_target_and_says_that_it_waits_for_that() {
    let mut unit = NotifySocket::bind();
    let (port, target_port) = (free_port(), free_port());
    let target_url = format!("http://127.0.0.1:{target_port}");
    let config = json!({ "proxy": { "port": port, "target": { "url": target_url } } });
    let config = write(&unit, &config.to_string());
    let mut program = unit.run(&[], &["-c", &config, "proxy", "start"]);
    unit.hears_status(&format!("waits for the target at {target_url}"))
        .await;
    if !unit.heard_ready() {
        unit.hears_ready().await;
    }
    assert_eq!(get(&format!("http://127.0.0.1:{port}/health"), None).await, Some(200));
    unit.hears_life().await;
    let _target = LlamaServer::start_at(target_port, &target(), &[]).await;
    unit.hears_status("serves").await;
    ends_well(&mut unit, &mut program).await;
}

/// A coordinator whose only worker is away.
fn lonely_coordinator(unit: &NotifySocket, port: u16) -> String {
    let config = json!({
        "coordinator": { "port": port, "backend": "cpu", "threads": 1 },
        "workers": [{ "name": "gaming-pc", "host": "127.0.0.1", "backend": "cpu", "agent_port": free_port(),
            "gpus": [{ "name": "CPU", "vram_gb": 1, "rpc_port": free_port() }] }],
        "models": { "tiny": { "path": model("tightwad-tiny-target-q8_0.gguf"), "ctx_size": 512 } },
        "binaries": { "llama_server": llama_cpp().join("bin/llama-server") },
    });
    write(unit, &config.to_string())
}

#[tokio::test]
async fn a_coordinator_is_ready_without_its_worker_and_names_it() {
    let mut unit = NotifySocket::bind();
    let port = free_port();
    let config = lonely_coordinator(&unit, port);
    let mut program = unit.run(&[], &["-c", &config, "run", "coordinator"]);
    unit.hears_ready().await;
    assert_eq!(get(&format!("http://127.0.0.1:{port}/health"), None).await, Some(503));
    unit.hears_status("gaming-pc").await;
    unit.hears_life().await;
    ends_well(&mut unit, &mut program).await;
}

#[tokio::test]
async fn a_coordinator_that_start_leaves_behind_does_not_speak_to_systemd() {
    let unit = NotifySocket::bind();
    let config = lonely_coordinator(&unit, free_port());
    let mut start = unit.run(&[], &["-c", &config, "start"]);
    let coordinator = eventually(SOON, || async {
        let pids = start.known_pid().map(children).unwrap_or_default();
        let runs = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains("coordinator")
        };
        pids.into_iter().find(runs).ok_or(())
    });
    let inherited = environment(coordinator.await.unwrap_or_else(|()| panic!("{}", start.log())));
    // It stops what it started.
    send(start.pid(), Signal::TERM);
    assert_eq!(exit_code(&mut start).await, Some(130), "{}", start.log());
    assert!(is_of_this_process_alone(&inherited));
}

/// A proxy whose token's file is out of its reach, in a unit with this credential.
fn proxy_with_credential(unit: &NotifySocket, port: u16, token: Option<&str>) -> Program {
    let config = json!({
        "proxy": {
            "port": port,
            "target": { "url": "http://127.0.0.1:9" },
            "auth_token_file": "/nobody/may/read/this",
        },
    });
    let config = write(unit, &config.to_string());
    let credentials = unit.folder().join("credentials");
    fs::create_dir(&credentials).unwrap();
    if let Some(token) = token {
        fs::write(credentials.join("proxy.auth_token_file"), token).unwrap();
    }
    let directory = format!("CREDENTIALS_DIRECTORY={}", credentials.display());
    unit.run(&[directory], &["-c", &config, "run", "proxy"])
}

#[tokio::test]
async fn a_proxy_takes_its_token_from_the_credential_and_refuses_any_other() {
    let mut unit = NotifySocket::bind();
    let port = free_port();
    let mut program = proxy_with_credential(&unit, port, Some("the right one\n"));
    unit.hears_ready().await;
    let status = format!("http://127.0.0.1:{port}/v1/tightwad/status");
    assert_eq!(get(&status, Some("the right one")).await, Some(200));
    assert_eq!(get(&status, Some("a wrong one")).await, Some(401));
    assert_eq!(get(&status, None).await, Some(401));
    ends_well(&mut unit, &mut program).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_secret_names_the_file_that_was_read() {
    for (token, named) in [
        (None, "/nobody/may/read/this: cannot be read"),
        (Some(" \n"), "credentials/proxy.auth_token_file: is empty"),
    ] {
        let mut unit = NotifySocket::bind();
        let mut program = proxy_with_credential(&unit, free_port(), token);
        unit.hears_status(named).await;
        assert_eq!(exit_code(&mut program).await, Some(4));
        assert!(program.log().contains(named), "{}", program.log());
    }
}

/// What `tightwad` leaves on a standard error that is the journal's.
fn journal(folder: &Path, variables: &[(&str, &str)], args: &[&str], until: &str) -> String {
    let path = folder.join("journal");
    let file = File::create(&path).unwrap();
    let stat = file.metadata().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
    command
        .args(args)
        .env_clear()
        .envs(variables.iter().copied())
        .env("JOURNAL_STREAM", format!("{}:{}", stat.dev(), stat.ino()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file);
    let mut child = command.spawn().unwrap();
    let mut text = String::new();
    for _ in 0..2000 {
        text = fs::read_to_string(&path).unwrap();
        if text.contains(until) || child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if !text.contains(until) {
        text = fs::read_to_string(&path).unwrap();
    }
    text
}

#[test]
fn lines_for_the_journal_have_a_priority_and_neither_time_nor_colour() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("tightwad.yaml");
    let target = json!({ "url": "http://127.0.0.1:9" });
    fs::write(&config, json!({ "proxy": { "port": 0, "target": target } }).to_string()).unwrap();
    let config = config.to_str().unwrap();
    // A system user's home, which nobody may write to.
    let text = journal(
        folder.path(),
        &[("HOME", "/")],
        &["-c", config, "run", "proxy"],
        "serves at",
    );
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("<6>the proxy serves at http://127.0.0.1:")),
        "{text}"
    );
    let unwritten = "<4>`tightwad proxy stop` will not find this proxy on port 0: cannot write its pid file: this user has \
                     no home; set XDG_RUNTIME_DIR or XDG_STATE_HOME";
    assert!(lines.contains(&unwritten), "{text}");
    assert!(!Path::new("/.local/state/tightwad").exists());

    let text = journal(folder.path(), &[], &["-c", "/no/such.yaml", "run", "proxy"], "error");
    assert!(text.starts_with("<3>error: /no/such.yaml: cannot read"), "{text}");
}

#[test]
fn a_standard_error_that_is_not_the_journals_gets_lines_for_people() {
    let output = Command::new(env!("CARGO_BIN_EXE_tightwad"))
        .args(["-c", "/no/such.yaml", "run", "proxy"])
        .env("JOURNAL_STREAM", "1:1")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("error: "), "{text}");
}

#[test]
fn a_config_is_right_where_neither_its_models_nor_its_secrets_are() {
    let rendered = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rendered");
    let files: Vec<PathBuf> = fs::read_dir(rendered)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    // The whole, and what each of five roles reads.
    assert_eq!(files.len(), 6, "{files:?}");
    for file in files {
        let output = Command::new(env!("CARGO_BIN_EXE_tightwad"))
            .arg("-c")
            .arg(&file)
            .args(["check-config", "--json"])
            .env_clear()
            .output()
            .unwrap();
        assert!(output.status.success(), "{}: {output:?}", file.display());
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&report["ok"], &report["problems"]), (&json!(true), &json!([])));
    }
}
