//! The reference pages in `docs/` say what the code says: commands, exit codes, keys, routes, errors, metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below `folder` whose names end with `.extension`, as paths from the repository's root.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(repository().join(folder)).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{folder}/{}", entry.file_name().to_str().unwrap());
        if entry.path().is_dir() {
            found.extend(files(&name, extension));
        } else if name.ends_with(&format!(".{extension}")) {
            found.push(name.into());
        }
    }
    found
}

/// What the source says without its unit tests.
fn sources() -> Vec<String> {
    let untested = |text: String| text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
    files("src", "rs").into_iter().map(read).map(untested).collect()
}

/// The section of a page below a heading such as `## proxy`, down to the next heading of that level or a higher one.
fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let (level, _) = heading.split_once(' ').unwrap();
    let (_, below) = page
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("there is no section {heading:?}"));
    let ends = (1..=level.len()).filter_map(|n| below.find(&format!("\n{} ", "#".repeat(n))));
    &below[..ends.min().unwrap_or(below.len())]
}

/// The rows of all tables in `text`, without their heads, as cells.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let mut rows = Vec::new();
    let mut of_table = 0;
    for line in text.lines() {
        of_table = if line.starts_with('|') { of_table + 1 } else { 0 };
        if of_table > 2 {
            rows.push(line.trim_matches('|').split(" | ").map(str::trim).collect());
        }
    }
    rows
}

/// Everything between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// What is quoted in the first cell of each row.
fn names(text: &str) -> BTreeSet<&str> {
    rows(text).into_iter().flat_map(|row| quoted(row[0])).collect()
}

fn help(command: &[&str]) -> String {
    let program = env!("CARGO_BIN_EXE_tightwad");
    let output = Command::new(program).args(command).arg("--help").output().unwrap();
    assert!(output.status.success(), "tightwad {command:?} --help fails");
    String::from_utf8(output.stdout).unwrap()
}

/// The subcommands that a help text lists.
fn subcommands(help: &str) -> Vec<&str> {
    let listed = help.split("Commands:\n").nth(1).unwrap_or_default();
    let lines = listed.lines().take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names.filter(|name| !name.is_empty() && *name != "help").collect()
}

/// The options that a help text lists, each with its default (empty: none).
fn options(help: &str) -> BTreeMap<String, String> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let mut option = None;
    for line in help.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let long = words.iter().take(2).find(|word| word.starts_with("--"));
        if let Some(long) = long.filter(|_| words[0].starts_with('-')) {
            option = Some((*long).to_owned());
            found.insert((*long).to_owned(), String::new());
        }
        if let Some(value) = line.trim().strip_prefix("[default: ")
            && let Some(option) = &option
        {
            found.insert(option.clone(), value.trim_end_matches(']').to_owned());
        }
    }
    found
}

#[test]
fn every_command_and_every_option_of_the_help_is_documented_and_no_other() {
    let page = read("docs/reference/commands.md");
    let of_all = options(&help(&[]));
    assert_eq!(
        names(section(&page, "## Options of every command")),
        of_all.keys().map(String::as_str).collect()
    );
    let mut commands = BTreeSet::new();
    let top = help(&[]);
    for command in subcommands(&top) {
        let own = help(&[command]);
        let parts: Vec<Vec<&str>> = match subcommands(&own) {
            parts if parts.is_empty() => vec![vec![command]],
            parts => parts.into_iter().map(|part| vec![command, part]).collect(),
        };
        for path in parts {
            let name = format!("tightwad {}", path.join(" "));
            let text = section(&page, &format!("## `{name}`"));
            let documented: BTreeMap<String, String> = rows(text)
                .into_iter()
                .map(|row| (row[0].trim_matches('`').to_owned(), row[1].to_owned()))
                .collect();
            let existing: BTreeMap<String, String> = options(&help(&path))
                .into_iter()
                .filter(|(option, _)| !of_all.contains_key(option))
                .collect();
            assert_eq!(
                documented.keys().collect::<Vec<_>>(),
                existing.keys().collect::<Vec<_>>(),
                "{name}"
            );
            for (option, default) in existing.iter().filter(|(_, default)| !default.is_empty()) {
                let documented = documented[option].trim_matches('`');
                assert_eq!(documented, default.trim_matches('`'), "default of {option} of {name}");
            }
            commands.insert(name);
        }
    }
    // `run` takes the part as an argument.
    assert!(commands.remove("tightwad run"));
    let run = help(&["run"]);
    let values = run.lines().filter_map(|line| line.trim().strip_prefix("- "));
    let parts = values.filter_map(|line| Some(line.split_once(':')?.0.to_owned()));
    commands.extend(
        parts
            .filter(|part| part != "text" && part != "json")
            .map(|part| format!("tightwad run {part}")),
    );
    let listed = names(section(&page, "## Commands"));
    assert_eq!(listed, commands.iter().map(String::as_str).collect());
}

