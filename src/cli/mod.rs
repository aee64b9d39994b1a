//! The command line: parses arguments, calls the other modules and prints. Each command ends with one exit code of [`exit::Exit`].
//!
//! `main` reads the arguments and the config and dispatches to one file per command.

mod bench;
mod benchmark;
mod chat;
mod check_config;
mod coordinator;
mod demo;
mod deployment;
mod embedded_proxy;
pub mod exit;
mod output;
mod pid_file;
mod plan;
mod pool_status;
mod progress;
mod proxy;
mod question_set;
mod received;
mod run;
mod server_status;
mod signals;
mod start;
mod status;
mod stop;
mod swap;
mod verify;
mod wrap;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use self::output::{say, say_part};
use crate::config::Loaded;
use crate::observe::journal;
use crate::observe::log::{self, Format};
use crate::supervise::parent_bound;
use exit::{Exit, Failure};

/// Environment variable with the log filter: `debug`, `warn,tightwad::child=info`, …
const LOG_FILTER: &str = "TIGHTWAD_LOG";

const EXAMPLES: &str = "\
Examples:
  tightwad check-config      show the mistakes in the config
  tightwad run target        start the target on the host with the big model
  tightwad run draft         start the draft on the host with the small model
  tightwad proxy start       start the endpoint in front of both
  tightwad chat              chat with the model
  tightwad bench             measure what drafting gains
  tightwad demo --target-model big.gguf --draft-model small.gguf
                             show what drafting gains with these two models

  tightwad run worker        lend this host's GPUs to the pool
  tightwad plan              check whether a model fits into the pool
  tightwad start             start one endpoint over the pool
  tightwad status --watch    watch the state of all parts
  tightwad swap qwen3-72b    load another model over the same GPUs
  tightwad benchmark         measure the speed of the pool
  tightwad stop              stop the pool

Exit codes: 0 ok, 1 other, 2 usage, 3 config, 4 file missing (model, program,
key), 5 port in use, 6 server unreachable, 7 not running, 8 a child process died
too often, 9 the model does not fit, 10 a worker has another build of llama.cpp,
11 broken model file, 12 nothing was drafted, 13 a draft is down, 14 a token or
key was refused, 130 interrupted, 141 the reader of the output has closed it.
The environment variable TIGHTWAD_LOG filters the log (error, warn, info, debug).";

const PROXY_EXAMPLES: &str = "\
Examples:
  tightwad -c cluster.yaml proxy start
  tightwad proxy status --json | jq .counts
  tightwad proxy stop";

/// Speculative decoding across machines, and one model over the GPUs of several, behind one OpenAI-compatible endpoint.
#[derive(Debug, Parser)]
#[command(name = "tightwad", version, after_help = EXAMPLES)]
struct Cli {
    /// The config. Default: `TIGHTWAD_CONFIG`, ./tightwad.yaml, ./configs/cluster.yaml,
    /// ~/.config/tightwad/config.yaml, /etc/tightwad/cluster.yaml
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Format of log lines (on stderr)
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    log_format: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start, stop or query the OpenAI-compatible endpoint
    #[command(subcommand, after_help = PROXY_EXAMPLES)]
    Proxy(ProxyCommand),
    /// Run one part of the cluster on this host in the foreground
    #[command(
        arg_required_else_help = true,
        after_help = "Example: tightwad -c cluster.yaml run target"
    )]
    Run {
        /// Part to run
        part: run::Part,
        /// With `worker`: the worker's name or host in the config. Default: the entry with this host's address.
        /// With `coordinator`: the model to load first. Default: the one marked `default`, else the only one.
        name: Option<String>,
        /// Detach from the terminal
        #[arg(long, hide = true)]
        detached: bool,
    },
    /// Show the mistakes in the config, and the files that this host lacks
    #[command(after_help = "Example: tightwad -c cluster.yaml check-config --show")]
    CheckConfig(check_config::Options),
    /// Chat with the model on the terminal, or answer the prompts from a pipe, one per line
    #[command(after_help = "Example: echo 'Write a haiku about frugality.' | tightwad chat")]
    Chat(chat::Options),
    /// Start a target, a draft and the proxy on this machine, and show what drafting gains
    #[command(after_help = "Example: tightwad demo --target-model big.gguf --draft-model small.gguf --once")]
    Demo(demo::Options),
    /// Measure what drafting gains: ask running servers the same prompts with and without it
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::Options),
    /// Check that drafted answers equal plain ones, token by token, at temperature 0 and 0.8
    #[command(after_help = "Example: tightwad verify --count 10 --kinds code")]
    Verify(verify::Options),
    /// Show which layers of a model go to which GPU of the pool, and whether it fits
    #[command(after_help = "Example: tightwad plan qwen3-72b --json | jq .fits")]
    Plan(plan::Options),
    /// Start the coordinator in the background, and wait until its model answers
    #[command(after_help = start::EXAMPLES)]
    Start(start::Options),
    /// Stop the coordinator of this host once running answers are finished, and free the workers
    #[command(after_help = "Example: tightwad stop")]
    Stop,
    /// Show the state of everything in the config
    #[command(after_help = pool_status::EXAMPLES)]
    Status(pool_status::Options),
    /// Replace the model that the coordinator runs
    #[command(after_help = swap::EXAMPLES)]
    Swap(swap::Options),
    /// Measure the running coordinator: prefill and decode speed, with one and with several requests
    #[command(after_help = benchmark::EXAMPLES)]
    Benchmark(benchmark::Options),
    /// Execute a program that the kernel kills when its parent ends
    #[command(name = parent_bound::SUBCOMMAND, hide = true)]
    ExecChild(ExecChild),
}

