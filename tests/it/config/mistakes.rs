//! What each mistake in the file is answered with.

use std::path::Path;

use super::{Place, error_of};

/// That the file is answered with one sentence that begins as expected.
fn assert_one_error(text: &str, expected: &str) {
    let error = error_of(text);
    let said = format!("{text}\nwas answered by\n{error}\nnot by\n{expected}");
    assert!(error.starts_with(expected) && error.lines().count() == 1, "{said}");
}

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
