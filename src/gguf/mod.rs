//! Reads the header of a GGUF model file: the shape of the model and its tensors, without the weights.
//!
//! A file may come from anywhere. Invariant: no file makes [`ModelFile::read`] panic, hang or allocate without bound.
//! `model` opens the parts, `parse` reads each header, `shape` derives the layers from the keys. [`crate::plan`] uses the
//! result.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `model` | a model and its parts |
//! | `parse` | reads a header: untrusted bytes |
//! | `keys` | the key-value pairs of a header |
//! | `types` | number formats of weights and their sizes |
//! | `shape` | the layers of a model, as a plan needs them |
//! | `error` | errors of reading a file |

#[cfg(test)]
pub(crate) mod builder;
mod error;
mod keys;
mod model;
mod parse;
mod shape;
mod types;

pub use error::ModelFileError;
pub use model::ModelFile;
#[cfg(test)]
pub(crate) use parse::MOST_NUMBERS;
pub use parse::Tensor;
pub use shape::{LayerMemory, Shape};
pub use types::TensorType;
