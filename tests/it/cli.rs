//! The built binary as its users meet it: exit codes, sentences, children.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
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

/// What a run left.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
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

fn is_alive(number: i32) -> bool {
    // A process that has ended and that its new parent has not waited for yet still has its number.
    let state = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    test_kill_process(pid(number)).is_ok() && !state.contains(") Z ")
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

#[test]
fn output_that_nobody_reads_ends_the_program_without_a_word() {
    let user = User::new();
    user.config("proxy: { target: { url: \"http://127.0.0.1:9\" } }\n");
    for args in [&["check-config", "--show"][..], &["check-config", "--json"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = user.tightwad(args).stdout(writer).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*said), (Some(141), ""), "{args:?}");
    }
}

#[test]
fn an_unknown_command_exits_2() {
    assert_eq!(User::new().run(&["frobnicate"]).code, Some(2));
}

#[test]
fn run_without_a_part_exits_2_and_lists_the_parts() {
    let ended = User::new().run(&["run"]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    for part in ["target", "draft", "proxy", "coordinator", "worker"] {
        assert!(ended.stderr.contains(part), "{ended:?}");
    }
}

#[test]
fn a_log_filter_that_is_none_exits_2_and_names_the_variable() {
    let ended = User::new()
        .tightwad(&["check-config"])
        .env("TIGHTWAD_LOG", "tightwad=loud")
        .output()
        .unwrap();
    Ended::from(ended).fails(2, &["TIGHTWAD_LOG", "tightwad=loud"]);
}

#[test]
fn the_version_is_told() {
    let ended = User::new().run(&["--version"]);
    assert_eq!(
        (ended.code, ended.stdout.trim()),
        (Some(0), concat!("tightwad ", env!("CARGO_PKG_VERSION")))
    );
}

#[test]
fn an_unknown_config_key_exits_3_and_names_the_key() {
    let user = User::new();
    user.config("proxy: { prot: 8088 }\n");
    for args in [&["check-config"][..], &["proxy", "status"], &["run", "proxy"]] {
        user.run(args).fails(3, &["prot", "port"]);
    }
}

#[test]
fn a_missing_config_exits_3() {
    User::new()
        .run(&["-c", "nowhere.yaml", "check-config"])
        .fails(3, &["nowhere.yaml"]);
}

#[test]
fn a_missing_config_is_one_problem_and_said_once() {
    let user = User::new();
    let nowhere = user.run(&["-c", "nowhere.yaml", "check-config"]);
    assert_eq!(nowhere.stderr.lines().count(), 1, "{nowhere:?}");
    let none = user.run(&["check-config"]);
    none.fails(3, &["no cluster file"]);
    for ended in [nowhere, none] {
        assert!(!ended.stderr.contains("the environment"), "{ended:?}");
    }
    // What the environment says is summed up under its name.
    let mut command = user.tightwad(&["check-config"]);
    command.env("TIGHTWAD_PROXY__PRT", "1").env("TIGHTWAD_PROXY__PORT", "2");
    command.env("TIGHTWAD_PROXY__TARGET__URL", "http://127.0.0.1:1");
    let ended = Ended::from(command.output().unwrap());
    assert!(ended.stderr.contains("the environment: 1 problem"), "{ended:?}");
}

#[test]
fn a_missing_token_or_key_file_exits_4_and_is_named() {
    let user = User::new();
    let target = "target: { url: \"http://127.0.0.1:1\" }";
    user.config(&format!(
        "proxy: {{ port: {}, auth_token_file: token, {target} }}\n",
        free_port()
    ));
    user.run(&["run", "proxy"]).fails(4, &["auth_token_file", "token"]);
    user.run(&["proxy", "status"]).fails(4, &["auth_token_file"]);
    fs::write(user.path("token"), "\n").unwrap();
    user.run(&["run", "proxy"]).fails(4, &["token", "is empty"]);
    user.fake_target(free_port(), "api_key_file: key");
    user.run(&["run", "target"]).fails(4, &["api_key_file", "key"]);
}

#[test]
fn a_host_without_that_part_exits_3_and_names_the_section_and_all_that_it_needs() {
    let user = User::new();
    let others = format!(
        "proxy: {{ target: {{ url: \"http://127.0.0.1:1\" }} }}\nmodels: {{ tiny: {{ path: {} }} }}\n",
        tiny_model().display()
    );
    for (section, told, keys) in [
        ("target", "add one that names its `model`", "model: tiny"),
        ("draft", "add one that names its `model`", "model: tiny"),
        ("coordinator", "add one, and `workers` beside it", ""),
    ] {
        user.config(&others);
        let sentence = format!("no section `{section}`; {told}");
        user.run(&["run", section]).fails(3, &[&sentence]);
        user.config(&format!("{others}{section}: {{ {keys} }}\n"));
        let checked = user.run(&["check-config"]);
        assert_eq!(checked.code, Some(0), "{checked:?}");
    }
}

#[test]
fn a_proxy_without_a_target_exits_3() {
    let user = User::new();
    user.config(&format!("proxy: {{ port: {} }}\n", free_port()));
    user.run(&["run", "proxy"]).fails(3, &["target"]);
}

#[test]
fn an_open_proxy_without_a_token_exits_3_and_names_the_ways_out() {
    let user = User::new();
    user.config("proxy: { host: 0.0.0.0, target: { url: \"http://127.0.0.1:1\" } }\n");
    user.run(&["run", "proxy"])
        .fails(3, &["auth_token_file", "allow_unauthenticated"]);
}

#[test]
fn an_open_coordinator_without_a_key_exits_3_and_names_the_ways_out() {
    let user = User::new();
    user.config("coordinator: { host: 0.0.0.0 }\nmodels: { a: { path: a } }\n");
    user.run(&["run", "coordinator"])
        .fails(3, &["coordinator.api_key_file", "coordinator.allow_unauthenticated"]);
}

#[test]
fn a_right_config_is_right_and_shown_without_its_secrets() {
    let user = User::new();
    user.config("proxy: { auth_token: hush, target: { url: \"http://127.0.0.1:1\" } }\n");
    let ended = user.run(&["check-config", "--show"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.stdout.contains("auth_token") && !ended.stdout.contains("hush"),
        "{ended:?}"
    );
    let json: serde_json::Value = serde_json::from_str(&user.run(&["check-config", "--json"]).stdout).unwrap();
    assert_eq!(json["ok"], true);
}

#[test]
fn a_missing_model_exits_4_and_names_the_file() {
    let user = User::new();
    user.config(&format!(
        "target: {{}}\nmodels: {{ big: {{ path: /no/such.gguf }} }}\nbinaries: {{ llama_server: {} }}\n",
        fake_llama_server().display()
    ));
    user.run(&["run", "target"]).fails(4, &["/no/such.gguf"]);
}

#[test]
fn a_model_that_is_no_gguf_exits_11() {
    let user = User::new();
    fs::write(user.path("page.gguf"), "<html>404</html>").unwrap();
    user.config(&format!(
        "target: {{}}\nmodels: {{ big: {{ path: page.gguf }} }}\nbinaries: {{ llama_server: {} }}\n",
        fake_llama_server().display()
    ));
    user.run(&["run", "target"]).fails(11, &["page.gguf", "GGUF"]);
}

#[test]
fn a_model_whose_download_broke_off_exits_11_and_is_named() {
    let user = User::new();
    let whole = fs::read(tiny_model()).unwrap();
    fs::write(user.path("half.gguf"), &whole[..whole.len() / 2]).unwrap();
    user.config(&format!(
        "target: {{}}\nmodels: {{ big: {{ path: half.gguf }} }}\nbinaries: {{ llama_server: {} }}\n",
        fake_llama_server().display()
    ));
    user.run(&["run", "target"])
        .fails(11, &["half.gguf", "is truncated", "download it again"]);
}

#[test]
fn a_missing_program_exits_4_and_names_it() {
    let user = User::new();
    user.config(&format!(
        "target: {{}}\nmodels: {{ tiny: {{ path: {} }} }}\nbinaries: {{ llama_server: no-llama-here }}\n",
        tiny_model().display()
    ));
    user.run(&["run", "target"]).fails(4, &["no-llama-here", "binaries"]);
}

#[test]
fn a_port_in_use_exits_5_for_each_part() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let user = User::new();
    user.fake_target(port, "env: { FAKE: sleep }");
    user.run(&["run", "target"]).fails(5, &[&port.to_string()]);
    user.config(&format!(
        "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n"
    ));
    user.run(&["run", "proxy"]).fails(5, &[&port.to_string()]);
}

#[test]
fn a_child_is_killed_with_its_supervisor_even_when_that_is_killed_with_sigkill() {
    let user = User::new();
    user.fake_target(
        free_port(),
        &format!("env: {{ FAKE: sleep, FAKE_PIDS: {} }}", user.path("pids").display()),
    );
    let supervisor = Running::start(user.tightwad(&["run", "target"]));
    eventually(SOON, "the child runs", || !user.fake_pids().is_empty());
    let child = user.fake_pids()[0];
    assert!(is_alive(child));
    supervisor.signal(Signal::KILL);
    eventually(Duration::from_secs(2), "the child is gone", || !is_alive(child));
}

#[test]
fn ctrl_c_ends_a_target_within_3_seconds_and_exits_0() {
    let user = User::new();
    user.fake_target(
        free_port(),
        &format!("env: {{ FAKE: sleep, FAKE_PIDS: {} }}", user.path("pids").display()),
    );
    let supervisor = Running::start(user.tightwad(&["run", "target"]));
    eventually(SOON, "the child runs", || !user.fake_pids().is_empty());
    supervisor.signal(Signal::INT);
    let ended = supervisor.ends_within(Duration::from_secs(3));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!is_alive(user.fake_pids()[0]));
}

