//! `tightwad bench`: measures what drafting gains on running servers. Prints the results so far after Ctrl-C or a failure.

mod table;

use std::time::Duration;

use clap::Args;
use futures_util::TryFutureExt;
use serde::Serialize;

use super::deployment::{Deployment, Servers};
use super::embedded_proxy::urls_of_drafts_down;
use super::exit::{Exit, Failure};
use super::output::{print_report, say};
use super::progress::{Countdown, Line};
use super::question_set::QuestionSet;
use super::signals::{self, unless_stopped};
use crate::bench::{
    Comparison, Contender, LengthTrial, Measurements, ModelPair, NativeDraft, Plan, Progress, Prompt, measure, pad,
};
use crate::config::Config;
use crate::gguf::ModelFile;

/// Shown below the options.
pub const EXAMPLES: &str = "\
Examples:
  tightwad bench                                            measure the servers of the config
  tightwad bench --own-draft --kinds code,edit --json       also measure llama-server's own drafting, as JSON
  tightwad bench --target http://big:8080 --draft http://small:8081 --delay 5
                                                            add 5 ms to each round trip";

/// Options of `bench`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(super) servers: Servers,
    #[command(flatten)]
    questions: QuestionSet,
    /// Number of times that each prompt is asked in each mode. A warm-up with one prompt of each kind does not count
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Temperature of the sampler. At 0 with one client, the exit code is 1 if texts differ
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Number of parallel requests. With several, also show the total throughput and the slowest client
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    clients: u16,
    /// Lengthen each prompt to about this many tokens with unrelated text
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Add this delay to each round trip to the target and to the draft, for drafted and plain answers. bench then runs a
    /// proxy in its own process, behind relays to both servers
    #[arg(long, value_name = "MS", conflicts_with = "proxy")]
    delay: Option<u16>,
    /// Also measure llama-server's own drafting. bench starts one more llama-server with the models of the sections `target` and
    /// `draft`. Their files must be on this machine, and both need memory a second time. bench first tries draft lengths of 1,
    /// 2, 3, 4, 6, 8, 12 and 16 for up to five minutes, and keeps the fastest
    #[arg(long)]
    own_draft: bool,
    /// Print everything as JSON instead of the table
    #[arg(long)]
    json: bool,
}

/// The measurements and their settings.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether all prompts were asked. `false` after Ctrl-C or a failure: the report covers the answers before.
    complete: bool,
    settings: Settings,
    /// Why nothing was drafted.
    #[serde(skip_serializing_if = "Option::is_none")]
    undrafted: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    own_draft: Option<Length>,
    /// Mean over the answers of the speed-up that the proxy's cost model predicted.
    predicted_speed_up: Option<f64>,
    #[serde(flatten)]
    comparison: Comparison,
}

/// Settings of the measurement.
#[derive(Debug, Serialize)]
struct Settings {
    target: String,
    proxy: String,
    prompts: usize,
    rounds: u16,
    max_tokens: u32,
    temperature: f64,
    seed: u32,
    /// Whether requests contained the predictions of the prompts.
    prediction: bool,
    clients: u16,
    context: Option<u32>,
    delay_ms: Option<u16>,
}

/// The draft length of llama-server's own drafting.
#[derive(Debug, Clone, Serialize)]
struct Length {
    n_max: u16,
    tried: Vec<LengthTrial>,
}

/// The prompts and the servers.
struct Setting {
    prompts: Vec<Prompt>,
    deployment: Deployment,
    own_draft: Option<NativeDraft>,
}

/// Measures and prints. After Ctrl-C or a failure, prints the results so far.
pub async fn bench(options: &Options, config: Option<&Config>) -> Result<(), Failure> {
    let stop = signals::stop_token()?;
    let setting = unless_stopped(&stop, Setting::find(options, config)).await?;
    let contenders = setting.contenders();
    let mut countdown = Countdown::new();
    let on_progress = |progress: Progress<'_>| show(&mut countdown, progress, (0, 1));
    let mut measured = Measurements::default();
    let plan = plan(options, &setting.deployment);
    let asking = measure(&plan, &setting.prompts, &contenders, &mut measured, on_progress);
    let asked = unless_stopped(&stop, asking.map_err(Failure::from)).await;
    countdown.clear();
    if measured.samples.is_empty() {
        return asked;
    }
    let report = report(options, &setting, &measured, asked.is_ok());
    print_report(&report, options.json, table::table)?;
    let down = match &report.undrafted {
        Some(_) => urls_of_drafts_down(&setting.deployment.attached.server).await,
        None => Ok(Vec::new()),
    };
    asked.and(setting.close().await)?;
    // With several clients, slots share a pass and the last digits of the logits may differ, drafted or not.
    if options.temperature == 0.0 && options.clients == 1 && !report.comparison.equal {
        return Err(Failure::new(
            Exit::Other,
            "some texts differ from the plain ones; `tightwad verify` shows where",
        ));
    }
    let down = down?;
    if !down.is_empty() {
        let message = format!(
            "nothing was drafted, because no draft answers at {}; start it with `tightwad run draft` on its host, or check its \
             `url`",
            down.join(", ")
        );
        return Err(Failure::new(Exit::DraftDown, message));
    }
    Ok(())
}

