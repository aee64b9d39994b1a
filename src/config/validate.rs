//! Checks that the types cannot express: values and combinations that would fail later, or that are probably unwanted.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use super::origin::{Finding, KeyPath, key_path};
use super::{Config, ConfigError, MaxDraftTokens, Proxy, Secret, Server, Upstream, is_loopback, is_wildcard};

/// Upper limit of `max_draft_tokens`; more never pays.
const MAX_DRAFT_TOKENS: u16 = 256;

/// Names of the sections, for a file without any.
pub(super) const SECTIONS: &str = "give at least one of the sections proxy, target, draft, coordinator, workers";

/// All problems.
pub(super) fn problems(config: &Config) -> Vec<Finding> {
    let mut check = Check::default();
    check.sections(config);
    if let Some(proxy) = &config.proxy {
        check.proxy(config, proxy);
    }
    for (name, server) in config.servers() {
        check.server(config, name, server);
    }
    if let Some(coordinator) = &config.coordinator {
        check.listener("coordinator", &coordinator.host);
        check.origins("coordinator", &coordinator.cors_origins);
        check.port(&["coordinator", "port"], coordinator.port);
        check.secret(
            &["coordinator"],
            "api_key",
            coordinator.api_key.as_ref(),
            coordinator.api_key_file.as_deref(),
        );
        check.secret(
            &["coordinator"],
            "draft_key",
            coordinator.draft_key.as_ref(),
            coordinator.draft_key_file.as_deref(),
        );
        check.gpus(&["coordinator"], &coordinator.gpus);
        if config.models.is_empty() {
            check.found(&["models"], "missing; the coordinator needs a model");
        }
    }
    check.workers(config);
    check.models(config);
    check.shared_ports(config);
    check.findings
}

/// Settings that are allowed but probably unwanted.
pub(super) fn warnings(config: &Config) -> Vec<Finding> {
    let mut check = Check::default();
    if rpc_endpoints(config).len() > 2 {
        check.found(
            &["workers"],
            "three or more RPC endpoints are reported to hang llama-server (ggml-org/llama.cpp#28487); one endpoint \
             per host keeps them few",
        );
    }
    check.findings
}

/// Refusals to listen on a non-loopback address without a token, each with its section.
pub(super) fn open_listeners(config: &Config) -> impl Iterator<Item = (&'static str, Finding)> {
    let proxy = config.proxy.iter().map(|proxy| {
        let has_token = proxy.auth_token.is_some() || proxy.auth_token_file.is_some();
        let closed = has_token || proxy.allow_unauthenticated;
        ("proxy", "auth_token", "token", proxy.host.as_str(), closed)
    });
    let coordinator = config.coordinator.iter().map(|coordinator| {
        let has_key = coordinator.api_key.is_some() || coordinator.api_key_file.is_some();
        let closed = has_key || coordinator.allow_unauthenticated;
        ("coordinator", "api_key", "key", coordinator.host.as_str(), closed)
    });
    let servers = config.servers().map(|(name, server)| {
        let has_key = server.api_key.is_some() || server.api_key_file.is_some();
        let closed = has_key || server.allow_unauthenticated;
        (name, "api_key", "key", server.host.as_str(), closed)
    });
    let open = proxy
        .chain(coordinator)
        .chain(servers)
        .filter(|(.., host, closed)| !closed && !is_loopback(host));
    open.map(|(section, key, what, host, _)| {
        let finding = Finding::new(
            key_path([section, "host"]),
            format!(
                "refusing to listen on {host} without a {what}: set {section}.{key}_file (or {section}.{key}), or set \
                 {section}.allow_unauthenticated: true if everybody who reaches this address may use it"
            ),
        );
        (section, finding)
    })
}

impl Config {
    /// Refuses a part that would listen on a non-loopback address without a token. Not a part of parsing, because only a part that listens must
    /// be refused.
    pub fn check_listeners(&self) -> Result<(), ConfigError> {
        let findings = open_listeners(self).map(|(_, finding)| finding.into_problem());
        ConfigError::unless_none(findings.collect())
    }

    /// The sections `target` and `draft`, by name.
    pub(super) fn servers(&self) -> impl Iterator<Item = (&'static str, &Server)> {
        let target = self.target.as_ref().map(|server| ("target", server));
        let draft = self.draft.as_ref().map(|server| ("draft", server));
        target.into_iter().chain(draft)
    }
}

