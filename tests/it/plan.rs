//! `tightwad plan`: what it says of a pool, and that llama-server does it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use crate::harness::llama_server::{Program, free_port, llama_cpp, target};
use crate::harness::wait::eventually;
use serde_json::Value;

/// A folder with a config.
struct Pool(tempfile::TempDir);

impl Pool {
    fn new(yaml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tightwad.yaml"), yaml).unwrap();
        Self(folder)
    }

    fn plan(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
        command.arg("plan").args(args).current_dir(self.0.path()).env_clear();
        command
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.0.path());
        command.output().unwrap()
    }

    /// Plans with at most so many KiB of memory.
    fn plan_within(&self, kib: u32) -> Output {
        let command = format!("ulimit -v {kib}; exec \"$0\" plan");
        let mut shell = Command::new("sh");
        shell.args(["-c", &command, env!("CARGO_BIN_EXE_tightwad")]);
        shell
            .current_dir(self.0.path())
            .env("HOME", self.0.path())
            .output()
            .unwrap()
    }

    fn json(&self) -> Value {
        let output = self.plan(&["--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }
}

/// A file with the model, a coordinator, these workers, and a llama-server that can be asked for its help.
fn yaml(model: &Path, keys: &str, workers: &str) -> String {
    format!(
        "coordinator: {{ slots: 2 }}\nworkers: {workers}\nmodels: {{ tiny: {{ path: {}, ctx_size: 1024, {keys} }} }}\n\
         binaries: {{ llama_server: {} }}\n",
        model.display(),
        llama_cpp().join("bin/llama-server").display()
    )
}

/// A worker without an agent.
fn worker(port: u16, gib: f64) -> String {
    format!(
        "{{ name: w{port}, host: 127.0.0.1, agent_port: 0, backend: cpu, \
         gpus: [ {{ name: cpu, vram_gb: {gib}, rpc_port: {port} }} ] }}"
    )
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A `ggml-rpc-server` on this machine's CPU that listens.
async fn rpc_server(port: u16) -> Program {
    let port_text = port.to_string();
    let program = Program::start(
        &llama_cpp().join("bin/ggml-rpc-server"),
        &["--device", "CPU", "-H", "127.0.0.1", "-p", &port_text],
    );
    // Nobody else is served by it yet, so a connection that is closed at once harms nobody.
    let listens = eventually(Duration::from_secs(20), || async {
        TcpStream::connect(("127.0.0.1", port))
    })
    .await;
    assert!(listens.is_ok(), "{}", program.log());
    program
}

/// Amounts of MiB that llama-server's log tells for buffers of this kind on an endpoint.
fn printed(log: &str, kind: &str, endpoint: &str) -> f64 {
    let line = log
        .lines()
        .find(|line| line.contains(endpoint) && line.contains(kind))
        .unwrap_or_else(|| panic!("no {kind} of {endpoint} in:\n{log}"));
    line.split('=')
        .nth(1)
        .unwrap()
        .trim()
        .trim_end_matches(" MiB")
        .trim()
        .parse()
        .unwrap()
}

#[tokio::test]
async fn llama_server_puts_the_layers_where_the_plan_says_and_needs_what_it_says() {
    let ports = [free_port(), free_port()];
    let _servers = [rpc_server(ports[0]).await, rpc_server(ports[1]).await];
    let workers = format!("[ {}, {} ]", worker(ports[0], 2.0), worker(ports[1], 4.0));
    let pool = Pool::new(&yaml(&target(), "", &workers));
    let plan = pool.json();
    assert_eq!(plan["fits"], true, "{plan:#}");
    let layers: Vec<u64> = plan["placements"]
        .as_array()
        .unwrap()
        .iter()
        .map(|placement| placement["layers"].as_u64().unwrap())
        .collect();
    assert!(
        layers[0] > 0 && layers[0] < layers[1] && layers.iter().sum::<u64>() == 7,
        "{layers:?}"
    );

    let command: Vec<&str> = plan["command"]
        .as_array()
        .unwrap()
        .iter()
        .map(|word| word.as_str().unwrap())
        .collect();
    let port = free_port().to_string();
    let more = ["--port", port.as_str(), "--verbose", "-t", "1"];
    let server = Program::start(Path::new(command[0]), &[&command[1..], &more].concat());
    let url = format!("http://127.0.0.1:{port}/health");
    let healthy = eventually(Duration::from_secs(60), || async {
        match reqwest::get(&url).await {
            Ok(answer) if answer.status().is_success() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    if let Err(error) = healthy.await {
        panic!("{error}\n{}", server.log());
    }
    let log = server.log();
    for (device, count) in layers.iter().enumerate() {
        let on_device = format!("assigned to device RPC{device},");
        let assigned = log.lines().filter(|line| line.contains(&on_device)).count() as u64;
        assert_eq!(assigned, *count, "layers on RPC{device}");
        let endpoint = format!("127.0.0.1:{}", ports[device]);
        let placement = &plan["placements"][device];
        for (key, kind, most) in [
            ("weights_bytes", "model buffer size", 1.01),
            ("kv_bytes", "KV buffer size", 1.01),
            ("compute_bytes", "compute buffer size", 1.6),
        ] {
            let planned = placement[key].as_f64().unwrap() / f64::from(1 << 20);
            let printed = printed(&log, kind, &endpoint);
            let ratio = planned / printed;
            assert!(
                (0.99..most).contains(&ratio),
                "{key} of RPC{device}: {planned} planned, {printed} printed"
            );
        }
    }
}

#[test]
fn the_plan_for_people_names_devices_layers_and_the_command() {
    let pool = Pool::new(&yaml(
        &target(),
        "",
        &format!("[ {}, {} ]", worker(50_052, 2.0), worker(50_053, 2.0)),
    ));
    let output = pool.plan(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "tiny: ",
        "RPC0",
        "RPC1",
        ", output",
        "  w50052: CPU cpu\n",
        "It fits",
        "note: worker w50052 has no agent; its `vram_gb` is taken as free memory",
        "--rpc 127.0.0.1:50052,127.0.0.1:50053 --device RPC0,RPC1 --split-mode layer --tensor-split ",
        "-ngl 999 --fit off",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
}

#[test]
fn a_plan_for_80_columns_breaks_between_words_and_its_command_can_be_pasted() {
    let workers = format!("[ {}, {} ]", worker(50_052, 2.0), worker(50_053, 2.0));
    let pool = Pool::new(&yaml(&target(), "", &workers));
    let wide = String::from_utf8(pool.plan(&[]).stdout).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
    command.arg("plan").current_dir(pool.0.path()).env("COLUMNS", "80");
    let narrow = String::from_utf8(command.output().unwrap().stdout).unwrap();
    // A path may be longer than a line.
    let too_long = narrow
        .lines()
        .filter(|line| line.chars().count() > 80 && line.trim().contains(' '));
    let too_long: Vec<&str> = too_long
        .filter(|line| !line.trim_end_matches(" \\").trim().starts_with('/'))
        .collect();
    assert!(too_long.is_empty(), "{too_long:?}\n{narrow}");
    let words = |text: &str| {
        text.split_whitespace()
            .filter(|word| *word != "\\")
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(words(&narrow), words(&wide));
}

#[test]
fn a_model_that_does_not_fit_exits_9_with_what_would_make_it_fit() {
    let pool = Pool::new(&yaml(
        &target(),
        "cache_type_k: f32, cache_type_v: f32",
        &format!("[ {} ]", worker(50_052, 0.53)),
    ));
    let output = pool.plan(&[]);
    assert_eq!(output.status.code(), Some(9), "{}", stderr(&output));
    let sentence = stderr(&output);
    assert!(
        sentence.contains("tiny does not fit into the pool") && sentence.contains("one more worker with 1 GiB"),
        "{sentence}"
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("It does not fit") && !text.contains("--rpc"),
        "no command for it: {text}"
    );
    let plan = pool.json();
    assert_eq!(plan["fits"], false);
    assert!(
        plan["suggestions"]
            .as_array()
            .is_some_and(|suggestions| !suggestions.is_empty()),
        "{plan:#}"
    );
}

#[test]
fn missing_and_broken_models_are_named_and_have_exit_codes_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let truncated: PathBuf = folder.path().join("truncated.gguf");
    std::fs::write(&truncated, &std::fs::read(target()).unwrap()[..1_000_000]).unwrap();
    for (model, code, says) in [
        (Path::new("/no/such.gguf"), 4, "does not exist"),
        (&truncated, 11, "is truncated"),
    ] {
        let output = Pool::new(&yaml(model, "", "[]")).plan(&[]);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        let sentence = stderr(&output);
        assert!(
            sentence.contains(says) && sentence.contains(model.to_str().unwrap()),
            "{sentence}"
        );
    }
}

#[test]
fn a_small_file_that_claims_millions_of_tensors_is_refused_at_once_and_in_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("holes.gguf");
    let counts = [50_000_000_u64, 0].map(u64::to_le_bytes).concat();
    std::fs::write(&model, [b"GGUF\x03\0\0\0", counts.as_slice()].concat()).unwrap();
    // As long as it must be for so many, and on the disk it takes one block.
    std::fs::File::options()
        .write(true)
        .open(&model)
        .unwrap()
        .set_len(2 << 30)
        .unwrap();
    let pool = Pool::new(&yaml(&model, "", "[]"));
    let began = std::time::Instant::now();
    let output = pool.plan_within(500_000);
    assert_eq!(output.status.code(), Some(11), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("it names 50000000 tensors"),
        "{}",
        stderr(&output)
    );
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn a_pool_without_devices_or_with_too_many_exits_3_and_says_what_to_do() {
    let none = Pool::new(&yaml(&target(), "", "[]")).plan(&[]);
    assert_eq!(none.status.code(), Some(3));
    assert!(stderr(&none).contains("the pool has no device"), "{}", stderr(&none));
    let workers: Vec<String> = (0..16).map(|number| worker(50_052 + number, 2.0)).collect();
    let many = Pool::new(&yaml(&target(), "", &format!("[ {} ]", workers.join(", ")))).plan(&[]);
    assert_eq!(many.status.code(), Some(3));
    assert!(
        stderr(&many).contains("16 devices") && stderr(&many).contains("at most 15"),
        "{}",
        stderr(&many)
    );
}

#[test]
fn an_agent_tells_devices_and_their_free_memory() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let agent_port = listener.local_addr().unwrap().port();
    let status = serde_json::json!({
        "name": "attic", "build": "b11434", "protocol": "7.0.0", "lease": null, "cache_bytes": 0, "cache_quota_bytes": 0,
        "last_lines": [], "endpoints": [ { "port": 50052, "state": "idle", "devices": [
            { "name": "CUDA0", "description": "RTX", "total_bytes": 16u64 << 30, "free_bytes": 15u64 << 30 },
            { "name": "CUDA1", "description": "RTX", "total_bytes": 16u64 << 30, "free_bytes": 14u64 << 30 },
        ] } ]
    })
    .to_string();
    let agent = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && client.read(&mut byte).unwrap() > 0 {
            request.extend(byte);
        }
        write!(
            client,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{status}",
            status.len()
        )
        .unwrap();
        String::from_utf8(request).unwrap()
    });
    let worker = format!("[ {{ name: attic, host: 127.0.0.1, agent_port: {agent_port}, agent_token: hush }} ]");
    let plan = Pool::new(&yaml(&target(), "", &worker)).json();
    let request = agent.join().unwrap();
    assert!(request.starts_with("GET /v1/worker HTTP/1.1"), "{request}");
    assert!(
        request.to_lowercase().contains("authorization: bearer hush"),
        "{request}"
    );
    let placements = plan["placements"].as_array().unwrap();
    assert_eq!(placements.len(), 2, "{plan:#}");
    assert_eq!(placements[1]["device"]["free_bytes"], 14u64 << 30);
    assert_eq!(placements[1]["device"]["known_from"], "agent");
    assert_eq!(plan["notes"], serde_json::json!([]));
}
