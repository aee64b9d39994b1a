//! The README and the pages of docs/ say what is so.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use tightwad::config::load::load_in;
use tightwad::config::{Coordinator, Environment};
use tightwad::engine::{Engine, Settings};
use tightwad::observe::metrics::Metrics;

/// The README and every page of `docs/`, but for the options, which `scripts/check-nix` compares: the name and the text.
fn pages() -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_dir(folder.join("docs")).unwrap();
    let names = docs.map(|entry| format!("docs/{}", entry.unwrap().file_name().to_str().unwrap()));
    let pages: BTreeMap<String, String> = names
        .chain(["README.md".to_owned()])
        .filter(|name| name != "docs/options.md")
        .map(|name| {
            let text = std::fs::read_to_string(folder.join(&name)).unwrap();
            (name, text)
        })
        .collect();
    assert!(pages.len() > 8, "{:?}", pages.keys());
    pages
}

fn page(name: &str) -> String {
    pages().remove(name).unwrap()
}

/// Everything between backticks, and every line of a code block, with its page.
fn code() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (name, text) in pages() {
        for (number, part) in text.split("```").enumerate() {
            if number % 2 == 1 {
                found.extend(part.lines().skip(1).map(|line| (name.clone(), line.to_owned())));
            } else {
                let inline = part.split('`').skip(1).step_by(2);
                found.extend(inline.map(|code| (name.clone(), code.split_whitespace().collect::<Vec<_>>().join(" "))));
            }
        }
    }
    found
}

fn help(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_tightwad"))
        .args(arguments)
        .arg("-h")
        .output()
        .unwrap();
    assert!(output.status.success(), "tightwad {arguments:?} -h fails");
    String::from_utf8(output.stdout).unwrap()
}

/// The first cell of each row of the table below `heading`.
fn first_cells(heading: &str) -> BTreeSet<String> {
    let text = page("docs/commands.md");
    let section = text
        .split(heading)
        .nth(1)
        .unwrap_or_else(|| panic!("docs/commands.md has no {heading:?}"));
    section
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.split('|').nth(1).unwrap().trim().trim_matches('`').to_owned())
        .collect()
}

/// The commands that a help text lists.
fn listed(help: &str) -> BTreeSet<String> {
    let commands = help.split("Commands:\n").nth(1).unwrap_or_default();
    commands
        .lines()
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_command_is_documented_and_every_documented_command_exists() {
    let documented = first_cells("## Commands");
    let mut existing = BTreeSet::new();
    for command in listed(&help(&[])) {
        match command.as_str() {
            "proxy" => existing.extend(
                listed(&help(&["proxy"]))
                    .iter()
                    .map(|part| format!("tightwad proxy {part}")),
            ),
            "run" => existing.extend(
                ["target", "draft", "proxy", "coordinator", "worker"].map(|part| format!("tightwad run {part}")),
            ),
            _ => drop(existing.insert(format!("tightwad {command}"))),
        }
    }
    assert!(
        help(&["run"]).contains("[possible values: target, draft, proxy, coordinator, worker]"),
        "{}",
        help(&["run"])
    );
    assert_eq!(documented, existing);
}

#[test]
fn the_documented_exit_codes_are_those_of_the_help() {
    let help = help(&[]);
    let sentence = help
        .split("Exit codes:")
        .nth(1)
        .unwrap()
        .split("The environment")
        .next()
        .unwrap();
    let of_the_help: BTreeSet<String> = sentence
        .split_whitespace()
        .filter(|word| word.chars().all(|digit| digit.is_ascii_digit()))
        .map(str::to_owned)
        .collect();
    assert_eq!(first_cells("## Exit codes"), of_the_help);
}

#[test]
fn every_documented_config_loads() {
    let folder = tempfile::tempdir().unwrap();
    let pages: String = pages().into_values().collect();
    let between = |begin: &'static str, end: &'static str| {
        let blocks = pages.split(begin).skip(1);
        blocks.map(move |rest| rest.split(end).next().unwrap())
    };
    let blocks: Vec<&str> = between("```yaml\n", "```")
        .chain(between("tightwad.yaml <<END\n", "END\n"))
        .collect();
    assert!(blocks.len() >= 4, "{blocks:?}");
    assert!(blocks.iter().any(|block| block.contains("threads: 1")), "{blocks:?}");
    for block in blocks {
        let file = folder.path().join("cluster.yaml");
        std::fs::write(&file, block).unwrap();
        let environment = Environment {
            variables: BTreeMap::new(),
            directory: folder.path().into(),
        };
        let loaded = load_in(Some(&file), &environment).unwrap_or_else(|error| panic!("{error}\n{block}"));
        loaded
            .check_listeners()
            .unwrap_or_else(|error| panic!("{error}\n{block}"));
    }
}

#[test]
fn the_documented_default_ports_are_those_of_the_config() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cluster.yaml");
    let sections = "proxy: {}\ntarget: {}\ndraft: {}\nworkers: [ { host: a } ]\nmodels: { a: { path: a } }\n";
    std::fs::write(&file, sections).unwrap();
    let config = load_in(Some(&file), &Environment::default()).unwrap().config;
    let worker = &config.workers[0];
    let sentence = format!(
        "the proxy {}, the target {}, the draft {}, the coordinator {}, a worker's agent {} and its RPC {}.",
        config.proxy.unwrap().port,
        config.target.unwrap().port,
        config.draft.unwrap().port,
        Coordinator::default().port,
        worker.agent_port,
        worker.rpc_endpoints().into_keys().next().unwrap(),
    );
    let text = page("docs/commands.md");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains(&sentence), "docs/commands.md does not say: {sentence}");
}

