//! Where the cluster file is found, and what environment variables change.

use std::path::Path;

use super::{MINIMAL, Place, error_of};
use tightwad::config::{MaxDraftTokens, Secret, load_in};

#[test]
fn the_first_file_of_the_search_wins() {
    let place = Place::new().variable("XDG_CONFIG_HOME", "/nowhere").file(
        "configs/cluster.yaml",
        "proxy: { port: 2, target: { url: 'http://a' } }",
    );
    assert_eq!(place.proxy().port, 2);
    let place = place.file("tightwad.yaml", "proxy: { port: 1, target: { url: 'http://a' } }");
    assert_eq!(place.proxy().port, 1);
    let place = place
        .file("named.yaml", "proxy: { port: 3, target: { url: 'http://a' } }")
        .variable("TIGHTWAD_CONFIG", "named.yaml");
    assert_eq!(place.proxy().port, 3);
    let explicit = load_in(Some(Path::new("tightwad.yaml")), &place.environment).unwrap();
    assert_eq!(explicit.config.proxy.unwrap().port, 1);
    assert_eq!(explicit.path, Some(place.path("tightwad.yaml")));
}

#[test]
fn the_users_own_folder_is_searched() {
    let place = Place::new().file("xdg/tightwad/config.yaml", MINIMAL);
    let xdg = place.path("xdg").display().to_string();
    assert!(place.variable("XDG_CONFIG_HOME", &xdg).load().is_ok());
    let place = Place::new().file(".config/tightwad/config.yaml", MINIMAL);
    let home = place.folder.path().display().to_string();
    assert!(place.variable("HOME", &home).load().is_ok());
}

#[test]
fn no_file_is_an_error_that_says_where_it_was_looked_for() {
    let error = Place::new().variable("HOME", "/home/me").error();
    for place in [
        "tightwad.yaml",
        "configs/cluster.yaml",
        "/home/me/.config/tightwad/config.yaml",
        "/etc/tightwad/cluster.yaml",
        "`-c FILE`",
        "TIGHTWAD_CONFIG",
    ] {
        assert!(error.contains(place), "{place} is not in {error}");
    }
}

#[test]
fn a_named_file_that_is_not_there_is_an_error_and_not_a_search() {
    let place = Place::with_file(MINIMAL).variable("TIGHTWAD_CONFIG", "gone.yaml");
    let error = place.error();
    assert!(
        error.starts_with("gone.yaml: cannot read the cluster file that TIGHTWAD_CONFIG names: "),
        "{error}"
    );
}

#[test]
fn what_is_no_cluster_file_is_not_read_to_its_end() {
    let error = |file: &str| {
        let place = Place::with_file(MINIMAL).variable("TIGHTWAD_CONFIG", file);
        place.error()
    };
    for (file, says) in [("/dev/zero", "a device"), ("/tmp", "a folder")] {
        let error = error(file);
        let begins = format!("{file}: cannot read the cluster file that TIGHTWAD_CONFIG names: it is {says}");
        assert!(error.starts_with(&begins), "{error}");
    }
    let long = Place::with_file(&format!("{MINIMAL}{}", "#\n".repeat(1 << 20)));
    assert!(long.error().contains("larger than 1 MiB"), "{}", long.error());
}

#[test]
fn a_pipe_is_read_as_a_file_is() {
    let place = Place::new().variable("TIGHTWAD_CONFIG", "pipe");
    let pipe = place.path("pipe");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let writer = std::thread::spawn(move || std::fs::write(pipe, MINIMAL));
    assert_eq!(place.proxy().target.unwrap().url.as_str(), "http://127.0.0.1:8080");
    writer.join().unwrap().unwrap();
}

#[test]
fn the_environment_alone_can_give_a_proxy() {
    let place = Place::new()
        .variable("TIGHTWAD_PROXY__TARGET__URL", "http://10.0.0.1:8080")
        .variable("TIGHTWAD_PROXY__PORT", "9000");
    let loaded = place.load().unwrap();
    assert_eq!(loaded.path, None);
    let proxy = loaded.config.proxy.unwrap();
    assert_eq!(
        (proxy.port, proxy.target.unwrap().url.as_str()),
        (9000, "http://10.0.0.1:8080")
    );
}

