//! The llama.cpp programs that a role keeps running: what they compute on, what they inherit, who may use them, what becomes
//! of one that hangs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::llama_server::{Program, free_port, llama_cpp, target};
use crate::harness::notify_socket::NotifySocket;
use crate::harness::wait::eventually;
use crate::harness::worker::{self, children, send};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Long enough for a machine with other things to do.
const SOON: Duration = Duration::from_secs(30);

fn fake_llama_server() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fakes/llama-server")
}

/// A unit and its config.
struct Unit {
    socket: NotifySocket,
    port: u16,
}

impl Unit {
    fn new() -> Self {
        Self {
            socket: NotifySocket::bind(),
            port: free_port(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.socket.folder().join(name)
    }

    /// What a file that a child wrote holds; nothing as long as it is not there.
    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Runs a role whose llama-server is `llama_server`, with these keys in its section.
    fn run(&self, role: &str, llama_server: &Path, keys: &Value) -> Program {
        self.run_with(&[], role, llama_server, keys)
    }

    fn run_with(&self, variables: &[String], role: &str, llama_server: &Path, keys: &Value) -> Program {
        let mut section = json!({ "port": self.port, "threads": 1, "slots": 2 });
        section
            .as_object_mut()
            .unwrap()
            .extend(keys.as_object().unwrap().clone());
        let config = json!({
            role: section,
            "models": { "tiny": { "path": target(), "ctx_size": 512 } },
            "binaries": { "llama_server": llama_server },
        });
        fs::write(self.path("cluster.yaml"), config.to_string()).unwrap();
        let file = self.path("cluster.yaml");
        self.socket.run(variables, &["-c", file.to_str().unwrap(), "run", role])
    }

    /// The keys of a section whose server is the fake one.
    fn faked(&self, mut keys: Value) -> Value {
        keys["env"] = json!({
            "FAKE": "sleep",
            "FAKE_ARGS": self.path("args"),
            "FAKE_DEVICES": self.path("devices"),
            "FAKE_COMPLAINS": "ggml_cuda_init: failed to initialize CUDA: driver/library version mismatch",
        });
        keys
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    async fn status_of(&self, path: &str, key: Option<&str>) -> Option<u16> {
        let mut request = reqwest::Client::new().get(self.url(path));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        request.send().await.ok().map(|answer| answer.status().as_u16())
    }
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let shown = eventually(SOON, || async { is_so().then_some(()).ok_or(()) }).await;
    assert!(shown.is_ok(), "not within {SOON:?}: {what}");
}

#[tokio::test]
async fn a_role_waits_for_its_kind_of_gpu_and_never_takes_the_cpu_instead() {
    for role in ["target", "draft"] {
        let mut unit = Unit::new();
        fs::write(unit.path("devices"), "Vulkan0: an iGPU (1 MiB, 1 MiB free)\n").unwrap();
        let program = unit.run(role, &fake_llama_server(), &unit.faked(json!({ "backend": "cuda" })));
        let status = unit.socket.hears_status("no CUDA device").await;
        for words in ["driver/library version mismatch", "reboot", "looking again"] {
            assert!(status.contains(words), "`{words}` is missing in {status}");
        }
        // It looks again, for longer than a server that fails at every start is tried.
        for _ in 0..3 {
            unit.socket.hears_status("looking again").await;
        }
        assert_eq!(unit.text("args"), "", "it was started without its GPU");
        assert!(!unit.socket.heard_ready());
        let said = program.log().matches("no CUDA device").count();
        assert_eq!(said, 1, "it is said once in the log:\n{}", program.log());

        // The driver is there again.
        let devices = "CUDA0: a GPU (1 MiB, 1 MiB free)\nCUDA1: another (1 MiB, 1 MiB free)\nVulkan0: an iGPU (1 MiB, 1 MiB free)\n";
        fs::write(unit.path("devices"), devices).unwrap();
        unit.socket.hears_status("loading tiny").await;
        until("it is started", || !unit.text("args").is_empty()).await;
        let args = unit.text("args");
        assert!(args.contains("--device CUDA0,CUDA1"), "{args}");
        assert!(program.log().contains("computes on CUDA0: a GPU"), "{}", program.log());
    }
}

#[tokio::test]
async fn devices_that_the_file_names_win_over_the_kind() {
    let unit = Unit::new();
    let keys = json!({ "backend": "cuda", "extra_args": ["--device", "none"] });
    let program = unit.run("target", &fake_llama_server(), &unit.faked(keys));
    until("it is started", || !unit.text("args").is_empty()).await;
    let args = unit.text("args");
    assert_eq!(args.matches("--device").count(), 1, "{args}");
    assert!(
        program.log().contains("the target computes on the CPU"),
        "{}",
        program.log()
    );
}

#[tokio::test]
async fn a_role_that_is_tied_to_no_gpu_says_what_it_computes_on() {
    let unit = Unit::new();
    fs::write(unit.path("devices"), "ROCm0: a GPU (1 MiB, 1 MiB free)\n").unwrap();
    let program = unit.run("draft", &fake_llama_server(), &unit.faked(json!({})));
    until("it is started", || !unit.text("args").is_empty()).await;
    assert!(!unit.text("args").contains("--device"), "{}", unit.text("args"));
    assert!(
        program.log().contains("the draft computes on ROCm0: a GPU"),
        "{}",
        program.log()
    );
}

/// The patched llama-server.
fn llama_server() -> PathBuf {
    llama_cpp().join("bin/llama-server")
}

/// The process of the only server that a role runs.
fn server_of(program: &Program) -> u32 {
    children(program.pid())[0]
}

#[tokio::test]
async fn a_target_on_a_loopback_address_asks_for_the_key_of_its_host() {
    let mut unit = Unit::new();
    let program = unit.run("target", &llama_server(), &json!({}));
    unit.socket.hears_ready().await;
    assert_eq!(unit.status_of("/slots", None).await, Some(401));
    let file = unit.path("tightwad/local_key");
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let key = fs::read_to_string(&file).unwrap();
    assert_eq!(unit.status_of("/slots", Some(key.trim())).await, Some(200));
    assert!(program.log().contains(file.to_str().unwrap()), "{}", program.log());
    assert!(!program.log().contains(key.trim()), "the key is in the log");
    // What llama-server warns of when anybody may use it.
    assert!(!program.log().contains("no API key is set"), "{}", program.log());

    // No page of another machine may read an answer.
    let foreign = reqwest::Client::new()
        .get(unit.url("/health"))
        .header("Origin", "https://evil.example")
        .send()
        .await
        .unwrap();
    let allowed = foreign.headers().get("access-control-allow-origin");
    assert!(allowed.is_none(), "{allowed:?}");
}

#[tokio::test]
async fn the_roles_of_a_host_find_its_key_and_a_file_can_do_without_it() {
    let mut unit = Unit::new();
    let _target = unit.run("target", &llama_server(), &json!({}));
    unit.socket.hears_ready().await;

    // As the section of the file, by its URL, and by its URL without a file.
    let tightwad = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tightwad"));
        command.args(args).env("XDG_STATE_HOME", unit.socket.folder());
        let output = command
            .current_dir(unit.socket.folder())
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let by_url = unit.path("by-url.yaml");
    let section = json!({
        "proxy": { "target": { "url": unit.url("") } },
        "target": { "port": unit.port },
        "models": { "tiny": { "path": target() } },
    });
    fs::write(&by_url, section.to_string()).unwrap();
    let by_section = unit.path("cluster.yaml");
    for file in [by_section, by_url] {
        let prompts = unit.path("prompts");
        fs::write(&prompts, "hello\n").unwrap();
        let (code, said) = tightwad_chat(&unit, &file);
        assert_eq!(code, Some(0), "{}: {said}", file.display());
    }
    // Another user has a key of their own, which this server does not take.
    let stranger = tempfile::tempdir().unwrap();
    let file = unit.path("cluster.yaml");
    for command in [
        &["-c", file.to_str().unwrap(), "chat", "--direct"][..],
        &["bench", "--target", &unit.url("")],
    ] {
        let (code, said) = tightwad_as(stranger.path(), &unit, command);
        assert_eq!(code, Some(14), "{command:?}: {said}");
        let file = stranger.path().join("tightwad/local_key");
        for words in ["401", file.to_str().unwrap(), "another user"] {
            assert!(said.contains(words), "{command:?}: `{words}` is missing in {said}");
        }
    }
    let (code, said) = tightwad(&["verify", "--target", &unit.url(""), "--help"]);
    assert_eq!(code, Some(0), "{said}");

    let mut open = Unit::new();
    let _open = open.run("target", &llama_server(), &json!({ "allow_unauthenticated": true }));
    open.socket.hears_ready().await;
    assert_eq!(open.status_of("/slots", None).await, Some(200));
    assert!(!open.path("tightwad/local_key").exists());
}

/// Asks the target of a file directly.
fn tightwad_chat(unit: &Unit, file: &Path) -> (Option<i32>, String) {
    let args = ["-c", file.to_str().unwrap(), "chat", "--direct"];
    tightwad_as(unit.socket.folder(), unit, &args)
}

/// Runs tightwad in the folder of a unit, as a user with this folder for state, who asks one question.
fn tightwad_as(state: &Path, unit: &Unit, args: &[&str]) -> (Option<i32>, String) {
    use std::io::Write;
    let mut chat = std::process::Command::new(env!("CARGO_BIN_EXE_tightwad"))
        .args(args)
        .current_dir(unit.socket.folder())
        .env("XDG_STATE_HOME", state)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let _ = chat.stdin.take().unwrap().write_all(b"hello\n");
    let ended = chat.wait_with_output().unwrap();
    (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
}

#[tokio::test]
async fn a_server_whose_process_is_stopped_is_replaced() {
    for role in ["target", "draft"] {
        let mut unit = Unit::new();
        let program = unit.run(role, &llama_server(), &json!({ "stall_seconds": 2 }));
        unit.socket.hears_ready().await;
        let first = server_of(&program);
        send(first, Signal::STOP);
        let status = unit.socket.hears_status("stopped for").await;
        assert!(status.contains("SIGSTOP") && status.contains("restarting"), "{status}");
        unit.socket.hears_status("tiny serves").await;
        assert_ne!(server_of(&program), first);
        assert_eq!(unit.status_of("/health", None).await, Some(200));
    }
}

#[tokio::test]
async fn a_server_that_hangs_in_a_request_is_replaced() {
    let mut unit = Unit::new();
    let keys = json!({ "stall_seconds": 1, "allow_unauthenticated": true });
    let program = unit.run("target", &llama_server(), &keys);
    unit.socket.hears_ready().await;
    let first = server_of(&program);
    // A grammar that llama.cpp does not get through in hours.
    let grammar = format!("root ::= {}", "\"a\"? ".repeat(6000));
    let body = json!({ "prompt": "a", "n_predict": 4, "grammar": grammar });
    let request = reqwest::Client::new().post(unit.url("/completion")).json(&body).send();
    let asked = tokio::spawn(request);
    let status = unit.socket.hears_status("nothing has moved for").await;
    assert!(status.contains("stall_seconds"), "{status}");
    assert!(asked.await.unwrap().is_err());
    unit.socket.hears_status("tiny serves").await;
    assert_ne!(server_of(&program), first);
}

#[tokio::test]
async fn a_child_inherits_what_it_needs_and_no_secret() {
    let unit = Unit::new();
    let inherited = [
        "CUDA_VISIBLE_DEVICES=1",
        "HF_TOKEN=hush",
        "AWS_SECRET_ACCESS_KEY=hush",
        "TIGHTWAD_LOG=info",
    ];
    let variables = inherited.map(str::to_owned);
    let program = unit.run_with(&variables, "target", &fake_llama_server(), &unit.faked(json!({})));
    until("it is started", || !unit.text("args").is_empty()).await;
    let environment = fs::read(format!("/proc/{}/environ", server_of(&program))).unwrap();
    let environment = String::from_utf8_lossy(&environment).replace('\0', "\n");
    for name in ["PATH=", "CUDA_VISIBLE_DEVICES=1", "FAKE=sleep", "LLAMA_API_KEY="] {
        assert!(environment.contains(name), "{name} is missing in\n{environment}");
    }
    for name in ["hush", "TIGHTWAD_", "NOTIFY_SOCKET"] {
        assert!(!environment.contains(name), "{name} is in\n{environment}");
    }
}

#[tokio::test]
async fn a_worker_whose_kind_of_gpu_is_not_there_lends_nothing() {
    for agent in ["agent_port: 1, agent_token: t", "agent_port: 0"] {
        let mut unit = Unit::new();
        let config = format!(
            "workers: [ {{ name: w, host: 127.0.0.1, backend: cuda, {}, cache_gb: 0, gpus: [ {{ name: g, vram_gb: 1, rpc_port: {} }} ] }} ]\n\
             binaries: {{ llama_server: {}, rpc_server: {} }}\n",
            agent.replace("agent_port: 1", &format!("agent_port: {}", free_port())),
            unit.port,
            llama_server().display(),
            llama_cpp().join("bin/ggml-rpc-server").display(),
        );
        fs::write(unit.path("cluster.yaml"), config).unwrap();
        let file = unit.path("cluster.yaml");
        let program = unit.socket.run(&[], &["-c", file.to_str().unwrap(), "run", "worker"]);
        let status = unit.socket.hears_status("no CUDA device").await;
        assert!(status.contains("CPU") && status.contains("looking again"), "{status}");
        unit.socket.hears_status("looking again").await;
        assert!(!unit.socket.heard_ready());
        assert!(!worker::is_listening(unit.port), "{}", program.log());
    }
}

#[tokio::test]
async fn what_hangs_up_on_a_service_does_not_end_it() {
    let unit = Unit::new();
    let mut program = unit.run("target", &fake_llama_server(), &unit.faked(json!({})));
    until("it is started", || !unit.text("args").is_empty()).await;
    send(program.pid(), Signal::HUP);
    until("it says so", || program.log().contains("SIGHUP is ignored")).await;
    assert!(program.is_alive());
    send(program.pid(), Signal::TERM);
    until("it ends", || {
        !Path::new(&format!("/proc/{}/exe", program.pid())).exists()
    })
    .await;
}

#[tokio::test]
async fn a_context_beyond_what_the_model_was_trained_for_is_told_in_our_words() {
    let mut unit = Unit::new();
    let config = json!({
        "target": { "port": unit.port, "threads": 1, "slots": 2 },
        "models": { "tiny": { "path": target(), "ctx_size": 65536 } },
        "binaries": { "llama_server": llama_server() },
    });
    fs::write(unit.path("cluster.yaml"), config.to_string()).unwrap();
    let file = unit.path("cluster.yaml");
    let program = unit.socket.run(&[], &["-c", file.to_str().unwrap(), "run", "target"]);
    unit.socket.hears_ready().await;
    let log = program.log();
    assert!(log.contains("models.tiny.ctx_size"), "{log}");
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
}
