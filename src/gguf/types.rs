//! Number formats of weights. A format stores blocks with a fixed number of weights in a fixed number of bytes.
//!
//! Numbers and sizes are those of `ggml.h`, `ggml.c` and `ggml-common.h` of llama.cpp b11434.

use serde::Serialize;

/// A number format: blocks of `block` weights in `bytes` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TensorType {
    /// llama.cpp's name for it: `q8_0`.
    pub name: &'static str,
    /// Weights per block.
    pub block: u64,
    /// Bytes per block.
    pub bytes: u64,
}

/// All formats, by their number in a GGUF file.
const TYPES: [(u32, TensorType); 35] = [
    (0, of("f32", 1, 4)),
    (1, of("f16", 1, 2)),
    (2, of("q4_0", 32, 18)),
    (3, of("q4_1", 32, 20)),
    (6, of("q5_0", 32, 22)),
    (7, of("q5_1", 32, 24)),
    (8, of("q8_0", 32, 34)),
    (9, of("q8_1", 32, 36)),
    (10, of("q2_K", 256, 84)),
    (11, of("q3_K", 256, 110)),
    (12, of("q4_K", 256, 144)),
    (13, of("q5_K", 256, 176)),
    (14, of("q6_K", 256, 210)),
    (15, of("q8_K", 256, 292)),
    (16, of("iq2_xxs", 256, 66)),
    (17, of("iq2_xs", 256, 74)),
    (18, of("iq3_xxs", 256, 98)),
    (19, of("iq1_s", 256, 50)),
    (20, of("iq4_nl", 32, 18)),
    (21, of("iq3_s", 256, 110)),
    (22, of("iq2_s", 256, 82)),
    (23, of("iq4_xs", 256, 136)),
    (24, of("i8", 1, 1)),
    (25, of("i16", 1, 2)),
    (26, of("i32", 1, 4)),
    (27, of("i64", 1, 8)),
    (28, of("f64", 1, 8)),
    (29, of("iq1_m", 256, 56)),
    (30, of("bf16", 1, 2)),
    (34, of("tq1_0", 256, 54)),
    (35, of("tq2_0", 256, 66)),
    (39, of("mxfp4", 32, 17)),
    (40, of("nvfp4", 64, 36)),
    (41, of("q1_0", 128, 18)),
    (42, of("q2_0", 64, 18)),
];

const fn of(name: &'static str, block: u64, bytes: u64) -> TensorType {
    TensorType { name, block, bytes }
}

impl TensorType {
    /// The type with this number in a GGUF file.
    #[must_use]
    pub fn numbered(number: u32) -> Option<Self> {
        let (_, kind) = TYPES.iter().find(|(known, _)| *known == number)?;
        Some(*kind)
    }

    /// The type with this name in llama.cpp.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let (_, kind) = TYPES.iter().find(|(_, kind)| kind.name == name)?;
        Some(*kind)
    }

    /// Bytes of a row of `weights` weights.
    #[must_use]
    pub fn row_bytes(self, weights: u64) -> u64 {
        weights.div_ceil(self.block).saturating_mul(self.bytes)
    }
}
