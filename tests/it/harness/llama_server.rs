use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::far_device::FarDevice;

/// The folder of the patched llama.cpp: `TIGHTWAD_LLAMA_CPP`, else what `scripts/llama-cpp` builds.
pub fn llama_cpp() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        if let Some(folder) = std::env::var_os("TIGHTWAD_LLAMA_CPP") {
            return PathBuf::from(folder);
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/llama-cpp");
        let output = Command::new(&script)
            .stderr(Stdio::inherit())
            .output()
            .expect("scripts/llama-cpp starts");
        assert!(output.status.success(), "scripts/llama-cpp failed");
        let stdout = String::from_utf8(output.stdout).expect("a path in UTF-8");
        PathBuf::from(stdout.lines().last().expect("the folder is the last line"))
    })
}

/// A model of `tests/models`.
pub fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models").join(name)
}

pub fn target() -> PathBuf {
    model("tightwad-tiny-target-q8_0.gguf")
}

/// Nobody listens there now. Another process may take it before it is used: start again then.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a free port")
        .port()
}

/// A program that ends with this value, or with the test process, however that ends.
pub struct Program {
    shell: Child,
    // the shell kills the program when this is closed
    lifeline: Option<ChildStdin>,
    folder: TempDir,
}

impl Program {
    pub fn start(program: &Path, args: &[&str]) -> Self {
        const SCRIPT: &str = r#"
            exec 3<&0
            "$@" 3<&- &
            program=$!
            echo "$program" >"$PID_FILE"
            { read -r _ <&3; kill -9 "$program"; } 2>/dev/null &
            wait "$program"
        "#;
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder for the log");
        let log = File::create(folder.path().join("log")).expect("a log file");
        let mut shell = Command::new("sh")
            .arg("-c")
            .arg(SCRIPT)
            .arg("sh")
            .arg(program)
            .args(args)
            .env("PID_FILE", folder.path().join("pid"))
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("sh starts");
        let lifeline = shell.stdin.take();
        Self {
            shell,
            lifeline,
            folder,
        }
    }

    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.folder.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn pid(&self) -> u32 {
        self.known_pid().expect("the pid of the program")
    }

