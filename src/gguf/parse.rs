//! The header of a model file: what a plan has to know of a model, without reading its weights.
//!
//! GGUF versions 2 and 3, little-endian, as in llama.cpp b11434 (`ggml/src/gguf.cpp`). A model may lie in several parts,
//! `name-00001-of-00003.gguf` and so on, each with a header of its own; the first one describes the model.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::upstream::failure::explain;

/// Where the data begins when the file does not say otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Longest name of a key or of a tensor; llama.cpp's own tensor names have at most 64 bytes.
const MAX_NAME: u64 = 64 * 1024;
/// Longest text that is kept.
const MAX_TEXT: u64 = 1024;
/// Longest array whose values are kept: llama.cpp has no model with more layers (`LLAMA_MAX_LAYERS`).
const MAX_ARRAY: u64 = 512;
/// More numbers than any model has in one of a layer's vectors, or entries in its vocabulary.
pub(crate) const MOST_NUMBERS: u64 = 1 << 24;
/// More numbers than any layer keeps of a sequence.
const MOST_STATE: u64 = 1 << 32;
/// Most dimensions of a tensor (`GGML_MAX_DIMS`).
const MAX_DIMENSIONS: u32 = 4;
/// Most parts of a model: their number has 16 bits.
const MAX_PARTS: u64 = 65_535;
/// Most tensors of a model. One of 61 layers with 384 experts, each expert's three matrices by themselves, has 70 000.
const MAX_TENSORS: u64 = 1 << 17;
/// Most keys of a file; models have about fifty.
const MAX_KEYS: u64 = 1 << 14;
/// Longest header, without the padding before the data. Vocabularies of 260 000 tokens with their merges take 20 MB.
const MAX_HEADER: u64 = 128 << 20;
/// A tensor's entry has at least a length of the name, a number of dimensions, a type and an offset.
const MIN_TENSOR_ENTRY: u64 = 8 + 4 + 4 + 8;
/// A key has at least a length, a type and a value of one byte.
const MIN_KEY_ENTRY: u64 = 8 + 4 + 1;

/// Why a model file cannot be planned with.
#[derive(Debug, thiserror::Error)]
pub enum ModelFileError {
    /// No such file.
    #[error("the model file {} does not exist; check `path` in the config", .0.display())]
    Missing(PathBuf),
    /// A part of the model is not there.
    #[error("{} is missing: the model has {of} parts, and all must lie in one folder; download it again", .path.display())]
    MissingPart {
        /// Where it should be.
        path: PathBuf,
        /// How many there are.
        of: u64,
    },
    /// It is a later part.
    #[error("{} is part {part} of a model of {of} parts; name the first part in `path`", .path.display())]
    NotFirstPart {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        part: u64,
        /// How many there are.
        of: u64,
    },
    /// A model of several parts whose name does not say where the others are.
    #[error(
        "{} is one of {of} parts, but is not called `…-00001-of-{of:05}.gguf`; give the parts their names back",
        .path.display()
    )]
    PartName {
        /// The file.
        path: PathBuf,
        /// How many there are.
        of: u64,
    },
    /// It is there and cannot be read.
    #[error("the model file {} cannot be read ({}); check its permissions", .path.display(), explain(.source))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A folder, a pipe or a device.
    #[error("{} is {what}, not a model file; name a GGUF file in `path`", .path.display())]
    NotAFile {
        /// What `path` names.
        path: PathBuf,
        /// What that is.
        what: &'static str,
    },
    /// It is no model.
    #[error("{} is not a GGUF model (it does not begin with `GGUF`); download or convert it again", .0.display())]
    NotGguf(PathBuf),
    /// Its numbers are the other way round.
    #[error("{} is a big-endian GGUF model; convert it for this machine, or download a little-endian one", .0.display())]
    BigEndian(PathBuf),
    /// Too old, or too new.
    #[error("{} is GGUF version {version}, and only 2 and 3 are known; convert it again", .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// It ends too early.
    #[error(
        "{} is truncated: it has {has} bytes and needs at least {needs}; download it again",
        .path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        has: u64,
        /// The least length that its header allows.
        needs: u64,
    },
    /// Its header makes no sense.
    #[error("the header of {} is broken ({what}); download or convert it again", .path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A number format of weights that is not known.
    #[error(
        "the tensor `{tensor}` of {} has type {number}, which llama.cpp b11434 does not know; convert the model again",
        .path.display()
    )]
    UnknownType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type.
        number: u32,
    },
    /// A key that every language model has.
    #[error("{} has no key `{key}`, so it is no language model that can be planned; convert it again", .path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
}

/// How numbers are stored: blocks of so many weights in so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TensorType {
    /// As llama.cpp calls it: `q8_0`.
    pub name: &'static str,
    /// Weights of a block.
    pub block: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// Number, name, weights and bytes of a block, as in `ggml.h`, `ggml.c` and `ggml-common.h` of llama.cpp b11434.
