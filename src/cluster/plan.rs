//! Which layers go where, and whether that fits. No I/O.
//!
//! llama.cpp b11434 puts a model's repeating layers and, as one more, its output layer on the devices in their order: with
//! `--tensor-split 3,4` the first 3 of 7 on the first device, the others on the second (`load_tensors` in
//! `src/llama-model.cpp`). So a plan gives the number of layers per device, and llama.cpp's rule has nothing to round:
//! [`layers_of_split`] is that rule. The input embeddings stay in the coordinator's own memory.
//!
//! What a device needs:
//!
//! - **weights**: the bytes of its layers' tensors. A model without an output matrix has a second copy of its embeddings in
//!   the output layer.
//! - **KV cache**: keys and values of its layers for each slot's context, rounded up to 256 tokens (`llama_kv_cache`); a
//!   layer with a window keeps that and one batch; a recurrent layer keeps a state per slot, and one more for each draft
//!   token that may be taken back.
//! - **compute**: an estimate. Measured with two CPU workers and models of 96 to 256 numbers per token: for each token of a
//!   batch (512) 16 vectors of the embedding's length and 3 of the feed-forward part's, in f32, and for each cell of a slot's
//!   context 8 bytes with flash attention, 16 and 4 per head without; and the output layer's scores. It came within 6 % of
//!   what llama-server printed there. A real GPU also takes some hundred MiB for its driver, which the margin is for.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::gguf::{ModelFile, Shape, TensorType};
use crate::config::{Coordinator, Model, Server};
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
const PLACING_OPTIONS: [&str; 17] = [
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
            unified: extra.has(&["-kvu", "--kv-unified"]),
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
            api_key: coordinator.api_key.clone(),
            api_key_file: coordinator.api_key_file.clone(),
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
    let mut costs: Vec<u64> = needs.iter().map(|need| need.weights + need.kv).collect();
    if let Some(output) = costs.last_mut() {
        *output += scores;
    }
    let room: Vec<u64> = devices
        .iter()
        .map(|device| device.free_bytes.saturating_sub(want.margin_bytes + compute))
        .collect();
    let counts = balance(&costs, &room);

    let mut placements: Vec<Placement> = Vec::with_capacity(devices.len());
    let mut first = 0;
    for (device, count) in devices.iter().zip(counts) {
        let own = &needs[first..first + count];
        let has_output = count > 0 && first + count == needs.len();
        let repeating = count - usize::from(has_output);
        let weights_bytes = own.iter().map(|need| need.weights).sum();
        let kv_bytes = own.iter().map(|need| need.kv).sum();
        let compute_bytes = if repeating > 0 { compute } else { 0 } + if has_output { scores } else { 0 };
        placements.push(Placement {
            device: device.clone(),
            argument: None,
            first_layer: u32::try_from(first).unwrap_or(u32::MAX),
            layers: u32::try_from(count).unwrap_or(u32::MAX),
            weights_bytes,
            kv_bytes,
            compute_bytes,
            left_bytes: difference(device.free_bytes, weights_bytes + kv_bytes + compute_bytes),
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

fn difference(a: u64, b: u64) -> i64 {
    i64::try_from(i128::from(a) - i128::from(b)).unwrap_or(i64::MIN)
}

/// What each layer needs, the output layer last, and the bytes that stay with the coordinator.
fn needs(model: &ModelFile, want: &Settings) -> (Vec<Need>, u64) {
    let repeating = model.shape.layers as usize;
    let mut needs = vec![Need::default(); repeating + 1];
    let (mut host, mut embeddings, mut has_output) = (0, 0, false);
    for tensor in &model.tensors {
        let bytes = tensor.bytes.next_multiple_of(ALIGNMENT);
        let stem = tensor.name.split('.').next().unwrap_or_default();
        match stem {
            "blk" => {
                let layer = tensor.name.split('.').nth(1).and_then(|layer| layer.parse().ok());
                let at = layer.unwrap_or(repeating).min(repeating);
                needs[at].weights += bytes;
            }
            "token_embd" | "position_embd" | "token_types" | "per_layer_token_embd" => {
                host += bytes;
                if stem == "token_embd" {
                    embeddings += bytes;
                }
            }
            "token_embd_norm" | "rope_freqs" | "rope_factors_long" | "rope_factors_short" => needs[0].weights += bytes,
            _ => {
                has_output |= tensor.name == "output.weight";
                needs[repeating].weights += bytes;
            }
        }
    }
    if !has_output {
        needs[repeating].weights += embeddings;
    }
    let states = u64::from(want.slots) * (1 + u64::from(want.draft_tokens.unwrap_or(0)));
    for (need, memory) in needs.iter_mut().zip(&model.shape.memory) {
        let (cells, streams) = want.cells(memory.window);
        let token = want.key_type.row_bytes(memory.key) + want.value_type.row_bytes(memory.value);
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
    let pair = if want.flash_attention { 8 } else { 16 };
    let (cells, _) = want.cells(None);
    want.batch
        .saturating_mul((4 * 11 * shape.embedding).saturating_add(pair * cells))
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
    let total: u64 = costs.iter().sum();
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

/// Layers per device that llama.cpp b11434 makes of a `--tensor-split`, with its own arithmetic: sums of 32-bit floats, and
/// each layer goes to the first device whose sum is beyond the layer's place.
#[must_use]
pub fn layers_of_split(split: &[f32], layers: u32) -> Vec<u32> {
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
        let all: u64 = needs.iter().map(|need| need.weights + need.kv).sum();
        let fixed = compute_bytes(&model.shape, want) + score_bytes(&model.shape, want) + want.margin_bytes;
        let enough = (all + fixed).div_ceil(GIB) + 1;
        // By how much it is less than enough.
        if let Some(less) = most(0, enough - 1, &|less| fits(&with_worker(enough - less), want)) {
            found.push(Suggestion::WorkerGb(enough - less));
        }
    }
    found
}
