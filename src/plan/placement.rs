//! Which layers go where, and whether that fits. No I/O.
//!
//! llama.cpp b11434 puts a model's repeating layers and, as one more, its output layer on the devices in their order: with
//! `--tensor-split 3,4` the first 3 of 7 on the first device, the others on the second (`load_tensors` in
//! `src/llama-model.cpp`). So a plan gives the number of layers per device, and llama.cpp's rule has nothing to round:
//! the tests hold that rule against the plan. The input embeddings stay in the coordinator's own memory.
//!
//! What a device needs:
//!
//! - **weights**: the bytes of its layers' tensors. A model without an output matrix has a second copy of its embeddings in
//!   the output layer.
//! - **KV cache**: keys and values of its layers for each slot's context, rounded up to 256 tokens (`llama_kv_cache`); a
//!   layer with a window keeps that and one batch; a recurrent layer keeps a state per slot, and one more for each draft
//!   token that may be taken back.
//! - **compute**: an estimate. Measured with two CPU workers and models of 96 to 4096 numbers per token: for each token of a
//!   batch (512) 16 vectors of the embedding's length and 3 of the feed-forward part's, in f32, and for each cell of a slot's
//!   context 8 bytes with flash attention, 16 and 4 per head without; and the output layer's scores; and a twentieth more. For
//!   the first device that is 5 to 14 % more than llama-server printed, for later ones, which need less, up to three times
//!   that. A real GPU also takes some hundred MiB for its driver, which the margin is for.
//!
//! Counted though llama-server may leave it out: layers of multi-token prediction.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::config::{Coordinator, Model, Server};
use crate::gguf::{ModelFile, Shape, TensorType};
use crate::supervise::command::{self, Launch, Pool};

/// Most devices of one model: `--tensor-split` takes fewer than `llama_max_devices()`, which is 16.
pub const MAX_DEVICES: usize = 15;
/// What stays free on each device: for its driver, for what the estimate misses, and for what else runs there.
pub const MARGIN_BYTES: u64 = 512 << 20;
/// Tokens that llama-server computes at once (`-ub`), unless told otherwise.
const DEFAULT_BATCH: u64 = 512;
/// The KV cache has room for a multiple of so many tokens.
const CELLS: u64 = 256;
/// Buffers start at a multiple of this, on the backend that rounds most.
const ALIGNMENT: u64 = 256;
/// Smallest context that is worth a suggestion.
const LEAST_CONTEXT: u32 = 1024;
const GIB: u64 = 1 << 30;

/// A device of the pool, in llama.cpp's order: those of the workers first, in the order of `--rpc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// What people call its host: the worker's name, or `coordinator`.
    pub host: String,
    /// What it is: `RTX 4070 Ti Super`.
    pub label: String,
    /// `host:port` of the `ggml-rpc-server` that serves it; `None`: it is the coordinator's own.
    pub endpoint: Option<String>,
    /// As llama.cpp calls it on its host: `CUDA0`.
    pub name: String,
    /// Its memory.
    pub total_bytes: u64,
    /// What of that is free.
    pub free_bytes: u64,
    /// Where that is known from.
    pub known_from: KnownFrom,
}

/// Where a device's memory is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KnownFrom {
    /// The worker's agent.
    Agent,
    /// The worker's `ggml-rpc-server`.
    Probe,
    /// `llama-server --list-devices`.
    LlamaServer,
    /// `vram_gb` in the config: nobody has looked what is free.
    Config,
}

/// What is wanted of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// Context of each slot in tokens.
    pub context: u32,
    /// Requests served at once.
    pub slots: u16,
    /// Type of the cache's keys.
    pub key_type: TensorType,
    /// Type of the cache's values.
    pub value_type: TensorType,
    /// Whether attention is computed without a table of all pairs of tokens.
    pub flash_attention: bool,
    /// Whether all slots share one cache.
    pub unified: bool,
    /// Whether layers with a window keep everything.
    pub full_windows: bool,
    /// Tokens computed at once.
    pub batch: u64,
    /// Draft tokens per step that it verifies for drafters outside; `None`: it does not.
    pub draft_tokens: Option<u16>,
    /// What stays free on each device.
    pub margin_bytes: u64,
}

/// Why there is no plan. That a model does not fit is not among it: then there is a [`Plan`] that says so.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// Nothing to put layers on.
    #[error("the pool has no device; give `gpus` to the coordinator or to a worker, or start the workers' agents")]
    NoDevices,
    /// More devices than llama.cpp can use.
    #[error(
        "the pool has {0} devices, and llama.cpp b11434 spreads a model over at most {MAX_DEVICES}; take some `gpus` or \
         `workers` out of the config"
    )]
    TooManyDevices(usize),
    /// A type of the KV cache that llama.cpp does not have.
    #[error("`{value}` is no type for a KV cache ({key}); use one of {}", CACHE_TYPES.join(", "))]
    CacheType {
        /// The key in the config.
        key: &'static str,
        /// What it says.
        value: String,
    },
}

