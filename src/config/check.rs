//! `tightwad check-config`: finds all problems and warnings of the configuration at once. Starts nothing.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::environment::Environment;
use super::load::{Reading, read};
use super::{Config, ConfigError, Problem, host_files, validate};

/// Scope of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The cluster file alone: the result is the same on every host.
    File,
    /// The cluster file, the `TIGHTWAD_<SECTION>__<KEY>` variables, and the named files and programs on this host.
    ThisHost,
}

/// Result of `check-config`. Serialises to `{ok, file, problems, warnings}`.
#[derive(Debug, Clone, Serialize)]
pub struct CheckReport {
    /// Whether every part could be started.
    pub ok: bool,
    /// The cluster file, when there is one.
    pub file: Option<PathBuf>,
    /// Problems that must be corrected.
    pub problems: Vec<Problem>,
    /// Settings that are allowed but probably unwanted; one sentence each.
    pub warnings: Vec<String>,
    /// The effective configuration, when it could be read; see [`Config::to_yaml`].
    #[serde(skip)]
    pub config: Option<Config>,
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines: Vec<String> = self.problems.iter().map(ToString::to_string).collect();
        lines.extend(self.warnings.iter().map(|warning| format!("warning: {warning}")));
        if !self.nothing_was_read() {
            let subject = self
                .file
                .as_ref()
                .map_or("the environment".into(), |file| file.display().to_string());
            lines.push(match self.problems.len() {
                0 => format!("{subject}: ok"),
                1 => format!("{subject}: 1 problem"),
                n => format!("{subject}: {n} problems"),
            });
        }
        f.write_str(&lines.join("\n"))
    }
}

impl CheckReport {
    /// Whether no configuration was found. Its only problem says so.
    fn nothing_was_read(&self) -> bool {
        let of_no_source = |problem: &Problem| problem.key.is_empty() && problem.variable.is_none();
        self.file.is_none() && self.problems.iter().any(of_no_source)
    }
}

/// Checks the configuration that [`load`](super::load()) would read.
#[must_use]
pub fn check_config(explicit: Option<&Path>, scope: Scope) -> CheckReport {
    check_config_in(explicit, &Environment::of_this_process(), scope)
}

/// [`check_config`] in a given environment.
#[must_use]
pub fn check_config_in(explicit: Option<&Path>, environment: &Environment, scope: Scope) -> CheckReport {
    let without_keys;
    let environment = match scope {
        Scope::ThisHost => environment,
        Scope::File => {
            without_keys = environment.without_keys();
            &without_keys
        }
    };
    let Reading {
        config,
        mut findings,
        origins,
    } = match read(explicit, environment) {
        Ok(reading) => reading,
        Err(error) => {
            let problems = error.problems();
            return CheckReport {
                ok: false,
                file: problems.iter().find_map(|problem| problem.file.clone()),
                problems,
                warnings: Vec::new(),
                config: None,
            };
        }
    };
    let loads = findings.is_empty();
    let open = config.iter().flat_map(validate::open_listeners);
    findings.extend(open.map(|(_, finding)| finding));
    let config = config.filter(|_| loads);
    let mut odd = config.as_ref().map(validate::warnings).unwrap_or_default();
    if scope == Scope::ThisHost {
        odd.extend(config.iter().flat_map(host_files::warnings));
    }
    let problems = origins.locate_all(findings);
    CheckReport {
        ok: problems.is_empty(),
        problems,
        warnings: odd
            .into_iter()
            .map(|finding| origins.locate(finding).to_string())
            .collect(),
        file: origins.file,
        config: config.map(Config::with_upstreams),
    }
}

impl Config {
    /// The configuration with all servers of the proxy, including those that follow from other sections.
    fn with_upstreams(mut self) -> Self {
        let (drafts, target) = self.proxy_upstreams();
        if let Some(proxy) = &mut self.proxy {
            proxy.draft = drafts;
            proxy.target = target;
        }
        self
    }

    /// The configuration as YAML with every key. Secrets are `***`, also in variables and arguments of a server.
    pub fn to_yaml(&self) -> Result<String, ConfigError> {
        serde_yaml::to_string(self).map_err(|error| {
            ConfigError::Invalid(vec![Problem {
                message: format!("cannot be written as YAML: {error}"),
                ..Problem::default()
            }])
        })
    }
}
