//! Parses the header of a GGUF file. The bytes are untrusted.
//!
//! GGUF versions 2 and 3, little-endian, as in llama.cpp b11434 (`ggml/src/gguf.cpp`). Invariant: the parser compares each
//! count and length with the file's length, and with what models have, before it reads or allocates anything for it.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use super::error::ModelFileError;
use super::keys::{Keys, Value};
use super::types::TensorType;

/// Alignment of the data if the file names none.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Longest name of a key or of a tensor; llama.cpp's own tensor names have at most 64 bytes.
const MAX_NAME: u64 = 64 * 1024;
/// Longest string that is kept.
const MAX_TEXT: u64 = 1024;
/// Longest array whose values are kept: llama.cpp has no model with more layers (`LLAMA_MAX_LAYERS`).
pub(super) const MAX_ARRAY: u64 = 512;
/// Limit for the length of vectors and for the size of the vocabulary; no model has more.
pub(crate) const MOST_NUMBERS: u64 = 1 << 24;
/// Most dimensions of a tensor (`GGML_MAX_DIMS`).
const MAX_DIMENSIONS: u32 = 4;
/// Most tensors of a model. A model of 61 layers with 384 experts, each with three matrices of its own, has 70 000.
pub(super) const MAX_TENSORS: u64 = 1 << 17;
/// Most keys of a file; models have about fifty.
const MAX_KEYS: u64 = 1 << 14;
/// Longest header without the padding before the data. A vocabulary of 260 000 tokens with its merges takes 20 MB.
const MAX_HEADER: u64 = 128 << 20;
/// Shortest entry of a tensor: length of the name, number of dimensions, type, offset.
const MIN_TENSOR_ENTRY: u64 = 8 + 4 + 4 + 8;
/// Shortest key-value pair: length of the key, type, one byte.
const MIN_KEY_ENTRY: u64 = 8 + 4 + 1;

/// A tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name: `blk.0.attn_q.weight`.
    pub name: String,
    /// Its dimensions, the length of a row first.
    pub dimensions: Vec<u64>,
    /// Its number format.
    pub kind: TensorType,
    /// Its size in bytes.
    pub bytes: u64,
}

/// An error in a header, without the name of the file.
#[derive(Debug)]
pub(super) enum ParseError {
    Io(io::Error),
    NotGguf,
    BigEndian,
    Version(u32),
    Truncated(u64),
    Broken(String),
    MissingKey(String),
    UnknownType { tensor: String, number: u32 },
}

impl From<io::Error> for ParseError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl ParseError {
    /// The same error, with the name of its file; `has`: the file's length.
    pub(super) fn in_file(self, path: &Path, has: u64) -> ModelFileError {
        let path = path.to_owned();
        match self {
            Self::Io(source) => ModelFileError::Unreadable { path, source },
            Self::NotGguf => ModelFileError::NotGguf(path),
            Self::BigEndian => ModelFileError::BigEndian(path),
            Self::Version(version) => ModelFileError::Version { path, version },
            Self::Truncated(needs) => ModelFileError::Truncated { path, has, needs },
            Self::Broken(what) => ModelFileError::Broken { path, what },
            Self::MissingKey(key) => ModelFileError::MissingKey { path, key },
            Self::UnknownType { tensor, number } => ModelFileError::UnknownType { path, tensor, number },
        }
    }
}

/// A parsed header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) keys: Keys,
    pub(super) tensors: Vec<Tensor>,
}

