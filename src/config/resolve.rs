//! Values that follow from several sections: the model of a server, and the servers of the proxy.

use std::collections::BTreeMap;
use std::fmt;

use super::error::{closest, list};
use super::origin::{Finding, key_path};
use super::{
    Backend, Config, ConfigError, DEFAULT_RPC_PORT, Gpu, GpuBackend, Model, Server, Upstream, Worker, is_loopback,
    is_wildcard,
};

/// [`Config::model_for`] with the message as the error.
pub(super) fn model<'a>(config: &'a Config, wanted: Option<&str>) -> Result<(&'a str, &'a Model), String> {
    let names = || config.models.keys().map(String::as_str);
    let mut models = config.models.iter().map(|(name, model)| (name.as_str(), model));
    let Some(wanted) = wanted else {
        let default = models.clone().find(|(_, model)| model.default);
        return match (default, models.next(), config.models.len()) {
            (Some(default), ..) => Ok(default),
            (None, Some(only), 1) => Ok(only),
            (None, _, 0) => Err("no model: the section models is empty".into()),
            _ => Err(format!(
                "name one of the models {}, or mark one with `default: true`",
                list(names())
            )),
        };
    };
    models
        .find(|(name, _)| *name == wanted)
        .ok_or_else(|| match closest(wanted, names()) {
            Some(meant) => format!("no model `{wanted}`; did you mean {meant}?"),
            None if config.models.is_empty() => format!("no model `{wanted}`; the section models is empty"),
            None => format!("no model `{wanted}`; the models are {}", list(names())),
        })
}

impl Config {
    /// The model with this name. Without a name: the one marked `default`, else the only one.
    pub fn model_for(&self, wanted: Option<&str>) -> Result<(&str, &Model), ConfigError> {
        model(self, wanted)
            .map_err(|message| ConfigError::Invalid(vec![Finding::new(key_path(["models"]), message).into_problem()]))
    }

    /// The proxy's drafters and target: those of the section `proxy`, else those of the sections `draft` and `target` (else `coordinator`).
    #[must_use]
    pub fn proxy_upstreams(&self) -> (Vec<Upstream>, Option<Upstream>) {
        let of_server = |server: &Server| Upstream {
            model_name: self.model_name(server.model.as_deref()),
            api_key: server.api_key.clone(),
            api_key_file: server.api_key_file.clone(),
            asks_local_key: server.asks_local_key(),
            ..Upstream::at(local_url(&server.host, server.port))
        };
        // A URL may also refer to a server of this file.
        let given = |upstream: &Upstream| Upstream {
            asks_local_key: self.servers().any(|(_, server)| upstream.is_keyless_at(server)),
            ..upstream.clone()
        };
        let drafts = self.proxy.iter().flat_map(|proxy| &proxy.draft);
        let mut drafts: Vec<Upstream> = drafts.map(given).collect();
        if drafts.is_empty() {
            drafts.extend(self.draft.as_ref().map(of_server));
        }
        let given = self.proxy.as_ref().and_then(|proxy| proxy.target.as_ref().map(given));
        let target = given.or_else(|| self.target.as_ref().map(of_server)).or_else(|| {
            self.coordinator.as_ref().map(|coordinator| Upstream {
                // No name, because a name would request a swap.
                model_name: None,
                api_key: coordinator.api_key.clone(),
                api_key_file: coordinator.api_key_file.clone(),
                draft_key: coordinator.draft_key.clone(),
                draft_key_file: coordinator.draft_key_file.clone(),
                ..Upstream::at(local_url(&coordinator.host, coordinator.port))
            })
        });
        (drafts, target)
    }

    fn model_name(&self, wanted: Option<&str>) -> Option<String> {
        model(self, wanted).ok().map(|(name, _)| name.to_owned())
    }
}

impl Upstream {
    /// A llama-server at a base URL.
    #[must_use]
    pub fn at(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model_name: None,
            backend: Backend::Llamacpp,
            api_key: None,
            api_key_file: None,
            asks_local_key: false,
            draft_key: None,
            draft_key_file: None,
        }
    }

    /// Whether this URL without a key is the loopback address of a server that requires the local key of this host.
    fn is_keyless_at(&self, server: &Server) -> bool {
        let keyless = self.api_key.is_none() && self.api_key_file.is_none();
        let there = reqwest::Url::parse(&self.url).is_ok_and(|url| {
            url.host_str().is_some_and(is_loopback) && url.port_or_known_default() == Some(server.port)
        });
        keyless && there && server.asks_local_key()
    }
}

