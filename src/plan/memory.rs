//! Estimates the memory that a model needs on its devices: weights, KV cache, compute buffers.
//!
//! | part | how it is computed |
//! | --- | --- |
//! | weights | the bytes of a layer's tensors; a model without an output matrix has a second copy of its embeddings in the output layer |
//! | KV cache | keys and values of a layer for each slot's context, rounded up to 256 tokens (`llama_kv_cache`). A layer with a window keeps the window and one batch. A recurrent layer keeps a state per slot, and one more for each draft token that may be rolled back. |
//! | compute buffers | an estimate, see below |
//!
//! The compute estimate has, for each token of a batch (512), 16 vectors of the embedding's length and 3 of the feed-forward
//! part's, in f32. For each cell of a slot's context it adds 8 bytes with flash attention; without, 16 and 4 per head. The
//! output layer adds its scores, and 5 % come on top. Measured with two CPU workers and models of 96 to 4096 numbers per
//! token: the estimate exceeds what llama-server printed by 5 to 14 % for the first device and by up to three times for later
//! ones. A real GPU also takes some hundred MiB for its driver; the margin covers those.
//!
//! The estimate counts layers of multi-token prediction, though llama-server may leave them out.

use super::Settings;
use crate::gguf::{ModelFile, Shape};

/// Alignment of buffers on the backend that rounds most.
const ALIGNMENT: u64 = 256;

/// Memory that one layer needs, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Need {
    pub(super) weights: u64,
    pub(super) kv: u64,
}

impl Need {
    pub(super) fn bytes(&self) -> u64 {
        self.weights.saturating_add(self.kv)
    }
}

/// Saturating sum: a huge context or a sparse file must not wrap around to a small number.
pub(super) fn sum(bytes: impl IntoIterator<Item = u64>) -> u64 {
    bytes.into_iter().fold(0, u64::saturating_add)
}

/// The needs of each layer, the output layer last, and the bytes in the memory of the coordinator's host.
pub(super) fn needs(model: &ModelFile, want: &Settings) -> (Vec<Need>, u64) {
    let repeating = model.shape.layers as usize;
    let mut needs = vec![Need::default(); repeating + 1];
    let (mut host, mut embeddings, mut has_output) = (0u64, 0u64, false);
    let add = |to: &mut u64, bytes: u64| *to = to.saturating_add(bytes);
    for tensor in &model.tensors {
        let bytes = tensor.bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX);
        let stem = tensor.name.split('.').next().unwrap_or_default();
        match stem {
            "blk" => {
                let layer = tensor.name.split('.').nth(1).and_then(|layer| layer.parse().ok());
                let at = layer.unwrap_or(repeating).min(repeating);
                add(&mut needs[at].weights, bytes);
            }
            "token_embd" | "position_embd" | "token_types" | "per_layer_token_embd" => {
                add(&mut host, bytes);
                if stem == "token_embd" {
                    add(&mut embeddings, bytes);
                }
            }
            "token_embd_norm" | "rope_freqs" | "rope_factors_long" | "rope_factors_short" => {
                add(&mut needs[0].weights, bytes);
            }
            _ => {
                has_output |= tensor.name == "output.weight";
                add(&mut needs[repeating].weights, bytes);
            }
        }
    }
    if !has_output {
        add(&mut needs[repeating].weights, embeddings);
    }
    let states = u64::from(want.slots) * (1 + u64::from(want.draft_tokens.unwrap_or(0)));
    for (need, memory) in needs.iter_mut().zip(&model.shape.memory) {
        let (cells, streams) = want.cells(memory.window);
        let token = sum([
            want.key_type.row_bytes(memory.key),
            want.value_type.row_bytes(memory.value),
        ]);
        need.kv = (token.saturating_mul(cells).saturating_mul(streams))
            .saturating_add(memory.state.saturating_mul(4).saturating_mul(states));
    }
    (needs, host)
}

/// Compute buffers of a device with repeating layers in bytes; see the module's documentation.
pub(super) fn compute_bytes(shape: &Shape, want: &Settings) -> u64 {
    let vectors = 4 * (16 * shape.embedding + 3 * shape.feed_forward);
    let pair = if want.flash_attention { 8 } else { 16 + 4 * shape.heads };
    let (cells, _) = want.cells(None);
    let bytes = want
        .batch
        .saturating_mul(vectors.saturating_add(pair.saturating_mul(cells)));
    bytes.saturating_add(bytes / 20)
}

/// Compute buffers in the memory of the coordinator's host in bytes, measured in the same way.
pub(super) fn host_compute_bytes(shape: &Shape, want: &Settings) -> u64 {
    let pair: u64 = if want.flash_attention { 8 } else { 16 };
    let (cells, _) = want.cells(None);
    want.batch
        .saturating_mul((4 * 11 * shape.embedding).saturating_add(pair.saturating_mul(cells)))
        .saturating_add(score_bytes(shape, want))
}

/// Bytes of the logits: one per token of the vocabulary, for each output position of a batch.
pub(super) fn score_bytes(shape: &Shape, want: &Settings) -> u64 {
    let wanted = u64::from(want.slots) * (1 + u64::from(want.draft_tokens.unwrap_or(0)));
    (4 * shape.vocabulary).saturating_mul(wanted.min(want.batch))
}

/// Formats bytes as MiB or GiB.
#[must_use]
pub fn amount(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib >= 1024.0 {
        format!("{:.2} GiB", mib / 1024.0)
    } else if mib >= 100.0 {
        format!("{mib:.0} MiB")
    } else {
        format!("{mib:.1} MiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::builder::{MIB, model, settings};

    #[test]
    fn a_model_without_an_output_matrix_has_its_embeddings_twice() {
        let mut tied = model(&[10]);
        tied.tensors.retain(|tensor| tensor.name != "output.weight");
        let (needs, host) = needs(&tied, &settings());
        assert_eq!((needs[1].weights, host), (100 * MIB, 100 * MIB));
    }
}
