//! What `check-config` reports.

use std::path::Path;

use super::{MINIMAL, Place};
use serde_json::Value as Json;
use tightwad::config::{Environment, Scope, check_config_in};

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
    // Warnings about the file itself are still reported.
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