impl Server {
    /// Whether it requires the host's [`local_key`](super::local_key): it listens on a loopback address and has no key. The key keeps out web
    /// pages and other users.
    #[must_use]
    pub fn asks_local_key(&self) -> bool {
        let has_key = self.api_key.is_some() || self.api_key_file.is_some();
        !has_key && !self.allow_unauthenticated && is_loopback(&self.host)
    }
}

impl Worker {
    /// A host without any setting for its GPUs.
    #[must_use]
    pub fn at(host: impl Into<String>) -> Self {
        Self {
            name: None,
            host: host.into(),
            backend: None,
            gpus: Vec::new(),
            agent_port: super::DEFAULT_AGENT_PORT,
            agent_token: None,
            agent_token_file: None,
            cache_gb: super::DEFAULT_CACHE_GB,
            cache_dir: None,
            extra_args: Vec::new(),
            env: BTreeMap::new(),
        }
    }

    /// Its name, else its host.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.host)
    }

    /// Whether it has an agent: it has a port for it, and a token unless it listens on a loopback address.
    #[must_use]
    pub fn has_agent(&self) -> bool {
        let token = self.agent_token.is_some() || self.agent_token_file.is_some();
        self.agent_port != 0 && (token || is_loopback(&self.host))
    }

    /// llama.cpp's name of one of its `gpus`: the given one, else by the position in the list; `None` if its backend is not given either.
    #[must_use]
    pub fn device_name(&self, gpu: &Gpu) -> Option<String> {
        if gpu.device.is_some() {
            return gpu.device.clone();
        }
        let number = self.gpus.iter().position(|other| std::ptr::eq(other, gpu))?;
        Some(self.backend?.device_name(number))
    }

    /// Base URL of its agent.
    #[must_use]
    pub fn agent_url(&self) -> String {
        format!("http://{}:{}", self.host, self.agent_port)
    }

    /// Its `ggml-rpc-server`s by port, each with its GPUs. Without GPUs, one server on the default port.
    #[must_use]
    pub fn rpc_endpoints(&self) -> BTreeMap<u16, Vec<&Gpu>> {
        let mut endpoints: BTreeMap<u16, Vec<&Gpu>> = BTreeMap::new();
        for gpu in &self.gpus {
            endpoints
                .entry(gpu.rpc_port.unwrap_or(DEFAULT_RPC_PORT))
                .or_default()
                .push(gpu);
        }
        if endpoints.is_empty() {
            endpoints.insert(DEFAULT_RPC_PORT, Vec::new());
        }
        endpoints
    }
}

impl GpuBackend {
    /// llama.cpp's name of the device with this number.
    #[must_use]
    pub fn device_name(self, number: usize) -> String {
        match self {
            Self::Cpu => "CPU".to_owned(),
            gpu => format!("{gpu}{number}"),
        }
    }

    /// Whether llama.cpp uses this name for a device of this kind.
    #[must_use]
    pub fn is_named(self, device: &str) -> bool {
        let number = device.strip_prefix(&self.to_string());
        number.is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit()))
    }

    /// This kind, unless it is the CPU.
    #[must_use]
    pub fn gpu(self) -> Option<Self> {
        (self != Self::Cpu).then_some(self)
    }
}

/// Prefix of llama.cpp's device names.
impl fmt::Display for GpuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hip => "ROCm",
            Self::Cuda => "CUDA",
            Self::Vulkan => "Vulkan",
            Self::Metal => "MTL",
            Self::Cpu => "CPU",
        })
    }
}

/// The URL of a listener for a client on the same host.
#[must_use]
pub fn local_url(host: &str, port: u16) -> String {
    if is_wildcard(host) {
        format!("http://127.0.0.1:{port}")
    } else if host.contains(':') {
        format!("http://[{host}]:{port}")
    } else {
        format!("http://{host}:{port}")
    }
}
