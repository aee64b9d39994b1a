//! From a model's name to a llama-server's command line.

use std::sync::Arc;

use super::load::TELLS_PROGRESS;
use crate::cluster::devices;
use crate::cluster::gguf::ModelFile;
use crate::cluster::plan::{self, Plan, PlanError};
use crate::cluster::swap::{Name, Unready};
use crate::config::{Config, Coordinator, Model, Secret};
use crate::supervise::command::{Launch, Role};
use crate::supervise::preflight;

/// What a start needs.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) launch: Launch,
    pub(super) url: reqwest::Url,
    /// The key of this one server.
    pub(super) key: Secret,
    /// A line for each device.
    pub(super) devices: Vec<String>,
}

/// Plans the model over the devices that there are. What does not fit now may fit once others have left the GPUs.
pub(super) async fn plan(config: &Config, coordinator: &Coordinator, model: &Model) -> Result<Plan, Unready> {
    let path = model.path.clone();
    preflight::model(&path).map_err(|error| ever(&error))?;
    let read = tokio::task::spawn_blocking(move || ModelFile::read(&path));
    let file = read
        .await
        .map_err(|error| ever(&error))?
        .map_err(|error| ever(&error))?;
    let program = preflight::program(&config.binaries.llama_server).map_err(|error| ever(&error))?;
    let max = config.proxy.as_ref().map(|proxy| proxy.max_draft_tokens);
    let drafts = preflight::external_draft(Role::Coordinator, &program, max.unwrap_or_default()).await;
    let want = plan::Settings::of(model, coordinator, drafts).map_err(|error| ever(&error))?;
    let found = devices::find(config, coordinator, &devices::Probed::new())
        .await
        .map_err(|error| ever(&error))?;
    for note in &found.notes {
        tracing::debug!("{note}");
    }
    let plan = plan::plan(&file, &found.devices, &want).map_err(|error| match error {
        PlanError::NoDevices => Unready::Yet(error.to_string()),
        _ => ever(&error),
    })?;
    if plan.fits {
        return Ok(plan);
    }
    let ways: Vec<String> = plan.suggestions.iter().map(ToString::to_string).collect();
    let ways = match &ways[..] {
        [] => "see `tightwad plan`".to_owned(),
        ways => format!("it would with {}", ways.join(", or ")),
    };
    Err(Unready::Yet(format!(
        "it does not fit into what is free in the pool: {ways}"
    )))
}

fn ever(error: &impl ToString) -> Unready {
    Unready::Ever(error.to_string())
}

/// The command line, with a port and a key of its own. Clients never see either: the front's key is the one that they
/// know.
pub(super) fn launch(
    config: &Config,
    coordinator: &Coordinator,
    name: &Name,
    model: &Model,
    plan: &Plan,
) -> Result<Prepared, Unready> {
    let program = preflight::program(&config.binaries.llama_server).map_err(|error| ever(&error))?;
    let port = preflight::free_port().map_err(|error| ever(&error))?;
    let key = Secret::new(format!("{:032x}", rand::random::<u128>()));
    let behind = Coordinator {
        api_key: Some(key.clone()),
        api_key_file: None,
        ..coordinator.clone()
    };
    let mut launch = plan.launch(program, &behind, (name, model), ("127.0.0.1", port));
    launch.env.push((TELLS_PROGRESS.to_owned(), Secret::new("0")));
    // ggml starts a debugger when it aborts, as it does over each lost worker. That takes seconds, and drowns its words.
    launch.env.push(("GGML_NO_BACKTRACE".to_owned(), Secret::new("1")));
    let url = launch.url();
    let url = reqwest::Url::parse(&url).map_err(|error| ever(&error))?;
    let devices = plan.placements.iter().filter(|placement| placement.layers > 0);
    let devices = devices.map(|placement| {
        let last = placement.first_layer + placement.layers - 1;
        let (host, label) = (&placement.device.host, &placement.device.label);
        format!("{host} {label}: layers {}-{last}", placement.first_layer)
    });
    Ok(Prepared {
        devices: devices.collect(),
        launch,
        url,
        key,
    })
}

/// The models by the names that the machine knows them by.
pub(super) fn names(config: &Config) -> Vec<Name> {
    config.models.keys().map(|name| Arc::from(name.as_str())).collect()
}
