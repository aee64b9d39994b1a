//! `tightwad plan`: shows which layers of a model go to which device, and whether they fit. Starts nothing.

use std::ffi::OsStr;
use std::fmt::Write;
use std::iter;

use serde::Serialize;

use super::coordinator;
use super::exit::{Exit, Failure};
use super::output::print_report;
use super::wrap;
use crate::config::{self, Config, Coordinator, Model};
use crate::count::count;
use crate::gguf::ModelFile;
use crate::plan::{self, Device, KnownFrom, Placement, Plan, PlanError, Settings, amount};
use crate::pool::build;
use crate::pool::devices::{self, FoundDevices, ProbedServers};
use crate::pool::launch;
use crate::supervise::command::{Launch, Role};
use crate::supervise::preflight;

/// Options of `tightwad plan`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Name of the model in `models`. Default: the one marked `default`, else the only one
    model: Option<String>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

/// The whole report.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    model: &'a str,
    #[serde(flatten)]
    plan: &'a Plan,
    notes: &'a [String],
    command: Vec<String>,
    environment: Vec<(String, String)>,
}

/// The plan, and what could not be found out for it.
struct Planned {
    plan: Plan,
    notes: Vec<String>,
    /// Workers of another build.
    others: Vec<String>,
}

/// Refuses a model whose file is broken or that cannot fit into the pool, and workers with another build, before anything is started.
pub async fn check(config: &Config, coordinator: &Coordinator, named: (&str, &Model)) -> Result<(), Failure> {
    let Planned { plan, others, .. } = planned(config, coordinator, named.1).await?;
    if !others.is_empty() {
        return Err(Failure::new(Exit::OtherBuild, others.join("; ")));
    }
    if plan.fits { Ok(()) } else { Err(misfit(named.0, &plan)) }
}

async fn planned(config: &Config, coordinator: &Coordinator, model: &Model) -> Result<Planned, Failure> {
    let file = ModelFile::read(&model.path)?;
    // Does not ask a worker without an agent: its server has one client at a time, which may be a coordinator.
    let found = devices::find(config, coordinator, &ProbedServers::new())
        .await
        .map_err(|error| Failure::new(Exit::Config, error.to_string()))?;
    let FoundDevices {
        devices,
        mut notes,
        builds,
        ..
    } = found;

    let drafts = config
        .proxy
        .as_ref()
        .map(|proxy| proxy.max_draft_tokens)
        .unwrap_or_default();
    let llama_server = &config.binaries.llama_server;
    let draft_tokens = match preflight::program(llama_server) {
        Ok(program) => preflight::external_draft(Role::Coordinator, &program, drafts).await?,
        Err(missing) => {
            notes.push(missing.to_string());
            None
        }
    };
    let own = build::build(llama_server).await;
    let differences = builds
        .iter()
        .map(|(worker, theirs)| build::difference(worker, theirs, own.as_deref()?));
    let others: Vec<String> = differences.flatten().collect();
    notes.extend(others.iter().cloned());
    let placing = plan::placing_options(model, coordinator);
    if !placing.is_empty() {
        notes.push(format!(
            "`extra_args` set the placement of layers ({}) and win, so the real placement may differ from this plan",
            placing.join(", ")
        ));
    }
    let settings = Settings::of(model, coordinator, draft_tokens)?;
    if let Some(trained) = file.shape.trained_context
        && u64::from(settings.context) > trained
    {
        notes.push(format!(
            "the model was trained with {trained} tokens: llama-server takes memory for {} per slot and serves {trained}; a \
             smaller ctx_size saves memory",
            settings.context
        ));
    }
    let plan = plan::plan(&file, &devices, &settings)?;
    Ok(Planned { plan, notes, others })
}

/// Plans a model over the pool and prints the plan.
pub async fn plan(config: &Config, options: &Options) -> Result<(), Failure> {
    let coordinator = coordinator::section(config)?;
    let (name, model) = config.model_for(options.model.as_deref())?;
    let Planned { plan, notes, .. } = planned(config, coordinator, model).await?;
    let launch = launch::launch(
        &plan,
        &config.binaries.llama_server,
        coordinator,
        (name, model),
        (&coordinator.host, coordinator.port),
    );
    let answer = Answer {
        model: name,
        plan: &plan,
        notes: &notes,
        command: words(&launch).collect(),
        environment: launch
            .env
            .iter()
            .map(|(name, value)| (name.clone(), shown(name, value.expose()).to_owned()))
            .collect(),
    };
    print_report(&answer, options.json, |_| table(name, &plan, &notes, &launch))?;
    if plan.fits { Ok(()) } else { Err(misfit(name, &plan)) }
}

/// Refuses a model that is larger than all memory of the pool. Accepts it while an agent does not answer.
pub async fn could_ever_fit(
    config: &Config,
    coordinator: &Coordinator,
    (name, model): (&str, &Model),
) -> Result<(), Failure> {
    let file = ModelFile::read(&model.path)?;
    let settings = Settings::of(model, coordinator, None)?;
    let found = devices::find(config, coordinator, &ProbedServers::new())
        .await
        .map_err(|error| Failure::new(Exit::Config, error.to_string()))?;
    let all_known = found.silent.is_empty();
    let mut devices = found.devices;
    for device in &mut devices {
        device.free_bytes = device.total_bytes;
    }
    match plan::plan(&file, &devices, &settings) {
        Ok(plan) if !plan.fits && all_known => Err(misfit(name, &plan)),
        Err(PlanError::NoDevices) if !all_known => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Ok(()),
    }
}