#[derive(Debug, Subcommand)]
enum ProxyCommand {
    /// Start the proxy in the foreground; Ctrl-C or `tightwad proxy stop` ends it
    #[command(after_help = "Example: tightwad -c cluster.yaml proxy start")]
    Start,
    /// Stop the proxy once running answers are finished, after ten seconds at most
    #[command(after_help = "Example: tightwad proxy stop")]
    Stop,
    /// Show the target, the drafts, the acceptance rate and the running requests
    #[command(after_help = proxy::STATUS_EXAMPLES)]
    Status {
        /// Print the whole answer as JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct ExecChild {
    #[arg(long)]
    parent: u32,
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Parses the command line, runs the command, and returns the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Before any thread starts, because this process becomes another program.
    if let Command::ExecChild(child) = &cli.command {
        return exec_child(child);
    }
    let quiet = matches!(
        cli.command,
        Command::Demo(_)
            | Command::Chat(_)
            | Command::Bench(_)
            | Command::Verify(_)
            | Command::Plan(_)
            | Command::Start(_)
            | Command::Stop
            | Command::Status(_)
            | Command::Swap(_)
            | Command::Benchmark(_)
    );
    let filter = std::env::var(LOG_FILTER).unwrap_or_else(|_| if quiet { "error" } else { "info" }.to_owned());
    if let Err(error) = log::init(cli.log_format, &filter) {
        return report(&Failure::new(Exit::Usage, format!("{LOG_FILTER}: {error}")));
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::other("start the runtime", error)),
    };
    let done = runtime.block_on(dispatch(&cli));
    // Does not wait for threads that a name look-up still blocks.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

async fn dispatch(cli: &Cli) -> Result<(), Failure> {
    let file = cli.config.as_deref();
    match &cli.command {
        Command::Proxy(ProxyCommand::Start) => run::run(&load(file)?, run::Part::Proxy, None).await,
        Command::Proxy(ProxyCommand::Stop) => proxy::stop(&load(file)?.config),
        Command::Proxy(ProxyCommand::Status { json }) => proxy::status(&load(file)?.config, *json).await,
        Command::Run { part, name, detached } => {
            if *detached {
                rustix::process::setsid().map_err(|error| Failure::other("leave the terminal", error))?;
            }
            run::run(&load(file)?, *part, name.as_deref()).await
        }
        Command::CheckConfig(options) => check_config::check(file, options),
        Command::Chat(options) => chat::chat(&load(file)?.config, options).await,
        Command::Demo(options) => demo::demo(options).await,
        Command::Bench(options) => {
            let loaded = load_unless_named(file, &options.servers)?;
            bench::bench(options, loaded.as_ref().map(|loaded| &loaded.config)).await
        }
        Command::Verify(options) => {
            let loaded = load_unless_named(file, &options.servers)?;
            verify::verify(options, loaded.as_ref().map(|loaded| &loaded.config)).await
        }
        Command::Plan(options) => plan::plan(&load(file)?.config, options).await,
        Command::Start(options) => start::start(file, cli.log_format, &load(file)?, options).await,
        Command::Stop => stop::stop(&load(file)?.config).await,
        Command::Status(options) => pool_status::status(&load(file)?.config, options).await,
        Command::Swap(options) => swap::swap(&load(file)?.config, options).await,
        Command::Benchmark(options) => benchmark::benchmark(&load(file)?.config, options).await,
        Command::ExecChild(child) => Err(Failure::other("execute", child.command[0].display())),
    }
}

/// Loads the config, and logs its warnings.
fn load(file: Option<&Path>) -> Result<Loaded, Failure> {
    let loaded = crate::config::load::load(file)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    Ok(loaded)
}

/// The config, unless the command line names a target and no config.
fn load_unless_named(file: Option<&Path>, servers: &deployment::Servers) -> Result<Option<Loaded>, Failure> {
    if file.is_none() && servers.target.is_some() {
        return Ok(None);
    }
    load(file).map(Some)
}

fn exec_child(child: &ExecChild) -> ExitCode {
    let Some((program, args)) = child.command.split_first() else {
        return Exit::Usage.into();
    };
    let error = parent_bound::become_program(child.parent, program, args);
    say(format_args!("error: cannot execute {}: {error}", program.display()));
    ExitCode::from(127)
}

fn report(failure: &Failure) -> ExitCode {
    if failure.message.is_empty() {
        return failure.exit.into();
    }
    let sentence = format!("error: {failure}");
    if journal::is_stderr() {
        say_part(format_args!("{}", journal::lines(tracing::Level::ERROR, &sentence)));
    } else {
        say(format_args!("{sentence}"));
    }
    failure.exit.into()
}
