//! The files that are shipped, and every key there is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{Place, keys};
use proptest::prelude::*;
use tightwad::config::{
    Backend, Binaries, Config, Coordinator, DEFAULT_DRAFT_PORT, Environment, Gpu, GpuBackend, MaxDraftTokens, Model,
    Proxy, Secret, Server, Upstream, VerificationMode, Worker, load_in,
};

fn shipped() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

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
