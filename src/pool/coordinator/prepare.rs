//! Prepares a start: from a model's name to the command line of its llama-server.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::load::TELLS_PROGRESS;
use crate::config::{Config, Coordinator, Model, Secret, Worker};
use crate::gguf::ModelFile;
use crate::http::auth::unguessable;
use crate::plan::{self, Device, KnownFrom, Plan, PlanError};
use crate::pool::devices::{self, ProbedServers};
use crate::pool::launch;
use crate::pool::swap::{Name, NotReady};
use crate::supervise::command::{Launch, Role};
use crate::supervise::preflight;

/// Everything that a start needs.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) launch: Launch,
    pub(super) url: reqwest::Url,
    /// The key of this one server.
    pub(super) key: Secret,
    /// One line per device, for the log and the status.
    pub(super) devices: Vec<String>,
    /// Free memory of the coordinator's GPUs before the start.
    pub(super) own_free: OwnFree,
}

/// The memory that a plan counts with.
#[derive(Debug, Clone, Copy)]
pub(super) enum PlanBasis<'a> {
    /// Nothing runs, so the model gets what is free now. Includes the memory that servers without an agent reported.
    FreeNow(&'a ProbedServers),
    /// A server still runs and will make room. It fills the coordinator's own GPUs, so this is what they had free before it
    /// started; workers report that number themselves.
    BesideServer(&'a OwnFree),
}

/// Free bytes of the coordinator's own GPUs, by name.
pub(super) type OwnFree = BTreeMap<String, u64>;

/// Plans models over the pool and makes their command lines.
#[derive(Debug)]
pub(super) struct Planner {
    config: Arc<Config>,
    coordinator: Arc<Coordinator>,
    /// Draft tokens per step that the program can verify; asked once.
    drafts: OnceCell<Option<u16>>,
    /// The coordinator's own GPUs that were missing at the last plan.
    missing_gpus: Mutex<Vec<String>>,
}

impl Planner {
    pub(super) fn new(config: Arc<Config>, coordinator: Arc<Coordinator>) -> Self {
        Self {
            config,
            coordinator,
            drafts: OnceCell::new(),
            missing_gpus: Mutex::default(),
        }
    }

    fn model(&self, name: &Name) -> Result<&Model, NotReady> {
        let unknown = || NotReady::Permanent("it is not in the config".to_owned());
        self.config.models.get(&**name).ok_or_else(unknown)
    }

    async fn program(&self) -> Result<PathBuf, NotReady> {
        let name = self.config.binaries.llama_server.clone();
        unhurried(move || preflight::program(&name).map_err(|error| ever(&error))).await
    }

    /// Plans the model over the devices of the pool.
    pub(super) async fn plan(&self, name: &Name, basis: PlanBasis<'_>) -> Result<Plan, NotReady> {
        let model = self.model(name)?;
        let path = model.path.clone();
        let file = unhurried(move || {
            preflight::model(&path).map_err(|error| ever(&error))?;
            ModelFile::read(&path).map_err(|error| ever(&error))
        });
        let (file, program) = (file.await?, self.program().await?);
        let max = self.config.proxy.as_ref().map(|proxy| proxy.max_draft_tokens);
        let ask = || preflight::external_draft(Role::Coordinator, &program, max.unwrap_or_default());
        // A program that did not answer in time is asked again at the next plan.
        let drafts = self.drafts.get_or_try_init(ask).await;
        let drafts = *drafts.map_err(|error| NotReady::Retryable(error.to_string()))?;
        let want = plan::Settings::of(model, &self.coordinator, drafts).map_err(|error| ever(&error))?;
        let mut devices = self.devices(basis).await?;
        let plan = plan::plan(&file, &devices, &want).map_err(|error| match error {
            PlanError::NoDevices => NotReady::Retryable(error.to_string()),
            _ => ever(&error),
        })?;
        if plan.fits {
            return Ok(plan);
        }
        let shortage = plan.shortage();
        for device in &mut devices {
            device.free_bytes = device.total_bytes;
        }
        if plan::plan(&file, &devices, &want).is_ok_and(|plan| plan.fits) {
            let why = format!("it does not fit into what is free in the pool: {shortage}");
            return Err(NotReady::Retryable(why));
        }
        Err(NotReady::Permanent(format!(
            "it does not fit into the pool: {shortage}"
        )))
    }

    /// Says which of the coordinator's own GPUs are missing, once and when that changes.
    fn warn_of(&self, missing: Vec<String>) {
        let mut before = self.missing_gpus.lock();
        if *before == missing {
            return;
        }
        if missing.is_empty() {
            tracing::info!("llama-server sees all GPUs of the coordinator again");
        } else {
            tracing::warn!(
                "llama-server does not see the coordinator's GPU {}, so the pool goes on without it; check its driver",
                missing.join(", ")
            );
        }
        *before = missing;
    }

    async fn devices(&self, basis: PlanBasis<'_>) -> Result<Vec<Device>, NotReady> {
        let unasked = ProbedServers::new();
        let probed = match basis {
            PlanBasis::FreeNow(probed) => probed,
            PlanBasis::BesideServer(_) => &unasked,
        };
        let found = devices::find(&self.config, &self.coordinator, probed);
        let found = found.await.map_err(|error| ever(&error))?;
        for note in &found.notes {
            tracing::debug!("{note}");
        }
        if let Some(missing) = found.missing {
            return Err(NotReady::Retryable(missing.to_string()));
        }
        self.warn_of(found.missing_gpus);
        let mut devices = found.devices;
        match basis {
            PlanBasis::FreeNow(_) => {
                let told = |worker: &Worker| {
                    let own = |device: &Device| device.known_from == KnownFrom::Agent && device.host == worker.name();
                    devices.iter().any(own)
                };
                let mute = self.config.workers.iter().find(|it| it.has_agent() && !told(it));
                if let Some(worker) = mute {
                    let why = format!(
                        "worker {} does not tell its devices yet; if it stays so, its log says why",
                        worker.name()
                    );
                    return Err(NotReady::Retryable(why));
                }
            }
            PlanBasis::BesideServer(before) => {
                for device in devices.iter_mut().filter(|device| device.endpoint.is_none()) {
                    device.free_bytes = before.get(&device.name).copied().unwrap_or(device.total_bytes);
                }
            }
        }
        Ok(devices)
    }

    /// The command line, with a port and a key of its own. Clients never see either; they know only the coordinator's key.
    pub(super) async fn launch(&self, name: &Name, plan: &Plan) -> Result<Prepared, NotReady> {
        let model = self.model(name)?;
        let program = self.program().await?;
        let port = preflight::free_port().map_err(|error| ever(&error))?;
        let key = Secret::new(unguessable());
        let behind = Coordinator {
            api_key: Some(key.clone()),
            api_key_file: None,
            ..(*self.coordinator).clone()
        };
        let mut launch = launch::launch(plan, program, &behind, (name, model), ("127.0.0.1", port));
        launch.env.push((TELLS_PROGRESS.to_owned(), Secret::new("0")));
        // ggml starts a debugger when it aborts, as it does over each lost worker. That takes seconds and hides the message.
        launch.env.push(("GGML_NO_BACKTRACE".to_owned(), Secret::new("1")));
        let url = launch.url();
        let url = reqwest::Url::parse(&url).map_err(|error| ever(&error))?;
        let devices = plan.placements.iter().filter(|placement| placement.layers > 0);
        let devices = devices.map(|placement| {
            let (host, label) = (&placement.device.host, &placement.device.label);
            format!("{host} {label}: layers {}", plan.layers_of(placement))
        });
        let own = plan.placements.iter().map(|placement| &placement.device);
        let own = own.filter(|device| device.endpoint.is_none());
        Ok(Prepared {
            devices: devices.collect(),
            launch,
            url,
            key,
            own_free: own.map(|device| (device.name.clone(), device.free_bytes)).collect(),
        })
    }
}

/// Runs work with files on a blocking thread: a disk that hangs must not delay the leases.
async fn unhurried<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NotReady> + Send + 'static,
) -> Result<T, NotReady> {
    tokio::task::spawn_blocking(work).await.map_err(|error| ever(&error))?
}

fn ever(error: &impl ToString) -> NotReady {
    NotReady::Permanent(error.to_string())
}

/// Names of the models that the pool serves: `first`, and all others but a model that only drafts.
pub(super) fn names(config: &Config, first: &str) -> Vec<Name> {
    let drafts = config.draft.as_ref().and_then(|draft| draft.model.as_deref());
    let models = config
        .models
        .iter()
        .filter(|(name, _)| *name == first || drafts != Some(name));
    models.map(|(name, _)| Arc::from(name.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_that_only_drafts_is_none_of_the_pools() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tightwad.yaml");
        let yaml = "models: { big: { path: b, default: true }, other: { path: o }, small: { path: s } }\n\
                    draft: { model: small }\ncoordinator: {}\n";
        std::fs::write(&file, yaml).unwrap();
        let config = crate::config::load(Some(&file)).unwrap().config;
        let listed = |first| {
            names(&config, first)
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(listed("big"), ["big", "other"]);
        assert_eq!(listed("small"), ["big", "other", "small"]);
    }
}
