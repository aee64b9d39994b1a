//! The cluster file: one YAML file that every host reads. A loaded [`Config`] is valid: its values were checked.
//!
//! The types here are the reference of its keys. [`load()`] finds the file, applies the environment over it, and reports each mistake with
//! file, line and key. [`check_config`] only reports. Every command begins with one of them.
//!
//! | file | what it does |
//! | --- | --- |
//! | `load` | the search for the file, and the layers |
//! | `yaml`, `expand` | text into values with their lines; `${VAR}` |
//! | `environment` | the `TIGHTWAD_<SECTION>__<KEY>` variables |
//! | `decode` | values into the types below |
//! | `validate` | checks that the types cannot express |
//! | `resolve`, `secret` | values that follow from several sections; tokens from files |
//! | `local_key` | the key that the servers of one host share |
//! | `credentials` | credentials of a systemd unit in place of these files |
//! | `check`, `host_files` | `check-config`: all problems at once; files and programs that this host lacks |
//! | `error`, `origin` | error messages, and the file, line and key of each value |

mod check;
mod credentials;
mod decode;
mod environment;
mod error;
mod expand;
mod host_files;
pub mod load;
pub mod local_key;
mod origin;
mod resolve;
mod secret;
mod validate;
mod yaml;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use check::{CheckReport, Scope, check_config, check_config_in};
pub use environment::Environment;
pub use error::{ConfigError, Problem};
pub use load::{Loaded, load, load_in};
pub use resolve::local_url;
pub use secret::{Secret, is_secret, shown_arguments};

/// Default port of the section `draft`. It differs from that of `target`, because both may run on one machine.
pub const DEFAULT_DRAFT_PORT: u16 = 8081;
/// Default port of `ggml-rpc-server`.
pub const DEFAULT_RPC_PORT: u16 = 50052;
/// Default of `cache_gb`: GiB of model parts that a worker keeps on disk.
pub const DEFAULT_CACHE_GB: f64 = 32.0;
/// Default of `stall_seconds`.
pub const DEFAULT_STALL_SECONDS: u64 = 30;
/// Default port of a worker's agent.
pub const DEFAULT_AGENT_PORT: u16 = 50051;

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The OpenAI endpoint, with its draft and target servers.
    pub proxy: Option<Proxy>,
    /// The llama-server that `tightwad run target` keeps running.
    pub target: Option<Server>,
    /// The llama-server that `tightwad run draft` keeps running.
    pub draft: Option<Server>,
    /// The llama-server that spreads one model over the workers' GPUs and its own.
    pub coordinator: Option<Coordinator>,
    /// The hosts that lend their GPUs to the coordinator.
    pub workers: Vec<Worker>,
    /// The models by name.
    pub models: BTreeMap<String, Model>,
    /// The llama.cpp programs.
    pub binaries: Binaries,
}

/// `proxy`: the OpenAI endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Proxy {
    /// Address to listen on. Any but a loopback address needs a token (see `allow_unauthenticated`).
    pub host: String,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// The drafter, or a list of them. None: requests are only forwarded. Derived from the section `draft` when that is
    /// given.
    #[serde(deserialize_with = "one_or_more")]
    pub draft: Vec<Upstream>,
    /// The target. Derived from the section `target` (else `coordinator`) when that is given.
    pub target: Option<Upstream>,
    /// Most draft tokens that one step of the target verifies.
    pub max_draft_tokens: MaxDraftTokens,
    /// How the target verifies drafts.
    pub verification: VerificationMode,
    /// Answer without the drafter while that is down (true), or refuse requests until it is back (false).
    pub fallback_on_draft_failure: bool,
    /// Sometimes ask the drafter for an answer that a target without verification has given, and show how far both agree.
    pub measure_agreement: bool,
    /// Token that clients send as `Authorization: Bearer …` (or `x-api-key`). Prefer `auth_token_file`.
    pub auth_token: Option<Secret>,
    /// File that holds the token; surrounding white space is dropped.
    pub auth_token_file: Option<PathBuf>,
    /// Listen on a non-loopback address without a token.
    pub allow_unauthenticated: bool,
    /// Origins of the web pages that may use this endpoint: `http://localhost:3000`, or `*` for all.
    pub cors_origins: Vec<String>,
    /// Largest `max_tokens` a request may ask for. None: no limit.
    pub max_tokens_limit: Option<u64>,
    /// Largest request body in bytes.
    pub max_body_size: u64,
    /// Seconds of silence after which a streaming client gets an SSE comment.
    pub keepalive_seconds: u64,
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8088,
            draft: Vec::new(),
            target: None,
            max_draft_tokens: MaxDraftTokens::Auto,
            verification: VerificationMode::Auto,
            fallback_on_draft_failure: true,
            measure_agreement: false,
            auth_token: None,
            auth_token_file: None,
            allow_unauthenticated: false,
            cors_origins: Vec::new(),
            max_tokens_limit: None,
            max_body_size: 64 * 1024 * 1024,
            keepalive_seconds: 15,
        }
    }
}