#[test]
fn a_child_that_ignores_sigterm_is_killed() {
    let user = User::new();
    user.fake_target(
        free_port(),
        &format!("env: {{ FAKE: deaf, FAKE_PIDS: {} }}", user.path("pids").display()),
    );
    let supervisor = Running::start(user.tightwad(&["run", "target"]));
    eventually(SOON, "the child runs", || !user.fake_pids().is_empty());
    // Its trap is set a moment after its process id is written.
    sleep(Duration::from_millis(200));
    supervisor.signal(Signal::TERM);
    let ended = supervisor.ends_within(Duration::from_secs(8));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!is_alive(user.fake_pids()[0]));
}

#[test]
fn a_child_that_dies_is_started_again_with_its_last_lines_shown() {
    let user = User::new();
    let env = format!(
        "env: {{ FAKE: die, FAKE_SAYS: my last words, FAKE_PIDS: {} }}",
        user.path("pids").display()
    );
    user.fake_target(free_port(), &env);
    let mut quiet = user.tightwad(&["run", "target"]);
    quiet.env("TIGHTWAD_LOG", "error");
    let supervisor = Running::start(quiet);
    eventually(SOON, "the child was started twice", || user.fake_pids().len() >= 2);
    supervisor.signal(Signal::TERM);
    let ended = supervisor.ends_within(SOON);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for words in ["my last words", "exit code 3", "starting it again"] {
        assert!(ended.stderr.contains(words), "`{words}` is missing in {}", ended.stderr);
    }
}

