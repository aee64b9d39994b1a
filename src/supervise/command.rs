//! Command lines of llama-server. Pure: no file is read, except a key file by [`Launch::api_key`].
//!
//! Arguments of the config come last and win. A key is never an argument, because every user of the machine can read the arguments.

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddrV4;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::config::{self, GpuBackend, Model, Secret, Server};

/// Option of our patched llama-server that lets drafters attach.
pub const EXTERNAL_DRAFT_OPTION: &str = "--spec-draft-external-max";
/// Draft tokens per step of a target with `max_draft_tokens: auto`.
const AUTO_DRAFT_TOKENS: u16 = 16;

/// More layers than any model has, so that all layers go to the devices.
const EVERY_LAYER: &str = "999";
/// Environment for several AMD GPUs in one host: with their own copy engines and many queues they hang or fault.
const SEVERAL_AMD_GPUS: [(&str, &str); 2] = [("HSA_ENABLE_SDMA", "0"), ("GPU_MAX_HW_QUEUES", "1")];

/// A command line, ready to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Program.
    pub program: OsString,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Environment variables besides the inherited ones. They may hold keys.
    pub env: Vec<(String, Secret)>,
    /// Kind of GPU that the server requires. Each start lists the devices and passes them as `--device`.
    pub gpus: Option<GpuBackend>,
    /// Time limit for a token while it answers a request; zero: none.
    pub stall: Duration,
}

/// Purpose of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Verifies drafts and answers.
    Target,
    /// Drafts.
    Draft,
    /// Answers, with the GPUs of several hosts.
    Coordinator,
    /// Lends its GPUs: a ggml-rpc-server.
    Rpc,
}

impl Role {
    /// Its name in the config, in the log and on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Target => "target",
            Self::Draft => "draft",
            Self::Coordinator => "coordinator",
            Self::Rpc => "rpc",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The devices that a llama-server spreads its model over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pool {
    /// `host:port` of each `ggml-rpc-server`.
    pub rpc: Vec<String>,
    /// llama.cpp's names of the devices, in the order of the layers: `RPC0`, `RPC1`, `CUDA0`.
    pub devices: Vec<String>,
    /// Layers on each device, the output layer included.
    pub layers: Vec<u32>,
}

/// Largest number of draft tokens per step of a target; `None` when drafting is off.
#[must_use]
pub fn external_draft(max: config::MaxDraftTokens) -> Option<u16> {
    match max {
        config::MaxDraftTokens::Auto => Some(AUTO_DRAFT_TOKENS),
        config::MaxDraftTokens::AtMost(0) => None,
        config::MaxDraftTokens::AtMost(n) => Some(n),
    }
}

/// The command line of a llama-server. `external_draft` is the largest number of draft tokens per step from external drafters, if the
/// binary supports them. `extra_args` of the config come last and win.
#[must_use]
pub fn llama_server(
    program: impl Into<OsString>,
    server: &Server,
    name: &str,
    model: &Model,
    external_draft: Option<u16>,
) -> Launch {
    launch(program.into(), server, name, model, external_draft, None)
}

/// The command line of a llama-server over several hosts. `server` holds the address behind the coordinator's public port, and the
/// other settings of the coordinator.
#[must_use]
pub fn coordinator(
    program: impl Into<OsString>,
    server: &Server,
    name: &str,
    model: &Model,
    external_draft: Option<u16>,
    pool: &Pool,
) -> Launch {
    launch(program.into(), server, name, model, external_draft, Some(pool))
}

fn launch(
    program: OsString,
    server: &Server,
    name: &str,
    model: &Model,
    external_draft: Option<u16>,
    pool: Option<&Pool>,
) -> Launch {
    let slots = server.slots.max(1);
    let mut args = Arguments::default();
    args.option("--host", &server.host);
    args.option("--port", server.port.to_string());
    args.option("-m", &model.path);
    // llama-server takes a name with a comma for two names.
    if !name.is_empty() && !name.contains(',') {
        args.option("--alias", name);
    }
    args.option("-c", (u64::from(model.ctx_size) * u64::from(slots)).to_string());
    args.option("-np", slots.to_string());
    if let Some(threads) = server.threads {
        args.option("-t", threads.to_string());
    }
    if let Some(flash_attn) = model.flash_attn {
        args.option("-fa", if flash_attn { "on" } else { "off" });
    }
    if let Some(kind) = &model.cache_type_k {
        args.option("-ctk", kind);
    }
    if let Some(kind) = &model.cache_type_v {
        args.option("-ctv", kind);
    }
    if let Some(pool) = pool {
        args.pool(pool);
    }
    if let Some(predict) = model.predict {
        args.option("-n", predict.to_string());
    }
    // Each open stream and each waiting drafter holds one of its threads.
    args.option("--threads-http", (u32::from(slots) * 3 + 8).to_string());
    args.flag("--no-webui");
    args.flag("--metrics");
    args.flag("--slots");
    if let Some(max) = external_draft {
        args.option(EXTERNAL_DRAFT_OPTION, max.to_string());
        // With a cache per slot, llama-server splits a pass by sequences of equal length, so that drafts of different lengths need
        // several passes over the weights (llama.cpp b11434, `llama_batch_allocr::split_equal`).
        if slots > 1 {
            args.flag("--kv-unified");
            args.option("--kv-unified-per-slot", model.ctx_size.to_string());
        }
    }
    let extra_args = || model.extra_args.iter().chain(&server.extra_args);
    let names_devices = extra_args().any(|argument| ["--device", "-dev"].contains(&argument.as_str()));
    if server.backend == Some(GpuBackend::Cpu) && !names_devices {
        args.option("--device", "none");
    }
    // Web pages of other machines must not read answers. A variable, because older builds of llama.cpp lack the option.
    let mut env: Vec<(String, Secret)> = vec![("LLAMA_ARG_CORS_ORIGINS".into(), Secret::new("localhost"))];
    // Keys never go on the command line, where every user of the machine can read them.
    if let Some(file) = &server.api_key_file {
        args.option("--api-key-file", file);
    } else if let Some(key) = &server.api_key {
        env.push(("LLAMA_API_KEY".into(), key.clone()));
    }
    env.extend(
        server
            .env
            .iter()
            .map(|(name, value)| (name.clone(), Secret::new(value.clone()))),
    );
    args.0.extend(extra_args().map(OsString::from));
    Launch {
        program,
        args: args.0,
        env,
        gpus: server.backend.and_then(GpuBackend::gpu).filter(|_| !names_devices),
        stall: Duration::from_secs(server.stall_seconds),
    }
}

/// Environment variables for a host's GPUs, for llama-server and `ggml-rpc-server`. The config's `env` comes later and wins.
#[must_use]
pub fn gpu_environment(backend: Option<GpuBackend>, gpus: usize) -> &'static [(&'static str, &'static str)] {
    if backend == Some(GpuBackend::Hip) && gpus > 1 {
        &SEVERAL_AMD_GPUS
    } else {
        &[]
    }
}

