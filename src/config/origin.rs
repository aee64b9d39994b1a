//! The source of each value, so that a problem can name its line or variable.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::error::Problem;

/// The keys from the root of the file to a value; elements of lists by their number.
pub(super) type KeyPath = Vec<String>;

/// The path of literal keys.
pub(super) fn key_path<'a>(keys: impl IntoIterator<Item = &'a str>) -> KeyPath {
    keys.into_iter().map(str::to_owned).collect()
}

/// A problem at a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub path: KeyPath,
    pub message: String,
}

impl Finding {
    pub fn new(path: KeyPath, message: impl Into<String>) -> Self {
        Self {
            path,
            message: message.into(),
        }
    }

    /// The problem without a source.
    pub fn into_problem(self) -> Problem {
        Problem {
            key: self.path.join("."),
            message: self.message,
            ..Problem::default()
        }
    }
}

/// The layer a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// A line of the file.
    Line(usize),
    /// An environment variable.
    Variable(String),
}

/// The origin of every value.
#[derive(Debug, Clone, Default)]
pub(super) struct Origins {
    pub file: Option<PathBuf>,
    pub keys: BTreeMap<KeyPath, Origin>,
}

impl Origins {
    /// The origin of the value, else of the innermost enclosing section with one.
    pub fn of(&self, path: &[String]) -> Option<&Origin> {
        (0..=path.len()).rev().find_map(|end| self.keys.get(&path[..end]))
    }

    /// Moves the origin of `path` to `renamed`.
    pub fn rename(&mut self, path: &[String], renamed: &[String]) {
        let inside = self.keys.iter().filter(|(key, _)| key.starts_with(path));
        let moved = inside.map(|(key, origin)| ([renamed, &key[path.len()..]].concat(), origin.clone()));
        self.keys.extend(moved.collect::<Vec<_>>());
    }

    /// All origins, in the order of the file.
    pub fn locate_all(&self, findings: Vec<Finding>) -> Vec<Problem> {
        let mut problems: Vec<Problem> = findings.into_iter().map(|finding| self.locate(finding)).collect();
        problems.sort_by_key(|problem| problem.line);
        problems
    }

    pub fn locate(&self, finding: Finding) -> Problem {
        let mut problem = Problem {
            file: self.file.clone(),
            ..Problem::default()
        };
        match self.of(&finding.path) {
            Some(Origin::Line(line)) => problem.line = Some(*line),
            Some(Origin::Variable(name)) => (problem.file, problem.variable) = (None, Some(name.clone())),
            None => {}
        }
        Problem {
            key: finding.path.join("."),
            message: finding.message,
            ..problem
        }
    }
}