#[test]
fn a_target_that_is_being_restarted_is_not_to_be_started_again() {
    let user = User::new();
    let env = format!("env: {{ FAKE: die, FAKE_PIDS: {} }}", user.path("pids").display());
    user.fake_target(free_port(), &env);
    let supervisor = Running::start(user.tightwad(&["run", "target"]));
    eventually(SOON, "the child was started twice", || user.fake_pids().len() >= 2);
    let ended = user.run(&["status"]);
    let number = supervisor.0.id().to_string();
    ended.fails(6, &["started or restarted", "tightwad run target", &number]);
    assert!(!ended.stderr.contains("start it"), "{ended:?}");
    supervisor.signal(Signal::TERM);
    supervisor.ends_within(SOON);
    user.run(&["status"]).fails(7, &["no target runs", "start it"]);
}

#[test]
fn what_a_child_warns_of_at_every_request_is_not_in_the_log() {
    let user = User::new();
    let lines = "0.1 W slot op: id 3 | task 9 | need to evaluate at least 1 token for each active slot\\n\
                 0.1 W slot op: id 3 | task 9 | n_past was set to 7\\n\
                 0.1 W srv stop: cancel task, id_task = 9\\n\
                 0.1 W srv load_model: this is odd";
    let pids = user.path("pids");
    let env = format!(
        "env: {{ FAKE: sleep, FAKE_SAYS: \"{lines}\", FAKE_PIDS: {} }}",
        pids.display()
    );
    user.fake_target(free_port(), &env);
    let supervisor = Running::start(user.tightwad(&["run", "target"]));
    eventually(SOON, "the child has said all", || {
        let pid = user.fake_pids().first().copied().unwrap_or_default();
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
    });
    supervisor.signal(Signal::TERM);
    let ended = supervisor.ends_within(SOON);
    assert!(ended.stderr.contains("this is odd"), "{ended:?}");
    for words in ["need to evaluate", "n_past", "cancel task"] {
        assert!(!ended.stderr.contains(words), "{ended:?}");
    }
}

