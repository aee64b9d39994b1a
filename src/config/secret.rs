//! Tokens and keys: never shown, and best kept in files of their own.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{ConfigError, Coordinator, Proxy, Server, Upstream, Worker};
use crate::upstream::failure::explain;

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
        f.write_str("***")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

/// Whether a variable of this name holds something that is not to be shown.
#[must_use]
pub fn is_secret(variable: &str) -> bool {
    let upper = variable.to_uppercase();
    let words = ["KEY", "TOKEN", "SECRET", "PASSWORD"];
    words.iter().any(|word| upper.contains(word))
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
    /// The key to send to this server, from `api_key` or read now from `api_key_file`. None: no key is set.
    pub fn api_key(&self) -> Result<Option<Secret>, ConfigError> {
        resolve(self.api_key.as_ref(), self.api_key_file.as_deref(), "api_key_file")
    }
}

impl Server {
    /// The key that clients must send, from `api_key` or read now from `api_key_file`. None: no key is set.
    pub fn api_key(&self) -> Result<Option<Secret>, ConfigError> {
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
    let text = super::load::read_text(path).map_err(|error| fail(format!("cannot be read: {}", explain(&error))))?;
    match text.trim() {
        "" => Err(fail("is empty; it should hold the token in one line".into())),
        secret => Ok(Some(Secret::new(secret))),
    }
}
