//! The settings of a model that decide its memory: context, slots, cache types. Read from the config and its `extra_args`.

use serde::Serialize;

use super::MARGIN_BYTES;
use super::error::PlanError;
use crate::config::{Coordinator, Model};
use crate::gguf::TensorType;

/// llama-server's default for `-ub`: tokens computed at once.
const DEFAULT_BATCH: u64 = 512;
/// The KV cache is rounded up to a multiple of this number of tokens.
const CELLS: u64 = 256;
/// Types that llama-server takes for its KV cache (`kv_cache_types` in `common/arg.cpp`).
pub(super) const CACHE_TYPES: [&str; 9] = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"];
/// Options that place layers. In `extra_args` they override the plan.
const PLACING_OPTIONS: [&str; 18] = [
    "-ts",
    "--tensor-split",
    "-dev",
    "--device",
    "-ngl",
    "--gpu-layers",
    "--n-gpu-layers",
    "-sm",
    "--split-mode",
    "--rpc",
    "-ot",
    "--override-tensor",
    "-cmoe",
    "--cpu-moe",
    "-ncmoe",
    "--n-cpu-moe",
    "-nkvo",
    "--no-kv-offload",
];

/// The settings of a model that decide its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// Context of each slot in tokens.
    pub context: u32,
    /// Requests served at once.
    pub slots: u16,
    /// Number format of the cached keys.
    pub key_type: TensorType,
    /// Number format of the cached values.
    pub value_type: TensorType,
    /// Whether flash attention is on.
    pub flash_attention: bool,
    /// Whether all slots share one cache.
    pub unified: bool,
    /// Whether layers with a sliding window cache the whole context.
    pub full_windows: bool,
    /// Tokens computed at once.
    pub batch: u64,
    /// Most draft tokens per step from external drafters; `None` without them.
    pub draft_tokens: Option<u16>,
    /// Bytes left free on each device.
    pub margin_bytes: u64,
}

impl Settings {
    /// The settings of the config. `extra_args` win, as they do on the command line.
    pub fn of(model: &Model, coordinator: &Coordinator, draft_tokens: Option<u16>) -> Result<Self, PlanError> {
        let extra = Extra(model, coordinator);
        let number = |names: &[&str]| extra.value(names).and_then(|value| value.parse::<u64>().ok());
        let slots = number(&["-np", "--parallel"])
            .and_then(|slots| u16::try_from(slots).ok())
            .unwrap_or(coordinator.slots)
            .max(1);
        let context = number(&["-c", "--ctx-size"])
            .filter(|all| *all > 0)
            .and_then(|all| u32::try_from(all / u64::from(slots)).ok())
            .unwrap_or(model.ctx_size);
        let cache_type = |key: &'static str, names: &[&str], given: Option<&str>| {
            let name = extra.value(names).or(given).unwrap_or("f16");
            TensorType::named(name)
                .filter(|kind| CACHE_TYPES.contains(&kind.name))
                .ok_or_else(|| PlanError::CacheType {
                    key,
                    value: name.to_owned(),
                })
        };
        let flash_attention = match extra.value(&["-fa", "--flash-attn"]) {
            Some(value) => !matches!(value, "off" | "0" | "false" | "disabled"),
            None => model.flash_attn.unwrap_or(true),
        };
        Ok(Self {
            context: context.max(1),
            slots,
            key_type: cache_type(
                "cache_type_k",
                &["-ctk", "--cache-type-k"],
                model.cache_type_k.as_deref(),
            )?,
            value_type: cache_type(
                "cache_type_v",
                &["-ctv", "--cache-type-v"],
                model.cache_type_v.as_deref(),
            )?,
            flash_attention,
            // As `supervise::command` sets it: one step verifies the drafts of several slots.
            unified: !extra.has(&["-no-kvu", "--no-kv-unified"])
                && (extra.has(&["-kvu", "--kv-unified"]) || (draft_tokens.is_some() && coordinator.slots > 1)),
            full_windows: extra.has(&["--swa-full"]),
            batch: number(&["-ub", "--ubatch-size"]).unwrap_or(DEFAULT_BATCH).max(1),
            draft_tokens,
            margin_bytes: MARGIN_BYTES,
        })
    }

    /// Size of the cache of a layer with this window: tokens per stream, and the number of streams.
    pub(super) fn cells(&self, window: Option<u64>) -> (u64, u64) {
        let slots = u64::from(self.slots);
        let context = u64::from(self.context);
        let (all, streams, sequences) = if self.unified {
            ((context * slots).next_multiple_of(CELLS), 1, slots)
        } else {
            (context.next_multiple_of(CELLS), slots, 1)
        };
        let room = match window.filter(|_| !self.full_windows) {
            Some(window) => window
                .saturating_mul(sequences)
                .saturating_add(self.batch)
                .min(all)
                .next_multiple_of(CELLS),
            None => all,
        };
        (room, streams)
    }
}

/// The options in `extra_args` that place layers and so override the plan.
#[must_use]
pub fn placing_options(model: &Model, coordinator: &Coordinator) -> Vec<String> {
    Extra(model, coordinator)
        .all()
        .filter(|arg| PLACING_OPTIONS.contains(&arg.as_str()))
        .cloned()
        .collect()
}

/// The `extra_args` of a model and its coordinator, in the order of the command line.
struct Extra<'a>(&'a Model, &'a Coordinator);

impl<'a> Extra<'a> {
    fn all(&self) -> impl DoubleEndedIterator<Item = &'a String> {
        self.0.extra_args.iter().chain(&self.1.extra_args)
    }

    fn has(&self, names: &[&str]) -> bool {
        self.all().any(|arg| names.contains(&arg.as_str()))
    }

    fn value(&self, names: &[&str]) -> Option<&'a str> {
        let mut value = None;
        for arg in self.all().rev() {
            if names.contains(&arg.as_str()) {
                return value;
            }
            value = Some(arg.as_str());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::builder::{config, settings};

    #[test]
    fn what_extra_args_say_is_what_is_planned() {
        let (mut model, mut coordinator) = config();
        model.extra_args = ["-c", "4096", "-ctk", "q8_0", "--kv-unified"]
            .map(str::to_owned)
            .to_vec();
        coordinator.extra_args = ["-np", "2", "-fa", "off", "--tensor-split", "1,1"]
            .map(str::to_owned)
            .to_vec();
        let settings = Settings::of(&model, &coordinator, Some(16)).unwrap();
        assert_eq!((settings.slots, settings.context, settings.unified), (2, 2048, true));
        assert_eq!((settings.key_type.name, settings.value_type.name), ("q8_0", "f16"));
        assert!(!settings.flash_attention);
        assert_eq!(placing_options(&model, &coordinator), ["--tensor-split"]);
        model.cache_type_v = Some("q9".into());
        let error = Settings::of(&model, &coordinator, None).unwrap_err().to_string();
        assert!(error.contains("q9") && error.contains("cache_type_v"), "{error}");
    }

    #[test]
    fn windows_and_shared_caches_have_the_cells_that_llama_cpp_gives_them() {
        let want = Settings {
            context: 8000,
            slots: 4,
            ..settings()
        };
        assert_eq!(want.cells(None), (8192, 4));
        assert_eq!(want.cells(Some(1000)), (1536, 4));
        let unified = Settings { unified: true, ..want };
        assert_eq!(unified.cells(None), (32_000, 1));
        assert_eq!(unified.cells(Some(1000)), (4608, 1));
    }
}