/// Types that llama-server takes for its KV cache (`kv_cache_types` in `common/arg.cpp`).
const CACHE_TYPES: [&str; 9] = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"];
/// Options that say where the layers go; given in `extra_args` they win, and the plan is not what happens.
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

impl Settings {
    /// What the config says, its `extra_args` included: those win on the command line, so they win here.
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
            // As `supervise::command` asks for it: drafts of several slots are verified in one pass.
            unified: !extra.has(&["-no-kvu", "--no-kv-unified"])
                && (extra.has(&["-kvu", "--kv-unified"]) || (draft_tokens.is_some() && coordinator.slots > 1)),
            full_windows: extra.has(&["--swa-full"]),
            batch: number(&["-ub", "--ubatch-size"]).unwrap_or(DEFAULT_BATCH).max(1),
            draft_tokens,
            margin_bytes: MARGIN_BYTES,
        })
    }

    /// Tokens that the cache of a layer with this window has room for: per sequence, and how many such.
    fn cells(&self, window: Option<u64>) -> (u64, u64) {
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

/// The options in `extra_args` that place layers by themselves, so that the plan is not what happens.
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

/// Which layers go where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The model's file.
    pub path: PathBuf,
    /// Bytes of its files.
    pub file_bytes: u64,
    /// Its layers, the output layer included.
    pub layers: u32,
    /// What was asked for.
    pub settings: Settings,
    /// The devices, in llama.cpp's order.
    pub placements: Vec<Placement>,
    /// What the coordinator's own memory holds.
    pub host: HostShare,
    /// Bytes of its free memory that each device must keep.
    pub margin_bytes: u64,
    /// Whether every device keeps its margin.
    pub fits: bool,
    /// What would make it fit, the nearest of each kind. Each was planned, and fits.
    pub suggestions: Vec<Suggestion>,
}

/// What one device gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// Its name on the command line: `RPC0`, `CUDA0`; `None`: it gets nothing and is left out.
    pub argument: Option<String>,
    /// Its first layer.
    pub first_layer: u32,
    /// How many layers it gets, the output layer included.
    pub layers: u32,
    /// Bytes of their weights.
    pub weights_bytes: u64,
    /// Bytes of their KV cache.
    pub kv_bytes: u64,
    /// Bytes to compute with, estimated.
    pub compute_bytes: u64,
    /// Bytes of its free memory that are left then. Below zero: they are missing.
    pub left_bytes: i64,
}

/// What the coordinator's own memory holds beside its devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct HostShare {
    /// Bytes of the input embeddings.
    pub weights_bytes: u64,
    /// Bytes to compute with, estimated.
    pub compute_bytes: u64,
}

/// A change that makes a model fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Suggestion {
    /// A smaller context.
    CtxSize(u32),
    /// Another type for both parts of the KV cache.
    CacheType(&'static str),
    /// Fewer requests at once.
    Slots(u16),
    /// One more worker with so many GiB of free memory.
    WorkerGb(u64),
}

/// Bytes as people read them.
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

impl Plan {
    /// The layers of one of its devices in words: `0-31`, `32`, `32-63 and output`, `output`, `none`.
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

    /// Of a plan that does not fit, the fullest device and what would help: `CUDA0 of gaming-pc lacks 3.2 GiB; …`.
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

    /// The devices that get layers, as llama-server's command line names them.
    #[must_use]
    pub fn pool(&self) -> Pool {
        let used = || self.placements.iter().filter(|placement| placement.layers > 0);
        let mut rpc: Vec<String> = Vec::new();
        for endpoint in used().filter_map(|placement| placement.device.endpoint.as_ref()) {
            if !rpc.contains(endpoint) {
                rpc.push(endpoint.clone());
            }
        }
        Pool {
            rpc,
            devices: used().filter_map(|placement| placement.argument.clone()).collect(),
            layers: used().map(|placement| placement.layers).collect(),
        }
    }

