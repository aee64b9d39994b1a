//! `tightwad check-config`: everything that is wrong or odd with the configuration, without starting anything.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::environment::Environment;
use super::load::{Reading, read};
use super::origin::{Finding, key_path};
use super::{Config, ConfigError, Problem, resolve, validate};

/// What `check-config` found. Serialises to `{ok, file, problems, warnings}`.
#[derive(Debug, Clone, Serialize)]
pub struct CheckReport {
    /// Whether every part could be started.
    pub ok: bool,
    /// The cluster file, when there is one.
    pub file: Option<PathBuf>,
    /// What must be changed.
    pub problems: Vec<Problem>,
    /// What is allowed and yet likely unwanted; one sentence each.
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
    /// Whether there is no source of a configuration to sum up, which the only problem then says.
    fn nothing_was_read(&self) -> bool {
        let of_no_source = |problem: &Problem| problem.key.is_empty() && problem.variable.is_none();
        self.file.is_none() && self.problems.iter().any(of_no_source)
    }
}

/// Checks the configuration that [`load`](super::load()) would take.
#[must_use]
pub fn check_config(explicit: Option<&Path>) -> CheckReport {
    check_config_in(explicit, &Environment::of_this_process())
}

/// [`check_config`] in a given environment.
#[must_use]
pub fn check_config_in(explicit: Option<&Path>, environment: &Environment) -> CheckReport {
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
    let odd = config
        .iter()
        .flat_map(|config| [validate::warnings(config), absent_files(config)].concat());
    let problems = origins.locate_all(findings);
    CheckReport {
        ok: problems.is_empty(),
        problems,
        warnings: odd.map(|finding| origins.locate(finding).to_string()).collect(),
        file: origins.file,
        config,
    }
}

impl Config {
    /// The configuration as YAML, every key written out, secrets as `***`, those in variables and arguments of a server too.
    pub fn to_yaml(&self) -> Result<String, ConfigError> {
        serde_yaml::to_string(self).map_err(|error| {
            ConfigError::Invalid(vec![Problem {
                message: format!("cannot be written as YAML: {error}"),
                ..Problem::default()
            }])
        })
    }
}

/// Files that a section names and this host lacks. No problem: another host may run that section.
fn absent_files(config: &Config) -> Vec<Finding> {
    let numbers: Vec<String> = (0..config.workers.len()).map(|number| number.to_string()).collect();
    let mut named: Vec<(Vec<&str>, &Path)> = Vec::new();
    for (number, worker) in numbers.iter().zip(&config.workers) {
        let token_file = worker.agent_token_file.iter();
        named.extend(token_file.map(|file| (vec!["workers", number, "agent_token_file"], file.as_path())));
    }
    for (section, server) in config.servers() {
        if let Ok((name, model)) = resolve::model(config, server.model.as_deref()) {
            named.push((vec!["models", name, "path"], &model.path));
        }
        named.extend(
            server
                .api_key_file
                .iter()
                .map(|file| (vec![section, "api_key_file"], file.as_path())),
        );
    }
    // A bare name is looked for on the `PATH` of whoever starts it.
    let llama_server = config.binaries.llama_server.as_path();
    let starts_one = config.servers().next().is_some() || config.coordinator.is_some();
    if starts_one && llama_server.components().count() > 1 {
        named.push((vec!["binaries", "llama_server"], llama_server));
    }
    if let Some(coordinator) = &config.coordinator {
        let models = config.models.iter();
        named.extend(models.map(|(name, model)| (vec!["models", name.as_str(), "path"], model.path.as_path())));
        let key_file = coordinator.api_key_file.iter();
        named.extend(key_file.map(|file| (vec!["coordinator", "api_key_file"], file.as_path())));
        let key_file = coordinator.draft_key_file.iter();
        named.extend(key_file.map(|file| (vec!["coordinator", "draft_key_file"], file.as_path())));
    }
    if let Some(proxy) = &config.proxy {
        let token_file = proxy.auth_token_file.iter();
        named.extend(token_file.map(|file| (vec!["proxy", "auth_token_file"], file.as_path())));
        let drafts = proxy.draft.iter().map(|draft| ("draft", draft));
        for (section, upstream) in drafts.chain(proxy.target.as_ref().map(|target| ("target", target))) {
            let key_file = upstream.api_key_file.as_deref();
            named.extend(key_file.map(|file| (vec!["proxy", section, "api_key_file"], file)));
            let key_file = upstream.draft_key_file.as_deref();
            named.extend(key_file.map(|file| (vec!["proxy", section, "draft_key_file"], file)));
        }
    }
    named.sort();
    named.dedup();
    // Where this user may not look, there is nothing to say.
    let absent = named
        .into_iter()
        .filter(|(_, file)| matches!(file.try_exists(), Ok(false)));
    absent
        .map(|(path, file)| Finding::new(key_path(path), format!("{} is not on this host", file.display())))
        .collect()
}
