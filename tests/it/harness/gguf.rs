//! Model files, as far as the tests take them apart.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::llama_server::target;

const ALIGNMENT: usize = 32;
const F32: u32 = 0;

/// Reads the parts of a GGUF file in turn.
#[derive(Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        taken
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().expect("four bytes"))
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().expect("eight bytes"))
    }

    pub fn size(&mut self) -> usize {
        usize::try_from(self.u64()).expect("a size")
    }

    pub fn string(&mut self) -> &'a [u8] {
        let n = self.size();
        self.take(n)
    }

    /// Skips a value.
    pub fn skip(&mut self, kind: u32) {
        match kind {
            0 | 1 | 7 => drop(self.take(1)),
            2 | 3 => drop(self.take(2)),
            4..=6 => drop(self.take(4)),
            8 => drop(self.string()),
            9 => {
                let of = self.u32();
                for _ in 0..self.u64() {
                    self.skip(of);
                }
            }
            _ => drop(self.take(8)),
        }
    }
}

pub fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// What stands in the file about a tensor, but for its name.
#[derive(Clone)]
struct Tensor {
    dims: Vec<u64>,
    kind: u32,
    offset: usize,
}

/// The target with so many blocks more that it takes several milliseconds per token and answers as before: drafts are in
/// time for it, and to verify several tokens costs little more than one, as with a model of a useful size. That takes F32,
/// where the processor waits for the weights; quantised, two tokens take more than twice as long as one, and not to draft
/// is right. The weights of the blocks are zero, so they change nothing, and take no room on a disk.
pub fn slow_target() -> PathBuf {
    deep_target(60)
}

/// As [`slow_target`], with this many blocks more.
pub fn deep_target(more: u32) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = folder.join(format!("slow-target-f32-{more}.gguf"));
    // Of tests that run at once each writes its own, and the last one stays.
    let mut file = tempfile::NamedTempFile::new_in(folder).expect("a model file");
    deepen(&std::fs::read(target()).expect("the target"), more, file.as_file_mut());
    file.persist(&path).expect("the model file gets its name");
    path
}

fn deepen(model: &[u8], more: u32, file: &mut File) {
    let mut reader = Reader(model);
    assert_eq!(reader.take(4), b"GGUF");
    let version = reader.u32();
    let (n_tensors, n_keys) = (reader.u64(), reader.u64());
    let keys = reader.0;
    let mut blocks = None;
    for _ in 0..n_keys {
        let name = reader.string();
        let kind = reader.u32();
        if name == b"llama.block_count" {
            let at = keys.len() - reader.0.len();
            blocks = Some((at, Reader(reader.0).u32()));
        }
        reader.skip(kind);
    }
    let (blocks_at, blocks) = blocks.expect("the number of blocks");
    let mut keys = keys[..keys.len() - reader.0.len()].to_vec();
    keys[blocks_at..blocks_at + 4].copy_from_slice(&(blocks + more).to_le_bytes());

    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        let name = String::from_utf8(reader.string().to_vec()).expect("a name");
        let dims = (0..reader.u32()).map(|_| reader.u64()).collect();
        let (kind, offset) = (reader.u32(), reader.size());
        tensors.push((name, Tensor { dims, kind, offset }));
    }
    let data_at = (model.len() - reader.0.len()).next_multiple_of(ALIGNMENT);
    let data = &model[data_at..];

    let mut end = data.len().next_multiple_of(ALIGNMENT);
    let block: Vec<_> = tensors
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("blk.0.")?.to_owned(), tensor.clone())))
        .collect();
    for i in blocks..blocks + more {
        for (name, tensor) in &block {
            let dims = tensor.dims.clone();
            let size = 4 * dims.iter().product::<u64>();
            tensors.push((
                format!("blk.{i}.{name}"),
                Tensor {
                    dims,
                    kind: F32,
                    offset: end,
                },
            ));
            end += usize::try_from(size).expect("a size").next_multiple_of(ALIGNMENT);
        }
    }

    let mut head = b"GGUF".to_vec();
    head.extend(version.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend(n_keys.to_le_bytes());
    head.extend(keys);
    for (name, tensor) in &tensors {
        put_string(&mut head, name);
        let n_dims = u32::try_from(tensor.dims.len()).expect("few dimensions");
        head.extend(n_dims.to_le_bytes());
        for dim in &tensor.dims {
            head.extend(dim.to_le_bytes());
        }
        head.extend(tensor.kind.to_le_bytes());
        head.extend((tensor.offset as u64).to_le_bytes());
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    file.write_all(&head).expect("written");
    file.write_all(data).expect("written");
    file.set_len((head.len() + end) as u64).expect("lengthened");
}
