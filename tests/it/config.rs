//! The cluster file as a user meets it: what is found, what wins, and what each mistake is answered with.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value as Json;
use tightwad::config::{
    Backend, Binaries, CheckReport, Config, ConfigError, Coordinator, DEFAULT_DRAFT_PORT, Environment, Gpu, GpuBackend,
    Loaded, MaxDraftTokens, Model, Proxy, Scope, Secret, Server, Upstream, VerificationMode, Worker, check_config_in,
    load_in,
};

const MINIMAL: &str = "proxy: { target: { url: 'http://127.0.0.1:8080' } }\n";

/// A folder of its own and an environment that holds nothing else.
struct Place {
    folder: tempfile::TempDir,
    environment: Environment,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let environment = Environment {
            directory: folder.path().to_owned(),
            ..Environment::default()
        };
        Self { folder, environment }
    }

    fn with_file(text: &str) -> Self {
        Self::new().file("tightwad.yaml", text)
    }

    fn file(self, name: &str, text: &str) -> Self {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.variables.insert(name.into(), value.into());
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn load(&self) -> Result<Loaded, ConfigError> {
        load_in(None, &self.environment)
    }

    fn proxy(&self) -> Proxy {
        self.load().unwrap().config.proxy.unwrap()
    }

    /// The error as it is printed, without the folder's name.
    fn error(&self) -> String {
        self.short(&self.load().unwrap_err().to_string())
    }

    fn check(&self) -> CheckReport {
        check_config_in(None, &self.environment, Scope::ThisHost)
    }

    fn short(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.folder.path().display()), "")
    }
}

fn error_of(text: &str) -> String {
    Place::with_file(text).error()
}

/// That the file is answered with one sentence that begins as expected.
fn assert_one_error(text: &str, expected: &str) {
    let error = error_of(text);
    let said = format!("{text}\nwas answered by\n{error}\nnot by\n{expected}");
    assert!(error.starts_with(expected) && error.lines().count() == 1, "{said}");
}

fn shipped() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

// Finding and layering

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

// Mistakes