/// `proxy.max_draft_tokens`: a cap, or `auto` (the limit of the target).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MaxDraftTokens {
    /// As many as pay, up to the limit of the target.
    #[default]
    Auto,
    /// At most this many; 0 turns drafting off.
    AtMost(u16),
}

/// `proxy.verification`: how the target verifies drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerificationMode {
    /// The best kind for the target: attached with Tightwad's patch, scored for vLLM and SGLang, otherwise none.
    #[default]
    Auto,
    /// Drafts attach to the running completion.
    Attached,
    /// In rounds, with a prompt for each length of the draft: a stock llama-server with several slots.
    FanOut,
    /// In rounds, by the likeliest tokens of a prompt: vLLM and SGLang.
    Scored,
    /// Not at all.
    None,
}

/// A server that is already running somewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// Base URL, without `/v1`: `http://192.168.1.100:8080`.
    pub url: String,
    /// The model's name there; shown in the status, and needed by servers that hold several.
    #[serde(default)]
    pub model_name: Option<String>,
    /// Kind of the server.
    #[serde(default)]
    pub backend: Backend,
    /// API key that this server requires. Prefer `api_key_file`.
    #[serde(default)]
    pub api_key: Option<Secret>,
    /// File that holds the API key.
    #[serde(default)]
    pub api_key_file: Option<PathBuf>,
    /// Whether it requires the [`local_key`] of this host.
    #[serde(skip)]
    pub asks_local_key: bool,
    /// Key for drafting on a target that is a pool's coordinator. Prefer `draft_key_file`.
    #[serde(default)]
    pub draft_key: Option<Secret>,
    /// File that holds that key.
    #[serde(default)]
    pub draft_key_file: Option<PathBuf>,
}

/// Kind of an [`Upstream`] server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// llama.cpp's llama-server.
    #[default]
    Llamacpp,
    /// Ollama.
    Ollama,
    /// Any server with an OpenAI-compatible API.
    Openai,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
}

/// `target`, `draft`: a llama-server that this host runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; [`DEFAULT_DRAFT_PORT`] in a section `draft` that names none.
    pub port: u16,
    /// Name of the model in `models`. None: the one marked `default`, else the only one.
    pub model: Option<String>,
    /// Requests served at once. The context is per slot.
    pub slots: u16,
    /// CPU threads. None: llama-server's choice.
    pub threads: Option<u16>,
    /// Backend that computes. With a GPU backend the server waits for such a GPU and never computes on the CPU instead. None: what llama.cpp
    /// finds.
    pub backend: Option<GpuBackend>,
    /// Seconds without a new token in a running answer after which llama-server is restarted; 0: never.
    pub stall_seconds: u64,
    /// Key that clients of this server send. Prefer `api_key_file`. On a loopback address the roles of this host share a
    /// random one if none is set: see [`local_key`].
    pub api_key: Option<Secret>,
    /// File that holds the key.
    pub api_key_file: Option<PathBuf>,
    /// Require no key, on any address.
    pub allow_unauthenticated: bool,
    /// Further arguments of llama-server; they override those that Tightwad gives.
    #[serde(serialize_with = "secret::hide_keys")]
    pub extra_args: Vec<String>,
    /// Further environment variables.
    #[serde(serialize_with = "secret::hide_values")]
    pub env: BTreeMap<String, String>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8080,
            model: None,
            slots: 4,
            threads: None,
            backend: None,
            stall_seconds: DEFAULT_STALL_SECONDS,
            api_key: None,
            api_key_file: None,
            allow_unauthenticated: false,
            extra_args: Vec::new(),
            env: BTreeMap::new(),
        }
    }
}

