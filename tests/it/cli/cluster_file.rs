//! Commands that read the cluster file, and files that are missing or wrong.

use std::fs;
use std::net::TcpListener;

use super::{Ended, User, fake_llama_server, free_port, tiny_model};

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
