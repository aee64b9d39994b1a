//! Commands that start, stop or ask a proxy: `proxy`, `chat`, `bench`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use super::{JSON, Running, SOON, User, eventually, free_port, handles, serves};
use rustix::process::Signal;

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
fn ctrl_c_at_the_prompt_of_a_person_is_no_error() {
    let user = User::new();
    user.config("proxy: { target: { url: \"http://127.0.0.1:1\" } }\n");
    let mut terminal = user.tightwad_in_terminal(&["chat"]);
    terminal.stdin(Stdio::piped());
    let mut terminal = Running::start(terminal);
    let mut shown = terminal.0.stdout.take().unwrap();
    let mut first = [0; 7];
    shown.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"Talking");
    let mut keys = terminal.0.stdin.take().unwrap();
    sleep(Duration::from_millis(300));
    keys.write_all(b"\x03").unwrap();
    terminal.0.stdout = Some(shown);
    let ended = terminal.ends_within(SOON);
    drop(keys);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn ctrl_c_ends_a_chat_whose_questions_come_from_a_pipe_without_a_word() {
    let user = User::new();
    user.config("proxy: { target: { url: \"http://127.0.0.1:1\" } }\n");
    let mut chat = user.tightwad(&["chat"]);
    chat.stdin(Stdio::piped());
    let mut chat = Running::start(chat);
    let input = chat.0.stdin.take();
    let number = chat.0.id().cast_signed();
    eventually(SOON, "the prompt is there", || handles(number, Signal::INT));
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
    let mut stderr = BufReader::new(bench.0.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("waiting for at most 15 s: ") {
        assert!(stderr.read_line(&mut said).unwrap() > 0, "{said}");
    }
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
