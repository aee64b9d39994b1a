//! Converts the tree of values into a [`Config`], and reports all values that do not fit, not only the first.

use std::collections::BTreeSet;

use figment::Figment;
use figment::error::{Actual, Error, Kind};
use figment::providers::Serialized;
use figment::value::{Dict, Value};

use super::error::{closest, list};
use super::origin::{Finding, KeyPath, Origin, Origins};
use super::{Config, DEFAULT_DRAFT_PORT, yaml};

/// Limit on reported problems. Each needs another attempt with the whole file.
const MOST_FINDINGS: usize = 50;

/// Serde stops at the first error. So each error is noted, its value removed, and the rest tried again. Returns a configuration only if
/// all errors are unknown keys: the meaning of a value of another type is unknown.
pub(super) fn decode(mut root: Dict, origins: &mut Origins) -> (Option<Config>, Vec<Finding>) {
    let mut findings: Vec<Finding> = Vec::new();
    let mut settled: BTreeSet<KeyPath> = BTreeSet::new();
    let mut understood = true;
    loop {
        give_draft_its_port(&mut root);
        let error = match Figment::from(Serialized::defaults(&root)).extract_lossy::<Config>() {
            Ok(config) => return (understood.then_some(config), findings),
            Err(error) => error,
        };
        if let Some(better) = second_reading(&error, origins)
            && let Some(slot) = find(&mut root, &error.path)
        {
            *slot = better;
            continue;
        }
        let mut at = error.path.clone();
        if let Kind::MissingField(field) = &error.kind {
            at.push(field.to_string());
        }
        if findings.len() == MOST_FINDINGS {
            let more = format!("more is wrong than these {MOST_FINDINGS}; correct them first");
            findings.push(Finding::new(KeyPath::new(), more));
            return (None, findings);
        }
        if !settled.contains(&at) {
            findings.push(Finding::new(at.clone(), describe(&error, origins)));
        }
        settled.insert(at);
        if let Kind::UnknownField(word, known) = &error.kind {
            // Checks the rest with the likely key.
            if let Some(meant) = closest(word, known.iter().copied())
                && let Some((_, parent)) = error.path.split_last()
                && let renamed = [parent, &[meant.to_owned()]].concat()
                && !settled.contains(&renamed)
                && rename(&mut root, &error.path, meant)
            {
                origins.rename(&error.path, &renamed);
                settled.insert(renamed);
                continue;
            }
        } else {
            understood = false;
        }
        match remove(&mut root, &error.path) {
            Some(removed) => settled.insert(removed),
            None => return (None, findings),
        };
    }
}

/// Sets the default port of `draft`, which has the same type as `target`.
fn give_draft_its_port(root: &mut Dict) {
    if let Some(Value::Dict(_, draft)) = root.get_mut("draft") {
        let port = || Value::from(DEFAULT_DRAFT_PORT);
        draft.entry("port".to_owned()).or_insert_with(port);
    }
}

/// Another reading of the value with the error, if there is one: a key without a value counts as absent, and a variable may hold a list
/// or a section in YAML.
fn second_reading(error: &Error, origins: &Origins) -> Option<Value> {
    let Kind::InvalidType(found, expected) = &error.kind else {
        return None;
    };
    match found {
        Actual::Option if expected.starts_with("struct") || expected == "a map" => Some(Value::from(Dict::new())),
        Actual::Option if expected == "a sequence" => Some(Value::from(Vec::<Value>::new())),
        Actual::Str(text) if matches!(origins.of(&error.path), Some(Origin::Variable(_))) => {
            let value = yaml::read(text, &|_| None).ok()?.value;
            matches!(value, Value::Dict(..) | Value::Array(..)).then_some(value)
        }
        _ => None,
    }
}