/// Name, host and whether it has a key, of each llama-server.
/// The first place of each `host:port` that a worker serves, with the worker's number.
fn rpc_endpoints(config: &Config) -> BTreeMap<(&str, u16), usize> {
    let mut endpoints = BTreeMap::new();
    for (number, worker) in config.workers.iter().enumerate() {
        for port in worker.rpc_endpoints().into_keys() {
            endpoints.entry((worker.host.as_str(), port)).or_insert(number);
        }
    }
    endpoints
}

#[derive(Default)]
struct Check {
    findings: Vec<Finding>,
}

impl Check {
    fn found(&mut self, path: &[&str], message: impl Into<String>) {
        self.findings
            .push(Finding::new(key_path(path.iter().copied()), message));
    }

    fn sections(&mut self, config: &Config) {
        let any = config.proxy.is_some()
            || config.target.is_some()
            || config.draft.is_some()
            || config.coordinator.is_some()
            || !config.workers.is_empty();
        if !any {
            self.found(
                &[],
                format!("nothing to run: {SECTIONS} (`proxy: {{}}` for one with nothing but defaults)"),
            );
        }
    }

    fn proxy(&mut self, config: &Config, proxy: &Proxy) {
        self.listener("proxy", &proxy.host);
        self.origins("proxy", &proxy.cors_origins);
        for upstream in &proxy.draft {
            self.upstream(proxy, "draft", upstream);
        }
        if let Some(upstream) = &proxy.target {
            self.upstream(proxy, "target", upstream);
        }
        if proxy.target.is_none() && config.target.is_none() && config.coordinator.is_none() {
            let message = "missing; give proxy.target, or a section target or coordinator in this file";
            self.found(&["proxy", "target"], message);
        }
        if let MaxDraftTokens::AtMost(n) = proxy.max_draft_tokens
            && n > MAX_DRAFT_TOKENS
        {
            self.found(
                &["proxy", "max_draft_tokens"],
                format!("{n} is more than {MAX_DRAFT_TOKENS}; `auto` is best"),
            );
        }
        self.secret(
            &["proxy"],
            "auth_token",
            proxy.auth_token.as_ref(),
            proxy.auth_token_file.as_deref(),
        );
        for (key, zero) in [
            ("max_body_size", proxy.max_body_size == 0),
            ("max_tokens_limit", proxy.max_tokens_limit == Some(0)),
            ("keepalive_seconds", proxy.keepalive_seconds == 0),
        ] {
            if zero {
                self.found(&["proxy", key], "must be more than 0");
            }
        }
    }

    fn upstream(&mut self, proxy: &Proxy, name: &str, upstream: &Upstream) {
        let path = ["proxy", name, "url"];
        match reqwest::Url::parse(&upstream.url) {
            _ if !upstream.url.starts_with("http://") && !upstream.url.starts_with("https://") => {
                let example = "such as http://192.168.1.100:8080";
                self.found(
                    &path,
                    format!("`{}` is not a URL with http:// or https://, {example}", upstream.url),
                );
            }
            Err(error) => self.found(&path, format!("`{}` is not a URL: {error}", upstream.url)),
            Ok(url) => {
                if !url.username().is_empty() || url.password().is_some() {
                    self.found(&path, "must not hold a user or password; use api_key_file");
                } else if url.query().is_some() || url.fragment().is_some() {
                    self.found(&path, "must not hold `?` or `#`; give the base URL");
                } else if url.path().trim_end_matches('/').ends_with("/v1") {
                    self.found(&path, format!("`{}`: give the base URL, without /v1", upstream.url));
                }
                let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
                let local = is_loopback(&proxy.host) || is_wildcard(&proxy.host);
                let own_host = host == proxy.host || (is_loopback(host) && local);
                if own_host && url.port_or_known_default() == Some(proxy.port) {
                    self.found(&path, format!("`{}` is the proxy itself", upstream.url));
                }
            }
        }
        self.secret(
            &["proxy", name],
            "api_key",
            upstream.api_key.as_ref(),
            upstream.api_key_file.as_deref(),
        );
        self.secret(
            &["proxy", name],
            "draft_key",
            upstream.draft_key.as_ref(),
            upstream.draft_key_file.as_deref(),
        );
        if name == "draft" && (upstream.draft_key.is_some() || upstream.draft_key_file.is_some()) {
            let given = if upstream.draft_key.is_some() {
                "draft_key"
            } else {
                "draft_key_file"
            };
            self.found(
                &["proxy", name, given],
                "is a key of the target: move it to proxy.target",
            );
        }
    }

