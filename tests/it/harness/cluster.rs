use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::llama_server::{Program, answer_of, llama_cpp, model};

/// What every secret of the cluster is.
const SECRET: &str = "known to all of its hosts";

/// All roles of a cluster on this machine, each as its unit would run it: from the file of the role, the hosts have loopback
/// addresses in place of their own, the models are tiny ones on the CPU, and each role has the credentials of its unit and no
/// other secret.
pub struct Cluster {
    /// The cluster file with this machine's addresses.
    pub config: Value,
    machine: Machine,
    roles: Vec<(String, Program)>,
    folder: TempDir,
}

impl Cluster {
    /// Starts every role of the folder, which has `cluster.json` and a file of each role.
    pub fn start(rendered: &Path) -> Self {
        let mut config = read(&rendered.join("cluster.json"));
        let mut machine = Machine {
            draft_model: config["draft"]["model"].as_str().map(str::to_owned),
            // A network of its own, so that the ports of the file are free there.
            network: [1 + rand::random::<u8>() % 250, rand::random()],
            addresses: BTreeMap::new(),
        };
        machine.takes(&mut config);
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let mut cluster = Self {
            config,
            machine,
            roles: Vec::new(),
            folder,
        };
        let workers: Vec<Value> = cluster.config["workers"].as_array().cloned().unwrap_or_default();
        for worker in workers {
            let name = worker["name"].as_str().or(worker["host"].as_str()).expect("a name");
            let own = format!("workers.{name}.");
            cluster.run(rendered, &["worker", name], &[&own]);
        }
        // A proxy that is given no target takes that of the file.
        let behind = if cluster.config["target"].is_object() {
            "target."
        } else {
            "coordinator."
        };
        for (role, keys) in [
            ("coordinator", ["coordinator.", "workers."].as_slice()),
            ("target", &["target."]),
            ("draft", &["draft."]),
            ("proxy", &["proxy.", behind, "draft."]),
        ] {
            if cluster.config[role].is_object() {
                cluster.run(rendered, &[role], keys);
            }
        }
        cluster
    }

    /// Runs a role from its file, with the secrets of the keys that begin so.
    fn run(&mut self, rendered: &Path, role: &[&str], keys: &[&str]) {
        let folder = self.folder.path().join(role.join("-"));
        std::fs::create_dir(&folder).expect("a folder for the role");
        let mut part = read(&rendered.join(role[0]).with_extension("json"));
        self.machine.takes(&mut part);
        let config = folder.join("tightwad.yaml");
        std::fs::write(&config, part.to_string()).expect("the config is written");
        // The key that the roles of a host share.
        std::fs::write(folder.join("local_key"), SECRET).expect("a credential");
        for key in secrets(&part) {
            if keys.iter().any(|own| key.starts_with(own)) {
                std::fs::write(folder.join(key), SECRET).expect("a credential");
            }
        }
        // The units of a host share it, each as a user of its own.
        std::fs::write(folder.join("local_key"), SECRET).expect("a credential");
        let folder = folder.to_str().expect("a path in UTF-8");
        let own = [
            "XDG_RUNTIME_DIR",
            "XDG_STATE_HOME",
            "XDG_CACHE_HOME",
            "CREDENTIALS_DIRECTORY",
        ];
        let mut args: Vec<String> = own.iter().map(|variable| format!("{variable}={folder}")).collect();
        let config = config.to_str().expect("a path in UTF-8");
        args.extend([env!("CARGO_BIN_EXE_tightwad"), "-c", config, "run"].map(str::to_owned));
        args.extend(role.iter().map(|word| (*word).to_owned()));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.roles
            .push((role.join(" "), Program::start(Path::new("env"), &args)));
    }

    /// Where a section listens.
    pub fn url(&self, section: &str) -> String {
        let (host, port) = (&self.config[section]["host"], &self.config[section]["port"]);
        format!("http://{}:{port}", host.as_str().expect("an address"))
    }

    pub async fn get(&self, section: &str, path: &str) -> (u16, Value) {
        let request = reqwest::Client::new().get(format!("{}{path}", self.url(section)));
        answer_of(request.bearer_auth(SECRET)).await
    }

    pub async fn post(&self, section: &str, path: &str, body: &Value) -> (u16, Value) {
        let request = reqwest::Client::new().post(format!("{}{path}", self.url(section)));
        answer_of(request.bearer_auth(SECRET).json(body)).await
    }