#[test]
fn a_child_that_dies_at_every_start_is_given_up_with_exit_8() {
    let user = User::new();
    user.fake_target(
        free_port(),
        &format!("env: {{ FAKE: die, FAKE_PIDS: {} }}", user.path("pids").display()),
    );
    user.run(&["run", "target"])
        .fails(8, &["gave up", "target", "exit code 3"]);
    assert_eq!(user.fake_pids().len(), 5);
}

#[test]
fn a_child_that_cannot_load_its_model_is_given_up_at_once() {
    let user = User::new();
    let says = "'0.00.001 E llama_model_load: error loading model: unknown model architecture'";
    let env = format!(
        "env: {{ FAKE: die, FAKE_SAYS: {says}, FAKE_PIDS: {} }}",
        user.path("pids").display()
    );
    user.fake_target(free_port(), &env);
    user.run(&["run", "target"])
        .fails(8, &["could not load the model", "unknown model architecture"]);
    assert_eq!(user.fake_pids().len(), 1);
}

#[test]
fn an_api_key_is_not_on_the_command_line_of_the_child() {
    let user = User::new();
    let pids = user.path("pids");
    user.fake_target(
        free_port(),
        &format!("api_key: hush, env: {{ FAKE: sleep, FAKE_PIDS: {} }}", pids.display()),
    );
    let _supervisor = Running::start(user.tightwad(&["run", "target"]));
    eventually(SOON, "the child runs", || !user.fake_pids().is_empty());
    let of_child = |what: &str| fs::read_to_string(format!("/proc/{}/{what}", user.fake_pids()[0])).unwrap();
    assert!(!of_child("cmdline").contains("hush"));
    assert!(of_child("environ").contains("LLAMA_API_KEY=hush"));
}

#[test]
fn a_proxy_that_does_not_run_cannot_be_stopped_or_asked_and_that_exits_7() {
    let user = User::new();
    user.config(&format!(
        "proxy: {{ port: {}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n",
        free_port()
    ));
    user.run(&["proxy", "stop"]).fails(7, &["no proxy"]);
    user.run(&["proxy", "status"]).fails(7, &["no proxy", "proxy start"]);
    user.run(&["status"]).fails(7, &["no proxy", "proxy start"]);
}

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