/// Parses the header of a file of `length` bytes. A sparse file may claim any length, so each count in it is also compared
/// with the limits above.
pub(super) fn parse(input: impl Read + Seek, length: u64) -> Result<Header, ParseError> {
    let mut reader = Reader {
        input,
        position: 0,
        length,
    };
    if length < 4 || reader.bytes::<4>()? != *b"GGUF" {
        return Err(ParseError::NotGguf);
    }
    let version = reader.u32()?;
    match version {
        2 | 3 => {}
        // A small number in the other byte order.
        _ if version.trailing_zeros() >= 16 => return Err(ParseError::BigEndian),
        _ => return Err(ParseError::Version(version)),
    }
    let n_tensors = reader.u64()?;
    let n_keys = reader.u64()?;
    reader.expect(n_keys, MIN_KEY_ENTRY, "keys", MAX_KEYS)?;
    let mut keys = Keys::default();
    for _ in 0..n_keys {
        let name = reader.name()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, &name)?;
        keys.insert(name, value);
    }
    let alignment = match keys.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::Number(alignment)) if alignment.is_power_of_two() && *alignment <= 1 << 30 => *alignment,
        Some(_) => return Err(ParseError::Broken("`general.alignment` is no power of two".into())),
    };
    reader.expect(n_tensors, MIN_TENSOR_ENTRY, "tensors", MAX_TENSORS)?;
    let mut tensors = Vec::new();
    let mut end = 0;
    for _ in 0..n_tensors {
        let (tensor, offset) = reader.tensor()?;
        let this_end = offset
            .checked_add(tensor.bytes)
            .ok_or_else(|| ParseError::Broken(format!("tensor `{}` ends beyond all files", tensor.name)))?;
        end = end.max(this_end);
        tensors.push(tensor);
    }
    let needs = reader.position.next_multiple_of(alignment).saturating_add(end);
    if !tensors.is_empty() && needs > length {
        return Err(ParseError::Truncated(needs));
    }
    Ok(Header { keys, tensors })
}

struct Reader<R> {
    input: R,
    position: u64,
    length: u64,
}