    /// The command line that does what is planned, with a llama-server that listens on `host` and `port`.
    #[must_use]
    pub fn launch(
        &self,
        program: impl Into<std::ffi::OsString>,
        coordinator: &Coordinator,
        (name, model): (&str, &Model),
        (host, port): (&str, u16),
    ) -> Launch {
        let mut env = coordinator.env.clone();
        for (name, value) in command::gpu_environment(Some(coordinator.backend), coordinator.gpus.len()) {
            env.entry((*name).to_owned()).or_insert_with(|| (*value).to_owned());
        }
        let server = Server {
            host: host.to_owned(),
            port,
            model: None,
            slots: coordinator.slots,
            threads: coordinator.threads,
            // The plan names its devices.
            backend: None,
            stall_seconds: coordinator.stall_seconds,
            api_key: coordinator.api_key.clone(),
            api_key_file: coordinator.api_key_file.clone(),
            allow_unauthenticated: coordinator.allow_unauthenticated,
            extra_args: coordinator.extra_args.clone(),
            env,
        };
        command::coordinator(program, &server, name, model, self.settings.draft_tokens, &self.pool())
    }
}

/// Puts a model's layers on devices, so that the fullest device is as empty as can be.
pub fn plan(model: &ModelFile, devices: &[Device], want: &Settings) -> Result<Plan, PlanError> {
    let mut plan = place(model, devices, want)?;
    if !plan.fits {
        plan.suggestions = suggestions(model, devices, want);
    }
    Ok(plan)
}

/// What one layer needs of its device.
#[derive(Debug, Clone, Copy, Default)]
struct Need {
    weights: u64,
    kv: u64,
}

