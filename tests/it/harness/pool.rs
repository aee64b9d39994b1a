use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpSocket;

use super::far_device::FarDevice;
use super::llama_server::{Program, answer_of, free_port, llama_cpp, model};
use super::wait::eventually;
use super::worker::children;

/// Two CPU workers and a coordinator on this machine, as processes.
pub struct Pool {
    pub workers: [Option<Program>; 2],
    pub coordinator: Option<Program>,
    url: String,
    folder: TempDir,
    agents: [u16; 2],
    /// Of `ggml-rpc-server`s that are run by hand.
    by_hand: Option<[u16; 2]>,
    far: Option<FarDevice>,
}

/// What differs between the pools of the tests.
pub struct Setup {
    /// Added to the section `coordinator`.
    pub coordinator: Value,
    /// Added to the models `big` and `other`.
    pub models: Value,
    /// The model that only drafts.
    pub drafter: Option<&'static str>,
    /// Each start of a llama-server takes so many seconds longer.
    pub slow: f32,
    /// The workers have no agents: their `ggml-rpc-server`s are run by hand.
    pub by_hand: bool,
    /// There are no workers; the coordinator lends a GPU of its own, which is full while a llama-server runs. That runs on
    /// the CPU, and knows nothing of it.
    pub own_gpu: bool,
    /// The second worker has no agent and is this device.
    pub far: Option<FarDevice>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            coordinator: json!({}),
            models: json!({}),
            drafter: None,
            slow: 0.0,
            by_hand: false,
            own_gpu: false,
            far: None,
        }
    }
}

impl Pool {
    /// Starts it, and waits until it answers.
    pub async fn ready(setup: Setup) -> Self {
        let pool = Self::start(setup);
        pool.becomes_ready(Duration::from_secs(15)).await;
        pool
    }

    /// Starts it.
    pub fn start(setup: Setup) -> Self {
        let mut pool = Self::without_coordinator(setup);
        pool.start_coordinator();
        pool
    }

