//! The header of a GGUF model file: what a plan has to know of a model, without its weights.
//!
//! A file may come from anywhere, so [`ModelFile::read`] treats every byte of it as hostile. The path of a file through the
//! modules: `model` opens the parts, `parse` reads each header, `shape` derives the layers from the keys.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `model` | a model and its parts |
//! | `parse` | reads a header: untrusted bytes |
//! | `keys` | the key-value pairs of a header |
//! | `types` | number formats of weights and their sizes |
//! | `shape` | what the layers of a model are like |
//! | `error` | why a file cannot be planned with |

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
