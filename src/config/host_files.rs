//! Checks the files and programs that the configuration names on this host.
//!
//! Every finding is a warning, because a cluster file names the files of all hosts, and another host may have a file that this one lacks.

use std::fs;
use std::path::Path;

use super::load::read_text;
use super::origin::{Finding, KeyPath, key_path};
use super::{Config, Model, resolve};
use crate::gguf::{ModelFile, ModelFileError};

/// Options of llama-server that extend the context beyond the trained length.
const CONTEXT_STRETCHERS: [&str; 4] = ["--rope-scal", "--rope-freq", "--yarn-", "--override-kv"];

/// All findings on this host that would stop a section from starting, or that are probably unwanted.
pub(super) fn warnings(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (key, file) in token_files(config) {
        findings.extend(token_file_problem(file).map(|problem| Finding::new(key, problem)));
    }
    for (name, model) in models(config) {
        findings.extend(model_problem(name, model));
    }
    for (key, program) in programs(config) {
        findings.extend(program_problem(program).map(|problem| Finding::new(key, problem)));
    }
    findings.sort_by(|a, b| a.path.cmp(&b.path));
    findings
}

/// Every file that holds a token or a key, with the key that names it.
fn token_files(config: &Config) -> Vec<(KeyPath, &Path)> {
    let numbers = (0..config.workers.len()).map(|number| number.to_string());
    let workers = numbers.zip(&config.workers).map(|(number, worker)| {
        let key = key_path(["workers", &number, "agent_token_file"]);
        (key, &worker.agent_token_file)
    });
    let servers = config
        .servers()
        .map(|(section, server)| (key_path([section, "api_key_file"]), &server.api_key_file));
    let coordinator = config.coordinator.iter().flat_map(|coordinator| {
        [
            (key_path(["coordinator", "api_key_file"]), &coordinator.api_key_file),
            (key_path(["coordinator", "draft_key_file"]), &coordinator.draft_key_file),
        ]
    });
    let proxy = config
        .proxy
        .iter()
        .map(|proxy| (key_path(["proxy", "auth_token_file"]), &proxy.auth_token_file));
    let upstreams = config.proxy.iter().flat_map(|proxy| {
        let drafts = proxy.draft.iter().map(|draft| ("draft", draft));
        let upstreams = drafts.chain(proxy.target.iter().map(|target| ("target", target)));
        upstreams.flat_map(|(name, server)| {
            [
                (key_path(["proxy", name, "api_key_file"]), &server.api_key_file),
                (key_path(["proxy", name, "draft_key_file"]), &server.draft_key_file),
            ]
        })
    });
    let all = workers.chain(servers).chain(coordinator).chain(proxy).chain(upstreams);
    all.filter_map(|(key, file)| Some((key, file.as_deref()?))).collect()
}

/// The models that a section of this file runs. A coordinator can run all of them.
fn models(config: &Config) -> Vec<(&str, &Model)> {
    if config.coordinator.is_some() {
        let models = config.models.iter();
        return models.map(|(name, model)| (name.as_str(), model)).collect();
    }
    let of_server = |server: &super::Server| resolve::model(config, server.model.as_deref()).ok();
    let mut models: Vec<_> = config.servers().filter_map(|(_, server)| of_server(server)).collect();
    models.sort_by_key(|(name, _)| *name);
    models.dedup_by_key(|(name, _)| *name);
    models
}

/// The programs that a section of this file starts.
fn programs(config: &Config) -> Vec<(KeyPath, &Path)> {
    let binaries = &config.binaries;
    let mut programs = Vec::new();
    if config.servers().next().is_some() || config.coordinator.is_some() {
        programs.push((key_path(["binaries", "llama_server"]), binaries.llama_server.as_path()));
    }
    if !config.workers.is_empty() {
        programs.push((key_path(["binaries", "rpc_server"]), binaries.rpc_server.as_path()));
    }
    programs
}

fn program_problem(program: &Path) -> Option<String> {
    if which::which(program).is_ok() {
        return None;
    }
    let shown = program.display();
    Some(if program.components().count() == 1 {
        format!("there is no program `{shown}` on PATH; build it with scripts/llama-cpp and give its path here")
    } else if program.exists() {
        format!("{shown} is not an executable program; check the path, and `chmod +x` it")
    } else {
        format!("{shown} is not on this host")
    })
}

/// Reports nothing about a file that this user cannot access, because a service has other rights.
fn token_file_problem(file: &Path) -> Option<String> {
    let shown = file.display();
    let metadata = match fs::metadata(file) {
        Ok(metadata) => metadata,
        Err(error) => return is_absent(&error).then(|| format!("{shown} is not on this host")),
    };
    if metadata.is_dir() {
        return Some(format!("{shown} is a directory; name the file in it"));
    }
    let is_blank = |text: String| text.trim().is_empty();
    let empty = metadata.is_file() && read_text(file).is_ok_and(is_blank);
    empty.then(|| format!("{shown} is empty; write the token into it, such as `openssl rand -hex 32` makes one"))
}

fn model_problem(name: &str, model: &Model) -> Option<Finding> {
    let at = |key: &str, message: String| Some(Finding::new(key_path(["models", name, key]), message));
    let shown = model.path.display();
    let metadata = match fs::metadata(&model.path) {
        Ok(metadata) => metadata,
        Err(error) if is_absent(&error) => return at("path", format!("{shown} is not on this host")),
        Err(_) => return None,
    };
    if metadata.is_dir() {
        return at("path", format!("{shown} is a directory; name the GGUF file in it"));
    }
    if !metadata.is_file() {
        return at("path", format!("{shown} is not a regular file; name a GGUF file"));
    }
    match ModelFile::read(&model.path) {
        Ok(file) => {
            let trained = file.shape.trained_context?;
            let message = beyond_training(model, trained)?;
            at("ctx_size", message)
        }
        // llama.cpp may support more than the planner, and a service may read more than this user.
        Err(
            ModelFileError::MissingKey { .. } | ModelFileError::UnknownType { .. } | ModelFileError::Unreadable { .. },
        ) => None,
        Err(error) => at("path", error.to_string()),
    }
}

/// Reports a context that is longer than the model was trained for, unless the file extends it.
fn beyond_training(model: &Model, trained: u64) -> Option<String> {
    let stretches = |argument: &String| CONTEXT_STRETCHERS.iter().any(|option| argument.starts_with(option));
    let beyond = u64::from(model.ctx_size) > trained && !model.extra_args.iter().any(stretches);
    beyond.then(|| {
        format!(
            "{} tokens, but the model was trained for {trained}; set ctx_size: {trained}, or stretch it with `--rope-scaling` \
             in extra_args",
            model.ctx_size
        )
    })
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}