#[test]
fn every_exit_code_is_documented_and_no_other() {
    let page = read("docs/reference/exit-codes.md");
    let documented: BTreeSet<u8> = rows(section(&page, "## Exit codes"))
        .into_iter()
        .map(|row| row[0].parse().unwrap())
        .collect();
    let source = read("src/cli/exit.rs");
    let body = source
        .split_once("pub enum Exit {")
        .unwrap()
        .1
        .split_once("\n}\n")
        .unwrap()
        .0;
    let existing: BTreeSet<u8> = body
        .lines()
        .filter_map(|line| line.trim().trim_end_matches(',').split_once(" = ")?.1.parse().ok())
        .collect();
    assert!(existing.len() > 10, "{existing:?}");
    assert_eq!(documented, existing);
    let of_the_help: BTreeSet<u8> = help(&[])
        .split("Exit codes:")
        .nth(1)
        .unwrap()
        .split("The environment")
        .next()
        .unwrap()
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    assert_eq!(documented, of_the_help);
}

/// The keys of `configs/reference.yaml` by section, those that are commented out included; a model's name is left out.
fn keys_of_the_reference() -> BTreeMap<String, BTreeSet<String>> {
    let is_key = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut path: Vec<(usize, String)> = Vec::new();
    for line in read("configs/reference.yaml").lines() {
        let key = line.trim_start().trim_start_matches("# ").trim_start_matches("- ");
        let Some((key, value)) = key.split_once(':') else {
            continue;
        };
        let commented = line.trim_start().starts_with('#');
        let of_a_model = !commented && key.starts_with("qwen");
        if !(is_key(key) || of_a_model)
            || !(value.is_empty() || value.starts_with(' '))
            || (commented && value.is_empty())
        {
            continue;
        }
        let indent = line.len() - line.trim_start().len() + if line.trim_start().starts_with("- ") { 2 } else { 0 };
        path.retain(|(of, _)| *of < indent);
        path.push((indent, if of_a_model { String::new() } else { key.to_owned() }));
        let names: Vec<&str> = path
            .iter()
            .map(|(_, name)| name.as_str())
            .filter(|name| !name.is_empty())
            .collect();
        let (section, rest) = names.split_first().unwrap();
        let keys = found.entry((*section).to_owned()).or_default();
        if !rest.is_empty() {
            keys.insert(rest.join("."));
        }
    }
    found
}

#[test]
fn every_key_of_the_reference_file_is_documented_and_no_other() {
    let page = read("docs/reference/config.md");
    let listed = names(section(&page, "## Sections"));
    let keys = keys_of_the_reference();
    assert_eq!(listed, keys.keys().map(String::as_str).collect());
    for (of, keys) in &keys {
        let heading = match of.as_str() {
            "target" | "draft" => "## `target` and `draft`".to_owned(),
            other => format!("## `{other}`"),
        };
        assert_eq!(
            names(section(&page, &heading)),
            keys.iter().map(String::as_str).collect(),
            "{of}"
        );
    }
    let included = page.contains("{{#include ../../configs/reference.yaml}}");
    assert!(
        included,
        "docs/reference/config.md does not show configs/reference.yaml"
    );
}

#[test]
fn every_route_is_documented_and_no_other() {
    let existing: BTreeSet<String> = sources()
        .iter()
        .flat_map(|source| source.split(".route(\"").skip(1))
        .map(|rest| rest.split('"').next().unwrap().to_owned())
        .collect();
    assert!(existing.len() > 8, "{existing:?}");
    let page = read("docs/reference/endpoints.md");
    let documented: BTreeSet<String> = ["## The proxy", "## The coordinator", "## The agent of a worker"]
        .iter()
        .flat_map(|heading| names(section(&page, heading)))
        .map(|name| name.split_once(' ').map_or(name, |(_method, path)| path).to_owned())
        .collect();
    assert_eq!(documented, existing);
}