const TYPES: [(u32, TensorType); 35] = [
    (0, of("f32", 1, 4)),
    (1, of("f16", 1, 2)),
    (2, of("q4_0", 32, 18)),
    (3, of("q4_1", 32, 20)),
    (6, of("q5_0", 32, 22)),
    (7, of("q5_1", 32, 24)),
    (8, of("q8_0", 32, 34)),
    (9, of("q8_1", 32, 36)),
    (10, of("q2_K", 256, 84)),
    (11, of("q3_K", 256, 110)),
    (12, of("q4_K", 256, 144)),
    (13, of("q5_K", 256, 176)),
    (14, of("q6_K", 256, 210)),
    (15, of("q8_K", 256, 292)),
    (16, of("iq2_xxs", 256, 66)),
    (17, of("iq2_xs", 256, 74)),
    (18, of("iq3_xxs", 256, 98)),
    (19, of("iq1_s", 256, 50)),
    (20, of("iq4_nl", 32, 18)),
    (21, of("iq3_s", 256, 110)),
    (22, of("iq2_s", 256, 82)),
    (23, of("iq4_xs", 256, 136)),
    (24, of("i8", 1, 1)),
    (25, of("i16", 1, 2)),
    (26, of("i32", 1, 4)),
    (27, of("i64", 1, 8)),
    (28, of("f64", 1, 8)),
    (29, of("iq1_m", 256, 56)),
    (30, of("bf16", 1, 2)),
    (34, of("tq1_0", 256, 54)),
    (35, of("tq2_0", 256, 66)),
    (39, of("mxfp4", 32, 17)),
    (40, of("nvfp4", 64, 36)),
    (41, of("q1_0", 128, 18)),
    (42, of("q2_0", 64, 18)),
];

const fn of(name: &'static str, block: u64, bytes: u64) -> TensorType {
    TensorType { name, block, bytes }
}

impl TensorType {
    /// The type with this number in a GGUF file.
    #[must_use]
    pub fn numbered(number: u32) -> Option<Self> {
        let (_, kind) = TYPES.iter().find(|(known, _)| *known == number)?;
        Some(*kind)
    }

    /// The type that llama.cpp calls so.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let (_, kind) = TYPES.iter().find(|(_, kind)| kind.name == name)?;
        Some(*kind)
    }

    /// Bytes of a row of so many weights.
    #[must_use]
    pub fn row_bytes(self, weights: u64) -> u64 {
        weights.div_ceil(self.block).saturating_mul(self.bytes)
    }
}

/// A tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name: `blk.0.attn_q.weight`.
    pub name: String,
    /// Its dimensions, the length of a row first.
    pub dimensions: Vec<u64>,
    /// How its numbers are stored.
    pub kind: TensorType,
    /// Its bytes.
    pub bytes: u64,
}

/// A model as its file describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFile {
    /// The file, or the first part.
    pub path: PathBuf,
    /// How many files it lies in.
    pub parts: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// What its layers are like.
    pub shape: Shape,
    /// The tensors of all parts.
    pub tensors: Vec<Tensor>,
}

/// What the layers of a model are like.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Shape {
    /// `general.architecture`: `llama`, `qwen3moe`, ….
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// Repeating layers, those of multi-token prediction included.
    pub layers: u32,
    /// Length of a token's vector.
    pub embedding: u64,
    /// Entries of the vocabulary.
    pub vocabulary: u64,
    /// Context in tokens that it was trained with.
    pub trained_context: Option<u64>,
    /// Heads of attention, in the layer with most of them.
    pub heads: u64,
    /// Widest hidden part that a token goes through; of experts all those that it uses.
    pub feed_forward: u64,
    /// What each layer keeps of the past.
    pub memory: Vec<LayerMemory>,
}

/// What a layer keeps of the past.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerMemory {
    /// Numbers of a token's key, over all heads; 0: none.
    pub key: u64,
    /// Numbers of a token's value.
    pub value: u64,
    /// Tokens that it looks back; `None`: all of them.
    pub window: Option<u64>,
    /// Numbers of the state of a recurrent layer, for each sequence.
    pub state: u64,
}

impl Shape {
    /// What no model has, and a plan could not count with.
    fn absurd(&self) -> Option<String> {
        let vectors = [
            ("embedding", self.embedding),
            ("vocabulary", self.vocabulary),
            ("heads", self.heads),
            ("feed-forward part", self.feed_forward),
        ];
        let kept = self.memory.iter();
        let kept = kept.flat_map(|memory| [("keys", memory.key), ("values", memory.value)]);
        let states = self.memory.iter().map(|memory| ("state", memory.state));
        let vectors = vectors.into_iter().chain(kept).map(|it| (it, MOST_NUMBERS));
        vectors
            .chain(states.map(|it| (it, MOST_STATE)))
            .find(|((_, number), most)| number > most)
            .map(|((what, number), _)| format!("its {what} would have {number} numbers"))
    }
}