    /// Waits until a section's status shows something, while all roles run.
    pub async fn shows(&mut self, section: &str, what: &str, within: Duration, is_so: impl Fn(&Value) -> bool) {
        let url = format!("{}/v1/tightwad/status", self.url(section));
        let give_up = Instant::now() + within;
        loop {
            let request = reqwest::Client::new().get(&url).bearer_auth(SECRET).send();
            let status: Value = match request.await {
                Ok(answer) => answer.json().await.unwrap_or_default(),
                Err(error) => json!(error.to_string()),
            };
            if is_so(&status) {
                return;
            }
            for (role, program) in &mut self.roles {
                assert!(program.is_alive(), "{role} has ended:\n{}", program.log());
            }
            assert!(
                Instant::now() < give_up,
                "the {section} does not show {what}: {status:#}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// The names of the credentials that the file's keys ask for.
fn secrets(config: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo = vec![(String::new(), config)];
    while let Some((path, value)) = todo.pop() {
        let entries: Vec<(String, &Value)> = match value {
            Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
            Value::Array(list) => {
                let name = |(number, value): (usize, &Value)| match value["name"].as_str().or(value["host"].as_str()) {
                    Some(name) => name.to_owned(),
                    None => number.to_string(),
                };
                list.iter().enumerate().map(|entry| (name(entry), entry.1)).collect()
            }
            _ => Vec::new(),
        };
        for (key, value) in entries {
            let path = if path.is_empty() { key } else { format!("{path}.{key}") };
            if path.ends_with("_file") && value.is_string() {
                found.push(path.clone());
            }
            todo.push((path, value));
        }
    }
    found
}

fn read(file: &Path) -> Value {
    let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_str(&text).expect("JSON")
}

/// What the files of a cluster have to become on this machine, which is the same for all of them.
struct Machine {
    draft_model: Option<String>,
    network: [u8; 2],
    addresses: BTreeMap<Ipv4Addr, Ipv4Addr>,
}

impl Machine {
    /// Changes what this machine does not have.
    fn takes(&mut self, config: &mut Value) {
        self.relocate(config);
        for (name, entry) in members(config, "models") {
            let gguf = if Some(name) == self.draft_model.as_ref() {
                "tightwad-tiny-draft-f16.gguf"
            } else {
                "tightwad-tiny-target-q8_0.gguf"
            };
            let default = entry["default"] == true;
            *entry = json!({ "path": model(gguf), "ctx_size": 1024, "default": default });
        }
        for section in ["coordinator", "target", "draft"] {
            // The proxy's file has no more of a server than where that listens.
            let Some(section) = config.get_mut(section).and_then(Value::as_object_mut) else {
                continue;
            };
            section.insert("threads".into(), json!(1));
            section.insert("extra_args".into(), json!(["--no-warmup"]));
            section.remove("env");
            section.remove("backend");
        }
        if let Some(coordinator) = config.get_mut("coordinator").and_then(Value::as_object_mut) {
            coordinator.insert("backend".into(), json!("cpu"));
            coordinator.insert("gpus".into(), json!([]));
        }
        for worker in config
            .get_mut("workers")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            let worker = worker.as_object_mut().expect("a worker");
            let port = worker["gpus"][0]["rpc_port"].as_u64().unwrap_or(50052);
            worker.insert("backend".into(), json!("cpu"));
            let gpu = json!({ "name": "a CPU", "vram_gb": 1, "rpc_port": port });
            worker.insert("gpus".into(), json!([gpu]));
            worker.insert("cache_gb".into(), json!(0));
            for key in ["env", "extra_args", "cache_dir"] {
                worker.remove(key);
            }
        }
        config["binaries"] = json!({
            "llama_server": llama_cpp().join("bin/llama-server"),
            "rpc_server": llama_cpp().join("bin/ggml-rpc-server"),
        });
    }

    /// Gives each address a loopback address, also in URLs.
    fn relocate(&mut self, value: &mut Value) {
        match value {
            Value::Object(map) => map.values_mut().for_each(|value| self.relocate(value)),
            Value::Array(list) => list.iter_mut().for_each(|value| self.relocate(value)),
            Value::String(text) => {
                let host = text.strip_prefix("http://").unwrap_or(text);
                let host = host.split([':', '/']).next().unwrap_or_default().to_owned();
                let Ok(address) = host.parse::<Ipv4Addr>() else { return };
                if address.is_unspecified() {
                    return;
                }
                let number = u8::try_from(self.addresses.len() + 1).expect("few hosts");
                let [a, b] = self.network;
                let own = *self
                    .addresses
                    .entry(address)
                    .or_insert(Ipv4Addr::new(127, a, b, number));
                *text = text.replace(&host, &own.to_string());
            }
            _ => {}
        }
    }
}

/// The members of a section, if there is one.
fn members<'a>(config: &'a mut Value, section: &str) -> impl Iterator<Item = (&'a String, &'a mut Value)> {
    config
        .get_mut(section)
        .and_then(Value::as_object_mut)
        .into_iter()
        .flatten()
}
