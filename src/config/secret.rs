//! Tokens and keys. A [`Secret`] never appears in logs, in `Debug` or in serialised output.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize, Serializer};

use super::{ConfigError, Coordinator, Proxy, Server, Upstream, Worker, local_key};
use crate::failure::explain;

/// A string that never shows in logs or in the output of `check-config`.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(HIDDEN)
    }
}

/// Shown in place of a secret.
const HIDDEN: &str = "***";

/// Whether a variable with this name holds a secret.
#[must_use]
pub fn is_secret(variable: &str) -> bool {
    let upper = variable.to_uppercase();
    let parts = ["KEY", "TOKEN", "SECRET", "PASS", "AUTH", "CREDENTIAL", "COOKIE"];
    let words = ["PAT", "DSN", "PWD"];
    parts.iter().any(|part| upper.contains(part)) || upper.split('_').any(|word| words.contains(&word))
}

/// Whether the next argument is a secret: `--api-key`, `--hf-token`, `-hft`.
fn is_secret_option(option: &str) -> bool {
    let Some(name) = option.strip_prefix('-') else {
        return false;
    };
    let mut words = name.split(['-', '_']);
    let is_secret = words.any(|word| ["key", "token", "secret", "password"].contains(&word));
    name == "hft" || (is_secret && !name.ends_with("-file"))
}

/// Whether a URL contains a password.
fn has_password(value: &str) -> bool {
    let rest = value.split_once("://").map(|(_, rest)| rest);
    rest.is_some_and(|rest| rest.split('/').next().is_some_and(|authority| authority.contains('@')))
}

/// Arguments without the values of secret options such as `--api-key`.
#[must_use]
pub fn shown_arguments(arguments: &[String]) -> Vec<String> {
    let mut value_is_secret = false;
    let shown = arguments.iter().map(|argument| {
        if std::mem::take(&mut value_is_secret) {
            return HIDDEN.to_owned();
        }
        match argument.split_once('=') {
            Some((option, _)) if is_secret_option(option) => format!("{option}={HIDDEN}"),
            _ => {
                value_is_secret = is_secret_option(argument);
                argument.clone()
            }
        }
    });
    shown.collect()
}

/// Serialises arguments without secrets.
pub(super) fn hide_keys<S: Serializer>(arguments: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    shown_arguments(arguments).serialize(serializer)
}

/// Serialises variables without the values of secret ones.
pub(super) fn hide_values<S: Serializer>(
    variables: &BTreeMap<String, String>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(variables.iter().map(|(name, value)| {
        let hidden = is_secret(name) || has_password(value);
        (name, if hidden { HIDDEN } else { value.as_str() })
    }))
}

impl Proxy {
    /// The token that clients must send, from `auth_token` or read now from `auth_token_file`. None: no token is set.
    pub fn token(&self) -> Result<Option<Secret>, ConfigError> {
        resolve(
            self.auth_token.as_ref(),
            self.auth_token_file.as_deref(),
            "proxy.auth_token_file",
        )
    }
}

impl Upstream {
    /// The key to send to this server, from `api_key` or read now from `api_key_file`, else the host's local key if it requires
    /// that. None: no key is set.
    pub fn api_key(&self) -> Result<Option<Secret>, ConfigError> {
        if self.asks_local_key {
            return Ok(Some(local_key::obtain()?.key));
        }
        resolve(self.api_key.as_ref(), self.api_key_file.as_deref(), "api_key_file")
    }

    /// The key to draft with, from `draft_key` or read now from `draft_key_file`. None: no key is set.
    pub fn draft_key(&self) -> Result<Option<Secret>, ConfigError> {
        resolve(
            self.draft_key.as_ref(),
            self.draft_key_file.as_deref(),
            "proxy.target.draft_key_file",
        )
    }
}

impl Server {
    /// The key that clients must send, from `api_key` or read now from `api_key_file`, else the host's local key if it requires
    /// that. None: no key is required.
    pub fn api_key(&self) -> Result<Option<Secret>, ConfigError> {
        if self.asks_local_key() {
            return Ok(Some(local_key::obtain()?.key));
        }
        resolve(self.api_key.as_ref(), self.api_key_file.as_deref(), "api_key_file")
    }
}

impl Coordinator {
    /// The key that clients must send, from `api_key` or read now from `api_key_file`. None: no key is set.
    pub fn api_key(&self) -> Result<Option<Secret>, ConfigError> {
        resolve(
            self.api_key.as_ref(),
            self.api_key_file.as_deref(),
            "coordinator.api_key_file",
        )
    }

    /// The key that drafters must send, from `draft_key` or read now from `draft_key_file`. None: no key is set.
    pub fn draft_key(&self) -> Result<Option<Secret>, ConfigError> {
        resolve(
            self.draft_key.as_ref(),
            self.draft_key_file.as_deref(),
            "coordinator.draft_key_file",
        )
    }
}

impl Worker {
    /// The token that coordinators must send to its agent, from `agent_token` or read now from `agent_token_file`. None:
    /// no token is set.
    pub fn agent_token(&self) -> Result<Option<Secret>, ConfigError> {
        resolve(
            self.agent_token.as_ref(),
            self.agent_token_file.as_deref(),
            "workers.agent_token_file",
        )
    }
}

fn resolve(inline: Option<&Secret>, file: Option<&Path>, key: &str) -> Result<Option<Secret>, ConfigError> {
    let Some(path) = file else { return Ok(inline.cloned()) };
    let fail = |reason: String| ConfigError::Secret {
        key: key.to_owned(),
        path: path.to_owned(),
        reason,
    };
    read(path).map(Some).map_err(fail)
}

/// Reads the secret in a file, or says why it cannot be read.
pub(super) fn read(path: &Path) -> Result<Secret, String> {
    let text = super::load::read_text(path).map_err(|error| format!("cannot be read: {}", explain(&error)))?;
    match text.trim() {
        "" => Err("is empty; it should hold the token in one line".into()),
        secret => Ok(Secret::new(secret)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_shown_without_keys() {
        let arguments = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for (given, shown) in [
            ("--api-key hush -t 2", "--api-key *** -t 2"),
            ("--api-key=hush -t 2", "--api-key=*** -t 2"),
            ("--hf-token hush -hft hush", "--hf-token *** -hft ***"),
            (
                "--api-key-file /f --image-min-tokens 5",
                "--api-key-file /f --image-min-tokens 5",
            ),
            ("-t 2 --api-key", "-t 2 --api-key"),
        ] {
            assert_eq!(shown_arguments(&arguments(given)), arguments(shown));
        }
    }

    #[test]
    fn a_url_with_a_password_is_not_shown() {
        assert!(has_password("http://me:hush@proxy:3128/"));
        assert!(!has_password("http://proxy:3128/a@b"));
    }
}
