//! The README and the pages of docs/ say what is so: links lead somewhere, commands and configs work, quoted messages exist.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use tightwad::config::load::load_in;
use tightwad::config::{Coordinator, Environment};

/// The generated page. `scripts/check-nix` compares it with the options.
const OPTIONS: &str = "docs/reference/nixos-options.md";

/// The README, the other pages beside it, and every page of `docs/` but the generated one: the name and the text.
fn pages() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let beside = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"].map(str::to_owned);
    let pages: BTreeMap<String, String> = pages_below(root, "docs")
        .into_iter()
        .chain(beside)
        .filter(|name| name != OPTIONS)
        .map(|name| {
            let text = std::fs::read_to_string(root.join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, text)
        })
        .collect();
    assert!(pages.len() > 20, "{:?}", pages.keys());
    pages
}

/// The names of the pages in a folder and in the folders below it.
fn pages_below(root: &Path, folder: &str) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root.join(folder)).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{folder}/{}", entry.file_name().to_str().unwrap());
        if name == "docs/book" {
            continue; // the built book
        }
        if entry.file_type().unwrap().is_dir() {
            names.extend(pages_below(root, &name));
        } else if Path::new(&name).extension().is_some_and(|extension| extension == "md") {
            names.push(name);
        }
    }
    names
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
    let name = "docs/reference/config.md";
    let text = page(name).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains(&sentence), "{name} does not say: {sentence}");
}

/// What is left of a page without blocks of code and without code in a line.
fn prose(text: &str) -> String {
    let blocks = text.split("```").step_by(2);
    blocks.flat_map(|block| block.split('`').step_by(2)).collect()
}

/// The identifiers that the headings of a page get, as mdBook and GitHub make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let outside: String = text.split("```").step_by(2).collect();
    let headings = outside.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| -> String {
        let words = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = words.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_and_anchor_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().unwrap();
    let mut anchored = 0;
    for (name, text) in pages() {
        let folder = root.join(&name);
        let folder = folder.parent().unwrap();
        let prose = prose(&text);
        let links = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                root.join(&name)
            } else {
                folder.join(file)
            };
            let target = target
                .canonicalize()
                .unwrap_or_else(|error| panic!("{name}: {link}: {error}"));
            let within = target.strip_prefix(&root).unwrap();
            // Outside of `docs/` there is nothing in the built book.
            assert!(
                !name.starts_with("docs/") || within.starts_with("docs"),
                "{name} links {link}; name a file outside of docs/ without a link"
            );
            if !anchor.is_empty() {
                let there = anchors(&std::fs::read_to_string(&target).unwrap());
                assert!(there.contains(anchor), "{name}: {link}: the anchors are {there:?}");
                anchored += 1;
            }
        }
    }
    assert!(anchored > 10, "{anchored}");
}

#[test]
fn the_book_has_every_page_once() {
    let pages: BTreeSet<String> = pages_below(Path::new(env!("CARGO_MANIFEST_DIR")), "docs")
        .into_iter()
        .filter_map(|name| name.strip_prefix("docs/").map(str::to_owned))
        .filter(|name| name != "SUMMARY.md")
        .collect();
    let summary = page("docs/SUMMARY.md");
    let listed: Vec<&str> = summary
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .collect();
    for (number, name) in listed.iter().enumerate() {
        assert!(!listed[..number].contains(name), "{name} is listed twice");
    }
    assert_eq!(listed.into_iter().map(str::to_owned).collect::<BTreeSet<_>>(), pages);
}

#[test]
fn a_page_is_short_enough_to_be_read_at_once() {
    for (name, text) in pages() {
        let most = if name == "README.md" { 200 } else { 250 };
        let lines = text.lines().count();
        assert!(lines <= most, "{name} has {lines} lines, and {most} is the most");
    }
}

/// The source with the strings as the program says them: without line ends that a `\\` takes back, and without escapes.
fn said() -> String {
    fn read(folder: &Path, text: &mut String) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, text);
            } else {
                let source = std::fs::read_to_string(path).unwrap();
                text.push_str(source.split("#[cfg(test)]\nmod ").next().unwrap());
            }
        }
    }
    let mut text = String::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut text);
    let mut lines = text.split("\\\n");
    let mut said = lines.next().unwrap().to_owned();
    lines.for_each(|line| said.push_str(line.trim_start()));
    said.replace("\\\"", "\"")
}

#[test]
fn every_message_of_the_troubleshooting_page_is_one_of_ours() {
    let said = said();
    let page = page("docs/guides/troubleshoot.md");
    let mut checked = 0;
    for row in page.lines().filter(|line| line.starts_with('|')) {
        // The message is in the first column, or in the second one behind a status.
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let message = cells[1..3].iter().find(|cell| cell.starts_with('`'));
        let message = message.map(|cell| cell.trim_matches('`'));
        for piece in message.into_iter().flat_map(|message| message.split('…')) {
            let piece = piece.trim();
            assert!(said.contains(piece), "{piece:?} is in no message of src/");
            checked += 1;
        }
    }
    assert!(checked > 50, "{checked}");
}

#[test]
fn every_file_that_the_documentation_runs_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    for (name, text) in pages() {
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
    // The example of CONTRIBUTING.md is a key that is to come.
    let code = || code().into_iter().filter(|(name, _)| name != "CONTRIBUTING.md");
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
        let is_word =
            key.contains('_') && !key.starts_with('_') && key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
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
