//! The header of a model file, read without its weights.

mod parse;

#[cfg(test)]
pub(crate) use parse::MOST_NUMBERS;
pub use parse::{LayerMemory, ModelFile, ModelFileError, Shape, Tensor, TensorType};
