//! `tightwad run …`: runs a part of the cluster in the foreground until Ctrl-C or SIGTERM, and reports its state to systemd.

use tokio_util::sync::CancellationToken;

use super::coordinator::Description;
use super::exit::{Exit, Failure};
use super::pid_file::PidFile;
use super::{coordinator, pid_file, plan, proxy, server_status, signals};
use crate::config::{self, Config, Loaded, Server, local_key};
use crate::gguf::ModelFile;
use crate::pool;
use crate::pool::coordinator::status::Status;
use crate::pool::worker::{WorkerError, local_worker};
use crate::supervise::command::Role;
use crate::supervise::notify::{Notifier, StatusLines};
use crate::supervise::preflight;
use crate::supervise::service::Service;

/// A part of the cluster that a host can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// The llama-server with the big model
    Target,
    /// The llama-server with the small model
    Draft,
    /// The OpenAI-compatible endpoint
    Proxy,
    /// The endpoint over the workers' GPUs
    Coordinator,
    /// The GPUs that this host lends to a coordinator
    Worker,
}

/// Runs the part until Ctrl-C or SIGTERM, and reports its state to systemd. `name` is that of the worker, or of the coordinator's first
/// model.
pub async fn run(loaded: &Loaded, part: Part, name: Option<&str>) -> Result<(), Failure> {
    let config = &loaded.config;
    if let (Some(name), Part::Target | Part::Draft | Part::Proxy) = (name, part) {
        let message =
            format!("`run` takes the name of a worker or of a coordinator's model, and nothing else: `{name}`");
        return Err(Failure::new(Exit::Usage, message));
    }
    let notifier = Notifier::default();
    notifier.watch();
    let stop = signals::stop_token_after({
        let notifier = notifier.clone();
        move || notifier.stopping()
    })?;
    let ended = match part {
        Part::Target => server(loaded, Role::Target, config.target.as_ref(), &notifier, &stop).await,
        Part::Draft => server(loaded, Role::Draft, config.draft.as_ref(), &notifier, &stop).await,
        Part::Proxy => proxy::run(loaded, &notifier, stop).await,
        Part::Worker => worker(config, name, &notifier, stop).await,
        Part::Coordinator => coordinator(loaded, name, &notifier, stop).await,
    };
    if let Err(failure) = &ended {
        notifier.status(&failure.message);
    }
    ended
}

async fn coordinator(
    loaded: &Loaded,
    model: Option<&str>,
    notifier: &Notifier,
    stop: CancellationToken,
) -> Result<(), Failure> {
    loaded.check_listener("coordinator")?;
    let config = &loaded.config;
    let section = coordinator::section(config)?;
    preflight::program(&config.binaries.llama_server)?;
    let first = config.model_for(model)?;
    preflight::model(&first.1.path)?;
    let what = format!("coordinator on port {}", section.port);
    let _claim = pid_file::claim(&coordinator::pid_name(section), &what, "tightwad stop")?;
    let listener = proxy::listen_at(&section.host, section.port).await?;
    notifier.status(&format!("checking `{}`", first.0));
    // This may take long, because a GPU driver may have to wake up.
    match stop
        .run_until_cancelled(plan::could_ever_fit(config, section, first))
        .await
    {
        Some(could) => could?,
        None => return Ok(()),
    }
    let address = listener.local_addr()?;
    tracing::info!(
        "the coordinator serves at {}/v1",
        config::local_url(&address.ip().to_string(), address.port())
    );
    let tell = {
        let notifier = notifier.clone();
        move |status: &Status| {
            notifier.status(&Description::of_status(status).to_string());
            // Ready before the model is loaded: requests wait, or get the progress of the load.
            notifier.ready();
        }
    };
    Ok(pool::coordinator::serve(listener, config.clone(), model, tell, stop).await?)
}

async fn worker(
    config: &Config,
    name: Option<&str>,
    notifier: &Notifier,
    stop: CancellationToken,
) -> Result<(), Failure> {
    // Host names in the config may take time to resolve.
    let Some(own) = stop.run_until_cancelled(local_worker(config, name)).await else {
        return Ok(());
    };
    let (entry, address) = own.map_err(WorkerError::from)?;
    Ok(pool::worker::run(entry, address, &config.binaries, notifier, stop).await?)
}

async fn server(
    loaded: &Loaded,
    role: Role,
    server: Option<&Server>,
    notifier: &Notifier,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let config = &loaded.config;
    let server = server.ok_or_else(|| {
        Failure::new(
            Exit::Config,
            format!("the config has no section `{role}`; add one that names its `model`"),
        )
    })?;
    loaded.check_listener(role.as_str())?;
    let model = config.model_for(server.model.as_deref())?;
    let drafts = config
        .proxy
        .as_ref()
        .map(|proxy| proxy.max_draft_tokens)
        .unwrap_or_default();
    let words = StatusLines {
        starting: format!("loading {}", model.0),
        serving: format!("{} serves", model.0),
    };
    notifier.status(&words.starting);
    let server = &with_local_key(role, server)?;
    let prepared = preflight::llama_server(role, &config.binaries, server, model, drafts);
    // This may take long, because a GPU driver may have to wake up.
    let Some(launch) = stop.run_until_cancelled(prepared).await else {
        return Ok(());
    };
    let launch = launch?;
    ModelFile::check_complete(&model.1.path)?;
    warn_of_context(model);
    // Without it `tightwad status` cannot know that the server is being restarted; nothing else depends on it.
    let _supervised = PidFile::claim(&server_status::pid_name(role.as_str(), server.port)).ok();
    let mut service = Service::start(role, launch, stop);
    let state = service.state();
    let ended = tokio::select! {
        ended = service.ended() => ended,
        never = notifier.follow(&words, vec![state]) => match never {},
    };
    service.stop().await;
    Ok(ended?)
}

/// Warns of a context that is longer than the model was trained for. llama-server cuts it without a clear message.
fn warn_of_context((name, model): (&str, &config::Model)) {
    let trained = ModelFile::read(&model.path)
        .ok()
        .and_then(|file| file.shape.trained_context);
    if let Some(trained) = trained.filter(|trained| u64::from(model.ctx_size) > *trained) {
        tracing::warn!(
            "`{name}` was trained for {trained} tokens, and its ctx_size is {}: each request gets {trained}; set \
             models.{name}.ctx_size to that",
            model.ctx_size
        );
    }
}

/// The section, with the shared key of this host if it has no key and listens on a loopback address.
fn with_local_key(role: Role, server: &Server) -> Result<Server, Failure> {
    if !server.asks_local_key() {
        return Ok(server.clone());
    }
    let local = local_key::obtain()?;
    tracing::info!("the {role} asks its clients for the key in {}", local.path.display());
    Ok(Server {
        api_key: Some(local.key),
        ..server.clone()
    })
}
