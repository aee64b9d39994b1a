//! Places the layers of a model on devices.
//!
//! llama.cpp b11434 puts the repeating layers and the output layer on the devices in order: with `--tensor-split 3,4` the
//! first 3 of 7 layers go on the first device, the others on the second (`load_tensors` in `src/llama-model.cpp`). So a plan
//! gives the number of layers per device, which leaves nothing to round; a test checks the plan against that rule. The input
//! embeddings stay in the memory of the coordinator's host.

use std::path::PathBuf;

use serde::Serialize;

use super::error::PlanError;
use super::memory::{Need, amount, compute_bytes, host_compute_bytes, needs, score_bytes, sum};
use super::suggestions::Suggestion;
use super::{Device, MAX_DEVICES, Settings};
use crate::gguf::ModelFile;

/// A placement of all layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The model's file.
    pub path: PathBuf,
    /// Bytes of its files.
    pub file_bytes: u64,
    /// Its layers, including the output layer.
    pub layers: u32,
    /// The settings that the plan is made for.
    pub settings: Settings,
    /// The devices, in llama.cpp's order.
    pub placements: Vec<Placement>,
    /// The share of the coordinator's host.
    pub host: HostShare,
    /// Bytes that must stay free on each device.
    pub margin_bytes: u64,
    /// Whether every device keeps its margin.
    pub fits: bool,
    /// Changes that make the model fit, the smallest of each kind.
    pub suggestions: Vec<Suggestion>,
}

/// The layers of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// Its name on the command line: `RPC0`, `CUDA0`; `None` if it gets no layers.
    pub argument: Option<String>,
    /// Its first layer.
    pub first_layer: u32,
    /// Number of its layers, including the output layer.
    pub layers: u32,
    /// Bytes of their weights.
    pub weights_bytes: u64,
    /// Bytes of their KV cache.
    pub kv_bytes: u64,
    /// Estimated bytes of its compute buffers.
    pub compute_bytes: u64,
    /// Bytes of its free memory that are left; negative if the memory does not suffice.
    pub left_bytes: i64,
}

/// The memory that a model needs on the coordinator's host, besides its devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct HostShare {
    /// Bytes of the input embeddings.
    pub weights_bytes: u64,
    /// Estimated bytes of the compute buffers.
    pub compute_bytes: u64,
}

impl Plan {
    /// The layers of a device as text: `0-31`, `32`, `32-63 and output`, `output`, `none`.
    #[must_use]
    pub fn layers_of(&self, placement: &Placement) -> String {
        let first = placement.first_layer;
        let has_output = placement.layers > 0 && first + placement.layers == self.layers;
        let repeating = placement.layers - u32::from(has_output);
        let range = match repeating {
            0 if has_output => return "output".to_owned(),
            0 => return "none".to_owned(),
            1 => first.to_string(),
            _ => format!("{first}-{}", first + repeating - 1),
        };
        if has_output {
            format!("{range} and output")
        } else {
            range
        }
    }

    /// For a plan that does not fit: the fullest device and the suggestions, `CUDA0 of gaming-pc lacks 3.2 GiB; …`.
    #[must_use]
    pub fn shortage(&self) -> String {
        let ways: Vec<String> = self.suggestions.iter().map(ToString::to_string).collect();
        let ways = if ways.is_empty() {
            "lend more GPUs, or take a smaller model".to_owned()
        } else {
            format!("it would with {}", ways.join(", or "))
        };
        let used = self.placements.iter().filter(|placement| placement.layers > 0);
        let Some(fullest) = used.min_by_key(|placement| placement.left_bytes) else {
            return ways;
        };
        let margin = i64::try_from(self.margin_bytes).unwrap_or(i64::MAX);
        let lacking = margin.saturating_sub(fullest.left_bytes).unsigned_abs();
        let Device { name, host, .. } = &fullest.device;
        format!("{name} of {host} lacks {}; {ways}", amount(lacking))
    }
}