#[test]
fn every_error_code_is_documented_and_no_other() {
    let bodies: Vec<String> = sources()
        .iter()
        .flat_map(|source| source.split("fn code(&self) -> &'static str {").skip(1))
        .map(|rest| rest.split("\n    }\n").next().unwrap().to_owned())
        .collect();
    let mut existing: BTreeSet<&str> = bodies
        .iter()
        .flat_map(|body| body.split('"').skip(1).step_by(2))
        .collect();
    assert!(existing.len() > 20, "{existing:?}");
    existing.insert("unsupported_media_type"); // of a swap
    let page = read("docs/reference/endpoints.md");
    assert_eq!(names(section(&page, "## Errors")), existing);
}

/// The names under which samples of an exposition appear.
fn samples(text: &str) -> BTreeSet<String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .map(|line| match line.split_once(' ').unwrap() {
            (name, "counter") if !name.ends_with("_total") => format!("{name}_total"),
            (name, "info") => format!("{name}_info"),
            (name, _) => name.to_owned(),
        })
        .collect()
}

/// A server of Tightwad's that ends with the test.
struct Server {
    process: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Server {
    /// `tightwad COMMAND` with a config of these lines, in which `PORT` is a free port; returns when it listens.
    fn start(command: &[&str], config: &str) -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cluster.yaml");
        std::fs::write(&file, config.replace("PORT", &port.to_string())).unwrap();
        let mut program = Command::new(env!("CARGO_BIN_EXE_tightwad"));
        program.arg("-c").arg(&file).args(command).stderr(Stdio::null());
        let server = Self {
            process: program.spawn().unwrap(),
            port,
            _folder: folder,
        };
        let until = Instant::now() + Duration::from_secs(30);
        while let Err(error) = server.connect() {
            assert!(Instant::now() < until, "{command:?} does not listen: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn connect(&self) -> std::io::Result<TcpStream> {
        TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))
    }

    /// The answer to `GET path`, with its head.
    fn get(&self, path: &str) -> String {
        let mut connection = self.connect().unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn has_the_metrics_of(server: &Server, heading: &str) {
    let text = server.get("/metrics");
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    let page = read("docs/reference/metrics.md");
    let existing = samples(&text);
    let existing: BTreeSet<&str> = existing.iter().map(String::as_str).collect();
    assert_eq!(names(section(&page, heading)), existing, "{text}");
}

#[test]
fn every_metric_of_the_proxy_is_documented_and_no_other() {
    let proxy = Server::start(
        &["proxy", "start"],
        "proxy: { port: PORT, target: { url: 'http://127.0.0.1:1' } }\n",
    );
    // Requests show once one has ended.
    proxy.get("/v1/models");
    has_the_metrics_of(&proxy, "## The proxy");
}

#[test]
fn every_metric_of_the_coordinator_is_documented_and_no_other() {
    // It is asked before it has a server: the worker does not answer, and no program is started.
    let config = format!(
        "coordinator: {{ port: PORT, backend: cpu }}\n\
         workers: [ {{ host: 127.0.0.1, agent_port: 1, gpus: [ {{ name: none, vram_gb: 1 }} ] }} ]\n\
         models: {{ tiny: {{ path: {} }} }}\n\
         binaries: {{ llama_server: {} }}\n",
        repository().join("tests/models/tightwad-tiny-draft-f16.gguf").display(),
        env!("CARGO_BIN_EXE_tightwad"),
    );
    let coordinator = Server::start(&["run", "coordinator"], &config);
    has_the_metrics_of(&coordinator, "## The coordinator");
}

#[test]
fn every_source_file_that_the_documentation_names_is_there() {
    let mut pages = files("docs", "md");
    pages.extend(["README.md", "CONTRIBUTING.md", "SECURITY.md", "nix/llama-cpp/README.md"].map(PathBuf::from));
    let mut checked = 0;
    for page in pages {
        let text = read(&page);
        for path in quoted(&text).filter(|it| ["src/", "modules/", "configs/"].iter().any(|of| it.starts_with(of))) {
            // `src/llama-….cpp` is a file of llama.cpp.
            if !path.contains(".cpp") {
                let found = repository().join(path).exists();
                assert!(found, "{}: there is no {path}", page.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 30, "{checked}");
}
