//! The llama.cpp programs that a role keeps running: what they compute on, what they inherit, who may use them, what becomes
//! of one that hangs.

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::llama_server::{Program, free_port, llama_cpp, target};
use harness::notify_socket::NotifySocket;
use harness::wait::eventually;
use harness::worker::{children, send};
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
        section.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let config = json!({
            role: section,
            "models": { "tiny": { "path": target(), "ctx_size": 512 } },
            "binaries": { "llama_server": llama_server },
        });
        fs::write(self.path("cluster.yaml"), config.to_string()).unwrap();
        let file = self.path("cluster.yaml");
        self.socket
            .run(variables, &["-c", file.to_str().unwrap(), "run", role])
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
    assert!(program.log().contains("the target computes on the CPU"), "{}", program.log());
}

#[tokio::test]
async fn a_role_that_is_tied_to_no_gpu_says_what_it_computes_on() {
    let unit = Unit::new();
    fs::write(unit.path("devices"), "ROCm0: a GPU (1 MiB, 1 MiB free)\n").unwrap();
    let program = unit.run("draft", &fake_llama_server(), &unit.faked(json!({})));
    until("it is started", || !unit.text("args").is_empty()).await;
    assert!(!unit.text("args").contains("--device"), "{}", unit.text("args"));
    assert!(program.log().contains("the draft computes on ROCm0: a GPU"), "{}", program.log());
}
