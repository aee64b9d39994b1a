//! The layers of a model as a plan needs them, derived from the keys of its header.

use super::keys::{Keys, Value};
use super::parse::{MAX_ARRAY, MOST_NUMBERS, ParseError, Tensor};

/// Limit for the recurrent state of a layer; no model has more numbers.
const MOST_STATE: u64 = 1 << 32;

/// Sliding-window patterns of architectures whose files do not tell them layer by layer: one layer in `n` attends to the whole
/// context, and the flag says whether that is the first one (`load_swa_pattern` in llama.cpp's `src/models`). For any other
/// architecture all layers count as full: the estimate may be too large, never too small.
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

/// Interval of full attention among recurrent layers, if the file does not tell it.
const DEFAULT_ATTENTION_INTERVAL: u64 = 4;

/// The layers of a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Shape {
    /// `general.architecture`: `llama`, `qwen3moe`, ….
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// Number of repeating layers, including those of multi-token prediction.
    pub layers: u32,
    /// Length of a token's embedding.
    pub embedding: u64,
    /// Size of the vocabulary.
    pub vocabulary: u64,
    /// Context that it was trained with, in tokens.
    pub trained_context: Option<u64>,
    /// Attention heads, in the layer with most of them.
    pub heads: u64,
    /// Width of the widest feed-forward part; for experts, the sum of those that a token uses.
    pub feed_forward: u64,
    /// The cache of each layer.
    pub memory: Vec<LayerMemory>,
}

/// The numbers that a layer caches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerMemory {
    /// Numbers per token in the keys, over all heads; 0: none.
    pub key: u64,
    /// Numbers per token in the values, over all heads.
    pub value: u64,
    /// Sliding window in tokens; `None`: the whole context.
    pub window: Option<u64>,
    /// Numbers per sequence in the state of a recurrent layer.
    pub state: u64,
}

impl Shape {
    /// Derives the shape from the keys; `tensors` are those of all parts.
    pub(super) fn of(keys: &Keys, tensors: &[Tensor]) -> Result<Self, ParseError> {
        let missing = ParseError::MissingKey;
        let architecture = keys
            .text("general.architecture")
            .ok_or_else(|| missing("general.architecture".into()))?;
        let key = |name: &str| format!("{architecture}.{name}");
        let required = |name: &str| keys.number(&key(name)).ok_or_else(|| missing(key(name)));
        let layers = required("block_count")?;
        let embedding = required("embedding_length")?;
        let layers = u32::try_from(layers)
            .ok()
            .filter(|layers| u64::from(*layers) <= MAX_ARRAY)
            .ok_or_else(|| ParseError::Broken(format!("it names {layers} layers")))?;
        let embedded = tensors
            .iter()
            .find(|tensor| tensor.name == "token_embd.weight")
            .and_then(|tensor| tensor.dimensions.get(1).copied());
        let tokens = keys.array_length("tokenizer.ggml.tokens");
        let experts_used = keys.largest(&key("expert_used_count")).unwrap_or(0);
        let of_experts = keys.largest(&key("expert_feed_forward_length")).unwrap_or(0);
        let dense = keys.largest(&key("feed_forward_length")).unwrap_or(0);
        let reader = Layers { keys, architecture };
        let shape = Self {
            architecture: architecture.to_owned(),
            name: keys.text("general.name").map(str::to_owned),
            layers,
            embedding,
            vocabulary: embedded.or(tokens).or(keys.number(&key("vocab_size"))).unwrap_or(0),
            trained_context: keys.number(&key("context_length")),
            heads: keys.largest(&key("attention.head_count")).unwrap_or(0),
            feed_forward: dense.max(of_experts.saturating_mul(experts_used)),
            memory: (0..layers as usize)
                .map(|layer| reader.memory(layer, layers, embedding))
                .collect(),
        };
        match shape.absurd() {
            None => Ok(shape),
            Some(what) => Err(ParseError::Broken(what)),
        }
    }

    /// The first size that exceeds its limit.
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

/// Derives the cache of each layer from the keys of an architecture.
struct Layers<'a> {
    keys: &'a Keys,
    architecture: &'a str,
}

impl Layers<'_> {
    fn memory(&self, layer: usize, layers: u32, embedding: u64) -> LayerMemory {
        let (keys, architecture) = (self.keys, self.architecture);
        let key = |name: &str| format!("{architecture}.{name}");
        let number = |name: &str| keys.number(&key(name));
        let state = self.state(embedding);
        let heads = keys.per_layer(&key("attention.head_count"), layer).unwrap_or(0);
        let kv_heads = keys.per_layer(&key("attention.head_count_kv"), layer).unwrap_or(heads);
        let recurrent = state > 0
            && match keys.per_layer(&key("attention.recurrent_layers"), layer) {
                Some(recurrent) => recurrent != 0,
                // A model with both kinds of layers: those without heads are recurrent.
                None if matches!(keys.get(&key("attention.head_count_kv")), Some(Value::Numbers(_))) => kv_heads == 0,
                None if architecture.starts_with("qwen3") => {
                    let interval = number("full_attention_interval").unwrap_or(DEFAULT_ATTENTION_INTERVAL);
                    !(layer as u64 + 1).is_multiple_of(interval.max(1))
                }
                // All layers are recurrent, or the pattern is unknown; then both caches count.
                None => true,
            };
        let without_attention = recurrent && (kv_heads == 0 || architecture.starts_with("qwen3"));
        // The last layers of some models share the cache of earlier ones.
        let shared = number("attention.shared_kv_layers").unwrap_or(0);
        let keeps = (layer as u64) < u64::from(layers).saturating_sub(shared);
        if without_attention || !keeps || heads == 0 {
            return LayerMemory {
                state: if recurrent { state } else { 0 },
                ..LayerMemory::default()
            };
        }
        let window = self.window(layer);
        let length = |name: &str| {
            let of_window = window.and_then(|_| number(&format!("attention.{name}_length_swa")));
            of_window
                .or_else(|| number(&format!("attention.{name}_length")))
                .unwrap_or(embedding / heads)
        };
        // Multi-head latent attention caches one vector for keys and values.
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

    /// The sliding window of a layer, if it has one.
    fn window(&self, layer: usize) -> Option<u64> {
        let (keys, architecture) = (self.keys, self.architecture);
        let window = keys.number(&format!("{architecture}.attention.sliding_window"))?;
        let pattern = keys.get(&format!("{architecture}.attention.sliding_window_pattern"));
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

    /// Numbers per sequence in the state of a recurrent layer (`n_embd_r` and `n_embd_s` in `llama-hparams.cpp`); 0 without
    /// such layers.
    fn state(&self, embedding: u64) -> u64 {
        let (keys, architecture) = (self.keys, self.architecture);
        let number = |name: &str| keys.number(&format!("{architecture}.{name}")).unwrap_or(0);
        let heads = keys
            .largest(&format!("{architecture}.attention.head_count"))
            .unwrap_or(0);
        let convolution = number("ssm.conv_kernel").saturating_sub(1);
        let head = number("wkv.head_size");
        if head > 0 {
            // At most two vectors for the token shift.
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
    use crate::gguf::ModelFileError;
    use crate::gguf::builder::{gemma, read};

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
    fn a_size_that_no_model_has_is_refused_by_its_name() {
        let made = gemma(1).number("gemma3.feed_forward_length", u32::MAX);
        let error = read(&made.bytes()).unwrap_err();
        assert!(matches!(error, ModelFileError::Broken { .. }), "{error:?}");
        assert!(error.to_string().contains("feed-forward"), "{error}");
    }
}