impl<R: Read + Seek> Reader<R> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        self.has(N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.position += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, ParseError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ParseError> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// Checks that the file has `more` bytes, and that the header stays within its limit.
    fn has(&self, more: u64) -> Result<(), ParseError> {
        match self.position.checked_add(more) {
            Some(needs) if needs > self.length => Err(ParseError::Truncated(needs)),
            Some(needs) if needs > MAX_HEADER => {
                let most = MAX_HEADER >> 20;
                Err(ParseError::Broken(format!(
                    "it is longer than {most} MiB, which no model's is"
                )))
            }
            Some(_) => Ok(()),
            None => Err(ParseError::Broken("a length is beyond all files".into())),
        }
    }

    /// Checks that the file can hold `count` entries of at least `least` bytes, and that `count` is at most `most`.
    fn expect(&self, count: u64, least: u64, what: &str, most: u64) -> Result<(), ParseError> {
        if count > most {
            let what = format!("it names {count} {what}, and no model has more than {most}");
            return Err(ParseError::Broken(what));
        }
        self.has(count.saturating_mul(least))
    }

    fn skip(&mut self, bytes: u64) -> Result<(), ParseError> {
        self.has(bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let Ok(step) = i64::try_from(bytes) else {
            return Err(ParseError::Broken("a length is beyond all files".into()));
        };
        // A short read keeps the buffer of a buffered reader; a seek drops it.
        if step < 4096 {
            io::copy(&mut self.input.by_ref().take(bytes), &mut io::sink())?;
        } else {
            self.input.seek(SeekFrom::Current(step))?;
        }
        self.position += bytes;
        Ok(())
    }

    fn text(&mut self, bytes: u64) -> Result<String, ParseError> {
        self.has(bytes)?;
        let mut text = Vec::new();
        self.input.by_ref().take(bytes).read_to_end(&mut text)?;
        self.position += bytes;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn name(&mut self) -> Result<String, ParseError> {
        let bytes = self.u64()?;
        self.has(bytes)?;
        if bytes > MAX_NAME {
            return Err(ParseError::Broken(format!("a name has {bytes} bytes")));
        }
        self.text(bytes)
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, ParseError> {
        match kind {
            8 => {
                let bytes = self.u64()?;
                if bytes <= MAX_TEXT {
                    return self.text(bytes).map(Value::Text);
                }
                self.skip(bytes)?;
                Ok(Value::Other)
            }
            9 => self.array(key),
            _ => Ok(self.scalar(kind, key)?.map_or(Value::Other, Value::Number)),
        }
    }

    /// A number or a boolean; `None` for a negative or fractional number.
    fn scalar(&mut self, kind: u32, key: &str) -> Result<Option<u64>, ParseError> {
        Ok(match kind {
            0 => Some(u64::from(self.bytes::<1>()?[0])),
            1 => u64::try_from(i8::from_le_bytes(self.bytes()?)).ok(),
            2 => Some(u64::from(u16::from_le_bytes(self.bytes()?))),
            3 => u64::try_from(i16::from_le_bytes(self.bytes()?)).ok(),
            4 => Some(u64::from(self.u32()?)),
            5 => u64::try_from(i32::from_le_bytes(self.bytes()?)).ok(),
            7 => Some(u64::from(self.bytes::<1>()?[0] != 0)),
            10 => Some(self.u64()?),
            11 => u64::try_from(i64::from_le_bytes(self.bytes()?)).ok(),
            _ => {
                self.skip(fixed_size(kind, key)?)?;
                None
            }
        })
    }

    fn array(&mut self, key: &str) -> Result<Value, ParseError> {
        let of = self.u32()?;
        let count = self.u64()?;
        if of == 8 {
            self.expect(count, 8, "texts", MOST_NUMBERS)?;
            for _ in 0..count {
                let bytes = self.u64()?;
                self.skip(bytes)?;
            }
            return Ok(Value::Array(count));
        }
        let size = fixed_size(of, key)?;
        self.expect(count, size, "values", MAX_HEADER)?;
        if count > MAX_ARRAY {
            self.skip(count * size)?;
            return Ok(Value::Array(count));
        }
        let mut numbers = Vec::new();
        for _ in 0..count {
            numbers.push(self.scalar(of, key)?.unwrap_or_default());
        }
        Ok(Value::Numbers(numbers))
    }

    fn tensor(&mut self) -> Result<(Tensor, u64), ParseError> {
        let name = self.name()?;
        let n_dimensions = self.u32()?;
        if n_dimensions > MAX_DIMENSIONS {
            let what = format!("tensor `{name}` has {n_dimensions} dimensions");
            return Err(ParseError::Broken(what));
        }
        let mut dimensions = Vec::new();
        for _ in 0..n_dimensions {
            dimensions.push(self.u64()?);
        }
        let number = self.u32()?;
        let offset = self.u64()?;
        let Some(kind) = TensorType::numbered(number) else {
            return Err(ParseError::UnknownType { tensor: name, number });
        };
        let row = dimensions.first().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block) {
            let what = format!(
                "rows of tensor `{name}` have {row} weights, which {} cannot hold",
                kind.name
            );
            return Err(ParseError::Broken(what));
        }
        let bytes = dimensions
            .iter()
            .skip(1)
            .try_fold(row / kind.block, |product, n| product.checked_mul(*n))
            .and_then(|blocks| blocks.checked_mul(kind.bytes));
        let Some(bytes) = bytes else {
            return Err(ParseError::Broken(format!("tensor `{name}` is larger than all files")));
        };
        let tensor = Tensor {
            name,
            dimensions,
            kind,
            bytes,
        };
        Ok((tensor, offset))
    }
}

/// Size of a value of this type in bytes.
fn fixed_size(kind: u32, key: &str) -> Result<u64, ParseError> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        10..=12 => Ok(8),
        _ => Err(ParseError::Broken(format!("key `{key}` has values of type {kind}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Cursor};

    use proptest::prelude::*;

    use super::*;
    use crate::gguf::builder::{gemma, header, read};

    #[test]
    fn a_big_endian_file_and_an_old_one_are_told() {
        let version = |bytes: [u8; 4]| [b"GGUF".as_slice(), &bytes, &[0; 16]].concat();
        assert!(matches!(
            read(&version([0, 0, 0, 3])),
            Err(ModelFileError::BigEndian(_))
        ));
        assert!(matches!(
            read(&version([1, 0, 0, 0])),
            Err(ModelFileError::Version { version: 1, .. })
        ));
    }

    #[test]
    fn an_unknown_type_is_named_with_its_tensor() {
        let bytes = gemma(1).tensor("blk.0.attn_q.weight", 64, 99, 64).bytes();
        let error = read(&bytes).unwrap_err().to_string();
        assert!(
            error.contains("`blk.0.attn_q.weight`") && error.contains("99"),
            "{error}"
        );
    }

    #[test]
    fn a_length_that_no_file_can_have_allocates_nothing() {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(u64::MAX.to_le_bytes());
        bytes.extend(u64::MAX.to_le_bytes());
        assert!(matches!(read(&bytes), Err(ModelFileError::Broken { .. })));
        bytes.truncate(8);
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend((1u64 << 40).to_le_bytes());
        bytes.resize(100, 0);
        assert!(matches!(read(&bytes), Err(ModelFileError::Truncated { .. })));
    }

    /// A file that is as long as it claims and holds nothing but zeros after its head, as a file of holes does.
    struct Holes {
        head: Vec<u8>,
        at: u64,
    }

    impl Read for Holes {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            buffer.fill(0);
            let head = usize::try_from(self.at)
                .ok()
                .and_then(|at| self.head.get(at..))
                .unwrap_or_default();
            let n = head.len().min(buffer.len());
            buffer[..n].copy_from_slice(&head[..n]);
            self.at += buffer.len() as u64;
            Ok(buffer.len())
        }
    }

    impl Seek for Holes {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            let SeekFrom::Current(step) = to else { panic!("{to:?}") };
            self.at = self.at.checked_add_signed(step).unwrap();
            Ok(self.at)
        }
    }

    /// Reads a header in a file of holes of a terabyte.
    fn read_holes(head: &[u8]) -> Result<Header, ParseError> {
        let head = head.to_vec();
        parse(BufReader::new(Holes { head, at: 0 }), 1 << 40)
    }

    #[test]
    fn counts_that_no_model_has_are_refused_though_a_file_of_holes_could_hold_them() {
        for (n_tensors, n_keys) in [
            (50_000_000u64, 0u64),
            (MAX_TENSORS + 1, 0),
            (0, MAX_KEYS + 1),
            (0, 1 << 35),
        ] {
            let counts = [n_tensors.to_le_bytes(), n_keys.to_le_bytes()].concat();
            let error = read_holes(&[b"GGUF\x03\0\0\0", counts.as_slice()].concat());
            assert!(
                matches!(error, Err(ParseError::Broken(_))),
                "{n_tensors} {n_keys}: {error:?}"
            );
        }
    }

    #[test]
    fn a_header_that_goes_on_for_ever_is_given_up_in_good_time() {
        // The longest array of texts that a header has room for; each of them is read.
        let texts = MAX_HEADER / 8 - 100;
        let head = [
            b"GGUF\x03\0\0\0".as_slice(),
            &0u64.to_le_bytes(),
            &MAX_KEYS.to_le_bytes(),
            &1u64.to_le_bytes(),
            b"k",
            &9u32.to_le_bytes(),
            &8u32.to_le_bytes(),
            &texts.to_le_bytes(),
        ];
        let began = std::time::Instant::now();
        let error = read_holes(&head.concat());
        assert!(matches!(error, Err(ParseError::Broken(_))), "{error:?}");
        assert!(
            began.elapsed() < std::time::Duration::from_secs(30),
            "{:?}",
            began.elapsed()
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let whole = [b"GGUF\x03\0\0\0".as_slice(), &bytes].concat();
            let _ = parse(Cursor::new(&bytes), bytes.len() as u64);
            let _ = parse(Cursor::new(&whole), whole.len() as u64);
        }

        #[test]
        fn a_header_cut_anywhere_or_with_changed_bytes_is_told_or_read(
            cut in 0..200_000usize,
            changes in proptest::collection::vec((0..4000usize, any::<u8>()), 0..6),
        ) {
            let mut bytes = header();
            let changed = !changes.is_empty();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            bytes.truncate(cut);
            let parsed = parse(Cursor::new(&bytes), cut as u64);
            // The real model is longer than this, so it is never whole.
            prop_assert!(changed || parsed.is_err());
        }

        #[test]
        fn a_header_with_changed_numbers_in_a_file_of_holes_is_refused_or_read_within_bounds(
            changes in proptest::collection::vec((0..4000usize, any::<[u8; 8]>(), 0..9usize), 1..6),
        ) {
            let mut bytes = header();
            for (at, number, length) in changes {
                bytes[at..at + length].copy_from_slice(&number[..length]);
            }
            if let Ok(Header { keys, tensors }) = read_holes(&bytes) {
                prop_assert!(keys.len() as u64 <= MAX_KEYS && tensors.len() as u64 <= MAX_TENSORS);
            }
        }
    }
}