#[test]
fn variables_win_over_the_file_and_take_the_type_of_their_key() {
    let proxy = Place::with_file(MINIMAL)
        .variable("TIGHTWAD_PROXY__PORT", "9000")
        .variable("TIGHTWAD_PROXY__AUTH_TOKEN", "0123")
        .variable("TIGHTWAD_PROXY__MAX_DRAFT_TOKENS", "8")
        .variable("TIGHTWAD_PROXY__ALLOW_UNAUTHENTICATED", "true")
        .proxy();
    assert_eq!(proxy.port, 9000);
    assert_eq!(proxy.auth_token, Some(Secret::new("0123")));
    assert_eq!(proxy.max_draft_tokens, MaxDraftTokens::AtMost(8));
    assert!(proxy.allow_unauthenticated);
    assert_eq!(proxy.target.unwrap().url, "http://127.0.0.1:8080");
}

#[test]
fn variables_reach_models_lists_and_the_environment_of_a_server() {
    let config = Place::with_file("target: {}\nmodels: { Qwen3-72B: { path: a.gguf } }")
        .variable("TIGHTWAD_MODELS__QWEN3_72B__CTX_SIZE", "4096")
        .variable("TIGHTWAD_TARGET__ENV__HIP_VISIBLE_DEVICES", "1")
        .variable("TIGHTWAD_TARGET__EXTRA_ARGS", "[--mlock, --no-mmap]")
        .variable("TIGHTWAD_WORKERS", "[{ host: 10.0.0.2 }]")
        .load()
        .unwrap()
        .config;
    assert_eq!(config.models["Qwen3-72B"].ctx_size, 4096);
    let target = config.target.unwrap();
    assert_eq!(target.env["HIP_VISIBLE_DEVICES"], "1");
    assert_eq!(target.extra_args, ["--mlock", "--no-mmap"]);
    assert_eq!(config.workers[0].host, "10.0.0.2");
}

#[test]
fn variables_that_are_no_keys_are_left_alone() {
    let place = Place::with_file(MINIMAL)
        .variable("TIGHTWAD_LOG", "debug")
        .variable("TIGHTWAD_LLAMA_CPP", "/opt")
        .variable("PATH", "/bin");
    assert!(place.load().is_ok());
}

#[test]
fn a_mistaken_variable_is_named() {
    let error = |name: &str, value: &str| Place::with_file(MINIMAL).variable(name, value).error();
    assert_eq!(
        error("TIGHTWAD_PROXY__PROT", "1"),
        "TIGHTWAD_PROXY__PROT: proxy.prot: unknown key; did you mean port?"
    );
    assert_eq!(
        error("TIGHTWAD_PROXY_PORT", "1"),
        "TIGHTWAD_PROXY_PORT: proxy_port: unknown key; did you mean TIGHTWAD_PROXY__PORT (two underscores)?"
    );
    assert_eq!(
        error("TIGHTWAD_PROXY__PORT", "many"),
        "TIGHTWAD_PROXY__PORT: proxy.port: expected a whole number from 0 to 65535, found `many`"
    );
    let error = error("TIGHTWAD_PROXY__TARGET__URL", "nowhere");
    assert!(
        error.starts_with("TIGHTWAD_PROXY__TARGET__URL: proxy.target.url: `nowhere`"),
        "{error}"
    );
}

#[test]
fn variables_in_strings_are_replaced() {
    let proxy =
        Place::with_file("proxy:\n  port: ${PORT}\n  auth_token: a${TOKEN}$${b}\n  target: { url: 'http://${HOST}' }")
            .variable("PORT", "9000")
            .variable("TOKEN", "1: {")
            .variable("HOST", "10.0.0.1")
            .proxy();
    assert_eq!(proxy.port, 9000);
    assert_eq!(proxy.auth_token.unwrap().expose(), "a1: {${b}");
    assert_eq!(proxy.target.unwrap().url, "http://10.0.0.1");
}

#[test]
fn an_unset_variable_in_a_string_is_an_error_with_file_line_key_and_name() {
    assert_eq!(
        error_of("proxy:\n  # ${COMMENT}\n  auth_token: ${TOKEN}\n  target: { url: http://a }"),
        "tightwad.yaml:3: proxy.auth_token: the environment variable TOKEN is not set"
    );
}
