//! `tightwad benchmark`: measures the speed of the running coordinator.

use std::fmt::Write as _;
use std::time::Duration;

use super::coordinator::{self, Client, Description};
use super::exit::{Exit, Failure};
use super::output::print_report;
use super::progress::Steps;
use crate::bench::pool::{BenchmarkError, Report, Settings, benchmark as measure};
use crate::config::Config;
use crate::count::count;
use crate::pool::swap::State;

pub const EXAMPLES: &str = "\
Example: tightwad benchmark --prompt-sizes 512,4096 --batch 1,4 --json
The times are those that the server reports. Each prompt is new to its cache. Other requests at the same time make the pool slower.";

/// Time limit for the status, which the coordinator answers from memory.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Options of `tightwad benchmark`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Lengths of the prompts in tokens
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "64,512,2048")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    prompt_sizes: Vec<u32>,
    /// Numbers of parallel requests
    #[arg(long, value_name = "REQUESTS", value_delimiter = ',', default_value = "1,2,4,8")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    batch: Vec<u16>,
    /// Tokens per answer
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

/// Measures and prints the figures.
pub async fn benchmark(config: &Config, options: &Options) -> Result<(), Failure> {
    let section = coordinator::section(config)?;
    let client = Client::new(section)?;
    let status = client.status(STATUS_TIMEOUT).await?;
    if status.now.state != State::Ready {
        let doing = Description::of_status(&status).doing;
        let message = format!("not ready: {doing}; see `tightwad status`");
        return Err(Failure::new(Exit::Unreachable, message));
    }
    let model = &*status.now.model;
    let has_layers = |name: &str| {
        status
            .devices
            .iter()
            .any(|device| device.starts_with(&format!("{name} ")))
    };
    let settings = Settings {
        model: model.to_owned(),
        context: config.models.get(model).map(|model| model.ctx_size),
        prompt_sizes: options.prompt_sizes.clone(),
        batches: options.batch.clone(),
        tokens: options.tokens,
        workers: config
            .workers
            .iter()
            .filter(|worker| has_layers(worker.name()))
            .cloned()
            .collect(),
    };
    let mut steps = Steps::new();
    let measured = measure(client.url(), client.key(), &settings, |doing| {
        steps.show(doing, None, "");
    })
    .await;
    steps.end();
    let report = measured?;
    print_report(&report, options.json, table)
}

impl From<BenchmarkError> for Failure {
    fn from(error: BenchmarkError) -> Self {
        match error {
            BenchmarkError::Chat(error) => error.into(),
            BenchmarkError::NothingFits(_) => Self::new(Exit::Usage, error.to_string()),
            BenchmarkError::NotTold { .. } => Self::new(Exit::Unreachable, error.to_string()),
        }
    }
}

fn table(report: &Report) -> String {
    let mut text = format!(
        "{}: {} tokens per answer, {} with {} tokens each\n\n{:>8} {:>8} {:>14} {:>14} {:>14}\n",
        report.model,
        report.tokens,
        count(report.slots, "slot", "slots"),
        report.context,
        "prompt",
        "at once",
        "prompt tok/s",
        "tok/s each",
        "tok/s together"
    );
    // Writing to a string cannot fail.
    for row in &report.measured {
        let _ = writeln!(
            text,
            "{:>8} {:>8} {:>14.1} {:>14.1} {:>14.1}",
            row.prompt_tokens,
            row.at_once,
            row.prompt_per_second,
            row.generated_per_second_each,
            row.generated_per_second
        );
    }
    text.push('\n');
    for note in &report.left_out {
        let _ = writeln!(text, "left out: {note}");
    }
    let network = &report.network;
    for trip in &network.round_trips {
        let _ = match trip.milliseconds {
            Some(ms) => writeln!(text, "{}: {ms:.2} ms per round trip", trip.worker),
            None => writeln!(
                text,
                "{}: round trip unknown, since it has no agent or that does not answer",
                trip.worker
            ),
        };
    }
    let _ = match network.least_share {
        Some(share) => writeln!(
            text,
            "network: at least {:.1}% of the time per token (a round trip to each worker, of an answer alone)",
            100.0 * share
        ),
        None => writeln!(text, "network: its share of the time per token is unknown"),
    };
    text
}