#[test]
fn every_mistake_is_told_with_its_line_at_once() {
    let text = "\
proxy:
  prot: 8088
  port: [1]
  draft: { url: http://a, modle_name: x }
  target:
    backend: olama
workers:
  - { host: a, gpus: [ { name: x, vram_gb: much } ] }
nonsense: 1
";
    let expected = "\
tightwad.yaml:2: proxy.prot: unknown key; did you mean port?
tightwad.yaml:3: proxy.port: expected a whole number from 0 to 65535, found a list
tightwad.yaml:4: proxy.draft.modle_name: unknown key; did you mean model_name?
tightwad.yaml:5: proxy.target.url: missing; it has no default
tightwad.yaml:6: proxy.target.backend: `olama` is none of llamacpp, ollama, openai, vllm, sglang; did you mean ollama?
tightwad.yaml:8: workers.0.gpus.0.vram_gb: expected a number, found `much`
tightwad.yaml:9: nonsense: unknown key; the keys here are proxy, target, draft, coordinator, workers, models, binaries";
    assert_eq!(error_of(text), expected);
}

#[test]
fn an_unknown_key_hides_nothing_that_is_wrong_with_the_rest() {
    let text = "\
proxy:
  host: 0.0.0.0
  keepalive_secs: 0
target:
  model: bigg
  colour: red
drafts:
  port: 8090
  modle: small
modles:
  big: { path: a, predict: 0 }
";
    let expected = "\
tightwad.yaml:3: proxy.keepalive_secs: unknown key; did you mean keepalive_seconds?
tightwad.yaml:3: proxy.keepalive_seconds: must be more than 0
tightwad.yaml:5: target.model: no model `bigg`; did you mean big?
tightwad.yaml:6: target.colour: unknown key; the keys here are host, port, model, slots, threads, backend, stall_seconds, api_key, api_key_file, allow_unauthenticated, extra_args, env
tightwad.yaml:7: drafts: unknown key; did you mean draft?
tightwad.yaml:9: draft.modle: unknown key; did you mean model?
tightwad.yaml:9: draft.model: no model `small`; the models are big
tightwad.yaml:10: modles: unknown key; did you mean models?
tightwad.yaml:11: models.big.predict: must be more than 0; leave it out for no limit";
    let place = Place::with_file(text);
    assert_eq!(place.error(), expected);
    // Nobody is about to listen, but who checks the file wants to know.
    let report = place.short(&place.check().to_string());
    let listener = "tightwad.yaml:2: proxy.host: refusing to listen on 0.0.0.0 without a token: ";
    assert!(report.starts_with(listener) && report.contains(expected), "{report}");
}

#[test]
fn a_value_that_cannot_be_understood_is_not_taken_for_a_default() {
    for text in [
        "target: { port: x }\ndraft: { port: 8080 }\nmodels: { a: { path: a } }\n",
        "target: { model: a }\nmodels: { a: { path: [] } }\n",
    ] {
        assert_eq!(error_of(text).lines().count(), 1, "{}", error_of(text));
    }
}

#[test]
fn one_mistake_gives_one_line() {
    for (text, expected) in [
        (
            "",
            "tightwad.yaml: the file is empty; give at least one of the sections proxy, target, draft, coordinator, workers",
        ),
        ("# nothing\n---\n", "tightwad.yaml: the file is empty; "),
        (
            "proxy:\n\tport: 1\n",
            "tightwad.yaml:2: a tab in the indentation; YAML wants spaces there",
        ),
        (
            "proxy:\n  target:\n  \turl: a\n",
            "tightwad.yaml:3: a tab in the indentation; YAML wants spaces there",
        ),
        ("- proxy\n", "tightwad.yaml:1: the file must be "),
        ("models: {}\n", "tightwad.yaml:1: nothing to run: "),
        ("proxy:\n", "tightwad.yaml:1: nothing to run: "),
        ("proxy: {\n", "tightwad.yaml:2: not valid YAML: "),
        ("proxy: {}\n---\nproxy: {}\n", "tightwad.yaml:2: a second YAML document"),
        ("proxy: {}\n", "tightwad.yaml:1: proxy.target: missing; "),
        (
            "proxy:\n  port: 1\n  port: 2\n",
            "tightwad.yaml:3: proxy.port: given twice (before in line 2)",
        ),
        (
            "proxy: { port: 1 }\nproxy: { port: 2 }\n",
            "tightwad.yaml:2: proxy: given twice (before in line 1)",
        ),
        (
            "proxy:\n  target: { ulr: http://a }\n",
            "tightwad.yaml:2: proxy.target.ulr: unknown key; did you mean url?",
        ),
        (
            "proxy:\n  target:\n    url:\n",
            "tightwad.yaml:3: proxy.target.url: empty; expected a string",
        ),
        (
            "proxy: { port: 70000, target: { url: http://a } }",
            "tightwad.yaml:1: proxy.port: expected a whole number from 0 to 65535, found 70000",
        ),
        (
            "proxy: { host: 1.5, target: { url: http://a } }",
            "tightwad.yaml:1: proxy.host: expected a string, found 1.5; put it in quotes",
        ),
        (
            "proxy: { auth_token: 12345, target: { url: http://a } }",
            "tightwad.yaml:1: proxy.auth_token: expected a string, found something else; put it in quotes",
        ),
        (
            "workers: [{ host: h, agent_token: 12345 }]",
            "tightwad.yaml:1: workers.0.agent_token: expected a string, found something else; put it in quotes",
        ),
        (
            "proxy: { max_draft_tokens: many, target: { url: http://a } }",
            "tightwad.yaml:1: proxy.max_draft_tokens: expected `auto` or a number of tokens from 0 to 65535, found `many`",
        ),
        ("workers:\n  - gpus: []\n", "tightwad.yaml:2: workers.0.host: missing; "),
        ("workers:\n  -\n", "tightwad.yaml:2: workers.0.host: missing; "),
        (
            "target: {}\nmodels:\n  a:\n",
            "tightwad.yaml:3: models.a.path: missing; ",
        ),
    ] {
        assert_one_error(text, expected);
    }
}

#[test]
fn a_bad_value_of_the_proxy_names_its_key_and_line() {
    let proxy = |rest: &str| format!("proxy:\n  target: {{ url: 'http://a' }}\n  {rest}\n");
    for (text, expected) in [
        (
            proxy("draft: { url: '' }"),
            "3: proxy.draft.url: `` is not a URL with http",
        ),
        (
            proxy("draft: { url: '10.0.0.1:80' }"),
            "3: proxy.draft.url: `10.0.0.1:80` is not a URL with http",
        ),
        (
            proxy("draft: { url: 'ftp://a' }"),
            "3: proxy.draft.url: `ftp://a` is not a URL with http",
        ),
        (
            proxy("draft: { url: 'http://' }"),
            "3: proxy.draft.url: `http://` is not a URL: ",
        ),
        (
            proxy("draft: { url: 'http://a/v1/' }"),
            "3: proxy.draft.url: `http://a/v1/`: give the base URL, without /v1",
        ),
        (
            proxy("draft: { url: 'http://me:pw@a' }"),
            "3: proxy.draft.url: must not hold a user",
        ),
        (
            proxy("cors_origins: [ 'http://a:3000', 'tauri://localhost', 'http://a/' ]"),
            "3: proxy.cors_origins.2: `http://a/` is not the origin of a page, such as http://localhost:3000",
        ),
        (
            proxy("cors_origins: [ 'localhost:3000' ]"),
            "3: proxy.cors_origins.0: `localhost:3000` is not the origin of a page",
        ),
        (
            proxy("cors_origins: [ 'http://a', '*' ]"),
            "3: proxy.cors_origins.1: `*` allows all origins; leave the others out",
        ),
        (
            proxy("cors_origins: [ 'null' ]"),
            "3: proxy.cors_origins.0: `null` is what any page can call itself",
        ),
        (
            proxy("draft: { url: 'http://localhost:8088' }"),
            "3: proxy.draft.url: `http://localhost:8088` is the proxy itself",
        ),
        (
            proxy("draft: { url: 'http://a', api_key: x, api_key_file: y }"),
            "3: proxy.draft.api_key: given together with api_key_file",
        ),
        (
            proxy("draft: { url: 'http://a', draft_key: x }"),
            "3: proxy.draft.draft_key: is a key of the target: move it to proxy.target",
        ),
        (
            proxy("max_draft_tokens: 257"),
            "3: proxy.max_draft_tokens: 257 is more than 256",
        ),
        (proxy("max_body_size: 0"), "3: proxy.max_body_size: must be more than 0"),
        (
            proxy("max_tokens_limit: 0"),
            "3: proxy.max_tokens_limit: must be more than 0",
        ),
        (
            proxy("keepalive_seconds: 0"),
            "3: proxy.keepalive_seconds: must be more than 0",
        ),
        (
            proxy("auth_token: a\n  auth_token_file: b"),
            "3: proxy.auth_token: given together with auth_token_file",
        ),
        (proxy("auth_token: ''"), "3: proxy.auth_token: is empty"),
        (
            proxy("auth_token_file: ~/token"),
            "3: proxy.auth_token_file: `~/token`: `~` is not replaced",
        ),
        (proxy("host: 'a:80'"), "3: proxy.host: `a:80` is not an address"),
    ] {
        assert_one_error(&text, &format!("tightwad.yaml:{expected}"));
    }
}

#[test]
fn a_bad_value_of_a_server_or_a_model_names_its_key_and_line() {
    let target = |rest: &str| format!("models: {{ big: {{ path: a }}, small: {{ path: b }} }}\ntarget:\n  {rest}\n");
    for (text, expected) in [
        (
            target("model: bigg"),
            "3: target.model: no model `bigg`; did you mean big?",
        ),
        (
            target("model: xyz"),
            "3: target.model: no model `xyz`; the models are big, small",
        ),
        (
            target("slots: 4"),
            "2: target.model: name one of the models big, small, or mark one",
        ),
        (target("model: big\n  port: 0"), "4: target.port: must be a port"),
        (target("model: big\n  slots: 0"), "4: target.slots: must be more than 0"),
        (
            "coordinator: {}\n".into(),
            "1: models: missing; the coordinator needs a model",
        ),
        (
            "target: {}\nmodels:\n  a: { path: a, default: true }\n  b: { path: b, default: true }\n".into(),
            "4: models.b.default: a is the default already",
        ),
        (
            "target: {}\nmodels: { a: { path: '' } }\n".into(),
            "2: models.a.path: is empty",
        ),
        (
            "target: {}\nmodels: { a: { path: a } }\ndraft: { port: 8080 }\n".into(),
            "3: draft.port: 8080 is taken by target",
        ),
        (
            "proxy: { host: 0.0.0.0, port: 1 }\nmodels: { a: { path: a } }\ntarget: { host: 10.0.0.1, port: 1 }\n"
                .into(),
            "3: target.port: 1 is taken by proxy",
        ),
    ] {
        assert_one_error(&text, &format!("tightwad.yaml:{expected}"));
    }
}

#[test]
fn a_bad_value_of_a_worker_names_its_key_and_line() {
    let worker = |rest: &str| format!("workers:\n  - {{ host: a }}\n  - {rest}\n");
    for (text, expected) in [
        (
            worker("{ host: a }"),
            "3: workers.1.host: a with rpc_port 50052 is in the list already",
        ),
        (
            worker("{ host: '::1' }"),
            "3: workers.1.host: `::1`: give an IPv4 address",
        ),
        (
            worker("{ host: 0.0.0.0 }"),
            "3: workers.1.host: 0.0.0.0 is not an address that the coordinator can reach",
        ),
        (
            worker("{ host: b, gpus: [ { name: x, vram_gb: 0 } ] }"),
            "3: workers.1.gpus.0.vram_gb: 0 GiB; must be more than 0",
        ),
        (
            worker("{ host: b, gpus: [ { name: x, vram_gb: 1, rpc_port: 0 } ] }"),
            "3: workers.1.gpus.0.rpc_port: must be a port",
        ),
    ] {
        assert_one_error(&text, &format!("tightwad.yaml:{expected}"));
    }
}

#[test]
fn hosts_of_their_own_may_share_a_port_and_gpus_a_server() {
    let text = "\
models: { a: { path: a } }
target: { host: 10.0.0.1, api_key: x }
draft: { host: 10.0.0.2, api_key: x }
workers:
  - { host: a, gpus: [ { name: x, vram_gb: 8 }, { name: y, vram_gb: 8 } ] }
  - { host: b }
";
    assert_eq!(Place::with_file(text).load().unwrap().warnings, Vec::<String>::new());
}

#[test]
fn aliases_cannot_multiply() {
    let text = "models:\n  a: &a { path: x }\n  b: &b [ *a, *a ]\n  c: [ *b, *b ]\n";
    assert_one_error(text, "tightwad.yaml:3: an alias inside of a value with an anchor");
    assert_one_error(&"[".repeat(100_000), "tightwad.yaml:1: ");
}

#[test]
fn anchors_are_understood() {
    let text = "models: { a: &m { path: a }, b: *m }\ntarget: { model: b }\n";
    assert_eq!(
        Place::with_file(text).load().unwrap().config.models["b"].path,
        Path::new("a")
    );
}

// Listeners and secrets

#[test]
fn an_open_proxy_parses_but_may_not_listen() {
    let place = Place::with_file("proxy:\n  host: 0.0.0.0\n  target: { url: http://a }\n");
    let loaded = place.load().unwrap();
    let refusal = loaded.check_listeners().unwrap_err().to_string();
    assert!(
        place
            .short(&refusal)
            .starts_with("tightwad.yaml:2: proxy.host: refusing to listen on 0.0.0.0"),
        "{refusal}"
    );
    for way_out in [
        "proxy.auth_token_file",
        "proxy.auth_token)",
        "proxy.allow_unauthenticated: true",
    ] {
        assert!(refusal.contains(way_out), "{refusal}");
    }
    let bare = loaded.config.check_listeners().unwrap_err().to_string();
    assert!(bare.starts_with("proxy.host: refusing"), "{bare}");
}

#[test]
fn a_token_loopback_or_consent_opens_the_proxy() {
    for key in [
        "host: '::1'",
        "host: localhost",
        "auth_token: x",
        "auth_token_file: x",
        "allow_unauthenticated: true",
    ] {
        let host = if key.starts_with("host") {
            ""
        } else {
            "host: 0.0.0.0\n  "
        };
        let place = Place::with_file(&format!("proxy:\n  {host}{key}\n  target: {{ url: http://a }}\n"));
        assert!(place.load().unwrap().check_listeners().is_ok(), "{key}");
    }
}

#[test]
fn an_open_llama_server_parses_but_may_not_listen_and_each_section_answers_for_itself() {
    for section in ["coordinator", "target", "draft"] {
        let open = format!(
            "models: {{ a: {{ path: a }} }}\nproxy: {{ target: {{ url: 'http://a' }} }}\n{section}:\n  host: 0.0.0.0\n"
        );
        let loaded = Place::with_file(&open).load().unwrap();
        assert!(loaded.check_listener("proxy").is_ok());
        let refusal = loaded.check_listener(section).unwrap_err().to_string();
        for way_out in [
            format!(":4: {section}.host: refusing to listen on 0.0.0.0"),
            format!("{section}.api_key_file"),
            format!("{section}.allow_unauthenticated: true"),
        ] {
            assert!(refusal.contains(&way_out), "{refusal}");
        }
        for key in ["api_key: x", "api_key_file: x", "allow_unauthenticated: true"] {
            let place = Place::with_file(&format!("{open}  {key}\n"));
            assert!(place.load().unwrap().check_listeners().is_ok(), "{section}: {key}");
        }
    }
}

#[test]
fn many_rpc_endpoints_are_a_warning() {
    let place = Place::with_file("workers: [ { host: a }, { host: b }, { host: c } ]");
    assert!(place.load().unwrap().warnings[0].contains("28487"));
}

#[test]
fn a_token_is_read_from_its_file() {
    let place = Place::new().file("token", "  s3cret\n").file("empty", "\n");
    let proxy = |name: &str| Proxy {
        auth_token_file: Some(place.path(name)),
        ..Proxy::default()
    };
    assert_eq!(proxy("token").token().unwrap(), Some(Secret::new("s3cret")));
    let error = |name: &str| place.short(&proxy(name).token().unwrap_err().to_string());
    assert_eq!(
        error("empty"),
        "proxy.auth_token_file: empty: is empty; it should hold the token in one line"
    );
    assert!(error("gone").starts_with("proxy.auth_token_file: gone: cannot be read: "));
    assert_eq!(Proxy::default().token().unwrap(), None);

    let upstream = Upstream {
        api_key: Some(Secret::new("k")),
        ..Upstream::at("http://a")
    };
    assert_eq!(upstream.api_key().unwrap(), Some(Secret::new("k")));
    let server = Server {
        api_key_file: Some(place.path("token")),
        ..Server::default()
    };
    assert_eq!(server.api_key().unwrap(), Some(Secret::new("s3cret")));
}

// What the sections mean together

fn config(text: &str) -> Config {
    Place::with_file(text).load().unwrap().config
}

#[test]
fn a_target_and_a_draft_of_one_machine_need_no_ports() {
    let upstreams = |draft: &str| {
        let models = "models: { a: { path: a } }";
        let (drafts, target) = config(&format!("proxy: {{}}\ntarget: {{}}\n{draft}\n{models}\n")).proxy_upstreams();
        (drafts.into_iter().next().map(|draft| draft.url), target.unwrap().url)
    };
    let (target, draft) = ("http://127.0.0.1:8080", "http://127.0.0.1:8081");
    assert_eq!(upstreams("draft: {}"), (Some(draft.to_owned()), target.to_owned()));
    assert_eq!(upstreams("draft: { port: 9 }").0.unwrap(), "http://127.0.0.1:9");
    assert_eq!(upstreams(""), (None, target.to_owned()));
    assert_eq!(
        error_of("target: { port: 8081 }\ndraft: {}\nmodels: { a: { path: a } }\n"),
        "tightwad.yaml:2: draft.port: 8081 is taken by target on the same address; give another port"
    );
}

#[test]
fn a_model_is_the_named_the_default_or_the_only_one() {
    let two = config("workers: [ { host: a } ]\nmodels: { a: { path: a }, b: { path: b, default: true } }");
    assert_eq!(two.model_for(Some("a")).unwrap().0, "a");
    assert_eq!(two.model_for(None).unwrap().0, "b");
    assert_eq!(
        two.model_for(Some("x")).unwrap_err().to_string(),
        "models: no model `x`; the models are a, b"
    );
    let none = config("workers: [ { host: a } ]\nmodels: { a: { path: a }, b: { path: b } }");
    let error = none.model_for(None).unwrap_err().to_string();
    assert_eq!(
        error,
        "models: name one of the models a, b, or mark one with `default: true`"
    );
    assert_eq!(
        config("workers: [ { host: a } ]\nmodels: { a: { path: a } }")
            .model_for(None)
            .unwrap()
            .0,
        "a"
    );
    assert!(Config::default().model_for(None).is_err());
}

#[test]
fn one_drafter_or_several_may_be_given() {
    let drafters = |text: &str| {
        let proxy = config(&format!("proxy: {{ target: {{ url: http://t }}, draft: {text} }}"))
            .proxy
            .unwrap();
        proxy.draft.into_iter().map(|draft| draft.url).collect::<Vec<_>>()
    };
    assert_eq!(drafters("{ url: http://a }"), ["http://a"]);
    assert_eq!(
        drafters("[ { url: http://a }, { url: http://b, backend: ollama } ]"),
        ["http://a", "http://b"]
    );
    assert_eq!(drafters("[]"), Vec::<String>::new());
    assert_eq!(
        error_of("proxy:\n  target: { url: http://t }\n  draft: [ { url: http://a }, { uri: http://b } ]\n"),
        "tightwad.yaml:3: proxy.draft.1.uri: unknown key; did you mean url?"
    );
}

#[test]
fn the_proxy_takes_the_servers_of_its_own_file() {
    let both = config(
        "proxy: {}\ntarget: { host: 0.0.0.0, model: big, api_key: k }\ndraft: { host: '::1', port: 8081, model: small, api_key_file: f }\n\
         models: { big: { path: a }, small: { path: b } }",
    );
    let (draft, target) = both.proxy_upstreams();
    let (draft, target) = (&draft[0], target.unwrap());
    assert_eq!(
        (draft.url.as_str(), draft.model_name.as_deref()),
        ("http://[::1]:8081", Some("small"))
    );
    assert_eq!(draft.api_key_file.as_deref(), Some(Path::new("f")));
    assert_eq!(
        (target.url.as_str(), target.model_name.as_deref()),
        ("http://127.0.0.1:8080", Some("big"))
    );
    assert_eq!(target.api_key.unwrap().expose(), "k");

    let pool = config(
        "proxy: {}\ncoordinator: { host: 10.0.0.1, api_key: k, draft_key_file: d }\nmodels: { big: { path: a } }",
    );
    let (draft, target) = pool.proxy_upstreams();
    assert_eq!(draft, []);
    let expected = Upstream {
        // To name a model is to ask for a swap.
        model_name: None,
        api_key: Some(Secret::new("k")),
        draft_key_file: Some("d".into()),
        ..Upstream::at("http://10.0.0.1:8080")
    };
    assert_eq!(target, Some(expected));

    let given =
        config("proxy: { target: { url: 'http://b', backend: ollama } }\ntarget: {}\nmodels: { big: { path: a } }");
    assert_eq!(given.proxy_upstreams().1.unwrap().backend, Backend::Ollama);
}

// check-config

#[test]
fn check_config_reports_the_open_listeners_of_the_example_as_its_only_problems() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/cluster.yaml");
    let report = check_config_in(Some(&path), &Environment::default(), Scope::ThisHost);
    assert!(!report.ok);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["problems"].as_array().unwrap().len(), 2);
    assert_eq!(json["problems"][0]["key"], "proxy.host");
    assert_eq!(json["problems"][1]["key"], "coordinator.host");
    assert!(json["problems"][0]["line"].is_number());
    let warnings = json["warnings"].to_string();
    assert!(warnings.contains("not on this host"), "{warnings}");
    assert!(report.to_string().ends_with("cluster.yaml: 2 problems"), "{report}");
}