pub(super) fn place(model: &ModelFile, devices: &[Device], want: &Settings) -> Result<Plan, PlanError> {
    if devices.is_empty() {
        return Err(PlanError::NoDevices);
    }
    if devices.len() > MAX_DEVICES {
        return Err(PlanError::TooManyDevices(devices.len()));
    }
    let (needs, host_weights) = needs(model, want);
    let compute = compute_bytes(&model.shape, want);
    let scores = score_bytes(&model.shape, want);
    let mut costs: Vec<u64> = needs.iter().map(Need::bytes).collect();
    if let Some(output) = costs.last_mut() {
        *output = output.saturating_add(scores);
    }
    let room: Vec<u64> = devices
        .iter()
        .map(|device| {
            device
                .free_bytes
                .saturating_sub(want.margin_bytes.saturating_add(compute))
        })
        .collect();
    let counts = balance(&costs, &room);

    let mut placements: Vec<Placement> = Vec::with_capacity(devices.len());
    let mut first = 0;
    for (device, count) in devices.iter().zip(counts) {
        let own = &needs[first..first + count];
        let has_output = count > 0 && first + count == needs.len();
        let repeating = count - usize::from(has_output);
        let weights_bytes = sum(own.iter().map(|need| need.weights));
        let kv_bytes = sum(own.iter().map(|need| need.kv));
        let compute_bytes = sum([
            if repeating > 0 { compute } else { 0 },
            if has_output { scores } else { 0 },
        ]);
        placements.push(Placement {
            device: device.clone(),
            argument: None,
            first_layer: u32::try_from(first).unwrap_or(u32::MAX),
            layers: u32::try_from(count).unwrap_or(u32::MAX),
            weights_bytes,
            kv_bytes,
            compute_bytes,
            left_bytes: difference(device.free_bytes, sum([weights_bytes, kv_bytes, compute_bytes])),
        });
        first += count;
    }
    name_devices(&mut placements);
    let margin = i64::try_from(want.margin_bytes).unwrap_or(i64::MAX);
    Ok(Plan {
        path: model.path.clone(),
        file_bytes: model.bytes,
        layers: u32::try_from(needs.len()).unwrap_or(u32::MAX),
        settings: want.clone(),
        margin_bytes: want.margin_bytes,
        fits: placements
            .iter()
            .all(|placement| placement.layers == 0 || placement.left_bytes >= margin),
        placements,
        host: HostShare {
            weights_bytes: host_weights,
            compute_bytes: host_compute_bytes(&model.shape, want),
        },
        suggestions: Vec::new(),
    })
}

/// Names devices `RPC0`, `RPC1`, … over all devices of the servers in `--rpc`: llama.cpp numbers used and unused devices. A
/// server without layers is left out of `--rpc`.
fn name_devices(placements: &mut [Placement]) {
    let used: Vec<String> = placements
        .iter()
        .filter(|placement| placement.layers > 0)
        .filter_map(|placement| placement.device.endpoint.clone())
        .collect();
    let mut number = 0;
    for placement in placements {
        let name = match &placement.device.endpoint {
            Some(endpoint) if used.contains(endpoint) => {
                number += 1;
                Some(format!("RPC{}", number - 1))
            }
            Some(_) => None,
            None => Some(placement.device.name.clone()),
        };
        placement.argument = name.filter(|_| placement.layers > 0);
    }
}

pub(super) fn difference(a: u64, b: u64) -> i64 {
    let difference = i128::from(a) - i128::from(b);
    i64::try_from(difference).unwrap_or(if difference < 0 { i64::MIN } else { i64::MAX })
}

