//! Tiny models with random weights, of the kinds of memory that the trained ones do not have.

// sizes of a tiny model fit every type
#![allow(clippy::cast_possible_truncation)]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::gguf::{Reader, put_string};
use super::llama_server::target;

const N_VOCAB: u64 = 4096;
const N_EMBD: u64 = 64;
const N_FF: u64 = 128;
const N_HEAD: u64 = 4;
const N_HEAD_KV: u64 = 2;
const HEAD: u64 = N_EMBD / N_HEAD;
const ALIGNMENT: usize = 32;

enum Data {
    Same(f32),
    /// Of this deviation.
    Noise(f32),
    Values(Vec<f32>),
}

/// A GGUF file in the making.
struct Model {
    arch: &'static str,
    keys: Vec<u8>,
    n_keys: u64,
    tensors: Vec<(String, Vec<u64>, Data)>,
}

impl Model {
    fn new(arch: &'static str, n_layer: u32) -> Self {
        let mut model = Self {
            arch,
            keys: Vec::new(),
            n_keys: 0,
            tensors: Vec::new(),
        };
        model.key("general.architecture", 8);
        put_string(&mut model.keys, arch);
        model.u32("context_length", 2048);
        model.u32("embedding_length", N_EMBD as u32);
        model.u32("block_count", n_layer);
        model.u32("vocab_size", N_VOCAB as u32);
        model.f32("attention.layer_norm_rms_epsilon", 1e-6);
        let (n_tokenizer_keys, tokenizer_keys) = tokenizer();
        model.keys.extend(tokenizer_keys);
        model.n_keys += n_tokenizer_keys;
        // the deviation is large enough for a next token that depends on more than the last one
        model.tensor("token_embd.weight", &[N_EMBD, N_VOCAB], Data::Noise(1.0));
        model
    }

    fn key(&mut self, name: &str, kind: u32) {
        put_string(&mut self.keys, name);
        self.keys.extend(kind.to_le_bytes());
        self.n_keys += 1;
    }

    fn u32(&mut self, name: &str, value: u32) {
        self.key(&format!("{}.{name}", self.arch), 4);
        self.keys.extend(value.to_le_bytes());
    }

    fn f32(&mut self, name: &str, value: f32) {
        self.key(&format!("{}.{name}", self.arch), 6);
        self.keys.extend(value.to_le_bytes());
    }

    fn i32_each(&mut self, name: &str, values: &[i32]) {
        self.key(&format!("{}.{name}", self.arch), 9);
        self.keys.extend(5_u32.to_le_bytes());
        self.keys.extend((values.len() as u64).to_le_bytes());
        for value in values {
            self.keys.extend(value.to_le_bytes());
        }
    }

    fn tensor(&mut self, name: &str, dims: &[u64], data: Data) {
        self.tensors.push((name.to_owned(), dims.to_vec(), data));
    }

    fn norm(&mut self, name: &str, n: u64) {
        self.tensor(name, &[n], Data::Same(1.0));
    }

    fn matrix(&mut self, name: &str, n_in: u64, n_out: u64) {
        self.tensor(name, &[n_in, n_out], Data::Noise(1.5 / (n_in as f32).sqrt()));
    }

    fn attention(&mut self, blk: &str, n_per_query: u64) {
        self.matrix(&format!("{blk}.attn_q.weight"), N_EMBD, N_HEAD * HEAD * n_per_query);
        self.matrix(&format!("{blk}.attn_k.weight"), N_EMBD, N_HEAD_KV * HEAD);
        self.matrix(&format!("{blk}.attn_v.weight"), N_EMBD, N_HEAD_KV * HEAD);
        self.matrix(&format!("{blk}.attn_output.weight"), N_HEAD * HEAD, N_EMBD);
        self.norm(&format!("{blk}.attn_q_norm.weight"), HEAD);
        self.norm(&format!("{blk}.attn_k_norm.weight"), HEAD);
    }

