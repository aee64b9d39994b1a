//! Which layers of a model go on which device of a pool, and whether that fits. Pure: no I/O and no command lines.
//!
//! The input is a model ([`crate::gguf`]), its [`Settings`] and the devices. The coordinator turns the [`Plan`] into a command
//! line.
//! Invariant: the number of layers per device is what llama.cpp makes of them as its `--tensor-split`.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `device` | the devices of a pool, and those that the config lists |
//! | `settings` | context, slots and cache types that are asked for |
//! | `memory` | estimates the memory of each layer |
//! | `placement` | puts the layers on devices |
//! | `suggestions` | finds changes that make the model fit |
//! | `error` | why there is no plan |

#[cfg(test)]
pub(crate) mod builder;
pub(crate) mod device;
mod error;
mod memory;
mod placement;
mod settings;
mod suggestions;

use crate::gguf::ModelFile;
pub use device::{Device, KnownFrom, configured};
pub use error::PlanError;
pub use memory::amount;
pub use placement::{HostShare, Placement, Plan};
pub use settings::{Settings, placing_options};
pub use suggestions::Suggestion;

/// Most devices of one model: `--tensor-split` takes fewer than `llama_max_devices()`, which is 16.
pub const MAX_DEVICES: usize = 15;
/// Memory left free on each device, for its driver, for errors of the estimate and for other programs.
pub const MARGIN_BYTES: u64 = 512 << 20;

/// Places a model's layers on `devices` so that the fullest device is as empty as possible. A plan that does not fit says so
/// and has suggestions.
pub fn plan(model: &ModelFile, devices: &[Device], want: &Settings) -> Result<Plan, PlanError> {
    let mut plan = placement::place(model, devices, want)?;
    if !plan.fits {
        plan.suggestions = suggestions::suggestions(model, devices, want);
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gguf::builder::{HeaderBuilder, read};

    /// Keys of sizes, for each way that a layer may keep something.
    const SIZES: [&str; 14] = [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window",
        "attention.shared_kv_layers",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_used_count",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "wkv.head_size",
        "kda.head_dim",
    ];

    proptest! {
        #[test]
        fn a_model_of_any_sizes_is_refused_or_planned(
            layers in 0u32..4,
            embedding in prop_oneof![0u32..100_000, Just(u32::MAX)],
            sizes in proptest::collection::vec((0..SIZES.len(), prop_oneof![0u32..100_000, any::<u32>()]), 0..8),
            context in 1u32..1_000_000,
        ) {
            let mut made = HeaderBuilder::new()
                .text("general.architecture", "made")
                .number("made.block_count", layers)
                .number("made.embedding_length", embedding);
            for (key, size) in sizes {
                made = made.number(&format!("made.{}", SIZES[key]), size);
            }
            if let Ok(model) = read(&made.tensor("blk.0.attn_q.weight", 64, 0, 256).bytes()) {
                let config = serde_json::json!({ "path": "/m.gguf", "ctx_size": context });
                let config: crate::config::Model = serde_json::from_value(config).unwrap();
                let want = Settings::of(&config, &crate::config::Coordinator::default(), Some(16)).unwrap();
                let device = Device {
                    host: "coordinator".into(),
                    label: String::new(),
                    endpoint: None,
                    name: "CUDA0".into(),
                    total_bytes: 1 << 34,
                    free_bytes: 1 << 34,
                    known_from: KnownFrom::Config,
                };
                let plan = plan(&model, &[device], &want).unwrap();
                prop_assert_eq!(plan.layers, layers + 1);
            }
        }
    }
}