/// The tiny target of the tests.
fn tiny_model() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/tightwad-tiny-target-q8_0.gguf")).unwrap()
}

/// The warnings about a target whose model is the file `big.gguf` of this content.
fn warnings_of_model(content: &[u8], keys: &str) -> String {
    let place = Place::new();
    std::fs::write(place.path("big.gguf"), content).unwrap();
    warnings_of_path(&place, &place.path("big.gguf"), keys)
}

fn warnings_of_path(place: &Place, path: &Path, keys: &str) -> String {
    let yaml = format!(
        "target: {{}}\nmodels: {{ big: {{ path: {}{keys} }} }}\nbinaries: {{ llama_server: /bin/sh }}\n",
        path.display()
    );
    std::fs::write(place.path("tightwad.yaml"), yaml).unwrap();
    let report = place.check();
    assert!(report.ok, "{report}");
    place.short(&report.warnings.join("\n"))
}

#[test]
fn check_config_warns_of_programs_that_are_not_on_this_host() {
    let warnings = |config: &str| {
        let place = Place::with_file(config);
        std::fs::write(place.path("big.gguf"), tiny_model()).unwrap();
        let report = place.check();
        assert!(report.ok, "{report}");
        report.warnings.join("\n")
    };
    let absent = warnings("draft: {}\nmodels: { big: { path: a } }\nbinaries: { llama_server: /no/such/llama-server }");
    assert!(
        absent.contains("binaries.llama_server: /no/such/llama-server is not on this host"),
        "{absent}"
    );
    let absent = warnings("draft: {}\nmodels: { big: { path: a } }\nbinaries: { llama_server: no-such-server }");
    assert!(
        absent.contains("binaries.llama_server: there is no program `no-such-server` on PATH"),
        "{absent}"
    );
    let absent = warnings("workers: [ { host: 127.0.0.1 } ]\nbinaries: { rpc_server: no-such-server }");
    assert!(
        absent.contains("binaries.rpc_server: there is no program `no-such-server` on PATH"),
        "{absent}"
    );
    assert_eq!(warnings(MINIMAL), "");
    assert_eq!(warnings_of_model(&tiny_model(), ", ctx_size: 2048"), "");
}