    fn feed_forward(&mut self, blk: &str) {
        self.matrix(&format!("{blk}.ffn_gate.weight"), N_EMBD, N_FF);
        self.matrix(&format!("{blk}.ffn_up.weight"), N_EMBD, N_FF);
        self.matrix(&format!("{blk}.ffn_down.weight"), N_FF, N_EMBD);
    }

    fn write(&self, path: &Path) {
        let mut file = BufWriter::new(File::create(path).expect("a model file"));
        let mut head = Vec::new();
        head.extend(b"GGUF");
        head.extend(3_u32.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend(self.n_keys.to_le_bytes());
        head.extend(&self.keys);
        let mut offset = 0;
        for (name, dims, _) in &self.tensors {
            put_string(&mut head, name);
            head.extend((dims.len() as u32).to_le_bytes());
            for dim in dims {
                head.extend(dim.to_le_bytes());
            }
            head.extend(0_u32.to_le_bytes()); // f32
            head.extend((offset as u64).to_le_bytes());
            offset += (dims.iter().product::<u64>() as usize * 4).next_multiple_of(ALIGNMENT);
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
        file.write_all(&head).expect("written");

        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 24) as f32
        };
        for (_, dims, data) in &self.tensors {
            let mut bytes = Vec::new();
            for i in 0..dims.iter().product::<u64>() as usize {
                let value = match data {
                    Data::Same(value) => *value,
                    Data::Values(values) => values[i],
                    // uniform noise has a deviation of sqrt(1/12)
                    Data::Noise(deviation) => (uniform() - 0.5) * 12_f32.sqrt() * deviation,
                };
                bytes.extend(value.to_le_bytes());
            }
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
            file.write_all(&bytes).expect("written");
        }
        file.flush().expect("written");
    }
}

/// The tokenizer of the trained models, as it stands in their files: the number of keys and the bytes.
fn tokenizer() -> (u64, Vec<u8>) {
    let file = std::fs::read(target()).expect("the target of tests/models");
    let mut reader = Reader(&file[16..]);
    let mut found = (0, Vec::new());
    for _ in 0..reader.u64() {
        let begin = reader.0;
        let is_tokenizer = reader.string().starts_with(b"tokenizer.");
        let kind = reader.u32();
        reader.skip(kind);
        if is_tokenizer {
            found.0 += 1;
            found.1.extend(&begin[..begin.len() - reader.0.len()]);
        }
    }
    found
}

/// Attention and short convolutions in turn: a state that can be rolled back by snapshots.
pub fn hybrid(path: &Path) {
    let mut model = Model::new("lfm2", 4);
    model.u32("feed_forward_length", N_FF as u32);
    model.u32("attention.head_count", N_HEAD as u32);
    model.i32_each("attention.head_count_kv", &[0, N_HEAD_KV as i32, 0, N_HEAD_KV as i32]);
    model.u32("shortconv.l_cache", 3);
    model.f32("rope.freq_base", 10000.0);
    model.norm("token_embd_norm.weight", N_EMBD);
    for layer in 0..4 {
        let blk = format!("blk.{layer}");
        model.norm(&format!("{blk}.attn_norm.weight"), N_EMBD);
        model.norm(&format!("{blk}.ffn_norm.weight"), N_EMBD);
        if layer % 2 == 0 {
            model.matrix(&format!("{blk}.shortconv.conv.weight"), 3, N_EMBD);
            model.matrix(&format!("{blk}.shortconv.in_proj.weight"), N_EMBD, 3 * N_EMBD);
            model.matrix(&format!("{blk}.shortconv.out_proj.weight"), N_EMBD, N_EMBD);
        } else {
            model.attention(&blk, 1);
        }
        model.feed_forward(&blk);
    }
    model.write(path);
}

/// Linear attention (gated delta net) with an attention layer after every three: its state is large and depends on all that
/// went before, and it can be rolled back by snapshots.
pub fn linear_attention(path: &Path) {
    qwen35_model(false).write(path);
}

/// As [`linear_attention`], with a layer that predicts a further token (MTP).
pub fn multi_token_prediction(path: &Path) {
    qwen35_model(true).write(path);
}