    /// Starts the workers.
    pub fn without_coordinator(setup: Setup) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let port = free_port();
        let mut agents = [free_port(), free_port()];
        let mut ports = [free_port(), free_port()];
        if setup.by_hand {
            agents = [0, 0];
        }
        if let Some(far) = &setup.far {
            (agents[1], ports[1]) = (0, far.port());
        }
        let worker = |name: &str, agent: u16, port: u16| {
            json!({
                "host": "127.0.0.1", "name": name, "backend": "cpu", "agent_port": agent, "cache_gb": 0,
                "gpus": [{ "name": "CPU", "vram_gb": 1, "rpc_port": port }],
            })
        };
        let mut config = json!({
            "coordinator": {
                "port": port, "backend": "cpu", "slots": 4, "threads": 1, "extra_args": ["--no-warmup"],
            },
            "workers": [worker("one", agents[0], ports[0]), worker("two", agents[1], ports[1])],
            "models": {
                "big": { "path": model("tightwad-tiny-target-q8_0.gguf"), "ctx_size": 2048, "default": true },
                "other": { "path": model("tightwad-tiny-draft-othervocab-f16.gguf"), "ctx_size": 512 },
            },
            "binaries": {
                "llama_server": if setup.own_gpu { with_gpu(folder.path()) } else { slow_server(folder.path(), setup.slow) },
                "rpc_server": llama_cpp().join("bin/ggml-rpc-server"),
            },
        });
        if setup.own_gpu {
            let gpus = json!([{ "name": "pretended", "vram_gb": 8 }]);
            merge(&mut config["coordinator"], json!({ "backend": "cuda", "gpus": gpus }));
            config["workers"] = json!([]);
        }
        merge(&mut config["coordinator"], setup.coordinator);
        merge(&mut config["models"], setup.models);
        if let Some(drafter) = setup.drafter {
            config["draft"] = json!({ "model": drafter });
        }
        std::fs::write(folder.path().join("pool.yaml"), config.to_string()).expect("the config is written");
        let mut pool = Self {
            workers: [None, None],
            coordinator: None,
            url: format!("http://127.0.0.1:{port}"),
            folder,
            agents,
            by_hand: setup.by_hand.then_some(ports),
            far: setup.far,
        };
        if !setup.own_gpu {
            pool.start_worker(0);
        }
        if !setup.own_gpu && pool.far.is_none() {
            pool.start_worker(1);
        }
        pool
    }

    /// A command of somebody who has the config and folders of their own.
    pub fn tightwad(&self, args: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tightwad"));
        command
            .arg("-c")
            .arg(self.folder.path().join("pool.yaml"))
            .args(args)
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .env("XDG_STATE_HOME", self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    fn run(&self, part: &[&str]) -> Program {
        let config = self.folder.path().join("pool.yaml");
        let config = config.to_str().expect("a path in UTF-8");
        // A user with folders of their own, for the pid file.
        let home = |variable: &str| format!("{variable}={}", self.folder.path().display());
        let (runtime, state) = (home("XDG_RUNTIME_DIR"), home("XDG_STATE_HOME"));
        let program = [&*runtime, &*state, env!("CARGO_BIN_EXE_tightwad"), "-c", config, "run"];
        let args: Vec<&str> = program.into_iter().chain(part.iter().copied()).collect();
        Program::start(Path::new("env"), &args)
    }

    pub fn start_worker(&mut self, index: usize) {
        self.workers[index] = Some(match self.by_hand {
            None => self.run(&["worker", ["one", "two"][index]]),
            Some(ports) => {
                let port = ports[index].to_string();
                let args = ["-H", "127.0.0.1", "-p", &port, "--device", "CPU"];
                Program::start(&llama_cpp().join("bin/ggml-rpc-server"), &args)
            }
        });
    }

    /// Takes the coordinator's pretended GPU away, or gives it back.
    pub fn lose_gpu(&self, lost: bool) {
        let mark = self.folder.path().join("gpu-lost");
        if lost {
            std::fs::write(mark, "").expect("a file");
        } else {
            std::fs::remove_file(mark).expect("it was lost");
        }
    }

    pub fn start_coordinator(&mut self) {
        self.coordinator = Some(self.run(&["coordinator"]));
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        answer_of(reqwest::Client::new().get(format!("{}{path}", self.url))).await
    }

    pub fn post(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        reqwest::Client::new().post(format!("{}{path}", self.url)).json(body)
    }

    /// A completion of a fixed prompt.
    pub async fn complete(&self, model: &str) -> (u16, Value) {
        let body = json!({
            "model": model, "prompt": "let größe = numbers[42].unwrap();", "max_tokens": 16, "temperature": 0,
            "cache_prompt": false,
        });
        answer_of(self.post("/v1/completions", &body)).await
    }

    /// The lines that a swap tells.
    pub async fn swap(&self, model: &str) -> Vec<Value> {
        let answer = self.post("/v1/tightwad/swap", &json!({ "model": model })).send().await;
        let text = answer.expect("an answer").text().await.expect("lines");
        text.lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect()
    }

    pub async fn status(&self) -> Value {
        self.get("/v1/tightwad/status").await.1
    }

    /// Waits until a model answers.
    pub async fn becomes_ready(&self, within: Duration) {
        let client = reqwest::Client::new();
        let ready = eventually(within, || async {
            let answer = client.get(format!("{}/health", self.url)).send().await;
            match answer {
                Ok(answer) if answer.status().is_success() => Ok(()),
                Ok(answer) => Err(answer.text().await.unwrap_or_default()),
                Err(error) => Err(error.to_string()),
            }
        });
        if let Err(problem) = ready.await {
            panic!("the pool is not ready: {problem}");
        }
    }

    /// Kills a worker. Until the answer is dropped nobody else gets the port of its agent, and nobody listens there.
    pub fn kill_worker(&mut self, index: usize) -> TcpSocket {
        let worker = self.workers[index].take().expect("it runs");
        signal(worker.pid(), Signal::KILL);
        drop(worker);
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("a port that was just in use");
        socket
            .bind(([127, 0, 0, 1], self.agents[index]).into())
            .expect("its port");
        socket
    }

    /// Whether a worker's agent answers.
    pub async fn agent_answers(&self, index: usize) -> bool {
        reqwest::get(format!("http://127.0.0.1:{}/v1/worker", self.agents[index]))
            .await
            .is_ok()
    }

    /// What a worker's agent says of its lease.
    pub async fn lease(&self, index: usize) -> Value {
        let url = format!("http://127.0.0.1:{}/v1/worker", self.agents[index]);
        answer_of(reqwest::Client::new().get(url)).await.1["lease"].clone()
    }

    /// The `ggml-rpc-server` of a worker.
    pub fn rpc_server(&self, index: usize) -> u32 {
        let worker = self.workers[index].as_ref().expect("a worker").pid();
        children(worker).pop().expect("a child")
    }
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a pid"), signal).expect("it runs");
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// A llama-server that sleeps before it serves.
fn slow_server(folder: &Path, seconds: f32) -> PathBuf {
    let real = llama_cpp().join("bin/llama-server");
    if seconds == 0.0 {
        return real;
    }
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *--port*) sleep {seconds};; esac\nexec {} \"$@\"\n",
        real.display()
    );
    script(folder, "slow-llama-server", &text)
}

/// A llama-server that pretends to have a GPU, whose memory is taken by whichever of its kind serves.
fn with_gpu(folder: &Path) -> PathBuf {
    let (real, pid) = (llama_cpp().join("bin/llama-server"), folder.join("pid"));
    let lost = folder.join("gpu-lost");
    let (real, pid, lost) = (real.display(), pid.display(), lost.display());
    let text = format!(
        r#"#!/bin/sh
case "$*" in
*--list-devices*)
    if [ -e {lost} ]; then
        echo 'ggml_cuda_init: failed to initialize CUDA: driver/library version mismatch' >&2
        echo 'Available devices:'
        exit
    fi
    free=8000
    [ -e {pid} ] && kill -0 "$(cat {pid})" 2>/dev/null && free=100
    printf 'Available devices:\n  CUDA0: Pretended (8000 MiB, %s MiB free)\n' "$free"
    exit ;;
*--port*) echo $$ > {pid} ;;
esac
for word; do
    shift
    [ "$word" = CUDA0 ] && word=none
    set -- "$@" "$word"
done
exec {real} "$@"
"#
    );
    script(folder, "llama-server-with-gpu", &text)
}

fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    let script = folder.join(name);
    std::fs::write(&script, text).expect("a script");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, executable).expect("its permissions");
    script
}