fn misfit(name: &str, plan: &Plan) -> Failure {
    let message = format!("{name} does not fit into the pool: {}", plan.shortage());
    Failure::new(Exit::DoesNotFit, message)
}

/// The plan for people.
fn table(name: &str, plan: &Plan, notes: &[String], launch: &Launch) -> String {
    let settings = &plan.settings;
    let mut text = format!(
        "{name}: {}, {} and the output layer; {} of {}, KV cache {}/{}\n\n",
        amount(plan.file_bytes),
        count(plan.layers.saturating_sub(1), "layer", "layers"),
        count(settings.slots, "slot", "slots"),
        count(settings.context, "token", "tokens"),
        settings.key_type.name,
        settings.value_type.name,
    );
    let mut rows = vec![["device", "layers", "weights", "KV cache", "compute", "free", "left"].map(str::to_owned)];
    rows.extend(plan.placements.iter().map(|placement| row(placement, plan)));
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let devices = plan.placements.iter().map(|placement| &placement.device);
    for (row, device) in rows.iter().zip(iter::once(None).chain(devices.map(Some))) {
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let _ = if column < 2 {
                write!(text, "{cell:<width$}  ")
            } else {
                write!(text, "{cell:>width$}  ")
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        if let Some(Device { host, name, label, .. }) = device {
            let _ = writeln!(text, "  {}", format!("{host}: {name} {label}").trim_end());
        }
    }
    let total = |of: fn(&Placement) -> u64| amount(plan.placements.iter().map(of).fold(0, u64::saturating_add));
    let _ = writeln!(
        text,
        "\nin all: weights {}, KV cache {}, compute about {}; the coordinator's own memory: {} and about {}",
        total(|placement| placement.weights_bytes),
        total(|placement| placement.kv_bytes),
        total(|placement| placement.compute_bytes),
        amount(plan.host.weights_bytes),
        amount(plan.host.compute_bytes),
    );
    if plan
        .placements
        .iter()
        .any(|placement| placement.device.known_from == KnownFrom::Config)
    {
        text.push_str("*: `vram_gb` of the config; the free memory is unknown\n");
    }
    for note in notes {
        let _ = writeln!(text, "note: {note}");
    }
    let margin = amount(settings.margin_bytes);
    if !plan.fits {
        let _ = writeln!(
            text,
            "It does not fit: each device must keep {margin}. It would fit with one of"
        );
        for suggestion in &plan.suggestions {
            let _ = writeln!(text, "  {suggestion}");
        }
        return wrap::fitted(&text, 2);
    }
    let _ = writeln!(text, "It fits; each device keeps {margin} or more.\n");
    let environment = launch.env.iter();
    let environment = environment.map(|(name, value)| format!("{name}={}", quoted(shown(name, value.expose()))));
    let command: Vec<String> = environment.chain(words(launch).map(|word| quoted(&word))).collect();
    format!("{}{}\n", wrap::fitted(&text, 2), wrap::command(&command, wrap::width()))
}

fn row(placement: &Placement, plan: &Plan) -> [String; 7] {
    let device = &placement.device;
    let of_config = if device.known_from == KnownFrom::Config {
        "*"
    } else {
        ""
    };
    [
        placement.argument.clone().unwrap_or_else(|| "-".into()),
        plan.layers_of(placement).replace(" and output", ", output"),
        amount(placement.weights_bytes),
        amount(placement.kv_bytes),
        amount(placement.compute_bytes),
        format!("{}{of_config}", amount(device.free_bytes)),
        if placement.left_bytes < 0 {
            format!("-{}", amount(placement.left_bytes.unsigned_abs()))
        } else {
            amount(placement.left_bytes.unsigned_abs())
        },
    ]
}

/// The value of a variable; hidden if it is a secret.
fn shown<'a>(name: &str, value: &'a str) -> &'a str {
    if config::is_secret(name) { "***" } else { value }
}

/// The program and its arguments, without keys.
fn words(launch: &Launch) -> impl Iterator<Item = String> {
    let word = |word: &OsStr| word.to_string_lossy().into_owned();
    let arguments: Vec<String> = launch.args.iter().map(|argument| word(argument)).collect();
    std::iter::once(word(&launch.program)).chain(config::shown_arguments(&arguments))
}

/// Quotes a word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_spaces_or_quotes_stays_one_word() {
        assert_eq!(quoted("/m/a.gguf"), "/m/a.gguf");
        assert_eq!(quoted("it's big"), r"'it'\''s big'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn keys_are_not_shown() {
        assert_eq!(shown("LLAMA_API_KEY", "hush"), "***");
        assert_eq!(shown("HSA_ENABLE_SDMA", "0"), "0");
    }
}
