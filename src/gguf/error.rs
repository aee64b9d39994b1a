//! Errors of reading a model file. Each says what to do next.

use std::io;
use std::path::PathBuf;

use crate::failure::explain;

/// Why a model file cannot be used for a plan.
#[derive(Debug, thiserror::Error)]
pub enum ModelFileError {
    /// No such file.
    #[error("the model file {} does not exist; check `path` in the config", .0.display())]
    Missing(PathBuf),
    /// A part of the model is missing.
    #[error("{} is missing: the model has {of} parts, and all must lie in one folder; download it again", .path.display())]
    MissingPart {
        /// The missing file.
        path: PathBuf,
        /// How many there are.
        of: u64,
    },
    /// The file is a later part of a model.
    #[error("{} is part {part} of a model of {of} parts; name the first part in `path`", .path.display())]
    NotFirstPart {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        part: u64,
        /// How many there are.
        of: u64,
    },
    /// The file has several parts, and its name does not say where the others are.
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
    /// The file exists and cannot be read.
    #[error("the model file {} cannot be read ({}); check its permissions", .path.display(), explain(.source))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path names a folder, a pipe or a device.
    #[error("{} is {what}, not a model file; name a GGUF file in `path`", .path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// The kind of file.
        what: &'static str,
    },
    /// The file is not a GGUF file.
    #[error("{} is not a GGUF model (it does not begin with `GGUF`); download or convert it again", .0.display())]
    NotGguf(PathBuf),
    /// The file is big-endian.
    #[error("{} is a big-endian GGUF model; convert it for this machine, or download a little-endian one", .0.display())]
    BigEndian(PathBuf),
    /// The version of the format is unknown.
    #[error("{} is GGUF version {version}, and only 2 and 3 are known; convert it again", .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The file ends too early.
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
    /// The header contradicts itself or exceeds a limit.
    #[error("the header of {} is broken ({what}); download or convert it again", .path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// The error.
        what: String,
    },
    /// A tensor has an unknown number format.
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
    /// A key that every language model has is missing.
    #[error("{} has no key `{key}`, so it is no language model that can be planned; convert it again", .path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
}
