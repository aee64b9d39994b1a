//! The cluster file as a user meets it: what is found, what wins, and what each mistake is answered with.

mod check;
mod listeners;
mod mistakes;
mod reference;
mod roles;
mod sources;

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value as Json;
use tightwad::config::{CheckReport, Config, ConfigError, Environment, Loaded, Proxy, Scope, check_config_in, load_in};

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

fn config(text: &str) -> Config {
    Place::with_file(text).load().unwrap().config
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

// Any configuration