fn describe(error: &Error, origins: &Origins) -> String {
    let secret = error
        .path
        .last()
        .is_some_and(|key| ["auth_token", "api_key", "draft_key", "agent_token"].contains(&key.as_str()));
    match &error.kind {
        Kind::UnknownField(word, known) => unknown_key(word, known, &error.path, origins),
        Kind::UnknownVariant(word, known) => match closest(word, known.iter().copied()) {
            Some(meant) => format!("`{word}` is none of {}; did you mean {meant}?", list(known.iter())),
            None => format!("`{word}` is none of {}", list(known.iter())),
        },
        Kind::MissingField(_) => "missing; it has no default".into(),
        Kind::InvalidType(Actual::Option, expected) => format!("empty; expected {}", plain_expected(expected)),
        Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
            let quote = if expected.contains("string") && !matches!(found, Actual::Seq | Actual::Map) {
                "; put it in quotes"
            } else {
                ""
            };
            let (expected, found) = (plain_expected(expected), plain_found(found, secret));
            format!("expected {expected}, found {found}{quote}")
        }
        other => other.to_string(),
    }
}

fn unknown_key(word: &str, known: &[&str], path: &[String], origins: &Origins) -> String {
    if let (Some(Origin::Variable(name)), 1) = (origins.of(path), path.len()) {
        let section = |key: &&&str| word.strip_prefix(**key).is_some_and(|rest| rest.starts_with('_'));
        if let Some(section) = known.iter().find(section) {
            let (head, tail) = name.split_at("TIGHTWAD_".len() + section.len());
            return format!("unknown key; did you mean {head}_{tail} (two underscores)?");
        }
    }
    match closest(word, known.iter().copied()) {
        Some(meant) => format!("unknown key; did you mean {meant}?"),
        None => format!("unknown key; the keys here are {}", list(known)),
    }
}

fn plain_expected(expected: &str) -> &str {
    match expected {
        "a boolean" | "bool" => "true or false",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" => "a whole number, 0 or more",
        "f64" => "a number",
        "a sequence" => "a list",
        "path string" => "a path (a string)",
        "a string" | "string" => "a string",
        "a map" => "a section",
        "string or map" => "a word",
        struct_or_enum if struct_or_enum.starts_with("struct") => "a section",
        other => other,
    }
}

fn plain_found(found: &Actual, secret: bool) -> String {
    match found {
        Actual::Seq => "a list".into(),
        Actual::Map => "a section".into(),
        Actual::Unit | Actual::Option => "nothing".into(),
        _ if secret => "something else".into(),
        Actual::Bool(value) => value.to_string(),
        Actual::Unsigned(value) => value.to_string(),
        Actual::Signed(value) => value.to_string(),
        Actual::Float(value) => value.to_string(),
        Actual::Str(value) => format!("`{value}`"),
        other => other.to_string(),
    }
}

fn find<'a>(root: &'a mut Dict, path: &[String]) -> Option<&'a mut Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(root.get_mut(first)?, |value, key| match value {
        Value::Dict(_, dict) => dict.get_mut(key),
        Value::Array(_, items) => items.get_mut(key.parse::<usize>().ok()?),
        _ => None,
    })
}

/// Renames the key at the end of `path`, unless the new name exists. Returns whether it did.
fn rename(root: &mut Dict, path: &[String], name: &str) -> bool {
    if let Some((last, parent)) = path.split_last()
        && let Some(dict) = dict_at(root, parent)
        && !dict.contains_key(name)
        && let Some(value) = dict.remove(last)
    {
        dict.insert(name.to_owned(), value);
        return true;
    }
    false
}

/// Removes the value at `path`, or the whole list around it, because the numbers of later elements must not change. Returns the removed
/// path.
fn remove(root: &mut Dict, path: &[String]) -> Option<KeyPath> {
    let (last, parent) = path.split_last()?;
    match dict_at(root, parent) {
        Some(dict) => dict.remove(last).map(|_| path.to_vec()),
        None => remove(root, parent),
    }
}

fn dict_at<'a>(root: &'a mut Dict, path: &[String]) -> Option<&'a mut Dict> {
    if path.is_empty() {
        return Some(root);
    }
    match find(root, path)? {
        Value::Dict(_, dict) => Some(dict),
        _ => None,
    }
}
