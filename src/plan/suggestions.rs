//! Finds changes that make a model fit, the smallest of each kind.
//!
//! Invariant: each suggestion was planned, and that plan fits.

use std::fmt;

use serde::Serialize;

use super::memory::{Need, compute_bytes, needs, score_bytes, sum};
use super::placement::place;
use super::{Device, KnownFrom, MAX_DEVICES, Settings};
use crate::gguf::{ModelFile, TensorType};

/// Smallest suggested context in tokens.
const LEAST_CONTEXT: u32 = 1024;
const GIB: u64 = 1 << 30;

/// A change that makes a model fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Suggestion {
    /// A smaller context.
    CtxSize(u32),
    /// Another number format for both keys and values.
    CacheType(&'static str),
    /// Fewer requests at once.
    Slots(u16),
    /// One more worker with this many GiB of free memory.
    WorkerGb(u64),
}

impl fmt::Display for Suggestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CtxSize(tokens) => write!(f, "ctx_size: {tokens}"),
            Self::CacheType(name) => write!(f, "cache_type_k: {name} and cache_type_v: {name}"),
            Self::Slots(slots) => write!(f, "slots: {slots}"),
            Self::WorkerGb(gib) => write!(f, "one more worker with {gib} GiB of free memory"),
        }
    }
}

/// The smallest change of each kind that makes the model fit.
pub(super) fn suggestions(model: &ModelFile, devices: &[Device], want: &Settings) -> Vec<Suggestion> {
    let fits = |devices: &[Device], want: &Settings| place(model, devices, want).is_ok_and(|plan| plan.fits);
    let slots = |slots| Settings { slots, ..want.clone() };
    let context = |context| Settings {
        context,
        ..want.clone()
    };
    let mut found = Vec::new();
    // Memory falls monotonically along each kind of change, so bisection finds the smallest one.
    let most = |least: u64, most: u64, fits: &dyn Fn(u64) -> bool| -> Option<u64> {
        let (mut low, mut high) = (least, most);
        if low > high || !fits(low) {
            return None;
        }
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if fits(middle) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Some(low)
    };
    let unit = u64::from(LEAST_CONTEXT);
    let contexts = |units: u64| context(u32::try_from(units * unit).unwrap_or(u32::MAX));
    let largest = u64::from(want.context).saturating_sub(1) / unit;
    if let Some(units) = most(1, largest, &|units| fits(devices, &contexts(units))) {
        found.push(Suggestion::CtxSize(contexts(units).context));
    }
    for name in ["q8_0", "q4_0"] {
        let Some(kind) = TensorType::named(name) else { continue };
        let smaller = kind.row_bytes(256) < want.key_type.row_bytes(256).max(want.value_type.row_bytes(256));
        let whole_rows = model
            .shape
            .memory
            .iter()
            .all(|memory| memory.key.is_multiple_of(kind.block) && memory.value.is_multiple_of(kind.block));
        let with = Settings {
            key_type: kind,
            value_type: kind,
            ..want.clone()
        };
        if smaller && whole_rows && want.flash_attention && fits(devices, &with) {
            found.push(Suggestion::CacheType(kind.name));
            break;
        }
    }
    let as_slots = |n: u64| slots(u16::try_from(n).unwrap_or(u16::MAX));
    if let Some(n) = most(1, u64::from(want.slots).saturating_sub(1), &|n| {
        fits(devices, &as_slots(n))
    }) {
        found.push(Suggestion::Slots(as_slots(n).slots));
    }
    if devices.len() < MAX_DEVICES {
        let with_worker = |gib: u64| {
            let bytes = gib.saturating_mul(GIB);
            let worker = Device {
                host: "another".into(),
                label: String::new(),
                endpoint: Some("another".into()),
                name: String::new(),
                total_bytes: bytes,
                free_bytes: bytes,
                known_from: KnownFrom::Config,
            };
            [&[worker], devices].concat()
        };
        // A worker with room for the whole model always suffices.
        let (needs, _) = needs(model, want);
        let all = sum(needs.iter().map(Need::bytes));
        let fixed = [
            compute_bytes(&model.shape, want),
            score_bytes(&model.shape, want),
            want.margin_bytes,
        ];
        let enough = all.saturating_add(sum(fixed)).div_ceil(GIB) + 1;
        // Bisect by how much less still suffices.
        if let Some(less) = most(0, enough - 1, &|less| fits(&with_worker(enough - less), want)) {
            found.push(Suggestion::WorkerGb(enough - less));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::builder::{device, model, settings};
    use crate::plan::plan;

    #[test]
    fn what_is_suggested_is_the_nearest_of_its_kind() {
        let devices = [device(Some("a:1"), 6500), device(None, 6500)];
        let model = model(&[250; 32]);
        let plan = plan(&model, &devices, &settings()).unwrap();
        assert!(!plan.fits);
        let context = plan.suggestions.iter().find_map(|suggestion| match suggestion {
            Suggestion::CtxSize(tokens) => Some(*tokens),
            _ => None,
        });
        let more = Settings {
            context: context.unwrap() + 1024,
            ..settings()
        };
        assert!(!crate::plan::plan(&model, &devices, &more).unwrap().fits);
        assert!(
            plan.suggestions
                .iter()
                .any(|suggestion| matches!(suggestion, Suggestion::Slots(1..4)))
        );
    }
}