    fn server(&mut self, config: &Config, name: &str, server: &Server) {
        self.listener(name, &server.host);
        self.port(&[name, "port"], server.port);
        if let Err(message) = super::resolve::model(config, server.model.as_deref()) {
            self.found(&[name, "model"], message);
        }
        if server.slots == 0 {
            self.found(&[name, "slots"], "must be more than 0");
        }
        if server.threads == Some(0) {
            self.found(
                &[name, "threads"],
                "must be more than 0; leave it out for llama-server's choice",
            );
        }
        self.secret(
            &[name],
            "api_key",
            server.api_key.as_ref(),
            server.api_key_file.as_deref(),
        );
    }

    fn workers(&mut self, config: &Config) {
        let endpoints = rpc_endpoints(config);
        for (number, worker) in config.workers.iter().enumerate() {
            let index = number.to_string();
            let path = ["workers", index.as_str()];
            self.gpus(&path, &worker.gpus);
            let host = worker.host.as_str();
            let message = if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == '/') {
                Some(format!("`{host}` is not an address or a name"))
            } else if host.contains(':') {
                Some(format!(
                    "`{host}`: give an IPv4 address or a name (llama.cpp's RPC knows no IPv6), without a port"
                ))
            } else if is_wildcard(host) {
                Some(format!(
                    "{host} is not an address that the coordinator can reach; give the host's own"
                ))
            } else {
                let taken = worker
                    .rpc_endpoints()
                    .into_keys()
                    .find(|port| endpoints.get(&(host, *port)) < Some(&number));
                taken.map(|port| format!("{host} with rpc_port {port} is in the list already; give another rpc_port"))
            };
            match message {
                Some(message) => self.found(&["workers", &index, "host"], message),
                None => self.agent(&path, worker, &config.workers[..number]),
            }
            if !(worker.cache_gb >= 0.0 && worker.cache_gb.is_finite()) {
                let message = format!("{} GiB; must be 0 (none) or more", worker.cache_gb);
                self.found(&["workers", &index, "cache_gb"], message);
            }
            if let Some(folder) = &worker.cache_dir {
                self.path(&["workers", &index, "cache_dir"], folder);
                let shares = |other: &&super::Worker| other.host == host && other.cache_dir.as_ref() == Some(folder);
                if let Some(other) = config.workers[..number].iter().find(shares) {
                    let message = format!(
                        "the worker {} on the same host has it; give another folder",
                        other.name()
                    );
                    self.found(&["workers", &index, "cache_dir"], message);
                }
            }
        }
    }

    /// Checks a worker's name, token and ports. `earlier` are the workers before it in the list.
    fn agent(&mut self, path: &[&str], worker: &super::Worker, earlier: &[super::Worker]) {
        let at = |key| [path, &[key]].concat();
        self.secret(
            path,
            "agent_token",
            worker.agent_token.as_ref(),
            worker.agent_token_file.as_deref(),
        );
        if earlier.iter().any(|other| other.name() == worker.name()) {
            let message = format!("another worker is called {} already; give another name", worker.name());
            self.found(&at("name"), message);
        }
        if !worker.has_agent() {
            return;
        }
        let port = worker.agent_port;
        if worker.rpc_endpoints().contains_key(&port) {
            self.found(
                &at("agent_port"),
                format!("{port} is an rpc_port of it; give another port"),
            );
        }
        let clash = earlier.iter().find(|other| {
            let takes = (other.has_agent() && other.agent_port == port) || other.rpc_endpoints().contains_key(&port);
            other.host == worker.host && takes
        });
        if let Some(other) = clash {
            let message = format!(
                "{port} is taken by the worker {} on the same host; give another port",
                other.name()
            );
            self.found(&at("agent_port"), message);
        }
    }

    fn gpus(&mut self, path: &[&str], gpus: &[super::Gpu]) {
        for (number, gpu) in gpus.iter().enumerate() {
            let index = number.to_string();
            let at = |key| [path, &["gpus", &index, key]].concat();
            if !(gpu.vram_gb > 0.0 && gpu.vram_gb.is_finite()) {
                self.found(&at("vram_gb"), format!("{} GiB; must be more than 0", gpu.vram_gb));
            }
            if gpu.rpc_port == Some(0) {
                self.found(&at("rpc_port"), "must be a port from 1 to 65535");
            }
        }
    }

    fn models(&mut self, config: &Config) {
        let mut default: Option<&str> = None;
        for (name, model) in &config.models {
            if name.is_empty() {
                self.found(&["models", name], "a model needs a name");
            }
            self.path(&["models", name, "path"], &model.path);
            if model.predict == Some(0) {
                self.found(
                    &["models", name, "predict"],
                    "must be more than 0; leave it out for no limit",
                );
            }
            if model.default {
                match default {
                    Some(first) => self.found(
                        &["models", name, "default"],
                        format!("{first} is the default already; keep one"),
                    ),
                    None => default = Some(name),
                }
            }
        }
    }

    fn listener(&mut self, section: &str, host: &str) {
        let name = !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || "/:[]".contains(c));
        if !name && host.parse::<Ipv6Addr>().is_err() {
            self.found(
                &[section, "host"],
                format!("`{host}` is not an address; the port has its own key"),
            );
        }
    }

    fn origins(&mut self, section: &str, origins: &[String]) {
        for (number, origin) in origins.iter().enumerate() {
            let authority = origin.split_once("://").map(|(_, authority)| authority);
            let odd = |c: char| c.is_whitespace() || c.is_control() || !c.is_ascii() || "/?#@,*".contains(c);
            let message = match authority {
                _ if origin == "*" && origins.len() == 1 => continue,
                _ if origin == "*" => "`*` allows all origins; leave the others out".to_owned(),
                _ if origin == "null" => "`null` is what any page can call itself; `*` allows all origins".to_owned(),
                Some(authority) if !origin.starts_with("://") && !authority.contains(odd) => continue,
                _ => format!(
                    "`{origin}` is not the origin of a page, such as http://localhost:3000 (without a path), or `*` for all"
                ),
            };
            self.found(&[section, "cors_origins", &number.to_string()], message);
        }
    }

    fn port(&mut self, path: &[&str], port: u16) {
        if port == 0 {
            self.found(path, "must be a port from 1 to 65535");
        }
    }

    fn secret(&mut self, section: &[&str], key: &str, inline: Option<&Secret>, file: Option<&Path>) {
        let at = |key| [section, &[key]].concat();
        let file_key = format!("{key}_file");
        if inline.is_some_and(|secret| secret.expose().trim().is_empty()) {
            self.found(&at(key), "is empty");
        }
        if let (Some(_), Some(_)) = (inline, file) {
            self.found(&at(key), format!("given together with {file_key}; keep one of them"));
        }
        if let Some(file) = file {
            self.path(&at(file_key.as_str()), file);
        }
    }

    fn path(&mut self, path: &[&str], file: &Path) {
        if file.as_os_str().is_empty() {
            self.found(path, "is empty");
        } else if file.starts_with("~") {
            self.found(
                path,
                format!("`{}`: `~` is not replaced; write ${{HOME}}", file.display()),
            );
        }
    }

    fn shared_ports(&mut self, config: &Config) {
        let proxy = config
            .proxy
            .iter()
            .map(|proxy| ("proxy", proxy.host.as_str(), proxy.port));
        let servers = config
            .servers()
            .map(|(name, server)| (name, server.host.as_str(), server.port));
        let coordinator = config
            .coordinator
            .iter()
            .map(|it| ("coordinator", it.host.as_str(), it.port));
        let listeners: Vec<_> = proxy
            .chain(servers)
            .chain(coordinator)
            .filter(|(.., port)| *port != 0)
            .collect();
        for (number, (name, host, port)) in listeners.iter().enumerate() {
            let clash = listeners[..number].iter().find(|(_, other, other_port)| {
                port == other_port
                    && (host == other || is_wildcard(host) || is_wildcard(other) || both_loopback(host, other))
            });
            if let Some((other, ..)) = clash {
                let path: KeyPath = key_path([*name, "port"]);
                let message = format!("{port} is taken by {other} on the same address; give another port");
                self.findings.push(Finding::new(path, message));
            }
        }
    }
}

/// `localhost` and `127.0.0.1` are one address; `127.0.0.1` and `127.0.0.2` are not.
fn both_loopback(a: &str, b: &str) -> bool {
    let address = |host: &str| match host {
        "localhost" => Some(IpAddr::from([127, 0, 0, 1])),
        _ => host.parse().ok(),
    };
    matches!((address(a), address(b)), (Some(a), Some(b)) if a == b)
}