#[test]
fn check_config_warns_of_a_model_that_cannot_be_loaded() {
    let model = tiny_model();
    let truncated = warnings_of_model(&model[..model.len() / 2], "");
    assert!(
        truncated.contains("models.big.path: big.gguf is truncated") && truncated.contains("download it again"),
        "{truncated}"
    );
    let text = warnings_of_model(b"<html>not found</html>", "");
    assert!(text.contains("models.big.path: big.gguf is not a GGUF model"), "{text}");
    let empty = warnings_of_model(b"", "");
    assert!(
        empty.contains("models.big.path: big.gguf is not a GGUF model"),
        "{empty}"
    );
    let place = Place::new();
    std::fs::create_dir(place.path("folder")).unwrap();
    let folder = warnings_of_path(&place, &place.path("folder"), "");
    assert!(
        folder.contains("models.big.path: folder is a directory; name the GGUF file in it"),
        "{folder}"
    );
    let device = warnings_of_path(&Place::new(), Path::new("/dev/zero"), "");
    assert!(
        device.contains("models.big.path: /dev/zero is not a regular file"),
        "{device}"
    );
}

#[test]
fn check_config_warns_of_a_context_beyond_what_the_model_was_trained_for() {
    let model = tiny_model();
    let beyond = warnings_of_model(&model, ", ctx_size: 4096");
    assert!(
        beyond.contains("models.big.ctx_size: 4096 tokens, but the model was trained for 2048; set ctx_size: 2048"),
        "{beyond}"
    );
    let default = warnings_of_model(&model, "");
    assert!(default.contains("models.big.ctx_size: 8192 tokens"), "{default}");
    assert_eq!(warnings_of_model(&model, ", ctx_size: 2048"), "");
    let scaled = ", ctx_size: 4096, extra_args: [--rope-scaling, yarn]";
    assert_eq!(warnings_of_model(&model, scaled), "");
}

