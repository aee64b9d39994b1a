//! What the roles of a file take from each other.

use std::path::Path;

use super::{config, error_of};
use tightwad::config::{Backend, Config, Secret, Upstream};

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