impl ModelFile {
    /// Reads the headers of a model and of its other parts.
    pub fn read(path: &Path) -> Result<Self, ModelFileError> {
        let first = read_part(path)?;
        let parts = first.number("split.count").unwrap_or(1).max(1);
        let mut model = Self {
            path: path.to_owned(),
            parts,
            bytes: first.length,
            shape: Shape::default(),
            tensors: Vec::new(),
        };
        if parts > MAX_PARTS {
            return Err(ModelFileError::Broken {
                path: path.to_owned(),
                what: format!("it names {parts} parts"),
            });
        }
        if parts > 1 {
            let part = first.number("split.no").unwrap_or(0).saturating_add(1);
            if part != 1 {
                return Err(ModelFileError::NotFirstPart {
                    path: path.to_owned(),
                    part,
                    of: parts,
                });
            }
            let parts = other_parts(path, parts)?;
            model.tensors.clone_from(&first.tensors);
            for path in parts {
                let part = read_part(&path).map_err(|error| match error {
                    ModelFileError::Missing(path) => ModelFileError::MissingPart { path, of: model.parts },
                    error => error,
                })?;
                model.bytes = model.bytes.saturating_add(part.length);
                model.tensors.extend(part.tensors);
                if model.tensors.len() as u64 > MAX_TENSORS {
                    return Err(ModelFileError::Broken {
                        path,
                        what: format!("with those before it the model has {} tensors", model.tensors.len()),
                    });
                }
            }
            if let Some(expected) = first.number("split.tensors.count")
                && expected != model.tensors.len() as u64
            {
                return Err(ModelFileError::Broken {
                    path: path.to_owned(),
                    what: format!("its parts hold {} tensors, not {expected}", model.tensors.len()),
                });
            }
        } else {
            model.tensors.clone_from(&first.tensors);
        }
        model.shape = first.shape(&model.tensors)?;
        Ok(model)
    }

    /// Checks that no part of the model and no end of a file is missing, as after a download that broke off. What else may
    /// be odd with it llama.cpp knows best.
    pub fn check_complete(path: &Path) -> Result<(), ModelFileError> {
        match Self::read(path) {
            Err(error @ (ModelFileError::Truncated { .. } | ModelFileError::MissingPart { .. })) => Err(error),
            _ => Ok(()),
        }
    }
}

/// The files of the parts after the first.
fn other_parts(first: &Path, of: u64) -> Result<Vec<PathBuf>, ModelFileError> {
    let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let end = format!("-00001-of-{of:05}.gguf");
    let stem = name.strip_suffix(&end).ok_or_else(|| ModelFileError::PartName {
        path: first.to_owned(),
        of,
    })?;
    Ok((2..=of)
        .map(|part| first.with_file_name(format!("{stem}-{part:05}-of-{of:05}.gguf")))
        .collect())
}

/// A value of the header, as far as it is kept.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Number(u64),
    Text(String),
    Numbers(Vec<u64>),
    /// An array that is too long, or of no numbers: its length.
    Array(u64),
    Other,
}

struct Part {
    path: PathBuf,
    length: u64,
    keys: HashMap<String, Value>,
    tensors: Vec<Tensor>,
}

fn read_part(path: &Path) -> Result<Part, ModelFileError> {
    let unreadable = |source: io::Error| match source.kind() {
        ErrorKind::NotFound => ModelFileError::Missing(path.to_owned()),
        _ => ModelFileError::Unreadable {
            path: path.to_owned(),
            source,
        },
    };
    // Looked at before it is opened, which waits where it is a pipe.
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(ModelFileError::NotAFile {
            path: path.to_owned(),
            what: if metadata.is_dir() {
                "a folder"
            } else {
                "a pipe or a device"
            },
        });
    }
    let file = File::open(path).map_err(unreadable)?;
    let length = metadata.len();
    parse(BufReader::new(file), length)
        .map_err(|fault| fault.in_file(path, length))
        .map(|(keys, tensors)| Part {
            path: path.to_owned(),
            length,
            keys,
            tensors,
        })
}

