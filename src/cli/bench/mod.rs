//! `tightwad bench`: what drafting gains on servers that run.

mod table;

use std::time::Duration;

use clap::Args;
use futures_util::TryFutureExt;
use serde::Serialize;

use super::deployment::{Deployment, Servers};
use super::embedded_proxy::urls_of_drafts_down;
use super::exit::{Exit, Failure};
use super::output::print_report;
use super::progress::{Countdown, Line};
use super::question_set::QuestionSet;
use super::signals::{self, unless_stopped};
use crate::bench::{Comparison, Contender, Measurements, OwnDraft, Pair, Plan, Progress, Prompt, Tried, measure, pad};
use crate::cluster::gguf::ModelFile;
use crate::config::Config;

/// Shown below the options.
pub const EXAMPLES: &str = "\
Examples:
  tightwad bench                                            the servers of the config
  tightwad bench --own-draft --kinds code,edit --json       and llama-server's own drafting, as JSON
  tightwad bench --target http://big:8080 --draft http://small:8081 --delay 5
                                                            as if the servers were 5 ms away";

/// Options of `bench`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(super) servers: Servers,
    #[command(flatten)]
    questions: QuestionSet,
    /// How often each prompt is asked in each mode, after a round that does not count with a prompt of each kind.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Temperature. At 0 the exit code is 1 if texts differ.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Requests at once. Several: also the throughput of all together, and the slowest client.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    clients: u16,
    /// Lengthen each prompt to about this many tokens, with text that has nothing to do with it.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Add this to each round trip to the target and to the draft. The proxy then is one that bench runs in its own
    /// process, with relays to both servers that hold every byte back; plain answers come through the relay as well.
    #[arg(long, value_name = "MS", conflicts_with = "proxy")]
    delay: Option<u16>,
    /// Compare with llama-server's own drafting too: bench starts one with the models of the config's sections `target`
    /// and `draft`, whose files must be on this machine; it needs memory for both once more. Draft lengths
    /// of 1, 2, 3, 4, 6, 8, 12 and 16 are tried first, as far as five minutes allow, and the fastest is kept.
    #[arg(long)]
    own_draft: bool,
    /// Print everything as JSON instead of the table.
    #[arg(long)]
    json: bool,
}

/// What was measured and how.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether everything was asked; else this is of the answers until Ctrl-C or a failure.
    complete: bool,
    settings: Settings,
    /// Why nothing was drafted.
    #[serde(skip_serializing_if = "Option::is_none")]
    undrafted: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    own_draft: Option<Length>,
    /// What the proxy's formula made of the agreement and the costs that it measured, as speed over that of plain steps: on
    /// average over the answers.
    predicted_speed_up: Option<f64>,
    #[serde(flatten)]
    comparison: Comparison,
}

/// How it was measured.
#[derive(Debug, Serialize)]
struct Settings {
    target: String,
    proxy: String,
    prompts: usize,
    rounds: u16,
    max_tokens: u32,
    temperature: f64,
    seed: u32,
    /// Whether what the prompts predict of their answers was sent.
    prediction: bool,
    clients: u16,
    context: Option<u32>,
    delay_ms: Option<u16>,
}

/// The draft length of llama-server's own drafting.
#[derive(Debug, Clone, Serialize)]
struct Length {
    n_max: u16,
    tried: Vec<Tried>,
}

/// Who is asked what.
struct Setting {
    prompts: Vec<Prompt>,
    deployment: Deployment,
    own_draft: Option<OwnDraft>,
}

/// Measures and prints; on Ctrl-C, or when a server fails, what has been measured until then.
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
    // What shares a pass with others may differ in the last digits, drafted or not.
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
    /// Finds the servers, and starts those of bench's own.
    async fn find(options: &Options, config: Option<&Config>) -> Result<Self, Failure> {
        let pair = options.own_draft.then(|| pair(config)).transpose()?;
        let mut prompts = options.questions.prompts()?;
        let delay = options.delay.map(|delay| Duration::from_millis(delay.into()));
        let line = Line::new();
        line.tell("looking at the servers");
        let deployment = Deployment::find(&options.servers, config, delay).await?;
        if let Some(reason) = &deployment.undrafted {
            line.clear();
            eprintln!("note: {reason}");
        }
        if let Some(tokens) = options.context {
            pad(&mut prompts, tokens as usize, &deployment.target).await;
        }
        let own_draft = match &pair {
            Some(pair) => {
                let trying = |n_max| line.tell(&format!("llama-server's own drafting: trying {n_max} tokens"));
                let wishes = plan(options, &deployment).wishes;
                Some(OwnDraft::start(pair, &prompts, wishes, trying).await?)
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

    /// Ends what bench has started.
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

/// Says how far it is; `part` is which of how many measurements this is, from 0.
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
fn pair(config: Option<&Config>) -> Result<Pair, Failure> {
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
    Ok(Pair {
        binaries: config.binaries.clone(),
        server: target.clone(),
        target: (name.to_owned(), model.clone()),
        draft: small.clone(),
        draft_threads: draft.threads,
    })
}
