//! From a model's name to a llama-server's command line.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::OnceCell;

use super::load::TELLS_PROGRESS;
use crate::config::{Config, Coordinator, Model, Secret, Worker};
use crate::gguf::ModelFile;
use crate::plan::{self, Device, KnownFrom, Plan, PlanError};
use crate::pool::devices::{self, Probed};
use crate::pool::launch;
use crate::pool::swap::{Name, Unready};
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
    /// Before the start.
    pub(super) own_free: OwnFree,
}

/// When a plan is made.
#[derive(Debug, Clone, Copy)]
pub(super) enum Moment<'a> {
    /// Nothing runs: what is free now is free for it. With what servers told that are run by hand.
    Free(&'a Probed),
    /// Beside a server that is to make room. The coordinator's own GPUs are full of it, so this is what they had free before
    /// it; workers tell such a number themselves.
    Beside(&'a OwnFree),
}

/// Free bytes of the coordinator's own GPUs, by name.
pub(super) type OwnFree = BTreeMap<String, u64>;

/// Makes plans.
#[derive(Debug)]
pub(super) struct Planner {
    config: Arc<Config>,
    coordinator: Arc<Coordinator>,
    /// The draft tokens that the program can verify: asked once.
    drafts: OnceCell<Option<u16>>,
}

impl Planner {
    pub(super) fn new(config: Arc<Config>, coordinator: Arc<Coordinator>) -> Self {
        Self {
            config,
            coordinator,
            drafts: OnceCell::new(),
        }
    }

    fn model(&self, name: &Name) -> Result<&Model, Unready> {
        let unknown = || Unready::Ever("it is not in the config".to_owned());
        self.config.models.get(&**name).ok_or_else(unknown)
    }

    async fn program(&self) -> Result<PathBuf, Unready> {
        let name = self.config.binaries.llama_server.clone();
        unhurried(move || preflight::program(&name).map_err(|error| ever(&error))).await
    }

    /// Plans the model over the devices that there are.
    pub(super) async fn plan(&self, name: &Name, moment: Moment<'_>) -> Result<Plan, Unready> {
        let model = self.model(name)?;
        let path = model.path.clone();
        let file = unhurried(move || {
            preflight::model(&path).map_err(|error| ever(&error))?;
            ModelFile::read(&path).map_err(|error| ever(&error))
        });
        let (file, program) = (file.await?, self.program().await?);
        let max = self.config.proxy.as_ref().map(|proxy| proxy.max_draft_tokens);
        let ask = || preflight::external_draft(Role::Coordinator, &program, max.unwrap_or_default());
        // A program that was too slow to tell is asked again at the next plan.
        let drafts = self.drafts.get_or_try_init(ask).await;
        let drafts = *drafts.map_err(|error| Unready::Yet(error.to_string()))?;
        let want = plan::Settings::of(model, &self.coordinator, drafts).map_err(|error| ever(&error))?;
        let mut devices = self.devices(moment).await?;
        let plan = plan::plan(&file, &devices, &want).map_err(|error| match error {
            PlanError::NoDevices => Unready::Yet(error.to_string()),
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
            return Err(Unready::Yet(why));
        }
        Err(Unready::Ever(format!("it does not fit into the pool: {shortage}")))
    }

    async fn devices(&self, moment: Moment<'_>) -> Result<Vec<Device>, Unready> {
        let unasked = Probed::new();
        let probed = match moment {
            Moment::Free(probed) => probed,
            Moment::Beside(_) => &unasked,
        };
        let found = devices::find(&self.config, &self.coordinator, probed);
        let found = found.await.map_err(|error| ever(&error))?;
        for note in &found.notes {
            tracing::debug!("{note}");
        }
        let mut devices = found.devices;
        match moment {
            Moment::Free(_) => {
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
                    return Err(Unready::Yet(why));
                }
            }
            Moment::Beside(before) => {
                for device in devices.iter_mut().filter(|device| device.endpoint.is_none()) {
                    device.free_bytes = before.get(&device.name).copied().unwrap_or(device.total_bytes);
                }
            }
        }
        Ok(devices)
    }

    /// The command line, with a port and a key of its own. Clients never see either: the front's key is the one that they
    /// know.
    pub(super) async fn launch(&self, name: &Name, plan: &Plan) -> Result<Prepared, Unready> {
        let model = self.model(name)?;
        let program = self.program().await?;
        let port = preflight::free_port().map_err(|error| ever(&error))?;
        let key = Secret::new(format!("{:032x}", rand::random::<u128>()));
        let behind = Coordinator {
            api_key: Some(key.clone()),
            api_key_file: None,
            ..(*self.coordinator).clone()
        };
        let mut launch = launch::launch(plan, program, &behind, (name, model), ("127.0.0.1", port));
        launch.env.push((TELLS_PROGRESS.to_owned(), Secret::new("0")));
        // ggml starts a debugger when it aborts, as it does over each lost worker. That takes seconds, and drowns its words.
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

/// What comes of work with files, which may lie on a disk that hangs: it never holds up the leases.
async fn unhurried<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Unready> + Send + 'static,
) -> Result<T, Unready> {
    tokio::task::spawn_blocking(work).await.map_err(|error| ever(&error))?
}

fn ever(error: &impl ToString) -> Unready {
    Unready::Ever(error.to_string())
}

/// The models by the names that the machine knows them by: `first`, and all but the one that only drafts.
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