fn qwen35_model(has_prediction_layer: bool) -> Model {
    let (d_state, n_groups, n_v_heads, d_conv) = (16, 2, 4, 4);
    let (key_dim, value_dim) = (d_state * n_groups, d_state * n_v_heads);
    let conv_dim = 2 * key_dim + value_dim;
    let mut model = Model::new("qwen35", if has_prediction_layer { 5 } else { 4 });
    model.u32("feed_forward_length", N_FF as u32);
    model.u32("attention.head_count", N_HEAD as u32);
    model.u32("attention.head_count_kv", N_HEAD_KV as u32);
    model.u32("attention.key_length", HEAD as u32);
    model.u32("attention.value_length", HEAD as u32);
    model.f32("rope.freq_base", 10000.0);
    model.u32("rope.dimension_count", HEAD as u32);
    model.i32_each("rope.dimension_sections", &[4, 2, 2, 0]);
    model.u32("full_attention_interval", 4);
    model.u32("ssm.conv_kernel", d_conv as u32);
    model.u32("ssm.inner_size", value_dim as u32);
    model.u32("ssm.state_size", d_state as u32);
    model.u32("ssm.time_step_rank", n_v_heads as u32);
    model.u32("ssm.group_count", n_groups as u32);
    if has_prediction_layer {
        model.u32("nextn_predict_layers", 1);
        model.matrix("blk.4.nextn.eh_proj.weight", 2 * N_EMBD, N_EMBD);
        model.norm("blk.4.nextn.enorm.weight", N_EMBD);
        model.norm("blk.4.nextn.hnorm.weight", N_EMBD);
    }
    model.norm("output_norm.weight", N_EMBD);
    for layer in 0..if has_prediction_layer { 5 } else { 4 } {
        let blk = format!("blk.{layer}");
        model.norm(&format!("{blk}.attn_norm.weight"), N_EMBD);
        model.norm(&format!("{blk}.post_attention_norm.weight"), N_EMBD);
        if layer >= 3 {
            // each head's query comes with a gate
            model.attention(&blk, 2);
        } else {
            model.matrix(&format!("{blk}.attn_qkv.weight"), N_EMBD, conv_dim);
            model.matrix(&format!("{blk}.attn_gate.weight"), N_EMBD, value_dim);
            model.matrix(&format!("{blk}.ssm_conv1d.weight"), d_conv, conv_dim);
            model.tensor(&format!("{blk}.ssm_dt.bias"), &[n_v_heads], Data::Noise(0.1));
            model.tensor(&format!("{blk}.ssm_a"), &[n_v_heads], Data::Same(-0.1));
            model.matrix(&format!("{blk}.ssm_beta.weight"), N_EMBD, n_v_heads);
            model.matrix(&format!("{blk}.ssm_alpha.weight"), N_EMBD, n_v_heads);
            model.norm(&format!("{blk}.ssm_norm.weight"), d_state);
            model.matrix(&format!("{blk}.ssm_out.weight"), value_dim, N_EMBD);
        }
        model.feed_forward(&blk);
    }
    model
}

/// As [`multi_token_prediction`], but each token is followed by that of the next number. The prediction layer looks only at what
/// the target passes on of the token before the last, and is right if that is the state of that very token.
pub fn counting(path: &Path) {
    let (n_embd, n_vocab) = (N_EMBD as usize, N_VOCAB as usize);
    // vectors of equal length for all tokens, moved on by `by`
    let vectors = |by: usize| -> Vec<f32> {
        let each = (0..n_vocab).flat_map(|token| {
            let mut random = StdRng::seed_from_u64(((token + n_vocab - by) % n_vocab) as u64);
            (0..n_embd).map(move |_| if random.random_bool(0.5) { 1.0 } else { -1.0 })
        });
        each.collect()
    };
    let mut model = qwen35_model(true);
    for (name, _, data) in &mut model.tensors {
        // no layer adds anything
        if ["attn_output", "ssm_out", "ffn_down"]
            .iter()
            .any(|it| name.contains(it))
        {
            *data = Data::Same(0.0);
        } else if name == "token_embd.weight" {
            *data = Data::Values(vectors(0));
        } else if name.ends_with("eh_proj.weight") {
            let passes = |i: usize| i % (2 * n_embd) == n_embd + i / (2 * n_embd);
            *data = Data::Values(
                (0..2 * n_embd * n_embd)
                    .map(|i| f32::from(u8::from(passes(i))))
                    .collect(),
            );
        }
    }
    model.tensor("output.weight", &[N_EMBD, N_VOCAB], Data::Values(vectors(1)));
    model.tensor(
        "blk.4.nextn.shared_head_head.weight",
        &[N_EMBD, N_VOCAB],
        Data::Values(vectors(2)),
    );
    model.write(path);
}