#[test]
fn check_config_warns_of_a_token_file_that_is_empty() {
    let place = Place::new();
    std::fs::write(place.path("token"), "\n").unwrap();
    let yaml = format!(
        "proxy: {{ target: {{ url: 'http://a:1' }}, auth_token_file: {} }}",
        place.path("token").display()
    );
    std::fs::write(place.path("tightwad.yaml"), yaml).unwrap();
    let warnings = place.short(&place.check().warnings.join("\n"));
    assert!(
        warnings.contains("proxy.auth_token_file: token is empty; write the token into it"),
        "{warnings}"
    );
    std::fs::remove_file(place.path("token")).unwrap();
    std::fs::create_dir(place.path("token")).unwrap();
    let warnings = place.short(&place.check().warnings.join("\n"));
    assert!(
        warnings.contains("proxy.auth_token_file: token is a directory"),
        "{warnings}"
    );
}

#[test]
fn a_portable_check_depends_on_nothing_but_the_file() {
    let text = "proxy: { auth_token_file: /no/such/token }\ntarget: {}\nmodels: { big: { path: /no/such.gguf } }\n\
                binaries: { llama_server: /no/such/llama-server }";
    let place = Place::with_file(text).variable("TIGHTWAD_PROXY__PROT", "1");
    assert!(!place.check().ok, "the variable counts on this host");
    let report = check_config_in(None, &place.environment, Scope::File);
    assert!(report.ok && report.warnings.is_empty(), "{report}");
    let wrong = Place::with_file("proxy: { prot: 1 }");
    assert!(!check_config_in(None, &wrong.environment, Scope::File).ok);
    // What the file itself says still counts.
    let many = "workers: [ { host: a }, { host: b }, { host: c } ]";
    let report = check_config_in(None, &Place::with_file(many).environment, Scope::File);
    assert_eq!(report.warnings.len(), 1, "{report}");
}

