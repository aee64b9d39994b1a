//! The README says what is so.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use tightwad::config::load::load_in;
use tightwad::config::{Coordinator, Environment};
use tightwad::engine::{Engine, Settings};
use tightwad::observe::metrics::Metrics;

const README: &str = include_str!("../README.md");

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
    let section = README
        .split(heading)
        .nth(1)
        .unwrap_or_else(|| panic!("the README has no {heading:?}"));
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
fn every_command_is_in_the_readme_and_every_command_there_exists() {
    let documented = first_cells("### Commands");
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
fn the_exit_codes_of_the_readme_are_those_of_the_help() {
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
    assert_eq!(first_cells("### Exit codes"), of_the_help);
}

#[test]
fn every_config_of_the_readme_loads() {
    let folder = tempfile::tempdir().unwrap();
    let between = |begin: &'static str, end: &'static str| {
        let blocks = README.split(begin).skip(1);
        blocks.map(move |rest| rest.split(end).next().unwrap())
    };
    let blocks: Vec<&str> = between("```yaml\n", "```")
        .chain(between("tightwad.yaml <<END\n", "END\n"))
        .collect();
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
fn the_default_ports_of_the_readme_are_those_of_the_config() {
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
    let readme = README.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(readme.contains(&sentence), "the README does not say: {sentence}");
}

#[test]
fn every_file_that_the_readme_links_or_runs_is_there() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let links = README.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let scripts = README
        .split(|character: char| character.is_whitespace() || "`(),;:".contains(character))
        .filter(|word| word.starts_with("scripts/") || word.starts_with("nix/"));
    let files: BTreeSet<&str> = links.chain(scripts).filter(|link| !link.contains("://")).collect();
    assert!(
        files.contains("scripts/demo") && files.contains("configs/reference.yaml"),
        "{files:?}"
    );
    for file in files {
        assert!(folder.join(file).exists(), "{file} is missing");
    }
}

#[tokio::test]
async fn the_metrics_of_the_readme_exist() {
    let metrics = Metrics::new(&Engine::start(Settings::default()).unwrap());
    let text = metrics.text().unwrap();
    let names: Vec<&str> = README
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