/// Number of layers per device, in order, so that the largest filled share of a device is as small as possible. Searches by
/// bisection for the smallest share with which filling one device after another places all layers.
pub(super) fn balance(costs: &[u64], room: &[u64]) -> Vec<usize> {
    let total = sum(costs.iter().copied());
    let fill = |share: f64| -> Option<Vec<usize>> {
        let mut next = 0;
        let counts = room
            .iter()
            .map(|room| {
                let budget = (*room).max(1) as f64 * share;
                let first = next;
                let mut sum = 0.0;
                while let Some(cost) = costs.get(next).filter(|cost| sum + **cost as f64 <= budget) {
                    sum += *cost as f64;
                    next += 1;
                }
                next - first
            })
            .collect();
        (next == costs.len()).then_some(counts)
    };
    // All layers on the roomiest device is always possible.
    let roomiest = room.iter().copied().max().unwrap_or(1).max(1);
    let mut enough = (total as f64 / roomiest as f64) * 1.001 + f64::MIN_POSITIVE;
    let mut best = fill(enough).unwrap_or_else(|| {
        let mut all = vec![0; room.len()];
        all[0] = costs.len();
        all
    });
    let mut too_little = 0.0;
    for _ in 0..48 {
        let share = f64::midpoint(too_little, enough);
        match fill(share) {
            Some(counts) => {
                best = counts;
                enough = share;
            }
            None => too_little = share,
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gguf::{LayerMemory, TensorType};
    use crate::plan::builder::{MIB, device, model, settings, tiny};
    use crate::plan::{MARGIN_BYTES, plan};

    /// Layers per device that llama.cpp b11434 makes of a `--tensor-split`, with its own arithmetic: sums of 32-bit floats, and
    /// each layer goes to the first device whose sum is beyond the layer's place.
    fn layers_of_split(split: &[f32], layers: u32) -> Vec<u32> {
        let mut sum = 0.0f32;
        let sums: Vec<f32> = split
            .iter()
            .map(|part| {
                sum += part;
                sum
            })
            .collect();
        let mut counts = vec![0; split.len()];
        for layer in 0..layers {
            let place = layer as f32 / layers as f32;
            if let Some(device) = sums.iter().position(|end| end / sum > place) {
                counts[device] += 1;
            }
        }
        counts
    }

    #[test]
    fn llama_cpp_splits_as_its_log_said() {
        assert_eq!(layers_of_split(&[3.0, 5.0], 7), [3, 4]);
        assert_eq!(layers_of_split(&[7.0, 1.0], 7), [7, 0]);
        assert_eq!(layers_of_split(&[1.0, 0.0, 1.0], 4), [2, 0, 2]);
    }

    #[test]
    fn the_tiny_target_needs_what_llama_server_printed() {
        let want = Settings {
            context: 1024,
            slots: 2,
            ..settings()
        };
        let (needs, host) = needs(&tiny("tightwad-tiny-target-q8_0.gguf"), &want);
        let hundredths = |bytes: u64| (100 * bytes + MIB / 2) / MIB;
        let weights = |needs: &[Need]| hundredths(needs.iter().map(|need| need.weights).sum());
        assert_eq!(
            (weights(&needs[..3]), weights(&needs[3..]), hundredths(host)),
            (240, 346, 106)
        );
        assert_eq!(hundredths(needs[..3].iter().map(|need| need.kv).sum()), 300);
        let q8_0 = TensorType::named("q8_0").unwrap();
        let want = Settings {
            context: 4096,
            key_type: q8_0,
            value_type: q8_0,
            ..want
        };
        let (needs, _) = super::needs(&tiny("tightwad-tiny-target-q8_0.gguf"), &want);
        assert_eq!(hundredths(needs[..3].iter().map(|need| need.kv).sum()), 638);
    }

    #[test]
    fn the_estimate_for_computing_is_no_less_and_little_more_than_llama_server_printed() {
        // MiB of the first of two CPU workers: "compute buffer size", llama.cpp b11434.
        let printed = [
            ("tightwad-tiny-target-q8_0.gguf", 1024, true, 16.55),
            ("tightwad-tiny-target-q8_0.gguf", 4096, true, 28.55),
            ("tightwad-tiny-target-q8_0.gguf", 16_384, true, 76.55),
            ("tightwad-tiny-target-q8_0.gguf", 2048, false, 42.54),
            ("tightwad-tiny-target-q8_0.gguf", 4096, false, 74.54),
            ("tightwad-tiny-draft-f16.gguf", 1024, true, 9.30),
            ("tightwad-tiny-draft-f16.gguf", 2048, false, 29.29),
            ("tightwad-tiny-draft-othervocab-f16.gguf", 1024, true, 8.37),
            ("tightwad-tiny-draft-othervocab-f16.gguf", 2048, false, 31.73),
        ];
        for (name, context, flash_attention, printed) in printed {
            let want = Settings {
                context,
                flash_attention,
                ..settings()
            };
            let estimated = compute_bytes(&tiny(name).shape, &want) as f64 / MIB as f64;
            let ratio = estimated / printed;
            assert!(
                (1.0..1.13).contains(&ratio),
                "{name}, {context}: {estimated} for {printed}"
            );
        }
    }

    #[test]
    fn no_devices_and_too_many_are_errors() {
        let model = model(&[10]);
        assert_eq!(plan(&model, &[], &settings()), Err(PlanError::NoDevices));
        let many = vec![device(Some("a:1"), 1000); 16];
        assert_eq!(plan(&model, &many, &settings()), Err(PlanError::TooManyDevices(16)));
    }

    /// What is wanted, with a suggestion taken.
    fn taken(suggestion: &Suggestion, devices: &mut Vec<Device>, want: &Settings) -> Settings {
        let mut want = want.clone();
        match suggestion {
            Suggestion::CtxSize(context) => want.context = *context,
            Suggestion::CacheType(name) => {
                want.key_type = TensorType::named(name).unwrap();
                want.value_type = want.key_type;
            }
            Suggestion::Slots(slots) => want.slots = *slots,
            Suggestion::WorkerGb(gib) => devices.insert(0, device(Some("new:1"), gib * 1024)),
        }
        want
    }

    /// Whether any way to put the layers on the devices in order leaves each its margin.
    fn can_fit(costs: &[u64], room: &[u64]) -> bool {
        let Some((first, others)) = room.split_first() else {
            return costs.is_empty();
        };
        (0..=costs.len()).any(|count| costs[..count].iter().sum::<u64>() <= *first && can_fit(&costs[count..], others))
    }

    proptest! {
        #[test]
        fn the_layers_of_a_plan_are_those_that_llama_cpp_makes_of_it(
            counts in proptest::collection::vec(0u32..40, 1..15),
        ) {
            let layers: u32 = counts.iter().sum();
            prop_assume!(layers > 0);
            let split: Vec<f32> = counts.iter().map(|count| *count as f32).collect();
            prop_assert_eq!(layers_of_split(&split, layers), counts);
        }

        #[test]
        fn layers_are_placed_once_and_fit_whenever_they_can(
            costs in proptest::collection::vec(1u64..1000, 1..8),
            room in proptest::collection::vec(0u64..2000, 1..4),
        ) {
            let counts = balance(&costs, &room);
            prop_assert_eq!(counts.iter().sum::<usize>(), costs.len());
            let mut first = 0;
            let fits = counts.iter().zip(&room).all(|(count, room)| {
                let own = &costs[first..first + count];
                first += count;
                own.iter().sum::<u64>() <= *room
            });
            prop_assert_eq!(fits, can_fit(&costs, &room));
        }

        #[test]
        fn no_size_makes_it_wrap_around(
            numbers in proptest::collection::vec(prop_oneof![0u64..1 << 24, Just(1 << 24), Just(u64::MAX)], 12),
            free in proptest::collection::vec(prop_oneof![0u64..1 << 40, Just(u64::MAX)], 1..4),
            (context, slots) in (prop_oneof![1u32..100_000, Just(u32::MAX)], prop_oneof![1u16..9, Just(u16::MAX)]),
        ) {
            let mut model = model(&[1, 2, 3]);
            for (tensor, bytes) in model.tensors.iter_mut().zip(&numbers) {
                tensor.bytes = *bytes;
            }
            model.shape.memory[1] = LayerMemory {
                key: numbers[5],
                value: numbers[6],
                window: Some(numbers[7]),
                state: numbers[8],
            };
            let most = |number: u64| number.min(crate::gguf::MOST_NUMBERS);
            model.shape.embedding = most(numbers[9]);
            model.shape.feed_forward = most(numbers[10]);
            model.shape.vocabulary = most(numbers[11]);
            let devices: Vec<Device> = free
                .iter()
                .map(|free| Device { free_bytes: *free, ..device(None, 1) })
                .collect();
            let want = Settings { context, slots, batch: numbers[4].max(1), ..settings() };
            let plan = plan(&model, &devices, &want).unwrap();
            prop_assert_eq!(plan.placements.iter().map(|it| it.layers).sum::<u32>(), 4);
            let all = u128::from(numbers[0]) + u128::from(numbers[1]) + u128::from(numbers[2]) + u128::from(numbers[4]);
            let room: u128 = free.iter().map(|free| u128::from(*free)).sum();
            prop_assert!(!plan.fits || all <= room);
        }

        #[test]
        fn a_plan_adds_up_and_its_suggestions_fit(
            layers in proptest::collection::vec(1u64..800, 1..40),
            free in proptest::collection::vec(0u64..16_000, 1..6),
            slots in 1u16..9,
            context in 256u32..40_000,
        ) {
            let model = model(&layers);
            let mut devices: Vec<Device> = free
                .iter()
                .enumerate()
                .map(|(number, free)| device(Some(&format!("w{number}:1")).filter(|_| number > 0).map(String::as_str), *free))
                .collect();
            devices.rotate_left(1);
            let want = Settings { context, slots, ..settings() };
            let plan = plan(&model, &devices, &want).unwrap();
            prop_assert_eq!(plan.placements.iter().map(|it| it.layers).sum::<u32>(), plan.layers);
            let weights: u64 = plan.placements.iter().map(|it| it.weights_bytes).sum();
            prop_assert_eq!(weights, (layers.iter().sum::<u64>() + 100) * MIB);
            for it in &plan.placements {
                let used = it.weights_bytes + it.kv_bytes + it.compute_bytes;
                prop_assert_eq!(it.left_bytes, difference(it.device.free_bytes, used));
                prop_assert_eq!(it.argument.is_some(), it.layers > 0);
                prop_assert!(!plan.fits || it.layers == 0 || it.left_bytes >= difference(MARGIN_BYTES, 0));
            }
            prop_assert!(plan.fits || !plan.suggestions.is_empty());
            for suggestion in &plan.suggestions {
                let mut devices = devices.clone();
                let want = taken(suggestion, &mut devices, &want);
                prop_assert!(place(&model, &devices, &want).unwrap().fits, "{suggestion}");
            }
        }
    }
}