#[test]
fn the_status_of_another_server_is_one_sentence_without_its_page() {
    for answer in [
        "HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>\n<body>no such page</body>",
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>\n<body>welcome</body>",
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{\"hello\":1}",
    ] {
        let user = User::new();
        let port = serves(answer);
        user.config(&format!(
            "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n"
        ));
        let ended = user.run(&["proxy", "status"]);
        ended.fails(6, &["no proxy of Tightwad's", &port.to_string(), "`port`"]);
        user.run(&["status"]).fails(6, &["no proxy of Tightwad's"]);
        assert!(
            !ended.stderr.contains('<') && ended.stderr.lines().count() == 1,
            "{ended:?}"
        );
    }
}

#[test]
fn the_status_of_a_proxy_whose_target_is_down_is_shown_and_exits_6() {
    let user = User::new();
    let _proxy = user.proxy_without_target();
    let ended = user.run(&["proxy", "status"]);
    ended.fails(6, &["no target that answers"]);
    assert!(ended.stdout.contains("http://127.0.0.1:1: down"), "{ended:?}");
}

const JSON: &str =
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{}";
const LOADING: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}";

#[test]
fn the_status_of_a_proxy_whose_draft_is_down_is_shown_and_exits_13() {
    let user = User::new();
    let (port, target) = (free_port(), serves(JSON));
    user.config(&format!(
        "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:{target}\" }}, draft: {{ url: \"http://127.0.0.1:1\" }} }}\n"
    ));
    let _proxy = Running::start(user.tightwad(&["proxy", "start"]));
    eventually(SOON, "the target is found", || {
        let ended = user.run(&["proxy", "status"]);
        ended.code != Some(7) && ended.stdout.contains(&format!("{target}: healthy"))
    });
    let ended = user.run(&["proxy", "status"]);
    ended.fails(13, &["http://127.0.0.1:1", "tightwad run draft"]);
    assert!(ended.stdout.contains(": up "), "{ended:?}");
    user.run(&["status"]).fails(13, &["http://127.0.0.1:1"]);
}

#[test]
fn the_status_ends_with_the_worst_of_what_the_file_declares() {
    let user = User::new();
    let model = tiny_model();
    let model = model.display();
    let status = |target: u16, draft: u16, worker: &str| {
        user.config(&format!(
            "target: {{ port: {target}, model: big }}\ndraft: {{ port: {draft}, model: small }}\n{worker}\n\
             models: {{ big: {{ path: {model} }}, small: {{ path: {model} }} }}\n"
        ));
        user.run(&["status"])
    };
    let (well, loading) = (serves(JSON), serves(LOADING));
    let draft = serves(JSON);
    let all_is_well = status(well, draft, "");
    assert_eq!(all_is_well.code, Some(0), "{all_is_well:?}");
    for line in [
        format!("target        http://127.0.0.1:{well}, big: ready"),
        format!("draft         http://127.0.0.1:{draft}, small: ready"),
    ] {
        assert!(
            all_is_well.stdout.contains(&line),
            "`{line}` is missing in {all_is_well:?}"
        );
    }
    status(well, free_port(), "").fails(13, &["no draft runs", "tightwad run draft"]);
    status(loading, draft, "").fails(6, &["loads its model"]);
    status(free_port(), free_port(), "").fails(7, &["no target runs", "tightwad run target", "no draft runs"]);
    let worker = format!(
        "workers: [ {{ host: 127.0.0.1, agent_port: {}, agent_token: t }} ]",
        free_port()
    );
    status(well, free_port(), &worker).fails(6, &["down: 127.0.0.1", "no draft runs"]);
}

#[test]
fn a_target_of_this_host_that_is_down_is_down_though_the_proxy_has_not_noticed_yet() {
    let user = User::new();
    let target = free_port();
    let body = format!(
        r#"{{"verification":"attached","target":{{"url":"http://127.0.0.1:{target}","healthy":true}},"drafts":[]}}"#
    );
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    user.config(&format!(
        "proxy: {{ port: {} }}\ntarget: {{ port: {target} }}\nmodels: {{ big: {{ path: {} }} }}\n",
        serves(answer.leak()),
        tiny_model().display()
    ));
    user.run(&["status"])
        .fails(7, &["no target runs", "tightwad run target"]);
}

