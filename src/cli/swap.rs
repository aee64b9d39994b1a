//! `tightwad swap`: replaces the model that the coordinator runs, and shows each step.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::json;
use tokio::time::timeout;

use super::coordinator::{self, Client, Description};
use super::exit::{Exit, Failure};
use super::output::{print, print_line};
use super::progress::Steps;
use super::{plan, signals};
use crate::config::{Config, is_loopback, is_wildcard};
use crate::pool::coordinator::status::{Step, SwapError, SwapLine};
use crate::upstream::chat::{refused, unreachable};

pub const EXAMPLES: &str = "\
Example: tightwad swap qwen3-72b --json | jq -c .state
Exit codes: 0 the model answers, 1 a later command asked for another model, 3 no such model, 6 the connection to the coordinator
broke, 7 no coordinator is running, 8 the model could not be started (on the coordinator's host 4 if its file is missing, 9 if it
does not fit, 11 if its file is broken), 130 Ctrl-C, which cancels the swap unless the old model is being stopped already.";

/// Time limit for the status, which the coordinator answers from memory.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Time limit for the next step. A coordinator sends a step at least every two seconds, so a silent one hangs.
const STEP_TIMEOUT: Duration = Duration::from_secs(7);

/// Options of `tightwad swap`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Name of the model in `models`
    model: String,
    /// Print each step as a line of JSON; the last line has `done` or `error`
    #[arg(long)]
    json: bool,
}

/// Makes the coordinator run another model, and shows each step.
pub async fn swap(config: &Config, options: &Options) -> Result<(), Failure> {
    let stop = signals::stop_token()?;
    let section = coordinator::section(config)?;
    let named = config.model_for(Some(&options.model))?;
    let model = named.0;
    let client = Client::new(section)?;
    let began = Instant::now();
    let mut steps = Steps::new();
    let mut last = None;
    let outcome = tokio::select! {
        outcome = follow(&client, model, options.json, &mut steps, &mut last) => Some(outcome),
        () = stop.cancelled() => None,
    };
    steps.end();
    match outcome.unwrap_or_else(|| Err(interrupted(model, last.as_ref()))) {
        Ok(()) if options.json => Ok(()),
        Ok(()) => {
            let (url, seconds) = (client.url(), began.elapsed().as_secs_f32());
            print_line(format_args!("`{model}` is served at {url}/v1 after {seconds:.1} s"))
        }
        Err(mut failure) if failure.exit == Exit::ChildGaveUp => {
            if let Ok(status) = client.status(STATUS_TIMEOUT).await {
                let now = Description::of_status(&status).doing;
                failure.message = format!("{}; now {now}", failure.message);
            }
            // The coordinator sends the reason as text. On its own host this command can find out the exit code.
            if (is_loopback(&section.host) || is_wildcard(&section.host))
                && let Err(seen) = plan::check(config, section, named).await
                && matches!(seen.exit, Exit::File | Exit::BrokenModel | Exit::DoesNotFit)
            {
                failure.exit = seen.exit;
            }
            Err(failure)
        }
        Err(failure) => Err(failure),
    }
}

/// The failure after Ctrl-C in this step. Closing the connection cancels the swap until the old model is stopped.
fn interrupted(model: &str, last: Option<&Step>) -> Failure {
    let message = match last.map(|step| &*step.model) {
        Some(now) if now == model => {
            format!("interrupted; `{model}` goes on to load without you: see `tightwad status`")
        }
        Some(old) => format!("interrupted; the swap is taken back, and `{old}` stays"),
        None => "interrupted before the coordinator answered; the swap is taken back".to_owned(),
    };
    Failure::new(Exit::Interrupted, message)
}

/// Shows the steps of a swap, and keeps the last one in `last`.
async fn follow(
    client: &Client,
    model: &str,
    json: bool,
    steps: &mut Steps,
    last: &mut Option<Step>,
) -> Result<(), Failure> {
    let request = client.post("/v1/tightwad/swap", &json!({ "model": model }));
    let hangs = |_| {
        let (url, seconds) = (client.url(), STEP_TIMEOUT.as_secs());
        let message =
            format!("the coordinator at {url} has said nothing for {seconds} s and seems to hang; restart it");
        Failure::new(Exit::Unreachable, message)
    };
    let answer = timeout(STEP_TIMEOUT, request.send()).await.map_err(hangs)?;
    let answer = answer.map_err(|error| client.silent(&error))?;
    if answer.status() == reqwest::StatusCode::NOT_FOUND {
        let message = format!(
            "the coordinator at {} has no model `{model}`: it was started before that was in the config; start it anew",
            client.url()
        );
        return Err(Failure::new(Exit::Config, message));
    }
    if !answer.status().is_success() {
        return Err(refused(client.url(), answer).await.into());
    }
    let mut bytes = answer.bytes_stream();
    let mut lines = Vec::new();
    while let Some(more) = timeout(STEP_TIMEOUT, bytes.next()).await.map_err(hangs)? {
        lines.extend_from_slice(&more.map_err(|error| unreachable(client.url(), &error))?);
        while let Some(end) = lines.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = lines.drain(..=end).collect();
            let read = serde_json::from_slice(&line);
            if json {
                print(line)?;
            }
            match read {
                Ok(SwapLine::Done { .. }) => return Ok(()),
                Ok(SwapLine::Failed { error }) => return Err(failure(&error)),
                Ok(SwapLine::Step(step)) => {
                    if !json {
                        let step = Description::of(&step);
                        steps.show(&step.doing, step.progress, &step.detail);
                    }
                    *last = Some(step);
                }
                // A line that only another version knows.
                Err(_) => {}
            }
        }
    }
    let message = format!("{} broke off while it swapped; see `tightwad status`", client.url());
    Err(Failure::new(Exit::Unreachable, message))
}

fn failure(error: &SwapError) -> Failure {
    let exit = match error.code.as_str() {
        "model_not_found" => Exit::Config,
        "model_failed" => Exit::ChildGaveUp,
        "shutting_down" => Exit::NotRunning,
        _ => Exit::Other,
    };
    Failure::new(exit, error.message.as_str())
}
