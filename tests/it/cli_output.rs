//! What commands print, compared with `tests/it/snapshots/`.
//!
//! `INSTA_UPDATE=always cargo test --test it cli_output::` writes the snapshots anew; `git diff` then shows what a user sees
//! change.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use insta::assert_snapshot;
use tempfile::TempDir;

/// A user with this cluster file in their folder.
struct User(TempDir);

impl User {
    fn new(yaml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tightwad.yaml"), yaml).unwrap();
        Self(folder)
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
        command.args(args).current_dir(self.0.path()).env_clear();
        command.env("HOME", self.0.path()).env("COLUMNS", "80");
        command.output().unwrap()
    }

    /// Everything that it prints, then the exit code.
    fn sees(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let mut seen = format!("$ tightwad {}\n", args.join(" "));
        for stream in [&output.stdout, &output.stderr] {
            seen.push_str(&String::from_utf8_lossy(stream));
        }
        let folder = fs::canonicalize(self.0.path()).unwrap();
        let seen = seen.replace(&folder.display().to_string(), "FOLDER");
        format!("{seen}\nexit code {}", output.status.code().unwrap())
    }
}

/// The commands of the help text of `parents`, and theirs.
fn commands(user: &User, parents: &[&str]) -> Vec<Vec<String>> {
    let help = user.run(&[parents, &["--help"]].concat()).stdout;
    let help = String::from_utf8(help).unwrap();
    let mut found = vec![parents.iter().map(|&name| name.to_owned()).collect()];
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    for line in listed.take_while(|line| !line.is_empty()) {
        let indented = line.strip_prefix("  ").filter(|line| !line.starts_with(' '));
        if let Some(name) = indented
            .and_then(|line| line.split(' ').next())
            .filter(|name| *name != "help")
        {
            found.extend(commands(user, &[parents, &[name]].concat()));
        }
    }
    found
}

#[test]
fn the_help_of_every_command() {
    let user = User::new("");
    let mut all = String::new();
    for command in commands(&user, &[]) {
        let args: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
        all.push_str(&user.sees(&args));
        all.push_str("\n\n");
    }
    assert_snapshot!(all);
}

#[test]
fn mistakes_in_a_cluster_file() {
    let user = User::new(
        "proxy:\n  prot: 8088\n  port: 70000\n  target: { url: 'ftp://host' }\nmodels:\n  big: { path: '', ctx_size: many }\n\
         workers:\n  - gpus: []\n",
    );
    assert_snapshot!(user.sees(&["check-config"]));
}

#[test]
fn an_open_listener_without_a_token() {
    let user = User::new("proxy: { host: 0.0.0.0, target: { url: 'http://127.0.0.1:8080' } }\n");
    assert_snapshot!(user.sees(&["check-config", "--portable"]));
}

#[test]
fn the_effective_values_of_a_cluster_file() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/one-machine.yaml");
    let user = User::new(&fs::read_to_string(file).unwrap());
    assert_snapshot!(user.sees(&["check-config", "--portable", "--show"]));
}

#[test]
fn commands_without_a_server() {
    let user = User::new("proxy: { port: 2, target: { url: 'http://127.0.0.1:1' } }\n");
    let commands: [&[&str]; 5] = [&["status"], &["swap", "big"], &["proxy", "stop"], &["chat"], &["run"]];
    assert_snapshot!(commands.map(|args| user.sees(args)).join("\n\n"));
}
