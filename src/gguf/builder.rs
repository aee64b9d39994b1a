//! Model files for tests, put together key by key.

use std::io::Write;

use super::{ModelFile, ModelFileError};

pub(crate) const TARGET: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/models/tightwad-tiny-target-q8_0.gguf"
);

/// The first bytes of the real model: its whole header and some of its data.
pub(crate) fn header() -> Vec<u8> {
    let mut bytes = std::fs::read(TARGET).unwrap();
    bytes.truncate(200_000);
    bytes
}

pub(crate) fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

pub(crate) fn read(bytes: &[u8]) -> Result<ModelFile, ModelFileError> {
    ModelFile::read(file(bytes).path())
}

/// A file that is put together key by key and tensor by tensor.
pub(crate) struct HeaderBuilder {
    keys: Vec<u8>,
    n_keys: u64,
    tensors: Vec<u8>,
    n_tensors: u64,
    data: u64,
}

impl HeaderBuilder {
    pub(crate) fn new() -> Self {
        Self {
            keys: Vec::new(),
            n_keys: 0,
            tensors: Vec::new(),
            n_tensors: 0,
            data: 0,
        }
    }

    fn string(bytes: &mut Vec<u8>, text: &str) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }

    pub(crate) fn number(mut self, key: &str, number: u32) -> Self {
        Self::string(&mut self.keys, key);
        self.keys.extend(4u32.to_le_bytes());
        self.keys.extend(number.to_le_bytes());
        self.n_keys += 1;
        self
    }

    pub(crate) fn numbers(mut self, key: &str, numbers: &[u32]) -> Self {
        Self::string(&mut self.keys, key);
        self.keys.extend(9u32.to_le_bytes());
        self.keys.extend(4u32.to_le_bytes());
        self.keys.extend((numbers.len() as u64).to_le_bytes());
        self.keys.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        self.n_keys += 1;
        self
    }

    pub(crate) fn text(mut self, key: &str, text: &str) -> Self {
        Self::string(&mut self.keys, key);
        self.keys.extend(8u32.to_le_bytes());
        Self::string(&mut self.keys, text);
        self.n_keys += 1;
        self
    }

    pub(crate) fn tensor(mut self, name: &str, row: u64, kind: u32, bytes: u64) -> Self {
        Self::string(&mut self.tensors, name);
        self.tensors.extend(1u32.to_le_bytes());
        self.tensors.extend(row.to_le_bytes());
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(self.data.to_le_bytes());
        self.data += bytes;
        self.n_tensors += 1;
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(self.n_tensors.to_le_bytes());
        bytes.extend(self.n_keys.to_le_bytes());
        bytes.extend(&self.keys);
        bytes.extend(&self.tensors);
        let data = bytes.len().next_multiple_of(32) + usize::try_from(self.data).unwrap();
        bytes.resize(data, 0);
        bytes
    }
}

pub(crate) fn gemma(layers: u32) -> HeaderBuilder {
    HeaderBuilder::new()
        .text("general.architecture", "gemma3")
        .number("gemma3.block_count", layers)
        .number("gemma3.embedding_length", 64)
        .number("gemma3.attention.head_count", 4)
        .number("gemma3.attention.sliding_window", 512)
}
