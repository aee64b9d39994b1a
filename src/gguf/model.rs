//! A model as its files describe it. A model may have several parts, `name-00001-of-00003.gguf` and so on, each with its own
//! header; the first part describes the model.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use super::error::ModelFileError;
use super::parse::{Header, MAX_TENSORS, Tensor, parse};
use super::shape::Shape;

/// Most parts of a model; the number has 16 bits.
const MAX_PARTS: u64 = 65_535;

/// A model as its file describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFile {
    /// The file, or the first part.
    pub path: PathBuf,
    /// Number of its files.
    pub parts: u64,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Its layers.
    pub shape: Shape,
    /// The tensors of all parts.
    pub tensors: Vec<Tensor>,
}

impl ModelFile {
    /// Reads the headers of a model and of its other parts.
    pub fn read(path: &Path) -> Result<Self, ModelFileError> {
        let first = read_part(path)?;
        let parts = first.header.keys.number("split.count").unwrap_or(1).max(1);
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
            let part = first.header.keys.number("split.no").unwrap_or(0).saturating_add(1);
            if part != 1 {
                return Err(ModelFileError::NotFirstPart {
                    path: path.to_owned(),
                    part,
                    of: parts,
                });
            }
            let parts = other_parts(path, parts)?;
            model.tensors.clone_from(&first.header.tensors);
            for path in parts {
                let part = read_part(&path).map_err(|error| match error {
                    ModelFileError::Missing(path) => ModelFileError::MissingPart { path, of: model.parts },
                    error => error,
                })?;
                model.bytes = model.bytes.saturating_add(part.length);
                model.tensors.extend(part.header.tensors);
                if model.tensors.len() as u64 > MAX_TENSORS {
                    return Err(ModelFileError::Broken {
                        path,
                        what: format!("with those before it the model has {} tensors", model.tensors.len()),
                    });
                }
            }
            if let Some(expected) = first.header.keys.number("split.tensors.count")
                && expected != model.tensors.len() as u64
            {
                return Err(ModelFileError::Broken {
                    path: path.to_owned(),
                    what: format!("its parts hold {} tensors, not {expected}", model.tensors.len()),
                });
            }
        } else {
            model.tensors.clone_from(&first.header.tensors);
        }
        model.shape =
            Shape::of(&first.header.keys, &model.tensors).map_err(|error| error.in_file(path, first.length))?;
        Ok(model)
    }

    /// Checks that no part is missing or truncated, as after an interrupted download. llama.cpp checks everything else.
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

struct Part {
    length: u64,
    header: Header,
}

fn read_part(path: &Path) -> Result<Part, ModelFileError> {
    let unreadable = |source: io::Error| match source.kind() {
        ErrorKind::NotFound => ModelFileError::Missing(path.to_owned()),
        _ => ModelFileError::Unreadable {
            path: path.to_owned(),
            source,
        },
    };
    // Opening a pipe would block, so check the kind of file first.
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
        .map_err(|error| error.in_file(path, length))
        .map(|header| Part { length, header })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::LayerMemory;
    use crate::gguf::builder::{HeaderBuilder, TARGET, gemma, read};

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
    fn a_file_whose_end_is_missing_tells_how_long_it_must_be() {
        let whole = std::fs::read(TARGET).unwrap();
        let error = read(&whole[..whole.len() - 1000]).unwrap_err();
        assert!(
            matches!(error, ModelFileError::Truncated { has, needs, .. } if has + 1000 >= needs && needs > has),
            "{error}"
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
        let part = HeaderBuilder::new().number("split.count", 2).number("split.no", 1);
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
        let made = HeaderBuilder::new().text("general.architecture", "clip");
        let error = read(&made.bytes()).unwrap_err().to_string();
        assert!(error.contains("`clip.block_count`"), "{error}");
    }
}
