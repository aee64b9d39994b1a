//! The JSON answer of one of our own servers.
//!
//! It is read as a typed value and printed as it came, so that `--json` keeps the fields that only another version knows.

use std::ops::Deref;

use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::Value;

/// An answer of type `T`.
#[derive(Debug)]
pub struct Received<T> {
    json: Value,
    known: T,
}

impl<T: DeserializeOwned> Received<T> {
    /// Reads the answer; `None` if it is not a `T`.
    pub fn read(json: Value) -> Option<Self> {
        let known = T::deserialize(&json).ok()?;
        Some(Self { json, known })
    }
}

impl<T> Deref for Received<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.known
    }
}

impl<T> Serialize for Received<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.json.serialize(serializer)
    }
}
