//! `tightwad verify`: checks that drafted answers equal plain ones. Fails if an answer differs, and if nothing was drafted.

use std::fmt::Write;
use std::time::Duration;

use clap::Args;
use futures_util::TryFutureExt;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::bench::show;
use super::deployment::{Deployment, Servers};
use super::embedded_proxy::{answers_in_rounds, why_undrafted};
use super::exit::{Exit, Failure};
use super::output::print_report;
use super::progress::{Countdown, Line};
use super::question_set::QuestionSet;
use super::signals::{self, unless_stopped};
use crate::bench::{Measurements, Plan, Progress, Verified, measure, verify as compare};
use crate::config::Config;
use crate::upstream::chat::Wishes;

/// 0 takes the likeliest token; a higher value depends on the sampler's random numbers.
const TEMPERATURES: [f64; 2] = [0.0, 0.8];

/// Options of `verify`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(super) servers: Servers,
    #[command(flatten)]
    questions: QuestionSet,
    /// Number of prompts to ask. Default: all
    #[arg(long, value_name = "N")]
    count: Option<usize>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    /// Whether all prompts were asked. `false` after Ctrl-C or a failure: the report covers the answers before.
    complete: bool,
    equal: bool,
    drafted: u64,
    accepted: u64,
    /// Why nothing was drafted.
    #[serde(skip_serializing_if = "Option::is_none")]
    undrafted: Option<String>,
    temperatures: Vec<Verified>,
}

/// Asks all prompts with and without drafting, compares the answers and prints the result.
pub async fn verify(options: &Options, config: Option<&Config>) -> Result<(), Failure> {
    let stop = signals::stop_token()?;
    let (report, asked) = run(options, config, &stop).await?;
    print_report(&report, options.json, text)?;
    asked?;
    if !report.equal {
        return Err(Failure::new(
            Exit::Other,
            "some drafted answers differ from the plain ones",
        ));
    }
    if report.drafted == 0 {
        let reason = report.undrafted.as_deref().unwrap_or("no draft seemed to pay");
        let message = format!(
            "nothing was drafted, so nothing was compared: {reason}; see `tightwad proxy status`, and take a slower \
             target if this one is too fast"
        );
        return Err(Failure::new(Exit::NothingDrafted, message));
    }
    Ok(())
}

/// Asks the prompts. Returns the report, and how the measurement ended.
async fn run(
    options: &Options,
    config: Option<&Config>,
    stop: &CancellationToken,
) -> Result<(Report, Result<(), Failure>), Failure> {
    let mut prompts = options.questions.prompts()?;
    prompts.truncate(options.count.unwrap_or(usize::MAX).max(1));
    let line = Line::new();
    line.tell("looking at the servers");
    let deployment = unless_stopped(stop, Deployment::find(&options.servers, config, None)).await?;
    let in_rounds = answers_in_rounds(&deployment.attached.server).await?;
    let contenders = [deployment.plain.clone(), deployment.attached.clone()];
    let (mut temperatures, mut asked) = (Vec::new(), Ok(()));
    let mut countdown = Countdown::new();
    for (number, temperature) in TEMPERATURES.into_iter().enumerate() {
        let plan = Plan {
            rounds: 1,
            clients: 1,
            wishes: Wishes {
                token_ids: deployment.is_llama_server && !in_rounds,
                ..options.questions.wishes(temperature, &deployment)
            },
        };
        let part = (number, TEMPERATURES.len());
        let on_progress = |progress: Progress<'_>| show(&mut countdown, progress, part);
        let mut measured = Measurements::default();
        let asking = measure(&plan, &prompts, &contenders, &mut measured, on_progress);
        asked = unless_stopped(stop, asking.map_err(Failure::from)).await;
        if !measured.samples.is_empty() {
            temperatures.push(compare(temperature, &measured, &prompts));
        }
        if asked.is_err() {
            break;
        }
    }
    countdown.clear();
    if temperatures.is_empty()
        && let Err(nothing) = asked
    {
        return Err(nothing);
    }
    let complete = asked.is_ok();
    let sum = |of: fn(&Verified) -> u64| temperatures.iter().map(of).sum();
    let drafted = sum(|verified| verified.drafted);
    let mut undrafted = deployment.undrafted.clone();
    if complete && drafted == 0 && undrafted.is_none() {
        // Asks again, because the proxy may have learned the reason from the answers.
        undrafted = why_undrafted(&deployment.attached.server, Duration::ZERO).await?;
    }
    let asked = asked.and(deployment.close().await);
    let report = Report {
        complete,
        equal: temperatures.iter().all(|verified| verified.divergences.is_empty()),
        drafted,
        accepted: sum(|verified| verified.accepted),
        undrafted,
        temperatures,
    };
    Ok((report, asked))
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    for verified in &report.temperatures {
        let rate = verified.token_equal_rate.unwrap_or(0.0) * 100.0;
        let how = if verified.by_token { "" } else { ", compared as texts" };
        let _ = writeln!(
            text,
            "temperature {}: {} of {} answers equal, {} of {} tokens ({rate:.2}%){how}; {} of {} draft tokens accepted",
            verified.temperature,
            verified.equal,
            verified.prompts,
            verified.equal_tokens,
            verified.tokens,
            verified.accepted,
            verified.drafted,
        );
        for divergence in &verified.divergences {
            let token = divergence
                .token
                .map(|token| format!("token {token}, "))
                .unwrap_or_default();
            let prompt: String = divergence.prompt.chars().take(70).collect();
            let _ = writeln!(
                text,
                "  {} {prompt:?}\n    differs at {token}character {}\n      plain:   {:?}\n      drafted: {:?}",
                divergence.kind, divergence.character, divergence.plain, divergence.drafted
            );
        }
    }
    if !report.complete {
        text.push_str("the other prompts were not asked\n");
    }
    text
}