#[test]
fn every_file_that_the_documentation_links_or_runs_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    for (name, text) in pages() {
        let folder = root.join(&name);
        let folder = folder.parent().unwrap();
        let links = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split([')', '#']).next());
        for link in links.filter(|link| !link.contains("://")) {
            assert!(folder.join(link).exists(), "{link} of {name} is missing");
        }
        let words = text.split(|character: char| character.is_whitespace() || "`(),;:[]#".contains(character));
        let paths = words.filter(|word| {
            ["scripts/", "nix/", "tests/", "docs/"]
                .iter()
                .any(|it| word.starts_with(it))
        });
        for path in paths {
            assert!(root.join(path).exists(), "{path} of {name} is missing");
            found.insert(path.to_owned());
        }
    }
    assert!(
        found.contains("scripts/demo") && found.contains("scripts/llama-cpp"),
        "{found:?}"
    );
}

#[test]
fn every_page_is_linked_from_the_readme() {
    let readme = page("README.md");
    for name in pages().keys().filter(|name| *name != "README.md") {
        assert!(
            readme.contains(&format!("]({name})")),
            "the README does not link {name}"
        );
    }
}

#[test]
fn every_command_line_of_the_documentation_is_understood() {
    let mut helps: BTreeMap<Vec<String>, String> = BTreeMap::new();
    let mut checked = 0;
    for (name, line) in code() {
        for part in line.split("tightwad ").skip(1) {
            let before = line.split("tightwad ").next().unwrap();
            // `-c FILE` before the command, a comment behind it; what is quoted holds no options of ours.
            let part = part.split(['#', '|', '`', '\'', '"', ')', '&', ';']).next().unwrap();
            let mut words: Vec<String> = part.split_whitespace().map(str::to_owned).collect();
            if words.first().is_some_and(|word| word == "-c") {
                words.drain(..2);
            }
            let Some(command) = words
                .first()
                .filter(|word| word.chars().all(|c| c.is_ascii_lowercase() || c == '-'))
            else {
                continue;
            };
            // A path, an option of its own, or a picture.
            if before.ends_with('/') || command.starts_with('-') || line.contains('─') {
                continue;
            }
            let mut path = vec![command.clone()];
            if command == "proxy" {
                path.extend(words.get(1).cloned());
            }
            let help = helps.entry(path.clone()).or_insert_with(|| {
                let path: Vec<&str> = path.iter().map(String::as_str).collect();
                help(&path)
            });
            for option in words.iter().filter(|word| word.starts_with("--")) {
                assert!(
                    help.contains(option.as_str()),
                    "{name}: `{line}`: {path:?} has no option {option}"
                );
            }
            checked += 1;
        }
    }
    assert!(checked > 40, "{checked}");
}

#[test]
fn every_key_of_the_documentation_is_in_the_reference() {
    let reference = include_str!("../../configs/reference.yaml");
    let keys: BTreeSet<&str> = reference
        .lines()
        .filter_map(|line| line.trim_start_matches([' ', '#', '-']).split_once(':'))
        .map(|(key, _)| key)
        .collect();
    let sections = [
        "proxy",
        "target",
        "draft",
        "coordinator",
        "workers",
        "models",
        "binaries",
    ];
    let mut checked = 0;
    for (name, code) in code() {
        let mut parts = code.split(':').next().unwrap().split('.');
        let is_key = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        if !parts.next().is_some_and(|first| sections.contains(&first)) || !parts.clone().all(is_key) {
            continue;
        }
        for key in parts {
            assert!(
                keys.contains(key),
                "{name}: `{code}` is no key of configs/reference.yaml"
            );
            checked += 1;
        }
    }
    // Words such as `wait_seconds`, which stand there without their section.
    let ends = [
        "_file", "_seconds", "_gb", "_port", "_size", "_args", "_tokens", "_request",
    ];
    for (name, code) in code() {
        let key = code.split(':').next().unwrap();
        let is_word = key.contains('_') && key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        if key.starts_with("tightwad_") {
            continue; // a metric
        }
        if is_word && ends.iter().any(|end| key.ends_with(end)) {
            assert!(
                keys.contains(key),
                "{name}: `{code}` is no key of configs/reference.yaml"
            );
            checked += 1;
        }
    }
    assert!(checked > 15, "{checked}");
}

#[tokio::test]
async fn the_documented_metrics_exist() {
    let metrics = Metrics::new(&Engine::start(Settings::default()).unwrap());
    let text = metrics.text().unwrap();
    let api = page("docs/api.md");
    let names: Vec<&str> = api
        .split('`')
        .filter(|word| word.starts_with("tightwad_") || word.starts_with("vllm:"))
        .collect();
    assert!(names.len() >= 5, "{names:?}");
    for name in names {
        assert!(
            text.contains(name.trim_end_matches("_total")),
            "{name} is not in\n{text}"
        );
    }
}