    /// As [`Self::pid`]; `None` for a moment after the start.
    pub fn known_pid(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.folder.path().join("pid")).ok()?;
        text.trim().parse().ok()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.shell.try_wait().is_ok_and(|status| status.is_none())
    }

    /// Its exit code, once it has ended by itself.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.shell.try_wait().ok().flatten().and_then(|status| status.code())
    }

    /// CPU time used so far, of all its threads.
    pub fn cpu_time(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        let on_cpu = tasks.filter_map(|task| {
            let stat = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
            stat.split_whitespace().next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(on_cpu.sum())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let _ = self.shell.wait();
        if std::thread::panicking() {
            let log = self.log();
            // gdb lists the threads of a llama-server that aborts.
            let lines = log.lines().rev().filter(|line| !line.starts_with("[New LWP "));
            let tail: Vec<&str> = lines.take(60).collect();
            eprintln!("--- the last lines of the log:");
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}

/// A llama-server on a free port of 127.0.0.1.
pub struct LlamaServer {
    program: Mutex<Program>,
    url: String,
    /// What it computes on, if that is not this machine.
    _device: Option<FarDevice>,
}

impl LlamaServer {
    /// Start it and wait until it serves. `args` come last, so they can override.
    pub async fn start(model: &Path, args: &[&str]) -> Self {
        // the port may be lost between asking for it and using it
        for _ in 0..3 {
            if let Some(server) = Self::try_start(free_port(), model, args).await {
                return server;
            }
        }
        panic!("llama-server does not start");
    }

    /// As [`Self::start`], on a port at which another one may have ended just now.
    pub async fn start_at(port: u16, model: &Path, args: &[&str]) -> Self {
        let started = super::wait::eventually(Duration::from_secs(10), || async {
            Self::try_start(port, model, args).await.ok_or(())
        });
        started.await.expect("the port is free")
    }

    /// The target, as it is worth drafting for: [`FarDevice`].
    pub async fn far_target(args: &[&str]) -> Self {
        let device = FarDevice::start().await;
        let server = Self::start(&target(), &[&device.args(), args].concat()).await;
        Self {
            _device: Some(device),
            ..server
        }
    }

    /// As [`Self::far_target`] and [`Self::start_at`].
    pub async fn far_target_at(port: u16, args: &[&str]) -> Self {
        let device = FarDevice::start().await;
        let server = Self::start_at(port, &target(), &[&device.args(), args].concat()).await;
        Self {
            _device: Some(device),
            ..server
        }
    }

    async fn try_start(port: u16, model: &Path, args: &[&str]) -> Option<Self> {
        let port_text = port.to_string();
        let model = model.to_str().expect("a path in UTF-8");
        let mut all = vec!["-m", model, "--host", "127.0.0.1", "--port", &port_text];
        all.extend([
            "-t",
            "1",
            "-tb",
            "1",
            "-c",
            "2048",
            "--no-webui",
            "--no-warmup",
            "--threads-http",
            "16",
        ]);
        all.extend(args);
        let mut program = Program::start(&llama_cpp().join("bin/llama-server"), &all);

        let url = format!("http://127.0.0.1:{port}");
        let client = reqwest::Client::new();
        let give_up = Instant::now() + Duration::from_secs(60);
        while Instant::now() < give_up {
            if client
                .get(format!("{url}/health"))
                .send()
                .await
                .is_ok_and(|answer| answer.status().is_success())
            {
                return Some(Self {
                    program: Mutex::new(program),
                    url,
                    _device: None,
                });
            }
            if !program.is_alive() {
                let log = program.log();
                if log.contains("couldn't bind") {
                    return None;
                }
                panic!("llama-server ended at its start:\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("llama-server is not healthy after a minute:\n{}", program.log());
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Tokens that it has generated so far; it has to be started with `--metrics`.
    pub async fn generated(&self) -> u64 {
        let metrics = self.get_text("/metrics").await;
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("llamacpp:tokens_predicted_total "));
        line.expect("the metric").trim().parse().expect("a number")
    }

    /// Slots that are working on something, by what the server says.
    pub async fn busy_slots(&self) -> usize {
        let slots = self.get("/slots").await;
        let slots = slots.as_array().expect("a list of slots");
        slots.iter().filter(|slot| slot["is_processing"] == true).count()
    }

    pub fn is_alive(&self) -> bool {
        self.program().is_alive()
    }

    pub fn cpu_time(&self) -> Duration {
        self.program().cpu_time()
    }

    pub fn pid(&self) -> u32 {
        self.program().pid()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("a process");
        kill_process(pid, signal).expect("it runs");
    }

    fn program(&self) -> std::sync::MutexGuard<'_, Program> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub async fn get(&self, path: &str) -> Value {
        self.get_text(path).await.parse().expect("JSON")
    }

    pub async fn get_text(&self, path: &str) -> String {
        let answer = reqwest::get(format!("{}{path}", self.url)).await.expect("an answer");
        answer.text().await.expect("a body")
    }

    /// POST, and expect 200.
    pub async fn post(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.send(path, body, None).await;
        assert_eq!(status, 200, "{path}: {answer}");
        answer
    }

    /// POST as it comes: the status and the JSON.
    pub async fn send(&self, path: &str, body: &Value, draft_key: Option<&str>) -> (u16, Value) {
        let mut request = reqwest::Client::new().post(format!("{}{path}", self.url)).json(body);
        if let Some(key) = draft_key {
            request = request.header("X-Draft-Key", key);
        }
        answer_of(request).await
    }

    pub async fn tokenize(&self, content: &str) -> Vec<i32> {
        let answer = self.post("/tokenize", &serde_json::json!({ "content": content })).await;
        serde_json::from_value(answer["tokens"].clone()).expect("tokens")
    }
}

/// Sends a request: the status and the JSON; a stream comes back as an array of its events.
pub async fn answer_of(request: reqwest::RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.expect("an answer");
    let status = answer.status().as_u16();
    let text = answer.text().await.expect("a body");
    (status, serde_json::from_str(&text).unwrap_or_else(|_| events(&text)))
}

/// The answer without what differs between any two runs.
pub fn essence(mut answer: Value) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                for key in [
                    "timings",
                    "id",
                    "created",
                    "created_at",
                    "completed_at",
                    "item_id",
                    "tokens_evaluated",
                    "id_slot",
                ] {
                    map.remove(key);
                }
                // The prompt's tokens, of which more or fewer may have been in the cache.
                if let Some(cached) = map.remove("cache_read_input_tokens").and_then(|cached| cached.as_u64()) {
                    let read = map["input_tokens"].as_u64().unwrap_or_default();
                    map.insert("input_tokens".to_owned(), (read + cached).into());
                }
                map.values_mut().for_each(strip);
            }
            Value::Array(values) => values.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut answer);
    answer
}

/// The JSON events of a server-sent event stream.
pub fn events(stream: &str) -> Value {
    stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter_map(|data| serde_json::from_str::<Value>(data).ok())
        .collect()
}
