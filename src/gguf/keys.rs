//! The key-value pairs of a header.

use std::collections::HashMap;

/// A value of a header.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Number(u64),
    Text(String),
    Numbers(Vec<u64>),
    /// An array that is too long, or not of numbers: only its length is kept.
    Array(u64),
    Other,
}

/// The pairs of one file, by key.
#[derive(Debug, Default)]
pub(super) struct Keys(HashMap<String, Value>);

impl Keys {
    pub(super) fn insert(&mut self, key: String, value: Value) {
        self.0.insert(key, value);
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self.0.get(key) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The number of a layer; the file gives one per layer, or one for all.
    pub(super) fn per_layer(&self, key: &str, layer: usize) -> Option<u64> {
        match self.0.get(key)? {
            Value::Number(number) => Some(*number),
            Value::Numbers(numbers) => numbers.get(layer).copied(),
            _ => None,
        }
    }

    /// The largest number of all layers.
    pub(super) fn largest(&self, key: &str) -> Option<u64> {
        match self.0.get(key)? {
            Value::Number(number) => Some(*number),
            Value::Numbers(numbers) => numbers.iter().copied().max(),
            _ => None,
        }
    }

    /// The length of an array whose values are not kept.
    pub(super) fn array_length(&self, key: &str) -> Option<u64> {
        match self.0.get(key)? {
            Value::Array(length) => Some(*length),
            _ => None,
        }
    }
}
