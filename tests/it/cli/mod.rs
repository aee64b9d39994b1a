//! The built binary as its users meet it: exit codes, sentences, children.

mod cluster_file;
mod endpoint;
mod run_target;
mod status;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::harness::ended::Ended;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A user with a folder of their own and nothing in the environment.
struct User {
    folder: TempDir,
}

impl User {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn tightwad(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
        command.args(args).current_dir(self.folder.path()).env_clear();
        command
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.folder.path());
        command.env("XDG_RUNTIME_DIR", self.folder.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The program in a terminal of its own, which `script` of util-linux opens, and which closes when that is killed.
    fn tightwad_in_terminal(&self, args: &[&str]) -> Command {
        let command = format!("exec {} {}", env!("CARGO_BIN_EXE_tightwad"), args.join(" "));
        let mut terminal = Command::new("script");
        terminal.args(["--quiet", "--return", "--command", &command, "/dev/null"]);
        terminal.current_dir(self.folder.path()).env_clear();
        let inherited = self.tightwad(&[]);
        let variables = inherited.get_envs().filter_map(|(name, value)| Some((name, value?)));
        terminal.envs(variables).env("SHELL", "/bin/sh");
        terminal
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        terminal
    }

    /// Writes `tightwad.yaml`, which is found by itself.
    fn config(&self, yaml: &str) -> &Self {
        fs::write(self.path("tightwad.yaml"), yaml).unwrap();
        self
    }

    /// A target that is the fake llama-server, with more keys for the section `target`.
    fn fake_target(&self, port: u16, more: &str) -> &Self {
        self.config(&format!(
            "target: {{ port: {port}, {more} }}\nmodels: {{ tiny: {{ path: {} }} }}\nbinaries: {{ llama_server: {} }}\n",
            tiny_model().display(),
            fake_llama_server().display()
        ))
    }

    /// A proxy that listens and whose target is down.
    fn proxy_without_target(&self) -> Running {
        let port = free_port();
        self.config(&format!(
            "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n"
        ));
        let proxy = Running::start(self.tightwad(&["proxy", "start"]));
        eventually(SOON, "the proxy listens", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        proxy
    }

    fn run(&self, args: &[&str]) -> Ended {
        Ended::from(self.tightwad(args).output().unwrap())
    }

    /// The process ids that the fake llama-server has had so far.
    fn fake_pids(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.path("pids")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Ended {
    /// Ends with this code and one sentence that contains all of these.
    #[track_caller]
    fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        let sentence = self
            .stderr
            .lines()
            .find(|line| line.starts_with("error: "))
            .unwrap_or_default();
        for word in words {
            assert!(sentence.contains(word), "`{word}` is missing in `{sentence}`");
        }
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}

/// Something in the background, which is killed at the end of the test.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> Self {
        Self(command.spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(pid(self.0.id().cast_signed()), signal).unwrap();
    }

    /// Waits for its end.
    #[track_caller]
    fn ends_within(mut self, patience: Duration) -> Ended {
        eventually(patience, "the program has ended", || {
            self.0.try_wait().unwrap().is_some()
        });
        let mut ended = Ended {
            code: self.0.wait().unwrap().code(),
            stdout: String::new(),
            stderr: String::new(),
        };
        std::io::Read::read_to_string(self.0.stdout.as_mut().unwrap(), &mut ended.stdout).unwrap();
        std::io::Read::read_to_string(self.0.stderr.as_mut().unwrap(), &mut ended.stderr).unwrap();
        ended
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn tiny_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/tightwad-tiny-target-q8_0.gguf")
}

fn fake_llama_server() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fakes/llama-server")
}

fn pid(number: i32) -> Pid {
    Pid::from_raw(number).unwrap()
}

/// Whether the process catches or ignores `signal`.
fn handles(number: i32, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{number}/status")).unwrap_or_default();
    let masks = status
        .lines()
        .filter_map(|line| line.strip_prefix("SigIgn:").or_else(|| line.strip_prefix("SigCgt:")));
    masks
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| (mask >> (signal.as_raw() - 1)) & 1 == 1)
}

#[track_caller]
fn eventually(patience: Duration, what: &str, condition: impl FnMut() -> bool) {
    let mut condition = condition;
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < patience, "not within {patience:?}: {what}");
        sleep(Duration::from_millis(20));
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

const SOON: Duration = Duration::from_secs(10);

/// Answers every connection with this, as long as the test runs.
fn serves(answer: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let mut request = [0; 1024];
            let _ = socket.read(&mut request);
            let _ = socket.write_all(answer.as_bytes());
        }
    });
    port
}

const JSON: &str =
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{}";
const LOADING: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}";
