//! `tightwad run target` and its child.

use std::fs;
use std::time::Duration;

use super::{Running, SOON, User, eventually, free_port, handles, pid};
use rustix::process::{Signal, kill_process, test_kill_process};

fn is_alive(number: i32) -> bool {
    // A process that has ended and that its new parent has not waited for yet still has its number.
    let state = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    test_kill_process(pid(number)).is_ok() && !state.contains(") Z ")
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
fn a_target_without_a_terminal_goes_on_after_sighup_and_says_so() {
    let user = User::new();
    user.fake_target(
        free_port(),
        &format!("env: {{ FAKE: sleep, FAKE_PIDS: {} }}", user.path("pids").display()),
    );
    let supervisor = Running::start(user.tightwad(&["run", "target"]));
    eventually(SOON, "the child runs", || !user.fake_pids().is_empty());
    supervisor.signal(Signal::HUP);
    supervisor.signal(Signal::HUP);
    std::thread::sleep(Duration::from_millis(300));
    assert!(is_alive(user.fake_pids()[0]));
    supervisor.signal(Signal::TERM);
    let ended = supervisor.ends_within(SOON);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended
            .stderr
            .contains("SIGHUP is ignored: a changed config takes a restart"),
        "{ended:?}"
    );
}

#[test]
fn a_target_that_is_stopped_while_it_loads_is_replaced() {
    let user = User::new();
    let pids = user.path("pids");
    let keys = format!(
        "stall_seconds: 1, env: {{ FAKE: sleep, FAKE_PIDS: {} }}",
        pids.display()
    );
    user.fake_target(free_port(), &keys);
    let supervisor = Running::start(user.tightwad(&["run", "target"]));
    eventually(SOON, "the child runs", || !user.fake_pids().is_empty());
    kill_process(pid(user.fake_pids()[0]), Signal::STOP).unwrap();
    eventually(SOON, "another has taken its place", || user.fake_pids().len() >= 2);
    supervisor.signal(Signal::TERM);
    let ended = supervisor.ends_within(SOON);
    assert!(ended.stderr.contains("its process has been stopped for"), "{ended:?}");
}

#[test]
fn a_target_ends_with_its_terminal() {
    let user = User::new();
    let pids = user.path("pids");
    user.fake_target(
        free_port(),
        &format!("env: {{ FAKE: sleep, FAKE_PIDS: {} }}", pids.display()),
    );
    let terminal = user.tightwad_in_terminal(&["run", "target"]);
    let terminal = Running::start(terminal);
    eventually(SOON, "the child runs", || !user.fake_pids().is_empty());
    drop(terminal);
    eventually(SOON, "the child has ended", || !is_alive(user.fake_pids()[0]));
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
    eventually(SOON, "its trap is set", || handles(user.fake_pids()[0], Signal::TERM));
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