#[test]
fn check_config_shows_the_servers_that_the_proxy_takes_from_other_sections() {
    let file = "proxy: {}\ntarget: {}\ndraft: { port: 9 }\nmodels: { big: { path: a } }";
    let config = Place::with_file(file).check().config.unwrap();
    let shown: Json = serde_yaml::from_str(&config.to_yaml().unwrap()).unwrap();
    assert_eq!(shown["proxy"]["target"]["url"], "http://127.0.0.1:8080", "{shown:#}");
    assert_eq!(shown["proxy"]["draft"][0]["url"], "http://127.0.0.1:9", "{shown:#}");
}

#[test]
fn check_config_shows_the_effective_values_without_secrets() {
    let report = Place::with_file(MINIMAL)
        .variable("TIGHTWAD_PROXY__AUTH_TOKEN", "s3cret")
        .check();
    assert!(report.ok, "{report}");
    let yaml = report.config.unwrap().to_yaml().unwrap();
    assert!(yaml.contains("***") && !yaml.contains("s3cret"), "{yaml}");
    assert!(yaml.contains("port: 8088"), "{yaml}");
    // Some tokens have to be in a server's environment.
    let target = "target: { env: { HF_TOKEN: s3cret, CUDA_VISIBLE_DEVICES: '1', https_proxy: 'http://me:s3cret@a:1/' } }\n\
         coordinator: { port: 1, extra_args: [ --api-key, s3cret, -t, '2' ] }\n\
         workers: [ { host: a, env: { HF_TOKEN: s3cret } } ]\n\
         models: { big: { path: /dev/null, extra_args: [ '--hf-token=s3cret' ] } }";
    let config = Place::with_file(target).check().config.unwrap();
    // The two forms in which it is shown.
    for shown in [config.to_yaml().unwrap(), serde_json::to_string(&config).unwrap()] {
        assert!(!shown.contains("s3cret"), "{shown}");
        assert!(
            shown.contains("CUDA_VISIBLE_DEVICES") && shown.contains("-t"),
            "{shown}"
        );
    }
}

#[test]
fn check_config_reports_what_cannot_be_read() {
    let report = Place::with_file("proxy: { prot: 1 }").check();
    assert!(!report.ok && report.file.is_some());
    assert_eq!(
        (report.problems[0].line, report.problems[0].key.as_str()),
        (Some(1), "proxy.prot")
    );
    assert!(!Place::new().check().ok);
}

// The files that come along

#[test]
fn every_shipped_file_loads() {
    let files = shipped();
    assert!(files.len() >= 4);
    for file in files {
        let loaded = load_in(Some(&file), &Environment::default());
        assert!(loaded.is_ok(), "{}", loaded.unwrap_err());
        let open = loaded.unwrap().check_listeners().is_err();
        assert_eq!(open, file.ends_with("cluster.yaml"), "{}", file.display());
    }
}