fn place(model: &ModelFile, devices: &[Device], want: &Settings) -> Result<Plan, PlanError> {
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

/// `RPC0`, `RPC1`, … over all devices of the servers that are named in `--rpc`: llama.cpp counts a server's devices whether
/// they are used or not. A server without layers is not named at all.
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

impl Need {
    fn bytes(&self) -> u64 {
        self.weights.saturating_add(self.kv)
    }
}

/// A context that no pool has room for, or a file of holes, must not become a small number.
fn sum(bytes: impl IntoIterator<Item = u64>) -> u64 {
    bytes.into_iter().fold(0, u64::saturating_add)
}

fn difference(a: u64, b: u64) -> i64 {
    let difference = i128::from(a) - i128::from(b);
    i64::try_from(difference).unwrap_or(if difference < 0 { i64::MIN } else { i64::MAX })
}

/// What each layer needs, the output layer last, and the bytes that stay with the coordinator.
fn needs(model: &ModelFile, want: &Settings) -> (Vec<Need>, u64) {
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

/// Bytes that a device with repeating layers computes with: see the module's text.
fn compute_bytes(shape: &Shape, want: &Settings) -> u64 {
    let vectors = 4 * (16 * shape.embedding + 3 * shape.feed_forward);
    let pair = if want.flash_attention { 8 } else { 16 + 4 * shape.heads };
    let (cells, _) = want.cells(None);
    let bytes = want
        .batch
        .saturating_mul(vectors.saturating_add(pair.saturating_mul(cells)));
    bytes.saturating_add(bytes / 20)
}

/// Bytes that the coordinator itself computes with, measured in the same way.
fn host_compute_bytes(shape: &Shape, want: &Settings) -> u64 {
    let pair: u64 = if want.flash_attention { 8 } else { 16 };
    let (cells, _) = want.cells(None);
    want.batch
        .saturating_mul((4 * 11 * shape.embedding).saturating_add(pair.saturating_mul(cells)))
        .saturating_add(score_bytes(shape, want))
}

/// Bytes of the scores of all tokens of the vocabulary, for each token whose successor is wanted.
fn score_bytes(shape: &Shape, want: &Settings) -> u64 {
    let wanted = u64::from(want.slots) * (1 + u64::from(want.draft_tokens.unwrap_or(0)));
    (4 * shape.vocabulary).saturating_mul(wanted.min(want.batch))
}

/// Layers in order onto devices in order, so that the largest share of any device's room is as small as can be: it finds the
/// least share with which filling one device after the other places all.
fn balance(costs: &[u64], room: &[u64]) -> Vec<usize> {
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
    // All layers on the roomiest device is always a way.
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

/// The nearest change of each kind that makes the model fit.
fn suggestions(model: &ModelFile, devices: &[Device], want: &Settings) -> Vec<Suggestion> {
    let fits = |devices: &[Device], want: &Settings| place(model, devices, want).is_ok_and(|plan| plan.fits);
    let slots = |slots| Settings { slots, ..want.clone() };
    let context = |context| Settings {
        context,
        ..want.clone()
    };
    let mut found = Vec::new();
    // Each of these needs less memory the further it goes, so the nearest one is found by halves.
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
        // With room for all of it on the new worker it fits for sure.
        let (needs, _) = needs(model, want);
        let all = sum(needs.iter().map(Need::bytes));
        let fixed = [
            compute_bytes(&model.shape, want),
            score_bytes(&model.shape, want),
            want.margin_bytes,
        ];
        let enough = all.saturating_add(sum(fixed)).div_ceil(GIB) + 1;
        // By how much it is less than enough.
        if let Some(less) = most(0, enough - 1, &|less| fits(&with_worker(enough - less), want)) {
            found.push(Suggestion::WorkerGb(enough - less));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::gguf::{LayerMemory, Tensor};

    const MIB: u64 = 1 << 20;

    fn tensor(name: &str, bytes: u64) -> Tensor {
        Tensor {
            name: name.to_owned(),
            dimensions: vec![bytes],
            kind: TensorType::named("i8").unwrap(),
            bytes,
        }
    }

    /// A model with layers of so many MiB, embeddings and an output matrix of 100 MiB each.
    fn model(layers: &[u64]) -> ModelFile {
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

    fn device(endpoint: Option<&str>, free_mib: u64) -> Device {
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

    fn config() -> (Model, Coordinator) {
        let model = serde_json::from_value(serde_json::json!({ "path": "/m/big.gguf", "ctx_size": 8192 })).unwrap();
        (model, Coordinator::default())
    }

    fn settings() -> Settings {
        let (model, coordinator) = config();
        Settings::of(&model, &coordinator, None).unwrap()
    }

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

    fn tiny(name: &str) -> ModelFile {
        ModelFile::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models").join(name)).unwrap()
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
    fn layers_follow_the_free_memory_and_the_workers_come_first() {
        let devices = [device(Some("a:1"), 24_000), device(None, 12_000)];
        let plan = plan(&model(&[500; 29]), &devices, &settings()).unwrap();
        assert!(plan.fits && plan.suggestions.is_empty());
        let pool = plan.pool();
        assert_eq!(
            (pool.rpc, pool.devices),
            (vec!["a:1".to_owned()], vec!["RPC0".into(), "CUDA0".into()])
        );
        assert!(pool.layers == [20, 10] || pool.layers == [21, 9], "{:?}", pool.layers);
    }

    #[test]
    fn a_server_without_layers_is_not_named_and_its_number_goes_to_the_next() {
        let devices = [
            device(Some("small:1"), 300),
            device(Some("a:1"), 200),
            device(Some("a:1"), 24_000),
            device(Some("b:1"), 24_000),
        ];
        let plan = plan(&model(&[500; 20]), &devices, &settings()).unwrap();
        let pool = plan.pool();
        assert_eq!(pool.rpc, ["a:1", "b:1"]);
        assert_eq!(pool.devices, ["RPC1", "RPC2"]);
        assert_eq!(pool.layers.len(), 2);
    }

    #[test]
    fn a_model_without_an_output_matrix_has_its_embeddings_twice() {
        let mut tied = model(&[10]);
        tied.tensors.retain(|tensor| tensor.name != "output.weight");
        let (needs, host) = needs(&tied, &settings());
        assert_eq!((needs[1].weights, host), (100 * MIB, 100 * MIB));
    }

    #[test]
    fn no_devices_and_too_many_are_errors() {
        let model = model(&[10]);
        assert_eq!(plan(&model, &[], &settings()), Err(PlanError::NoDevices));
        let many = vec![device(Some("a:1"), 1000); 16];
        assert_eq!(plan(&model, &many, &settings()), Err(PlanError::TooManyDevices(16)));
    }

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

    #[test]
    fn several_amd_gpus_get_their_environment_unless_the_config_says_otherwise() {
        let (model_config, mut coordinator) = config();
        let gpu = serde_json::json!({ "name": "7900 XTX", "vram_gb": 24.0 });
        coordinator.gpus = vec![serde_json::from_value(gpu).unwrap(); 2];
        coordinator.env.insert("GPU_MAX_HW_QUEUES".into(), "4".into());
        let plan = plan(&model(&[10]), &[device(None, 24_000)], &settings()).unwrap();
        let launch = plan.launch(
            "llama-server",
            &coordinator,
            ("big", &model_config),
            ("127.0.0.1", 9000),
        );
        let env: Vec<_> = launch
            .env
            .iter()
            .map(|(name, value)| (name.as_str(), value.expose()))
            .collect();
        assert!(
            env.ends_with(&[("GPU_MAX_HW_QUEUES", "4"), ("HSA_ENABLE_SDMA", "0")]),
            "{env:?}"
        );
        assert_eq!(launch.url(), "http://127.0.0.1:9000");
        assert_eq!(launch.value_of("--rpc"), None);
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
        assert!(!super::plan(&model, &devices, &more).unwrap().fits);
        assert!(
            plan.suggestions
                .iter()
                .any(|suggestion| matches!(suggestion, Suggestion::Slots(1..4)))
        );
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
