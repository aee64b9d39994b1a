//! Turns a [`Plan`] into the command line of the coordinator's llama-server.

use std::ffi::OsString;

use crate::config::{Coordinator, Model, Server};
use crate::plan::Plan;
use crate::supervise::command::{self, Launch, Pool};

/// The command line that places layers as planned, for a llama-server that listens on `host` and `port`.
#[must_use]
pub fn launch(
    plan: &Plan,
    program: impl Into<OsString>,
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
    command::coordinator(program, &server, name, model, plan.settings.draft_tokens, &share(plan))
}

/// The devices that get layers, by their names on the command line.
fn share(plan: &Plan) -> Pool {
    let used = || plan.placements.iter().filter(|placement| placement.layers > 0);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::builder::{config, device, model, settings};
    use crate::plan::plan;

    #[test]
    fn layers_follow_the_free_memory_and_the_workers_come_first() {
        let devices = [device(Some("a:1"), 24_000), device(None, 12_000)];
        let plan = plan(&model(&[500; 29]), &devices, &settings()).unwrap();
        assert!(plan.fits && plan.suggestions.is_empty());
        let pool = share(&plan);
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
        let pool = share(&plan);
        assert_eq!(pool.rpc, ["a:1", "b:1"]);
        assert_eq!(pool.devices, ["RPC1", "RPC2"]);
        assert_eq!(pool.layers.len(), 2);
    }

    #[test]
    fn several_amd_gpus_get_their_environment_unless_the_config_says_otherwise() {
        let (model_config, mut coordinator) = config();
        let gpu = serde_json::json!({ "name": "7900 XTX", "vram_gb": 24.0 });
        coordinator.gpus = vec![serde_json::from_value(gpu).unwrap(); 2];
        coordinator.env.insert("GPU_MAX_HW_QUEUES".into(), "4".into());
        let plan = plan(&model(&[10]), &[device(None, 24_000)], &settings()).unwrap();
        let launch = launch(
            &plan,
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
}