impl Setting {
    /// Finds the servers, and starts those that bench runs itself.
    async fn find(options: &Options, config: Option<&Config>) -> Result<Self, Failure> {
        let pair = options.own_draft.then(|| pair(config)).transpose()?;
        let mut prompts = options.questions.prompts()?;
        let delay = options.delay.map(|delay| Duration::from_millis(delay.into()));
        let line = Line::new();
        line.tell("looking at the servers");
        let deployment = Deployment::find(&options.servers, config, delay).await?;
        if let Some(reason) = &deployment.undrafted {
            line.clear();
            say(format_args!("note: {reason}"));
        }
        if let Some(tokens) = options.context {
            pad(&mut prompts, tokens as usize, &deployment.target).await;
        }
        let own_draft = match &pair {
            Some(pair) => {
                let trying = |n_max| line.tell(&format!("llama-server's own drafting: trying {n_max} tokens"));
                let wishes = plan(options, &deployment).wishes;
                Some(NativeDraft::start(pair, &prompts, wishes, trying).await?)
            }
            None => None,
        };
        Ok(Self {
            prompts,
            deployment,
            own_draft,
        })
    }

    fn contenders(&self) -> Vec<Contender> {
        let own_draft = self.own_draft.iter().map(|own| &own.contender);
        let contenders = [&self.deployment.plain, &self.deployment.attached];
        contenders.into_iter().chain(own_draft).cloned().collect()
    }

    /// Ends the servers that bench has started.
    async fn close(self) -> Result<(), Failure> {
        if let Some(own) = self.own_draft {
            own.stop().await;
        }
        self.deployment.close().await
    }
}

fn plan(options: &Options, deployment: &Deployment) -> Plan {
    Plan {
        rounds: options.rounds.into(),
        clients: options.clients.into(),
        wishes: options.questions.wishes(options.temperature, deployment),
    }
}

fn report(options: &Options, setting: &Setting, measured: &Measurements, complete: bool) -> Report {
    let deployment = &setting.deployment;
    Report {
        complete,
        settings: Settings {
            target: deployment.plain.server.url().to_owned(),
            proxy: deployment.attached.server.url().to_owned(),
            prompts: setting.prompts.len(),
            rounds: options.rounds,
            max_tokens: options.questions.max_tokens,
            temperature: options.temperature,
            seed: options.questions.seed,
            prediction: options.questions.prediction,
            clients: options.clients,
            context: options.context,
            delay_ms: options.delay,
        },
        undrafted: deployment.undrafted.clone(),
        own_draft: setting.own_draft.as_ref().map(|own| Length {
            n_max: own.n_max,
            tried: own.tried.clone(),
        }),
        predicted_speed_up: measured.expected_speed_up(),
        comparison: Comparison::of(measured, &setting.prompts),
    }
}

/// Shows the progress. `part` is the index and the number of measurements.
pub fn show(countdown: &mut Countdown, progress: Progress<'_>, part: (usize, usize)) {
    if let Progress::Asking {
        mode,
        warming_up,
        done,
        all,
    } = progress
    {
        let doing = if warming_up { "warming up, " } else { "" };
        let (number, count) = part;
        countdown.show(&format!("{doing}{}", mode.name()), number * all + done, count * all);
    }
}

/// The two models of the config.
fn pair(config: Option<&Config>) -> Result<ModelPair, Failure> {
    let missing = |section: &str| {
        Failure::new(
            Exit::Config,
            format!("--own-draft needs the section `{section}` in the config, which names the model"),
        )
    };
    let config = config.ok_or_else(|| missing("target"))?;
    let target = config.target.as_ref().ok_or_else(|| missing("target"))?;
    let draft = config.draft.as_ref().ok_or_else(|| missing("draft"))?;
    let (name, model) = config.model_for(target.model.as_deref())?;
    let (_, small) = config.model_for(draft.model.as_deref())?;
    for model in [model, small] {
        ModelFile::check_complete(&model.path)?;
    }
    Ok(ModelPair {
        binaries: config.binaries.clone(),
        server: target.clone(),
        target: (name.to_owned(), model.clone()),
        draft: small.clone(),
        draft_threads: draft.threads,
    })
}
