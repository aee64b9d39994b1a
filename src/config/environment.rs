//! The environment of the process, and its layer of `TIGHTWAD_<SECTION>__<KEY>` variables over the file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use figment::value::{Dict, Value};

use super::origin::{KeyPath, Origin, Origins};

/// Variables with the prefix that are not keys of the file.
const NOT_KEYS: [&str; 3] = ["TIGHTWAD_CONFIG", "TIGHTWAD_LOG", "TIGHTWAD_LLAMA_CPP"];

/// The environment that the configuration depends on. Tests make their own.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// The environment variables.
    pub variables: BTreeMap<String, String>,
    /// Base of relative paths in the search; empty for the working directory.
    pub directory: PathBuf,
}

impl Environment {
    /// The environment of this process, without variables that are not UTF-8.
    #[must_use]
    pub fn of_this_process() -> Self {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self {
            variables,
            directory: PathBuf::new(),
        }
    }

    /// The same without the variables that set keys of the file.
    pub(super) fn without_keys(&self) -> Self {
        let is_key = |name: &str| name.starts_with("TIGHTWAD_") && !NOT_KEYS.contains(&name);
        let mut environment = self.clone();
        environment.variables.retain(|name, _| !is_key(name));
        environment
    }

    /// A variable; an empty one counts as unset.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.variables
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// Applies the variables that name keys over the values of the file.
    pub(super) fn overlay(&self, root: &mut Dict, origins: &mut Origins) {
        for (name, value) in &self.variables {
            let Some(keys) = name.strip_prefix("TIGHTWAD_") else {
                continue;
            };
            if NOT_KEYS.contains(&name.as_str()) {
                continue;
            }
            let keys: Vec<&str> = keys.split("__").collect();
            let mut path = KeyPath::new();
            insert(root, &keys, value, &mut path);
            origins.keys.retain(|key, _| !key.starts_with(&path));
            origins.keys.insert(path, Origin::Variable(name.clone()));
        }
    }
}

fn insert(dict: &mut Dict, keys: &[&str], text: &str, path: &mut KeyPath) {
    let Some((first, rest)) = keys.split_first() else {
        return;
    };
    let key = existing(dict, first).unwrap_or_else(|| {
        // The names below `env` are themselves environment variables.
        let as_it_stands = path.last().is_some_and(|parent| parent == "env");
        if as_it_stands {
            (*first).to_owned()
        } else {
            first.to_ascii_lowercase()
        }
    });
    path.push(key.clone());
    if rest.is_empty() {
        dict.insert(key, Value::from(text));
        return;
    }
    let value = dict.entry(key).or_insert_with(|| Value::from(Dict::new()));
    if !matches!(value, Value::Dict(..)) {
        *value = Value::from(Dict::new());
    }
    if let Value::Dict(_, inner) = value {
        insert(inner, rest, text, path);
    }
}

/// The existing key, such as `Qwen3-72B`, that a variable spells with capitals and underscores.
fn existing(dict: &Dict, spelled: &str) -> Option<String> {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_lowercase()
        } else {
            '_'
        }
    };
    dict.keys()
        .find(|key| key.chars().map(plain).eq(spelled.chars().map(plain)))
        .cloned()
}