/// `coordinator`: a [`Server`] over its own GPUs and the workers'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Coordinator {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on.
    pub port: u16,
    /// Backend for its own GPUs.
    pub backend: GpuBackend,
    /// Its own GPUs.
    pub gpus: Vec<Gpu>,
    /// Requests served at once. The context is per slot.
    pub slots: u16,
    /// CPU threads. None: llama-server's choice.
    pub threads: Option<u16>,
    /// Replace the running model by the one that a request names.
    pub swap_on_request: bool,
    /// Seconds that running answers get to finish before a swap cancels them.
    pub drain_seconds: u64,
    /// Seconds that a request waits for its model before the coordinator answers 503.
    pub wait_seconds: u64,
    /// Seconds without a new token in a running answer after which llama-server is restarted; 0: never.
    pub stall_seconds: u64,
    /// Key that clients of this server send. Prefer `api_key_file`.
    pub api_key: Option<Secret>,
    /// File that holds the key.
    pub api_key_file: Option<PathBuf>,
    /// Key that proxies send to draft for its clients' answers. None: only proxies on its own host draft. Prefer
    /// `draft_key_file`.
    pub draft_key: Option<Secret>,
    /// File that holds that key.
    pub draft_key_file: Option<PathBuf>,
    /// Listen on a non-loopback address without a key.
    pub allow_unauthenticated: bool,
    /// Origins of the web pages that may use this endpoint: `http://localhost:3000`, or `*` for all.
    pub cors_origins: Vec<String>,
    /// Further arguments of llama-server; they override those that Tightwad gives.
    #[serde(serialize_with = "secret::hide_keys")]
    pub extra_args: Vec<String>,
    /// Further environment variables; they override those that Tightwad gives.
    #[serde(serialize_with = "secret::hide_values")]
    pub env: BTreeMap<String, String>,
}

impl Default for Coordinator {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8080,
            backend: GpuBackend::default(),
            gpus: Vec::new(),
            slots: 4,
            threads: None,
            swap_on_request: false,
            drain_seconds: 30,
            wait_seconds: 120,
            stall_seconds: DEFAULT_STALL_SECONDS,
            api_key: None,
            api_key_file: None,
            draft_key: None,
            draft_key_file: None,
            allow_unauthenticated: false,
            cors_origins: Vec::new(),
            extra_args: Vec::new(),
            env: BTreeMap::new(),
        }
    }
}

/// Backend of llama.cpp for a host's GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuBackend {
    /// AMD, ROCm.
    #[default]
    Hip,
    /// NVIDIA.
    Cuda,
    /// Any with Vulkan.
    Vulkan,
    /// Apple.
    Metal,
    /// No GPU.
    Cpu,
}

/// One entry of `workers`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// Name for people. None: its `host`.
    #[serde(default)]
    pub name: Option<String>,
    /// IPv4 address or host name at which the coordinator reaches it.
    pub host: String,
    /// Backend for its GPUs. With a GPU backend the worker waits for such a GPU and never lends its CPU instead. None: what llama.cpp finds.
    #[serde(default)]
    pub backend: Option<GpuBackend>,
    /// Its GPUs.
    #[serde(default)]
    pub gpus: Vec<Gpu>,
    /// Port of its agent, `tightwad run worker`. 0: there is no agent, and the user runs `ggml-rpc-server`.
    #[serde(default = "default_agent_port")]
    pub agent_port: u16,
    /// Token that coordinators send to the agent. Prefer `agent_token_file`. Without a token only a worker on a loopback
    /// address has an agent.
    #[serde(default)]
    pub agent_token: Option<Secret>,
    /// File that holds the token.
    #[serde(default)]
    pub agent_token_file: Option<PathBuf>,
    /// Most GiB of model parts that it keeps on disk, so that a load need not send them again; 0 keeps none.
    #[serde(default = "default_cache_gb")]
    pub cache_gb: f64,
    /// Folder for the model parts. None: the user's cache folder.
    #[serde(default)]
    pub cache_dir: Option<PathBuf>,
    /// Further arguments of ggml-rpc-server; they override those that Tightwad gives.
    #[serde(default, serialize_with = "secret::hide_keys")]
    pub extra_args: Vec<String>,
    /// Further environment variables; they override those that Tightwad gives.
    #[serde(default, serialize_with = "secret::hide_values")]
    pub env: BTreeMap<String, String>,
}