/// What is wrong with a header, before the file's name is known.
#[derive(Debug)]
enum Fault {
    Io(io::Error),
    NotGguf,
    BigEndian,
    Version(u32),
    Truncated(u64),
    Broken(String),
    UnknownType { tensor: String, number: u32 },
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Fault {
    fn in_file(self, path: &Path, has: u64) -> ModelFileError {
        let path = path.to_owned();
        match self {
            Self::Io(source) => ModelFileError::Unreadable { path, source },
            Self::NotGguf => ModelFileError::NotGguf(path),
            Self::BigEndian => ModelFileError::BigEndian(path),
            Self::Version(version) => ModelFileError::Version { path, version },
            Self::Truncated(needs) => ModelFileError::Truncated { path, has, needs },
            Self::Broken(what) => ModelFileError::Broken { path, what },
            Self::UnknownType { tensor, number } => ModelFileError::UnknownType { path, tensor, number },
        }
    }
}

type Header = (HashMap<String, Value>, Vec<Tensor>);

/// Reads a header of a file of `length` bytes. A count or a length that it names is compared with the file's length and with
/// what models have before anything is read or allocated for it: a file of holes may be as long as it likes.
fn parse(input: impl Read + Seek, length: u64) -> Result<Header, Fault> {
    let mut reader = Reader {
        input,
        position: 0,
        length,
    };
    if length < 4 || reader.bytes::<4>()? != *b"GGUF" {
        return Err(Fault::NotGguf);
    }
    let version = reader.u32()?;
    match version {
        2 | 3 => {}
        // A small number that was written the other way round.
        _ if version.trailing_zeros() >= 16 => return Err(Fault::BigEndian),
        _ => return Err(Fault::Version(version)),
    }
    let n_tensors = reader.u64()?;
    let n_keys = reader.u64()?;
    reader.expect(n_keys, MIN_KEY_ENTRY, "keys", MAX_KEYS)?;
    let mut keys = HashMap::new();
    for _ in 0..n_keys {
        let name = reader.name()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, &name)?;
        keys.insert(name, value);
    }
    let alignment = match keys.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::Number(alignment)) if alignment.is_power_of_two() && *alignment <= 1 << 30 => *alignment,
        Some(_) => return Err(Fault::Broken("`general.alignment` is no power of two".into())),
    };
    reader.expect(n_tensors, MIN_TENSOR_ENTRY, "tensors", MAX_TENSORS)?;
    let mut tensors = Vec::new();
    let mut end = 0;
    for _ in 0..n_tensors {
        let (tensor, offset) = reader.tensor()?;
        let this_end = offset
            .checked_add(tensor.bytes)
            .ok_or_else(|| Fault::Broken(format!("tensor `{}` ends beyond all files", tensor.name)))?;
        end = end.max(this_end);
        tensors.push(tensor);
    }
    let needs = reader.position.next_multiple_of(alignment).saturating_add(end);
    if !tensors.is_empty() && needs > length {
        return Err(Fault::Truncated(needs));
    }
    Ok((keys, tensors))
}

struct Reader<R> {
    input: R,
    position: u64,
    length: u64,
}

