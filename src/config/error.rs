//! Errors of the cluster file. Each message names file, line and key.

use std::fmt;
use std::io;
use std::path::PathBuf;

use serde::Serialize;

use crate::failure::explain;

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no cluster file, and the environment sets no `proxy`.
    #[error(
        "no cluster file found; looked for {}\nwrite one (configs/reference.yaml lists every key), or name one with \
         `-c FILE` or TIGHTWAD_CONFIG",
        list(looked.iter().map(|path| path.display()))
    )]
    NotFound {
        /// The places, in the order of the search.
        looked: Vec<PathBuf>,
    },
    /// The cluster file cannot be read.
    #[error("{}: cannot read the cluster file{}: {}", path.display(), if *from_variable { " that TIGHTWAD_CONFIG names" } else { "" }, explain(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// Whether `TIGHTWAD_CONFIG` named it.
        from_variable: bool,
        /// The system's reason.
        source: io::Error,
    },
    /// The content is wrong. Holds all problems, one line each.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<Problem>),
    /// The file of a token or a key cannot be used.
    #[error("{key}: {}: {reason}", path.display())]
    Secret {
        /// The key that names the file.
        key: String,
        /// The file.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
}

impl ConfigError {
    pub(super) fn unless_none(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Self::Invalid(problems))
        }
    }

    /// The problems, one by one.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        match self {
            Self::Invalid(problems) => problems.clone(),
            other => vec![Problem {
                message: other.to_string(),
                ..Problem::default()
            }],
        }
    }
}

/// One problem and its place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The cluster file, when it is the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The line in it, counted from 1.
    pub line: Option<usize>,
    /// The environment variable, when that is the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variable: Option<String>,
    /// The dotted key, `proxy.draft.url`; empty for the whole file.
    pub key: String,
    /// The problem, and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(variable) = &self.variable {
            write!(f, "{variable}: ")?;
        } else if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
            if let Some(line) = self.line {
                write!(f, "{line}:")?;
            }
            f.write_str(" ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// `a, b, c`.
pub(super) fn list(items: impl IntoIterator<Item = impl fmt::Display>) -> String {
    items
        .into_iter()
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// Longer words are not compared, because that would take long.
const LONGEST_WORD: usize = 128;

/// The known word that is most similar to `wanted`.
pub(super) fn closest<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if wanted.len() > LONGEST_WORD {
        return None;
    }
    known
        .into_iter()
        .map(|word| {
            let one_slip = wanted.len() > 2 && strsim::damerau_levenshtein(wanted, word) == 1;
            let part = wanted.len() > 2 && (word.contains(wanted) || wanted.contains(word));
            let floor = if one_slip || part { 0.85 } else { 0.0 };
            (word, strsim::jaro_winkler(wanted, word).max(floor))
        })
        .filter(|(_, likeness)| *likeness > 0.8)
        .max_by(|(_, a), (_, b)| a.total_cmp(b))
        .map(|(word, _)| word)
}