#[test]
fn a_draft_that_is_down_is_named_once_though_its_section_and_the_proxy_both_know_it() {
    let user = User::new();
    let (target, draft) = (serves(JSON), free_port());
    let body = format!(
        r#"{{"verification":"none","target":{{"url":"http://127.0.0.1:{target}","healthy":true}},
            "drafts":[{{"url":"http://127.0.0.1:{draft}","healthy":false}}]}}"#
    );
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    user.config(&format!(
        "proxy: {{ port: {} }}\ntarget: {{ port: {target} }}\ndraft: {{ port: {draft} }}\nmodels: {{ big: {{ path: {} }} }}\n",
        serves(answer.leak()),
        tiny_model().display()
    ));
    let ended = user.run(&["status"]);
    ended.fails(13, &["no draft runs", "tightwad run draft"]);
    let url = format!("http://127.0.0.1:{draft}");
    assert_eq!(ended.stderr.matches(&url).count(), 1, "{ended:?}");
}

#[test]
fn the_status_fails_where_the_token_of_the_proxy_cannot_be_read() {
    let user = User::new();
    user.config("proxy: { auth_token_file: nowhere, target: { url: \"http://127.0.0.1:1\" } }\n");
    user.run(&["status"]).fails(4, &["proxy.auth_token_file", "nowhere"]);
}

#[test]
fn a_target_on_the_loopback_address_of_another_host_is_not_taken_for_down() {
    let user = User::new();
    user.config(&format!(
        "proxy: {{ host: 192.0.2.1, auth_token: t }}\ntarget: {{ port: {} }}\nmodels: {{ big: {{ path: {} }} }}\n",
        free_port(),
        tiny_model().display()
    ));
    let ended = user.run(&["status"]);
    assert!(ended.stdout.contains("it is not asked from here"), "{ended:?}");
    assert!(!ended.stderr.contains("no target runs"), "{ended:?}");
}

#[test]
fn a_wrong_token_is_told_from_a_server_that_is_down() {
    let user = User::new();
    let port = free_port();
    let config = |token: &str| {
        user.config(&format!(
            "proxy: {{ port: {port}, auth_token: {token}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n"
        ));
    };
    config("right");
    let _proxy = Running::start(user.tightwad(&["proxy", "start"]));
    eventually(SOON, "the proxy listens", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    config("wrong");
    user.run(&["proxy", "status"]).fails(14, &["401", "token"]);
    user.run(&["status"]).fails(14, &["401", "token"]);
    let mut chat = user.tightwad(&["chat"]);
    chat.stdin(Stdio::piped());
    let mut chat = Running::start(chat);
    chat.0.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    chat.ends_within(SOON).fails(14, &["401", "token"]);
}

#[test]
fn ctrl_c_at_the_prompt_of_a_chat_ends_it_without_a_word() {
    let user = User::new();
    user.config("proxy: { target: { url: \"http://127.0.0.1:1\" } }\n");
    let mut chat = user.tightwad(&["chat"]);
    chat.stdin(Stdio::piped());
    let mut chat = Running::start(chat);
    let input = chat.0.stdin.take();
    sleep(Duration::from_millis(500));
    chat.signal(Signal::INT);
    let ended = chat.ends_within(SOON);
    drop(input);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(130), ""), "{ended:?}");
}

#[test]
fn bench_says_what_it_waits_for_when_a_draft_is_down() {
    let user = User::new();
    let target = format!("http://127.0.0.1:{}", serves(JSON));
    let bench = user.tightwad(&["bench", "--target", &target, "--draft", "http://127.0.0.1:1"]);
    let mut bench = Running::start(bench);
    sleep(Duration::from_secs(4));
    bench.0.kill().unwrap();
    let mut stderr = String::new();
    bench.0.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(stderr.contains("waiting for at most 15 s: "), "{stderr}");
}