/// Mamba-2 layers, an attention layer and a feed-forward layer: a state that can be rolled back by snapshots.
pub fn state_space(path: &Path) {
    let (d_inner, d_state, d_conv, n_groups, n_heads) = (2 * N_EMBD, 16, 4, 2, 4);
    let d_conv_rows = d_inner + 2 * n_groups * d_state;
    let mut model = Model::new("nemotron_h", 4);
    model.i32_each("feed_forward_length", &[0, 0, 0, N_FF as i32]);
    model.f32("attention.layer_norm_epsilon", 1e-6);
    model.u32("attention.head_count", N_HEAD as u32);
    model.i32_each("attention.head_count_kv", &[0, N_HEAD_KV as i32, 0, 0]);
    model.u32("attention.key_length", HEAD as u32);
    model.u32("attention.value_length", HEAD as u32);
    model.u32("ssm.conv_kernel", d_conv as u32);
    model.u32("ssm.inner_size", d_inner as u32);
    model.u32("ssm.state_size", d_state as u32);
    model.u32("ssm.time_step_rank", n_heads as u32);
    model.u32("ssm.group_count", n_groups as u32);
    model.norm("output_norm.weight", N_EMBD);
    for layer in 0..4 {
        let blk = format!("blk.{layer}");
        model.norm(&format!("{blk}.attn_norm.weight"), N_EMBD);
        match layer {
            1 => {
                model.matrix(&format!("{blk}.attn_q.weight"), N_EMBD, N_HEAD * HEAD);
                model.matrix(&format!("{blk}.attn_k.weight"), N_EMBD, N_HEAD_KV * HEAD);
                model.matrix(&format!("{blk}.attn_v.weight"), N_EMBD, N_HEAD_KV * HEAD);
                model.matrix(&format!("{blk}.attn_output.weight"), N_HEAD * HEAD, N_EMBD);
            }
            3 => {
                model.matrix(&format!("{blk}.ffn_up.weight"), N_EMBD, N_FF);
                model.matrix(&format!("{blk}.ffn_down.weight"), N_FF, N_EMBD);
            }
            _ => {
                let n_in = 2 * d_inner + 2 * n_groups * d_state + n_heads;
                model.matrix(&format!("{blk}.ssm_in.weight"), N_EMBD, n_in);
                model.matrix(&format!("{blk}.ssm_conv1d.weight"), d_conv, d_conv_rows);
                model.tensor(&format!("{blk}.ssm_conv1d.bias"), &[d_conv_rows], Data::Noise(0.1));
                model.tensor(&format!("{blk}.ssm_dt.bias"), &[n_heads], Data::Noise(0.1));
                model.tensor(&format!("{blk}.ssm_a"), &[1, n_heads], Data::Same(-0.1));
                model.tensor(&format!("{blk}.ssm_d"), &[1, n_heads], Data::Same(1.0));
                model.tensor(
                    &format!("{blk}.ssm_norm.weight"),
                    &[d_inner / n_groups, n_groups],
                    Data::Same(1.0),
                );
                model.matrix(&format!("{blk}.ssm_out.weight"), d_inner, N_EMBD);
            }
        }
    }
    model.write(path);
}