impl Launch {
    /// The effective value of an option: the last one wins.
    #[must_use]
    pub fn value_of(&self, option: &str) -> Option<&str> {
        let at = self.args.iter().rposition(|arg| arg == option)?;
        self.args.get(at + 1)?.to_str()
    }

    /// A key that it accepts from clients.
    #[must_use]
    pub fn api_key(&self) -> Option<Secret> {
        let of_env = || {
            self.env
                .iter()
                .rfind(|(name, _)| name == "LLAMA_API_KEY")
                .map(|(_, key)| key.clone())
        };
        let first_line = |file: &str| {
            let text = std::fs::read_to_string(Path::new(file)).ok()?;
            text.lines().find(|line| !line.is_empty()).map(Secret::new)
        };
        let of_file = || self.value_of("--api-key-file").and_then(first_line);
        self.value_of("--api-key")
            .map(Secret::new)
            .or_else(of_file)
            .or_else(of_env)
    }

    /// The address on which it listens.
    #[must_use]
    pub fn address(&self) -> (String, u16) {
        let host = self.value_of("--host").unwrap_or("127.0.0.1").to_owned();
        (
            host,
            self.value_of("--port")
                .and_then(|port| port.parse().ok())
                .unwrap_or(8080),
        )
    }

    /// The IPv4 address on which it listens. llama.cpp's RPC supports no other.
    #[must_use]
    pub fn ipv4_address(&self) -> Option<SocketAddrV4> {
        let (host, port) = self.address();
        Some(SocketAddrV4::new(host.parse().ok()?, port))
    }