#[test]
fn check_config_of_the_file_alone_says_nothing_about_this_host() {
    let user = User::new();
    user.config("target: {}\nmodels: { big: { path: /no/such.gguf } }\nbinaries: { llama_server: /no/such/program }\n");
    let here = user.run(&["check-config"]);
    assert!(
        here.code == Some(0) && here.stderr.contains("/no/such.gguf"),
        "{here:?}"
    );
    let mut portable = user.tightwad(&["check-config", "--portable"]);
    let portable = Ended::from(portable.env("TIGHTWAD_TARGET__PRT", "1").output().unwrap());
    assert_eq!(portable.code, Some(0), "{portable:?}");
    assert_eq!(portable.stderr.lines().count(), 1, "{portable:?}");
    user.config("target: { prt: 1 }\n");
    user.run(&["check-config", "--portable"]).fails(3, &[]);
}

#[test]
fn a_proxy_of_the_environment_is_not_for_a_users_own_machines() {
    let user = User::new();
    let (port, target) = (
        free_port(),
        serves("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{}"),
    );
    user.config(&format!(
        "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:{target}\" }} }}\n"
    ));
    let mut proxy = user.tightwad(&["proxy", "start"]);
    proxy
        .env("HTTP_PROXY", "http://127.0.0.1:1")
        .env("http_proxy", "http://127.0.0.1:1");
    let _proxy = Running::start(proxy);
    eventually(SOON, "the target is found", || {
        user.run(&["proxy", "status"]).code == Some(0)
    });
}

#[test]
fn proxy_stop_ends_the_proxy_and_a_second_start_is_refused_while_it_runs() {
    let user = User::new();
    let proxy = user.proxy_without_target();
    user.run(&["proxy", "start"]).fails(5, &["already runs"]);
    let stopped = user.run(&["proxy", "stop"]);
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    assert_eq!(proxy.ends_within(SOON).code, Some(0));
    user.run(&["proxy", "stop"]).fails(7, &["no proxy"]);
}

#[test]
fn the_proxy_waits_calmly_for_a_server_and_warns_of_it_once_when_it_stays_down() {
    let user = User::new();
    let server = "http://127.0.0.1:1";
    user.config(&format!(
        "proxy: {{ port: {}, target: {{ url: \"{server}\" }} }}\n",
        free_port()
    ));
    let proxy = Running::start(user.tightwad(&["proxy", "start"]));
    sleep(Duration::from_secs(12));
    proxy.signal(Signal::TERM);
    let ended = proxy.ends_within(SOON);
    let told = ended.stderr.lines().filter(|line| line.contains("target server"));
    let levels = told.map(|line| line.contains("WARN")).collect::<Vec<_>>();
    assert_eq!(levels, [false, true], "{ended:?}");
}

#[test]
fn a_pid_file_that_a_crash_left_behind_never_leads_to_another_process() {
    let user = User::new();
    let port = free_port();
    user.config(&format!(
        "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n"
    ));
    let mut bystander = Running::start({
        let mut command = Command::new("sleep");
        command.arg("60");
        command
    });
    fs::create_dir(user.path("tightwad")).unwrap();
    fs::write(
        user.path(&format!("tightwad/proxy-{port}.pid")),
        bystander.0.id().to_string(),
    )
    .unwrap();
    user.run(&["proxy", "stop"]).fails(7, &["no proxy"]);
    assert!(bystander.0.try_wait().unwrap().is_none());
}

#[test]
fn chat_with_a_server_that_is_down_exits_6() {
    let user = User::new();
    user.config("proxy: { target: { url: \"http://127.0.0.1:1\" } }\n");
    let mut chat = user.tightwad(&["chat", "--direct"]);
    chat.stdin(Stdio::piped());
    let mut chat = Running::start(chat);
    chat.0.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    chat.ends_within(SOON).fails(6, &["http://127.0.0.1:1"]);
}

#[test]
fn chat_without_a_question_fails_like_one_with_a_question() {
    let user = User::new();
    let port = free_port();
    user.config(&format!(
        "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n"
    ));
    user.run(&["chat"]).fails(6, &[&format!("http://127.0.0.1:{port}")]);
}