/// Every key of every type, with all that is optional given. No `..default()`: a new key does not compile until it is
/// here, and then the reference must name it.
#[allow(clippy::too_many_lines)]
fn everything() -> Config {
    let upstream = Upstream {
        url: "http://a".into(),
        model_name: Some("m".into()),
        backend: Backend::Llamacpp,
        api_key: Some(Secret::new("k")),
        api_key_file: Some("f".into()),
        asks_local_key: false,
        draft_key: Some(Secret::new("k")),
        draft_key_file: Some("f".into()),
    };
    let server = Server {
        host: "h".into(),
        port: 1,
        model: Some("m".into()),
        slots: 1,
        threads: Some(1),
        backend: Some(GpuBackend::Cuda),
        stall_seconds: 1,
        api_key: Some(Secret::new("k")),
        api_key_file: Some("f".into()),
        allow_unauthenticated: false,
        extra_args: Vec::new(),
        env: [].into(),
    };
    let gpu = |rpc_port| Gpu {
        name: "g".into(),
        vram_gb: 1.0,
        rpc_port,
        device: Some("d".into()),
    };
    let model = Model {
        path: "p".into(),
        ctx_size: 1,
        predict: Some(1),
        flash_attn: Some(true),
        cache_type_k: Some("f16".into()),
        cache_type_v: Some("f16".into()),
        default: true,
        extra_args: Vec::new(),
    };
    Config {
        proxy: Some(Proxy {
            host: "h".into(),
            port: 1,
            draft: vec![Upstream {
                // Keys of a target alone.
                draft_key: None,
                draft_key_file: None,
                ..upstream.clone()
            }],
            target: Some(upstream),
            max_draft_tokens: MaxDraftTokens::Auto,
            verification: VerificationMode::Auto,
            fallback_on_draft_failure: true,
            measure_agreement: false,
            auth_token: Some(Secret::new("k")),
            auth_token_file: Some("f".into()),
            allow_unauthenticated: false,
            cors_origins: vec!["http://a".into()],
            max_tokens_limit: Some(1),
            max_body_size: 1,
            keepalive_seconds: 1,
        }),
        target: Some(server.clone()),
        draft: Some(server),
        coordinator: Some(Coordinator {
            host: "h".into(),
            port: 1,
            backend: GpuBackend::Hip,
            gpus: vec![gpu(None)],
            slots: 1,
            threads: Some(1),
            swap_on_request: false,
            drain_seconds: 1,
            wait_seconds: 1,
            stall_seconds: 1,
            api_key: Some(Secret::new("k")),
            api_key_file: Some("f".into()),
            draft_key: Some(Secret::new("k")),
            draft_key_file: Some("f".into()),
            allow_unauthenticated: false,
            cors_origins: vec!["http://a".into()],
            extra_args: Vec::new(),
            env: [].into(),
        }),
        workers: vec![Worker {
            name: Some("n".into()),
            host: "h".into(),
            backend: Some(GpuBackend::Hip),
            gpus: vec![gpu(Some(1))],
            agent_port: 1,
            agent_token: Some(Secret::new("k")),
            agent_token_file: Some("f".into()),
            cache_gb: 1.0,
            cache_dir: Some("d".into()),
            extra_args: Vec::new(),
            env: [].into(),
        }],
        models: [("m".into(), model)].into(),
        binaries: Binaries {
            llama_server: "l".into(),
            rpc_server: "r".into(),
        },
    }
}

/// The dotted keys that have a value; `*` for list elements and for names the user chooses.
fn keys(value: &Json, at: &str, found: &mut BTreeSet<String>) {
    match value {
        Json::Object(entries) => {
            for (key, value) in entries {
                let chosen = ["models", "target.env", "draft.env", "coordinator.env", "workers.*.env"].contains(&at);
                let key = if chosen { "*" } else { key.as_str() };
                let path = if at.is_empty() {
                    key.into()
                } else {
                    format!("{at}.{key}")
                };
                keys(value, &path, found);
            }
        }
        Json::Array(items) if items.iter().all(Json::is_object) && !items.is_empty() => {
            for item in items {
                keys(item, &format!("{at}.*"), found);
            }
        }
        Json::Null => return,
        _ => {}
    }
    if !at.is_empty() && !at.contains(".env.") {
        found.insert(at.to_owned());
    }
}

fn keys_of(config: &Config) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    keys(&serde_json::to_value(config).unwrap(), "", &mut found);
    found
}

#[test]
fn the_reference_names_every_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/reference.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let load = |text: &str| {
        let variables = [
            "DRAFT_API_KEY",
            "TARGET_API_KEY",
            "POOL_API_KEY",
            "POOL_DRAFT_KEY",
            "PROXY_TOKEN",
            "WORKER_TOKEN",
        ];
        let place = variables
            .iter()
            .fold(Place::with_file(text), |place, name| place.variable(name, "x"));
        place
            .load()
            .map(|loaded| keys_of(&loaded.config))
            .map_err(|error| error.to_string())
    };
    // A key that is shown as a comment counts once it parses. A secret and its file exclude each other, so one at a time.
    let commented = |line: &str, wanted: fn(&str) -> bool| {
        let key = line
            .trim_start()
            .strip_prefix("# ")
            .and_then(|rest| rest.split_once(": "))
            .map(|(key, _)| key);
        key.is_some_and(|key| key.chars().all(|c| c.is_ascii_lowercase() || c == '_') && wanted(key))
    };
    let uncomment = |wanted: fn(&str) -> bool| -> String {
        let line = |line: &str| {
            if commented(line, wanted) {
                line.replacen("# ", "", 1)
            } else {
                line.into()
            }
        };
        text.lines().map(line).collect::<Vec<String>>().join("\n")
    };
    let mut named = load(&uncomment(|key| !key.ends_with("_file"))).unwrap();
    named.extend(load(&uncomment(|key| key.ends_with("_file"))).unwrap());
    assert_eq!(named, keys_of(&everything()));
}

#[test]
fn the_reference_tells_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/reference.yaml");
    let config = load_in(Some(&path), &Environment::default()).unwrap().config;
    let proxy = Proxy {
        draft: Vec::new(),
        target: None,
        ..config.proxy.unwrap()
    };
    assert_eq!(proxy, Proxy::default());
    assert_eq!(config.binaries, Binaries::default());
    let target = Server {
        model: None,
        extra_args: Vec::new(),
        env: [].into(),
        ..config.target.unwrap()
    };
    assert_eq!(target, Server::default());
    let draft = Server {
        port: DEFAULT_DRAFT_PORT,
        ..Server::default()
    };
    assert_eq!(
        Server {
            model: None,
            ..config.draft.unwrap()
        },
        draft
    );
    let (port, gpus) = (8080, Vec::new());
    let coordinator = Coordinator {
        port,
        gpus,
        ..config.coordinator.unwrap()
    };
    assert_eq!(coordinator, Coordinator::default());
}

// Any configuration