fn default_agent_port() -> u16 {
    DEFAULT_AGENT_PORT
}

fn default_cache_gb() -> f64 {
    DEFAULT_CACHE_GB
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Name for people.
    pub name: String,
    /// Its memory in GiB.
    pub vram_gb: f64,
    /// On a worker: port of the `ggml-rpc-server` that serves it.
    #[serde(default)]
    pub rpc_port: Option<u16>,
    /// Name of the device in llama.cpp: `CUDA0`, `ROCm1`, `CPU`. None: the host's GPUs in llama.cpp's order.
    #[serde(default)]
    pub device: Option<String>,
}

/// One entry of `models`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The GGUF file (the first one of a split model).
    pub path: PathBuf,
    /// Context per slot in tokens.
    #[serde(default = "default_ctx_size")]
    pub ctx_size: u32,
    /// Most tokens of an answer that names no `max_tokens`. None: until the context is full.
    #[serde(default)]
    pub predict: Option<u32>,
    /// Flash attention. None: llama-server's choice.
    #[serde(default)]
    pub flash_attn: Option<bool>,
    /// Type of the KV cache's keys: `f16`, `q8_0`, …. None: llama-server's choice.
    #[serde(default)]
    pub cache_type_k: Option<String>,
    /// Type of the KV cache's values; a quantised one needs flash attention. None: llama-server's choice.
    #[serde(default)]
    pub cache_type_v: Option<String>,
    /// Whether sections that name no model use this one.
    #[serde(default)]
    pub default: bool,
    /// Further arguments of llama-server for this model.
    #[serde(default, serialize_with = "secret::hide_keys")]
    pub extra_args: Vec<String>,
}

fn default_ctx_size() -> u32 {
    8192
}

/// `binaries`: names looked up on `PATH`, or paths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Binaries {
    /// llama.cpp's `llama-server`.
    pub llama_server: PathBuf,
    /// llama.cpp's `ggml-rpc-server`.
    pub rpc_server: PathBuf,
}

impl Default for Binaries {
    fn default() -> Self {
        Self {
            llama_server: "llama-server".into(),
            rpc_server: "ggml-rpc-server".into(),
        }
    }
}

/// Whether only this machine can reach a listener on `host`.
#[must_use]
pub fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether a listener on `host` listens on every address of its machine.
#[must_use]
pub fn is_wildcard(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok_and(|address| address.is_unspecified())
}

/// A section, or a list of sections.
fn one_or_more<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Upstream>, D::Error> {
    struct Visitor;
    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = Vec<Upstream>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a map")
        }
        fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Vec<Upstream>, A::Error> {
            Upstream::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(|one| vec![one])
        }
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, seq: A) -> Result<Vec<Upstream>, A::Error> {
            Vec::deserialize(serde::de::value::SeqAccessDeserializer::new(seq))
        }
    }
    deserializer.deserialize_any(Visitor)
}

impl Serialize for MaxDraftTokens {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::AtMost(n) => serializer.serialize_u16(*n),
        }
    }
}

impl<'de> Deserialize<'de> for MaxDraftTokens {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = MaxDraftTokens;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`auto` or a number of tokens from 0 to 65535")
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<MaxDraftTokens, E> {
                match value {
                    "auto" => Ok(MaxDraftTokens::Auto),
                    _ => value
                        .parse()
                        .map(MaxDraftTokens::AtMost)
                        .map_err(|_| E::invalid_value(serde::de::Unexpected::Str(value), &self)),
                }
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<MaxDraftTokens, E> {
                u16::try_from(value)
                    .map(MaxDraftTokens::AtMost)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(value), &self))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<MaxDraftTokens, E> {
                u16::try_from(value)
                    .map(MaxDraftTokens::AtMost)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(value), &self))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}
