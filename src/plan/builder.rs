//! Models, devices and settings for tests.

use std::path::Path;

use super::{Device, KnownFrom, Settings};
use crate::config::{Coordinator, Model};
use crate::gguf::{LayerMemory, ModelFile, Shape, Tensor, TensorType};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn tensor(name: &str, bytes: u64) -> Tensor {
    Tensor {
        name: name.to_owned(),
        dimensions: vec![bytes],
        kind: TensorType::named("i8").unwrap(),
        bytes,
    }
}

/// A model with layers of so many MiB, embeddings and an output matrix of 100 MiB each.
pub(crate) fn model(layers: &[u64]) -> ModelFile {
    let blocks = layers
        .iter()
        .enumerate()
        .map(|(number, mib)| tensor(&format!("blk.{number}.ffn_up.weight"), mib * MIB));
    let others = ["token_embd.weight", "output.weight"].map(|name| tensor(name, 100 * MIB));
    let memory = LayerMemory {
        key: 1024,
        value: 1024,
        window: None,
        state: 0,
    };
    ModelFile {
        path: "/m/big.gguf".into(),
        parts: 1,
        bytes: 0,
        shape: Shape {
            architecture: "llama".into(),
            layers: u32::try_from(layers.len()).unwrap(),
            embedding: 4096,
            vocabulary: 32_000,
            heads: 32,
            feed_forward: 11_008,
            memory: vec![memory; layers.len()],
            ..Shape::default()
        },
        tensors: blocks.chain(others).collect(),
    }
}

pub(crate) fn device(endpoint: Option<&str>, free_mib: u64) -> Device {
    Device {
        host: endpoint.unwrap_or("coordinator").into(),
        label: "GPU".into(),
        endpoint: endpoint.map(str::to_owned),
        name: "CUDA0".into(),
        total_bytes: free_mib * MIB,
        free_bytes: free_mib * MIB,
        known_from: KnownFrom::Agent,
    }
}

pub(crate) fn config() -> (Model, Coordinator) {
    let model = serde_json::from_value(serde_json::json!({ "path": "/m/big.gguf", "ctx_size": 8192 })).unwrap();
    (model, Coordinator::default())
}

pub(crate) fn settings() -> Settings {
    let (model, coordinator) = config();
    Settings::of(&model, &coordinator, None).unwrap()
}

pub(crate) fn tiny(name: &str) -> ModelFile {
    ModelFile::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models").join(name)).unwrap()
}
