//! `tightwad run …`: this host's part, in the foreground.

use super::exit::{Exit, Failure};
use super::{coordinator, pid_file, plan, proxy, signals};
use crate::cluster;
use crate::cluster::worker::{WorkerError, own_entry};
use crate::config::{self, Config, Loaded, Server};
use crate::supervise::command::Role;
use crate::supervise::preflight;
use crate::supervise::service::Service;

/// What a host can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// The llama-server with the big model.
    Target,
    /// The llama-server with the small model.
    Draft,
    /// The OpenAI-compatible endpoint.
    Proxy,
    /// The endpoint over the workers' GPUs.
    Coordinator,
    /// The GPUs that this host lends to a coordinator.
    Worker,
}

/// Runs it until Ctrl-C or SIGTERM.
/// `name` says which worker, or the coordinator's first model.
pub async fn run(loaded: &Loaded, part: Part, name: Option<&str>) -> Result<(), Failure> {
    let config = &loaded.config;
    if let (Some(name), Part::Target | Part::Draft | Part::Proxy) = (name, part) {
        let message =
            format!("`run` takes the name of a worker or of a coordinator's model, and nothing else: `{name}`");
        return Err(Failure::new(Exit::Usage, message));
    }
    match part {
        Part::Target => server(config, Role::Target, config.target.as_ref()).await,
        Part::Draft => server(config, Role::Draft, config.draft.as_ref()).await,
        Part::Proxy => proxy::run(loaded).await,
        Part::Worker => worker(config, name).await,
        Part::Coordinator => coordinator(loaded, name).await,
    }
}

async fn coordinator(loaded: &Loaded, model: Option<&str>) -> Result<(), Failure> {
    let stop = signals::stop_token()?;
    loaded.check_listener("coordinator")?;
    let config = &loaded.config;
    let section = coordinator::section(config)?;
    preflight::program(&config.binaries.llama_server)?;
    let first = config.model_for(model)?;
    preflight::model(&first.1.path)?;
    let what = format!("coordinator on port {}", section.port);
    let _claim = pid_file::claim(&coordinator::pid_name(section), &what, "tightwad stop")?;
    let listener = proxy::listen_at(&section.host, section.port).await?;
    plan::could_ever_fit(config, section, first).await?;
    let address = listener.local_addr()?;
    tracing::info!(
        "the coordinator serves at {}/v1",
        config::local_url(&address.ip().to_string(), address.port())
    );
    Ok(cluster::coordinator::serve(listener, config.clone(), model, stop).await?)
}

async fn worker(config: &Config, name: Option<&str>) -> Result<(), Failure> {
    let stop = signals::stop_token()?;
    let (entry, address) = own_entry(config, name).await.map_err(WorkerError::from)?;
    Ok(cluster::worker::run(entry, address, &config.binaries, stop).await?)
}

async fn server(config: &Config, role: Role, server: Option<&Server>) -> Result<(), Failure> {
    let stop = signals::stop_token()?;
    let server = server.ok_or_else(|| {
        Failure::new(
            Exit::Config,
            format!("the config has no section `{role}`; add one, with `model` and `port`"),
        )
    })?;
    let model = config.model_for(server.model.as_deref())?;
    let drafts = config
        .proxy
        .as_ref()
        .map(|proxy| proxy.max_draft_tokens)
        .unwrap_or_default();
    let launch = preflight::llama_server(role, &config.binaries, server, model, drafts).await?;
    let mut service = Service::start(role, launch, &stop);
    let ended = service.ended().await;
    service.stop().await;
    Ok(ended?)
}