/// A state that can only be saved and restored as a whole.
pub fn recurrent(path: &Path) {
    let (d_inner, d_state, d_conv, dt_rank) = (2 * N_EMBD, 16, 4, 8);
    let mut model = Model::new("mamba", 2);
    model.u32("feed_forward_length", N_FF as u32);
    model.u32("ssm.conv_kernel", d_conv as u32);
    model.u32("ssm.inner_size", d_inner as u32);
    model.u32("ssm.state_size", d_state as u32);
    model.u32("ssm.time_step_rank", dt_rank as u32);
    model.u32("attention.head_count", 0);
    model.norm("output_norm.weight", N_EMBD);
    for layer in 0..2 {
        let blk = format!("blk.{layer}");
        model.norm(&format!("{blk}.attn_norm.weight"), N_EMBD);
        model.matrix(&format!("{blk}.ssm_in.weight"), N_EMBD, 2 * d_inner);
        model.matrix(&format!("{blk}.ssm_conv1d.weight"), d_conv, d_inner);
        model.tensor(&format!("{blk}.ssm_conv1d.bias"), &[d_inner], Data::Noise(0.1));
        model.matrix(&format!("{blk}.ssm_x.weight"), d_inner, dt_rank + 2 * d_state);
        model.matrix(&format!("{blk}.ssm_dt.weight"), dt_rank, d_inner);
        model.tensor(&format!("{blk}.ssm_dt.bias"), &[d_inner], Data::Noise(0.1));
        model.tensor(&format!("{blk}.ssm_a"), &[d_state, d_inner], Data::Same(-0.1));
        model.norm(&format!("{blk}.ssm_d"), d_inner);
        model.matrix(&format!("{blk}.ssm_out.weight"), d_inner, N_EMBD);
    }
    model.write(path);
}

/// An EAGLE-3 head for the larger draft model of `tests/models`.
pub fn eagle3_head(path: &Path) {
    let n_embd_target = 128;
    let mut model = Model::new("eagle3", 1);
    model.u32("feed_forward_length", N_FF as u32);
    model.u32("attention.head_count", N_HEAD as u32);
    model.u32("attention.head_count_kv", N_HEAD_KV as u32);
    model.u32("rope.dimension_count", HEAD as u32);
    model.f32("rope.freq_base", 10000.0);
    model.u32("target_hidden_size", n_embd_target as u32);
    model.i32_each("target_layers", &[0, 1, 1]);
    model.matrix("fc.weight", 3 * n_embd_target, N_EMBD);
    model.norm("output_norm.weight", N_EMBD);
    model.matrix("output.weight", N_EMBD, N_VOCAB);
    for name in ["attn_norm", "attn_norm_2", "ffn_norm"] {
        model.norm(&format!("blk.0.{name}.weight"), N_EMBD);
    }
    model.matrix("blk.0.attn_q.weight", 2 * N_EMBD, N_HEAD * HEAD);
    model.matrix("blk.0.attn_k.weight", 2 * N_EMBD, N_HEAD_KV * HEAD);
    model.matrix("blk.0.attn_v.weight", 2 * N_EMBD, N_HEAD_KV * HEAD);
    model.matrix("blk.0.attn_output.weight", N_HEAD * HEAD, N_EMBD);
    model.feed_forward("blk.0");
    model.write(path);
}

/// Most layers see the last 16 tokens only.
pub fn sliding_window(path: &Path) {
    let mut model = Model::new("gemma3", 6);
    model.u32("feed_forward_length", N_FF as u32);
    model.u32("attention.head_count", N_HEAD as u32);
    model.u32("attention.head_count_kv", N_HEAD_KV as u32);
    model.u32("attention.key_length", HEAD as u32);
    model.u32("attention.value_length", HEAD as u32);
    model.u32("attention.sliding_window", 16);
    model.f32("rope.freq_base", 10000.0);
    model.norm("output_norm.weight", N_EMBD);
    for layer in 0..6 {
        let blk = format!("blk.{layer}");
        model.norm(&format!("{blk}.attn_norm.weight"), N_EMBD);
        model.attention(&blk, 1);
        model.norm(&format!("{blk}.post_attention_norm.weight"), N_EMBD);
        model.norm(&format!("{blk}.ffn_norm.weight"), N_EMBD);
        model.feed_forward(&blk);
        model.norm(&format!("{blk}.post_ffw_norm.weight"), N_EMBD);
    }
    model.write(path);
}