    /// The URL at which this machine reaches it.
    #[must_use]
    pub fn url(&self) -> String {
        let (host, port) = self.address();
        config::local_url(&host, port)
    }
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.extend([name.into(), value.into()]);
    }

    /// The order matters: `--rpc` must come first, because it creates the devices that `--device` names.
    fn pool(&mut self, pool: &Pool) {
        if !pool.rpc.is_empty() {
            self.option("--rpc", pool.rpc.join(","));
        }
        let layers: Vec<_> = pool.layers.iter().map(ToString::to_string).collect();
        self.option("--device", pool.devices.join(","));
        self.option("--split-mode", "layer");
        self.option("--tensor-split", layers.join(","));
        self.option("-ngl", EVERY_LAYER);
        // Without this, llama-server would change the planned layers by its own estimate of free memory.
        self.option("--fit", "off");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        serde_json::from_value(serde_json::json!({
            "path": "/m/big.gguf", "ctx_size": 4096, "flash_attn": true, "predict": 512
        }))
        .unwrap()
    }

    fn line(launch: &Launch) -> String {
        launch
            .args
            .iter()
            .map(|arg| arg.to_str().unwrap())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn a_target_gets_a_context_per_slot_and_room_for_drafts() {
        let server = Server {
            slots: 3,
            threads: Some(6),
            ..Server::default()
        };
        assert_eq!(
            line(&llama_server("llama-server", &server, "big", &model(), Some(16))),
            "--host 127.0.0.1 --port 8080 -m /m/big.gguf --alias big -c 12288 -np 3 -t 6 -fa on -n 512 \
             --threads-http 17 --no-webui --metrics --slots --spec-draft-external-max 16 --kv-unified --kv-unified-per-slot 4096"
        );
    }

    #[test]
    fn a_draft_or_a_stock_binary_gets_no_option_that_it_does_not_know() {
        let launch = llama_server("llama-server", &Server::default(), "m", &model(), None);
        assert!(!line(&launch).contains("external"));
    }

    #[test]
    fn a_kind_of_gpu_is_asked_for_unless_the_file_names_devices() {
        let server = |backend, extra_args: &[&str]| Server {
            backend,
            extra_args: extra_args.iter().map(|it| (*it).to_owned()).collect(),
            ..Server::default()
        };
        let launch = |server: &Server| llama_server("llama-server", server, "m", &model(), None);
        let cuda = Some(GpuBackend::Cuda);
        assert_eq!(launch(&server(cuda, &[])).gpus, cuda);
        assert_eq!(launch(&server(cuda, &["-dev", "none"])).gpus, None);
        let cpu = launch(&server(Some(GpuBackend::Cpu), &[]));
        assert_eq!((cpu.gpus, cpu.value_of("--device")), (None, Some("none")));
        let moved = launch(&server(Some(GpuBackend::Cpu), &["--device", "CUDA1"]));
        assert_eq!(moved.value_of("--device"), Some("CUDA1"));
        assert_eq!(launch(&server(None, &[])).value_of("--device"), None);
    }

    #[test]
    fn pages_of_other_machines_may_not_read_answers() {
        let launch = llama_server("llama-server", &Server::default(), "m", &model(), None);
        let origins = ("LLAMA_ARG_CORS_ORIGINS".to_owned(), Secret::new("localhost"));
        assert!(launch.env.contains(&origins), "{launch:?}");
    }

    #[test]
    fn extra_arguments_come_last_so_that_they_win() {
        let server = Server {
            extra_args: vec!["--port".into(), "9999".into()],
            ..Server::default()
        };
        let model = Model {
            extra_args: vec!["--no-repack".into()],
            ..model()
        };
        let launch = llama_server("llama-server", &server, "m", &model, None);
        assert!(line(&launch).ends_with("--slots --no-repack --port 9999"));
        assert_eq!(launch.url(), "http://127.0.0.1:9999");
    }

    #[test]
    fn a_pool_is_named_before_its_devices_and_extra_arguments_still_win() {
        let pool = Pool {
            rpc: vec!["10.0.0.2:50052".into(), "10.0.0.3:50052".into()],
            devices: vec!["RPC0".into(), "RPC1".into(), "ROCm0".into()],
            layers: vec![10, 20, 3],
        };
        let model = Model {
            cache_type_k: Some("q8_0".into()),
            extra_args: vec!["--tensor-split".into(), "1,1,1".into()],
            ..model()
        };
        let launch = coordinator("llama-server", &Server::default(), "m", &model, None, &pool);
        let line = line(&launch);
        assert!(
            line.contains(
                "-ctk q8_0 --rpc 10.0.0.2:50052,10.0.0.3:50052 --device RPC0,RPC1,ROCm0 --split-mode layer \
                 --tensor-split 10,20,3 -ngl 999 --fit off"
            ),
            "{line}"
        );
        assert_eq!(launch.value_of("--tensor-split"), Some("1,1,1"));
    }

    #[test]
    fn only_several_amd_gpus_get_an_environment() {
        assert!(gpu_environment(Some(GpuBackend::Hip), 1).is_empty());
        assert!(gpu_environment(Some(GpuBackend::Cuda), 2).is_empty());
        let expected = [("HSA_ENABLE_SDMA", "0"), ("GPU_MAX_HW_QUEUES", "1")];
        assert_eq!(gpu_environment(Some(GpuBackend::Hip), 2), expected);
    }

    #[test]
    fn a_key_is_never_an_argument_and_never_shows() {
        let server = Server {
            api_key: Some(Secret::new("hush")),
            ..Server::default()
        };
        let launch = llama_server("llama-server", &server, "m", &model(), None);
        assert!(!line(&launch).contains("hush"));
        assert!(!format!("{launch:?}").contains("hush"));
        assert_eq!(launch.api_key(), Some(Secret::new("hush")));
    }

    #[test]
    fn a_key_file_is_named() {
        let server = Server {
            api_key_file: Some("/run/keys/llama".into()),
            ..Server::default()
        };
        let launch = llama_server("llama-server", &server, "m", &model(), None);
        assert_eq!(launch.value_of("--api-key-file"), Some("/run/keys/llama"));
    }

    #[test]
    fn the_largest_context_and_slot_count_do_not_overflow() {
        let server = Server {
            slots: u16::MAX,
            ..Server::default()
        };
        let model = Model {
            ctx_size: u32::MAX,
            ..model()
        };
        let launch = llama_server("llama-server", &server, "m", &model, None);
        assert_eq!(launch.value_of("-c"), Some("281470681677825"));
    }
}