/// Words that YAML could take for something else.
fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z][a-z0-9-]{0,8}",
        proptest::sample::select(vec![
            "on", "no", "null", "~x", "1e3", "0x10", "007", "1_000", ".5", "-", "a: b", "#x", "é", "true", "*a", "&b",
            "!c", "%", "@", "\"", "'", "{", "$"
        ])
        .prop_map(str::to_owned),
    ]
}

prop_compose! {
    fn any_gpu()(name in word(), vram_gb in 0.1f64..1000.0, rpc_port in proptest::option::of(1u16..)) -> Gpu {
        Gpu { name, vram_gb, rpc_port, device: None }
    }
}

prop_compose! {
    fn any_model()(
        path in word(),
        ctx_size: u32,
        predict in proptest::option::of(1u32..),
        flash_attn: Option<bool>,
        extra_args in proptest::collection::vec(word(), 0..3),
    ) -> Model {
        Model { path: path.into(), ctx_size, predict, flash_attn, cache_type_k: None, cache_type_v: None, default: false, extra_args }
    }
}

prop_compose! {
    fn any_proxy()(
        (host, port) in ("[a-z]{1,8}", any::<u16>()),
        draft in proptest::option::of(word()),
        limit in proptest::option::of(1u64..),
        body in 1u64..,
        tokens in proptest::option::of(0u16..=256),
        (fallback, open) in any::<(bool, bool)>(),
    ) -> Proxy {
        Proxy {
            host: format!("{host}.lan"),
            port,
            draft: draft.into_iter().map(|name| Upstream { model_name: Some(name), ..Upstream::at("http://a:1") }).collect(),
            target: Some(Upstream { backend: Backend::Ollama, ..Upstream::at("https://b:2/base") }),
            max_draft_tokens: tokens.map_or(MaxDraftTokens::Auto, MaxDraftTokens::AtMost),
            fallback_on_draft_failure: fallback,
            allow_unauthenticated: open,
            max_tokens_limit: limit,
            max_body_size: body,
            ..Proxy::default()
        }
    }
}

prop_compose! {
    fn any_config()(
        proxy in any_proxy(),
        gpus in proptest::collection::vec(any_gpu(), 0..3),
        models in proptest::collection::btree_map(word(), any_model(), 1..4),
        (env, extra_args) in (proptest::collection::btree_map(word(), word(), 0..3), proptest::collection::vec(word(), 0..3)),
        with_server: bool,
        llama_server in word(),
    ) -> Config {
        let model = models.keys().next().cloned();
        let server = Server { host: "10.0.0.1".into(), model, env, extra_args, ..Server::default() };
        Config {
            proxy: Some(proxy),
            target: with_server.then_some(server),
            workers: vec![Worker { gpus, ..Worker::at("w") }],
            models,
            binaries: Binaries { llama_server: llama_server.into(), ..Binaries::default() },
            ..Config::default()
        }
    }
}

proptest! {
    #[test]
    fn a_configuration_written_as_yaml_loads_as_the_same(config in any_config()) {
        let yaml = config.to_yaml().unwrap();
        let loaded = Place::with_file(&yaml).load();
        prop_assert!(loaded.is_ok(), "{}\n{yaml}", loaded.unwrap_err());
        prop_assert_eq!(loaded.unwrap().config, config, "{}", yaml);
    }

    #[test]
    fn no_text_makes_it_panic(text in "(proxy|target|models|url|: |[{}\\[\\]]|- |\n| |\t|[&*!]a|\\PC){0,40}") {
        let _ = Place::with_file(&text).load();
    }
}

#[test]
fn what_a_worker_says_of_its_agent_is_checked() {
    let workers = |second: &str| format!("workers:\n  - {{ host: a, agent_token: t }}\n  - {second}\n");
    for (yaml, problem) in [
        (
            workers("{ host: a, name: b, agent_token: t, gpus: [ { name: x, vram_gb: 1, rpc_port: 7 } ] }"),
            "workers.1.agent_port: 50051 is taken by the worker a",
        ),
        (
            workers("{ host: b, name: a }"),
            "workers.1.name: another worker is called a already",
        ),
        (
            workers("{ host: b, agent_token: t, agent_port: 50052 }"),
            "workers.1.agent_port: 50052 is an rpc_port of it",
        ),
        (
            workers("{ host: b, agent_token: t, agent_token_file: /f }"),
            "workers.1.agent_token: given together with agent_token_file",
        ),
        (
            workers("{ host: b, cache_gb: -1 }"),
            "workers.1.cache_gb: -1 GiB; must be 0 (none) or more",
        ),
    ] {
        let place = Place::with_file(&yaml);
        let error = place.load().unwrap_err().to_string();
        assert!(error.contains(problem), "{yaml}: {error}");
    }
}

#[test]
fn a_worker_has_an_agent_only_with_a_token_or_where_nobody_else_gets_at_it() {
    let worker = |agent_port, token: Option<&str>, host: &str| Worker {
        agent_port,
        agent_token: token.map(Secret::new),
        ..Worker::at(host)
    };
    assert!(worker(1, Some("t"), "10.0.0.2").has_agent());
    assert!(worker(1, None, "127.0.0.1").has_agent());
    assert!(!worker(1, None, "10.0.0.2").has_agent());
    assert!(!worker(0, Some("t"), "10.0.0.2").has_agent());
}

#[test]
fn a_token_file_that_this_host_lacks_is_a_warning() {
    let place = Place::with_file("workers: [ { host: a, agent_token_file: /no/such/token } ]");
    let report = check_config_in(None, &place.environment, Scope::ThisHost);
    assert!(report.ok);
    assert!(
        report
            .warnings
            .iter()
            .any(|warning| warning.contains("workers.0.agent_token_file")),
        "{:?}",
        report.warnings
    );
}