impl<R: Read + Seek> Reader<R> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.has(N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.position += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// Whether the file goes on for so many bytes, and the header may.
    fn has(&self, more: u64) -> Result<(), Fault> {
        match self.position.checked_add(more) {
            Some(needs) if needs > self.length => Err(Fault::Truncated(needs)),
            Some(needs) if needs > MAX_HEADER => {
                let most = MAX_HEADER >> 20;
                Err(Fault::Broken(format!(
                    "it is longer than {most} MiB, which no model's is"
                )))
            }
            Some(_) => Ok(()),
            None => Err(Fault::Broken("a length is beyond all files".into())),
        }
    }

    /// Whether the file can hold so many entries of at least `least` bytes, and a model may have them.
    fn expect(&self, count: u64, least: u64, what: &str, most: u64) -> Result<(), Fault> {
        if count > most {
            let what = format!("it names {count} {what}, and no model has more than {most}");
            return Err(Fault::Broken(what));
        }
        self.has(count.saturating_mul(least))
    }

    fn skip(&mut self, bytes: u64) -> Result<(), Fault> {
        self.has(bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let Ok(step) = i64::try_from(bytes) else {
            return Err(Fault::Broken("a length is beyond all files".into()));
        };
        // Of a buffered reader this keeps the buffer.
        if step < 4096 {
            io::copy(&mut self.input.by_ref().take(bytes), &mut io::sink())?;
        } else {
            self.input.seek(SeekFrom::Current(step))?;
        }
        self.position += bytes;
        Ok(())
    }

    fn text(&mut self, bytes: u64) -> Result<String, Fault> {
        self.has(bytes)?;
        let mut text = Vec::new();
        self.input.by_ref().take(bytes).read_to_end(&mut text)?;
        self.position += bytes;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn name(&mut self) -> Result<String, Fault> {
        let bytes = self.u64()?;
        self.has(bytes)?;
        if bytes > MAX_NAME {
            return Err(Fault::Broken(format!("a name has {bytes} bytes")));
        }
        self.text(bytes)
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, Fault> {
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

    /// A number or a truth value; `None` for one with a fraction or below zero.
    fn scalar(&mut self, kind: u32, key: &str) -> Result<Option<u64>, Fault> {
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

    fn array(&mut self, key: &str) -> Result<Value, Fault> {
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

    fn tensor(&mut self) -> Result<(Tensor, u64), Fault> {
        let name = self.name()?;
        let n_dimensions = self.u32()?;
        if n_dimensions > MAX_DIMENSIONS {
            let what = format!("tensor `{name}` has {n_dimensions} dimensions");
            return Err(Fault::Broken(what));
        }
        let mut dimensions = Vec::new();
        for _ in 0..n_dimensions {
            dimensions.push(self.u64()?);
        }
        let number = self.u32()?;
        let offset = self.u64()?;
        let Some(kind) = TensorType::numbered(number) else {
            return Err(Fault::UnknownType { tensor: name, number });
        };
        let row = dimensions.first().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block) {
            let what = format!(
                "rows of tensor `{name}` have {row} weights, which {} cannot hold",
                kind.name
            );
            return Err(Fault::Broken(what));
        }
        let bytes = dimensions
            .iter()
            .skip(1)
            .try_fold(row / kind.block, |product, n| product.checked_mul(*n))
            .and_then(|blocks| blocks.checked_mul(kind.bytes));
        let Some(bytes) = bytes else {
            return Err(Fault::Broken(format!("tensor `{name}` is larger than all files")));
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

/// Bytes of a value of this type.
fn fixed_size(kind: u32, key: &str) -> Result<u64, Fault> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        10..=12 => Ok(8),
        _ => Err(Fault::Broken(format!("key `{key}` has values of type {kind}"))),
    }
}

/// Which layers look back over a window only, where the file does not say it layer by layer: of how many layers one sees
/// all, and whether that is the first of them (`load_swa_pattern` in llama.cpp's `src/models`). An architecture that is not
/// here is planned as if all its layers saw all: too much, never too little.
const WINDOW_PATTERNS: [(&str, u64, bool); 12] = [
    ("afmoe", 4, false),
    ("cohere2", 4, false),
    ("cohere2moe", 4, true),
    ("exaone-moe", 4, false),
    ("exaone4", 4, false),
    ("gemma2", 2, false),
    ("gemma3", 6, false),
    ("gemma3n", 5, false),
    ("gpt-oss", 2, false),
    ("olmo2", 4, false),
    ("plamo3", 8, false),
    ("smallthinker", 4, true),
];

/// The interval of full attention among recurrent layers, where the file does not tell it.
const DEFAULT_ATTENTION_INTERVAL: u64 = 4;

impl Part {
    fn number(&self, key: &str) -> Option<u64> {
        match self.keys.get(key) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.keys.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A number per layer, given for each or once for all.
    fn per_layer(&self, key: &str, layer: usize) -> Option<u64> {
        match self.keys.get(key)? {
            Value::Number(number) => Some(*number),
            Value::Numbers(numbers) => numbers.get(layer).copied(),
            _ => None,
        }
    }

    fn largest(&self, key: &str) -> Option<u64> {
        match self.keys.get(key)? {
            Value::Number(number) => Some(*number),
            Value::Numbers(numbers) => numbers.iter().copied().max(),
            _ => None,
        }
    }

    fn shape(&self, tensors: &[Tensor]) -> Result<Shape, ModelFileError> {
        let missing = |key: String| ModelFileError::MissingKey {
            path: self.path.clone(),
            key,
        };
        let architecture = self
            .text("general.architecture")
            .ok_or_else(|| missing("general.architecture".into()))?;
        let key = |name: &str| format!("{architecture}.{name}");
        let required = |name: &str| self.number(&key(name)).ok_or_else(|| missing(key(name)));
        let layers = required("block_count")?;
        let embedding = required("embedding_length")?;
        let layers = u32::try_from(layers)
            .ok()
            .filter(|layers| u64::from(*layers) <= MAX_ARRAY)
            .ok_or_else(|| ModelFileError::Broken {
                path: self.path.clone(),
                what: format!("it names {layers} layers"),
            })?;
        let embedded = tensors
            .iter()
            .find(|tensor| tensor.name == "token_embd.weight")
            .and_then(|tensor| tensor.dimensions.get(1).copied());
        let tokens = match self.keys.get("tokenizer.ggml.tokens") {
            Some(Value::Array(count)) => Some(*count),
            _ => None,
        };
        let experts_used = self.largest(&key("expert_used_count")).unwrap_or(0);
        let of_experts = self.largest(&key("expert_feed_forward_length")).unwrap_or(0);
        let dense = self.largest(&key("feed_forward_length")).unwrap_or(0);
        let shape = Shape {
            architecture: architecture.to_owned(),
            name: self.text("general.name").map(str::to_owned),
            layers,
            embedding,
            vocabulary: embedded.or(tokens).or(self.number(&key("vocab_size"))).unwrap_or(0),
            trained_context: self.number(&key("context_length")),
            heads: self.largest(&key("attention.head_count")).unwrap_or(0),
            feed_forward: dense.max(of_experts.saturating_mul(experts_used)),
            memory: (0..layers as usize)
                .map(|layer| self.layer_memory(architecture, layer, layers, embedding))
                .collect(),
        };
        match shape.absurd() {
            None => Ok(shape),
            Some(what) => Err(ModelFileError::Broken {
                path: self.path.clone(),
                what,
            }),
        }
    }

    fn layer_memory(&self, architecture: &str, layer: usize, layers: u32, embedding: u64) -> LayerMemory {
        let key = |name: &str| format!("{architecture}.{name}");
        let number = |name: &str| self.number(&key(name));
        let state = self.state(architecture, embedding);
        let heads = self.per_layer(&key("attention.head_count"), layer).unwrap_or(0);
        let kv_heads = self.per_layer(&key("attention.head_count_kv"), layer).unwrap_or(heads);
        let recurrent = state > 0
            && match self.per_layer(&key("attention.recurrent_layers"), layer) {
                Some(recurrent) => recurrent != 0,
                // Layers without attention, of models that mix both.
                None if matches!(self.keys.get(&key("attention.head_count_kv")), Some(Value::Numbers(_))) => {
                    kv_heads == 0
                }
                None if architecture.starts_with("qwen3") => {
                    let interval = number("full_attention_interval").unwrap_or(DEFAULT_ATTENTION_INTERVAL);
                    !(layer as u64 + 1).is_multiple_of(interval.max(1))
                }
                // Either all layers are recurrent, or this is not known: then both are counted.
                None => true,
            };
        let without_attention = recurrent && (kv_heads == 0 || architecture.starts_with("qwen3"));
        // The last layers of some use what those before them have kept.
        let shared = number("attention.shared_kv_layers").unwrap_or(0);
        let keeps = (layer as u64) < u64::from(layers).saturating_sub(shared);
        if without_attention || !keeps || heads == 0 {
            return LayerMemory {
                state: if recurrent { state } else { 0 },
                ..LayerMemory::default()
            };
        }
        let window = self.window(architecture, layer);
        let length = |name: &str| {
            let of_window = window.and_then(|_| number(&format!("attention.{name}_length_swa")));
            of_window
                .or_else(|| number(&format!("attention.{name}_length")))
                .unwrap_or(embedding / heads)
        };
        // Multi-head latent attention keeps one vector for both.
        let latent = number("attention.key_length_mla").is_some_and(|length| length > 0);
        LayerMemory {
            key: length("key").saturating_mul(kv_heads),
            value: if latent {
                0
            } else {
                length("value").saturating_mul(kv_heads)
            },
            window,
            state: if recurrent { state } else { 0 },
        }
    }

    /// The window that a layer looks back over, if it does not see all.
    fn window(&self, architecture: &str, layer: usize) -> Option<u64> {
        let window = self.number(&format!("{architecture}.attention.sliding_window"))?;
        let pattern = self
            .keys
            .get(&format!("{architecture}.attention.sliding_window_pattern"));
        let known = WINDOW_PATTERNS.iter().find(|(name, ..)| *name == architecture);
        let has_window = match pattern {
            Some(Value::Numbers(layers)) => layers.get(layer).is_some_and(|has_window| *has_window != 0),
            _ => known.is_some_and(|(_, every, first)| {
                let every = match pattern {
                    Some(Value::Number(every)) => *every,
                    _ => *every,
                };
                let layer = layer as u64;
                every == 0
                    || if *first {
                        !layer.is_multiple_of(every)
                    } else {
                        layer % every != every - 1
                    }
            }),
        };
        (has_window && window > 0).then_some(window)
    }

    /// Numbers that a recurrent layer keeps per sequence (`n_embd_r` and `n_embd_s` in `llama-hparams.cpp`); 0: the model
    /// has no such layers.
    fn state(&self, architecture: &str, embedding: u64) -> u64 {
        let number = |name: &str| self.number(&format!("{architecture}.{name}")).unwrap_or(0);
        let heads = self
            .largest(&format!("{architecture}.attention.head_count"))
            .unwrap_or(0);
        let convolution = number("ssm.conv_kernel").saturating_sub(1);
        let head = number("wkv.head_size");
        if head > 0 {
            // Two vectors for the shift of tokens, at most.
            return embedding.saturating_mul(head.saturating_add(2));
        }
        let cache = number("shortconv.l_cache");
        if cache > 0 {
            return embedding.saturating_mul(cache - 1);
        }
        let head = number("kda.head_dim");
        if head > 0 {
            let inner = head.saturating_mul(heads);
            return inner.saturating_mul(head.saturating_add(convolution.max(3).saturating_mul(3)));
        }
        let (inner, state) = (number("ssm.inner_size"), number("ssm.state_size"));
        let groups = number("ssm.group_count").saturating_mul(2).saturating_mul(state);
        convolution
            .saturating_mul(inner.saturating_add(groups))
            .saturating_add(state.saturating_mul(inner))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use proptest::prelude::*;

    use super::*;
    use crate::plan;

    const TARGET: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/models/tightwad-tiny-target-q8_0.gguf"
    );

    /// The first bytes of the real model: its whole header and some of its data.
    fn header() -> Vec<u8> {
        let mut bytes = std::fs::read(TARGET).unwrap();
        bytes.truncate(200_000);
        bytes
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn read(bytes: &[u8]) -> Result<ModelFile, ModelFileError> {
        ModelFile::read(file(bytes).path())
    }

    /// A header that is put together key by key.
    struct Made {
        keys: Vec<u8>,
        n_keys: u64,
        tensors: Vec<u8>,
        n_tensors: u64,
        data: u64,
    }

    impl Made {
        fn new() -> Self {
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

        fn number(mut self, key: &str, number: u32) -> Self {
            Self::string(&mut self.keys, key);
            self.keys.extend(4u32.to_le_bytes());
            self.keys.extend(number.to_le_bytes());
            self.n_keys += 1;
            self
        }

        fn numbers(mut self, key: &str, numbers: &[u32]) -> Self {
            Self::string(&mut self.keys, key);
            self.keys.extend(9u32.to_le_bytes());
            self.keys.extend(4u32.to_le_bytes());
            self.keys.extend((numbers.len() as u64).to_le_bytes());
            self.keys.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            self.n_keys += 1;
            self
        }

        fn text(mut self, key: &str, text: &str) -> Self {
            Self::string(&mut self.keys, key);
            self.keys.extend(8u32.to_le_bytes());
            Self::string(&mut self.keys, text);
            self.n_keys += 1;
            self
        }

        fn tensor(mut self, name: &str, row: u64, kind: u32, bytes: u64) -> Self {
            Self::string(&mut self.tensors, name);
            self.tensors.extend(1u32.to_le_bytes());
            self.tensors.extend(row.to_le_bytes());
            self.tensors.extend(kind.to_le_bytes());
            self.tensors.extend(self.data.to_le_bytes());
            self.data += bytes;
            self.n_tensors += 1;
            self
        }

        fn bytes(&self) -> Vec<u8> {
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

    fn gemma(layers: u32) -> Made {
        Made::new()
            .text("general.architecture", "gemma3")
            .number("gemma3.block_count", layers)
            .number("gemma3.embedding_length", 64)
            .number("gemma3.attention.head_count", 4)
            .number("gemma3.attention.sliding_window", 512)
    }

    #[test]
    fn the_tiny_target_is_what_llama_cpp_says_it_is() {
        let model = ModelFile::read(Path::new(TARGET)).unwrap();
        let shape = &model.shape;
        assert_eq!(
            (shape.architecture.as_str(), shape.layers, shape.embedding),
            ("llama", 6, 256)
        );
        assert_eq!(
            (shape.vocabulary, shape.trained_context, shape.heads),
            (4096, Some(2048), 4)
        );
        assert_eq!(shape.feed_forward, 768);
        assert_eq!(
            shape.memory[5],
            LayerMemory {
                key: 128,
                value: 128,
                window: None,
                state: 0
            }
        );
        assert_eq!(model.bytes, std::fs::metadata(TARGET).unwrap().len());
    }

    #[test]
    fn a_file_that_is_missing_or_no_model_is_told() {
        assert!(matches!(
            ModelFile::read(Path::new("/no/such.gguf")),
            Err(ModelFileError::Missing(_))
        ));
        assert!(matches!(
            read(b"version https://git-lfs"),
            Err(ModelFileError::NotGguf(_))
        ));
        assert!(matches!(read(b""), Err(ModelFileError::NotGguf(_))));
    }

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
    fn a_file_whose_end_is_missing_tells_how_long_it_must_be() {
        let whole = std::fs::read(TARGET).unwrap();
        let error = read(&whole[..whole.len() - 1000]).unwrap_err();
        assert!(
            matches!(error, ModelFileError::Truncated { has, needs, .. } if has + 1000 >= needs && needs > has),
            "{error}"
        );
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
    fn read_holes(head: &[u8]) -> Result<Header, Fault> {
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
            let fault = read_holes(&[b"GGUF\x03\0\0\0", counts.as_slice()].concat());
            assert!(
                matches!(fault, Err(Fault::Broken(_))),
                "{n_tensors} {n_keys}: {fault:?}"
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
        let fault = read_holes(&head.concat());
        assert!(matches!(fault, Err(Fault::Broken(_))), "{fault:?}");
        assert!(
            began.elapsed() < std::time::Duration::from_secs(30),
            "{:?}",
            began.elapsed()
        );
    }

    #[test]
    fn a_folder_is_no_model_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = ModelFile::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("is a folder"), "{error}");
        assert!(
            ModelFile::read(Path::new("/dev/zero"))
                .unwrap_err()
                .to_string()
                .contains("a device")
        );
    }

    #[test]
    fn layers_with_a_window_are_told_from_those_that_see_all() {
        let shape = read(&gemma(12).bytes()).unwrap().shape;
        let full: Vec<_> = (0..12).filter(|layer| shape.memory[*layer].window.is_none()).collect();
        assert_eq!(full, [5, 11]);
        assert_eq!(shape.memory[0].window, Some(512));
        let told = gemma(3).numbers("gemma3.attention.sliding_window_pattern", &[0, 1, 0]);
        let shape = read(&told.bytes()).unwrap().shape;
        assert_eq!(
            shape.memory.iter().map(|memory| memory.window).collect::<Vec<_>>(),
            [None, Some(512), None]
        );
    }

    #[test]
    fn heads_may_differ_from_layer_to_layer() {
        let made = gemma(2)
            .numbers("gemma3.attention.head_count_kv", &[2, 4])
            .number("gemma3.attention.key_length", 32)
            .number("gemma3.attention.value_length", 16);
        let memory = read(&made.bytes()).unwrap().shape.memory;
        assert_eq!(
            [memory[0].key, memory[0].value, memory[1].key, memory[1].value],
            [64, 32, 128, 64]
        );
    }

    #[test]
    fn the_parts_of_a_model_are_found_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let first = folder.path().join("m-00001-of-00002.gguf");
        let second = folder.path().join("m-00002-of-00002.gguf");
        let described = gemma(1)
            .number("split.count", 2)
            .number("split.no", 0)
            .number("split.tensors.count", 3)
            .tensor("a", 32, 0, 128);
        std::fs::write(&first, described.bytes()).unwrap();
        assert!(matches!(
            ModelFile::read(&first),
            Err(ModelFileError::MissingPart { path, of: 2 }) if path == second
        ));
        let part = Made::new().number("split.count", 2).number("split.no", 1);
        std::fs::write(&second, part.tensor("b", 32, 8, 34).tensor("c", 32, 8, 34).bytes()).unwrap();
        let model = ModelFile::read(&first).unwrap();
        assert_eq!((model.parts, model.tensors.len(), model.tensors[2].bytes), (2, 3, 34));
        assert!(matches!(
            ModelFile::read(&second),
            Err(ModelFileError::NotFirstPart { part: 2, of: 2, .. })
        ));
        let renamed = folder.path().join("renamed.gguf");
        std::fs::copy(&first, &renamed).unwrap();
        assert!(matches!(
            ModelFile::read(&renamed),
            Err(ModelFileError::PartName { .. })
        ));
    }

    #[test]
    fn a_file_without_layers_is_no_language_model() {
        let made = Made::new().text("general.architecture", "clip");
        let error = read(&made.bytes()).unwrap_err().to_string();
        assert!(error.contains("`clip.block_count`"), "{error}");
    }

    #[test]
    fn a_size_that_no_model_has_is_refused_by_its_name() {
        let made = gemma(1).number("gemma3.feed_forward_length", u32::MAX);
        let error = read(&made.bytes()).unwrap_err();
        assert!(matches!(error, ModelFileError::Broken { .. }), "{error:?}");
        assert!(error.to_string().contains("feed-forward"), "{error}");
    }

    /// Keys of sizes, for each way that a layer may keep something.
    const SIZES: [&str; 14] = [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window",
        "attention.shared_kv_layers",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_used_count",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "wkv.head_size",
        "kda.head_dim",
    ];

    proptest! {
        #[test]
        fn a_model_of_any_sizes_is_refused_or_planned(
            layers in 0u32..4,
            embedding in prop_oneof![0u32..100_000, Just(u32::MAX)],
            sizes in proptest::collection::vec((0..SIZES.len(), prop_oneof![0u32..100_000, any::<u32>()]), 0..8),
            context in 1u32..1_000_000,
        ) {
            let mut made = Made::new()
                .text("general.architecture", "made")
                .number("made.block_count", layers)
                .number("made.embedding_length", embedding);
            for (key, size) in sizes {
                made = made.number(&format!("made.{}", SIZES[key]), size);
            }
            if let Ok(model) = read(&made.tensor("blk.0.attn_q.weight", 64, 0, 256).bytes()) {
                let config = serde_json::json!({ "path": "/m.gguf", "ctx_size": context });
                let config: crate::config::Model = serde_json::from_value(config).unwrap();
                let want = plan::Settings::of(&config, &crate::config::Coordinator::default(), Some(16)).unwrap();
                let device = plan::Device {
                    host: "coordinator".into(),
                    label: String::new(),
                    endpoint: None,
                    name: "CUDA0".into(),
                    total_bytes: 1 << 34,
                    free_bytes: 1 << 34,
                    known_from: plan::KnownFrom::Config,
                };
                let plan = plan::plan(&model, &[device], &want).unwrap();
                prop_assert_eq!(plan.layers, layers + 1);
            }
        }

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
            if let Ok((keys, tensors)) = read_holes(&bytes) {
                prop_assert!(keys.len() as u64 <= MAX_KEYS && tensors.len() as u64 <= MAX_TENSORS);
            }
        }
    }
}
