//! `tightwad start`: starts the coordinator in the background and waits until its model answers. Ctrl-C stops only what it has started.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::coordinator::{self, Client, Description};
use super::exit::{Exit, Failure};
use super::output::{print_line, say};
use super::progress::Steps;
use super::{pid_file, plan, proxy, signals};
use crate::config::{Config, Coordinator, Loaded};
use crate::observe::log::Format;
use crate::pool::coordinator::status::Status;
use crate::pool::swap::State;
use crate::supervise::{notify, preflight};

pub const EXAMPLES: &str = "\
Examples:
  tightwad start                 start with the model marked `default`
  tightwad start -m qwen3-72b    start with another model
Exit codes: 0 the model answers, 3 config, 4 file missing, 5 port in use or another model is running, 6 a worker was not
available within `wait_seconds`, 8 the server died too often, 9 the model does not fit, 10 a worker has another build of
llama.cpp, 11 the model file is broken, 130 Ctrl-C, which stops the started coordinator.";

/// Interval between status requests.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time limit for the status, which the coordinator answers from memory.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for the coordinator to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(40);
/// Number of log lines to show.
const LOG_LINES: usize = 10;

/// Options of `tightwad start`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Name of the model in `models`. Default: the one marked `default`, else the only one
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// The result: a coordinator that serves.
#[derive(Debug, Serialize)]
struct Served {
    state: &'static str,
    model: String,
    url: String,
    /// Whether the coordinator was running before.
    already: bool,
    /// Process id of the coordinator, if this command has started it.
    pid: Option<u32>,
    /// Log file of the coordinator.
    log: Option<PathBuf>,
    seconds: f64,
}

/// The result: a failure, with the end of the log.
struct Unserved {
    failure: Failure,
    last_lines: Vec<String>,
    log: Option<PathBuf>,
}

impl From<Failure> for Unserved {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            last_lines: Vec::new(),
            log: None,
        }
    }
}

/// Starts the coordinator, unless it is running, and waits until it serves or fails. `file` is the config as named on the command line.
pub async fn start(file: Option<&Path>, format: Format, loaded: &Loaded, options: &Options) -> Result<(), Failure> {
    let stop = signals::stop_token()?;
    let mut steps = Steps::new();
    let outcome = bring_up(
        file,
        format,
        &loaded.config,
        options.model.as_deref(),
        &mut steps,
        &stop,
    )
    .await;
    steps.end();
    match outcome {
        Ok(served) if options.json => print_line(format_args!("{:#}", json!(served)))?,
        Ok(Served {
            model,
            url,
            already: true,
            ..
        }) => print_line(format_args!("the coordinator already serves `{model}` at {url}/v1"))?,
        Ok(Served {
            model,
            url,
            pid,
            log,
            seconds,
            ..
        }) => {
            print_line(format_args!("`{model}` is served at {url}/v1 after {seconds:.1} s"))?;
            if let (Some(pid), Some(log)) = (pid, log) {
                print_line(format_args!("process {pid}, log {}", log.display()))?;
            }
        }
        Err(Unserved {
            mut failure,
            last_lines,
            log,
        }) => {
            if options.json {
                let report = json!({
                    "state": "failed", "error": failure.message, "exit": failure.exit as u8, "log": log,
                    "last_lines": last_lines,
                });
                print_line(format_args!("{report:#}"))?;
            } else {
                for line in &last_lines {
                    say(format_args!("  {line}"));
                }
            }
            if let Some(log) = log {
                failure.message = format!("{}; its log is {}", failure.message, log.display());
            }
            return Err(failure);
        }
    }
    Ok(())
}

async fn bring_up(
    file: Option<&Path>,
    format: Format,
    config: &Config,
    wanted: Option<&str>,
    steps: &mut Steps,
    stop: &CancellationToken,
) -> Result<Served, Unserved> {
    let began = Instant::now();
    let section = coordinator::section(config)?;
    let named = config.model_for(wanted).map_err(Failure::from)?;
    let client = Client::new(section)?;
    let patience = Duration::from_secs(section.wait_seconds);
    match client.status(STATUS_TIMEOUT).await {
        Ok(status) => {
            let model = runs_already(&status, wanted)?;
            follow(&client, None, patience, steps, stop).await?;
            return Ok(Served {
                state: "ready",
                model,
                url: client.url().to_owned(),
                already: true,
                pid: None,
                log: None,
                seconds: began.elapsed().as_secs_f64(),
            });
        }
        Err(failure) if failure.exit == Exit::NotRunning => {}
        // Another program may use the port, which gives a better message.
        Err(failure) => {
            listen(section).await?;
            return Err(failure.into());
        }
    }
    preflight::program(&config.binaries.llama_server).map_err(Failure::from)?;
    preflight::model(&named.1.path).map_err(Failure::from)?;
    listen(section).await?;
    steps.show(&format!("checking `{}`", named.0), None, "");
    tokio::select! {
        fits = plan::check(config, section, named) => fits?,
        () = stop.cancelled() => return Err(Failure::new(Exit::Interrupted, "interrupted; nothing was started").into()),
    }
    let mut background = Background::start(file, format, section, named.0)?;
    let followed = follow(&client, Some(&mut background), patience, steps, stop).await;
    let log = Some(background.log.clone());
    match followed {
        Ok(()) => Ok(Served {
            state: "ready",
            model: named.0.to_owned(),
            url: client.url().to_owned(),
            already: false,
            pid: background.child.id(),
            log,
            seconds: began.elapsed().as_secs_f64(),
        }),
        Err(mut unserved) => {
            background.stop().await;
            unserved.log = log.filter(|_| unserved.failure.exit != Exit::Interrupted);
            if unserved.last_lines.is_empty() && unserved.log.is_some() {
                unserved.last_lines = last_lines(&background.log);
            }
            Err(unserved)
        }
    }
}

/// Checks that the port is free.
async fn listen(section: &Coordinator) -> Result<(), Failure> {
    proxy::listen_at(&section.host, section.port).await.map(drop)
}

/// The model of the running coordinator; a failure if it is not the wanted one.
fn runs_already(status: &Status, wanted: Option<&str>) -> Result<String, Failure> {
    let model = &**status.now.next.as_ref().unwrap_or(&status.now.model);
    match wanted.filter(|wanted| *wanted != model) {
        None => Ok(model.to_owned()),
        Some(wanted) => Err(Failure::new(
            Exit::PortInUse,
            format!("the coordinator already runs with `{model}`; change that with `tightwad swap {wanted}`"),
        )),
    }
}

/// Shows the steps until the model answers. Fails if the coordinator cannot start for `patience` because of its workers.
async fn follow(
    client: &Client,
    mut background: Option<&mut Background>,
    patience: Duration,
    steps: &mut Steps,
    stop: &CancellationToken,
) -> Result<(), Unserved> {
    let mut blocked: Option<Instant> = None;
    loop {
        if let Some(status) = background.as_mut().and_then(|it| it.child.try_wait().ok().flatten()) {
            return Err(ended(status).into());
        }
        match client.status(STATUS_TIMEOUT).await {
            Ok(status) => {
                let Description {
                    doing,
                    progress,
                    detail,
                } = Description::of_status(&status);
                match (status.now.state, &status.now.problem) {
                    (State::Ready, _) => return Ok(()),
                    (State::GaveUp, _) => {
                        let lines = &status.last_lines;
                        return Err(Unserved {
                            failure: Failure::new(Exit::ChildGaveUp, doing),
                            last_lines: lines[lines.len().saturating_sub(LOG_LINES)..].to_vec(),
                            log: None,
                        });
                    }
                    (State::Loading | State::Draining, _) => blocked = None,
                    (_, Some(problem)) => {
                        let since = *blocked.get_or_insert_with(Instant::now);
                        if since.elapsed() >= patience {
                            return Err(Failure::new(Exit::Unreachable, problem.as_str()).into());
                        }
                    }
                    (_, None) => {}
                }
                steps.show(&doing, progress, &detail);
            }
            // The started coordinator does not listen yet, or is busy. If it has ended, the next iteration notices.
            Err(_) if background.is_some() => steps.show("starting the coordinator", None, ""),
            Err(failure) => return Err(failure.into()),
        }
        tokio::select! {
            () = sleep(POLL_INTERVAL) => {}
            () = stop.cancelled() => {
                let message = match background {
                    Some(_) => "interrupted; what was started is stopped again",
                    None => "interrupted; the coordinator, which ran before, goes on",
                };
                return Err(Failure::new(Exit::Interrupted, message).into());
            }
        }
    }
}

/// The failure for a coordinator that has ended, by its exit code. Its log has the reason.
fn ended(status: ExitStatus) -> Failure {
    let exit = match status.code() {
        Some(3) => Exit::Config,
        Some(4) => Exit::File,
        Some(5) => Exit::PortInUse,
        Some(11) => Exit::BrokenModel,
        Some(9) => Exit::DoesNotFit,
        _ => Exit::ChildGaveUp,
    };
    Failure::new(exit, format!("the coordinator ended at once ({status})"))
}

/// A coordinator that keeps running when this process ends.
struct Background {
    child: Child,
    log: PathBuf,
}

impl Background {
    fn start(file: Option<&Path>, format: Format, section: &Coordinator, model: &str) -> Result<Self, Failure> {
        let log = pid_file::log_path(&coordinator::pid_name(section))
            .map_err(|error| Failure::other("find a folder for the log", error))?;
        let written = open_log(&log).map_err(|error| Failure::other(&format!("write {}", log.display()), error))?;
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        if let Some(file) = file {
            command.arg("-c").arg(file);
        }
        if format == Format::Json {
            command.args(["--log-format", "json"]);
        }
        command
            .args(["run", "coordinator", "--detached", "--"])
            .arg(model)
            .stdin(Stdio::null())
            .stdout(written.try_clone()?)
            .stderr(written)
            .kill_on_drop(false);
        // systemd must not take messages of the coordinator for messages of this command.
        notify::hide_from(&mut command);
        let child = command
            .spawn()
            .map_err(|error| Failure::other("start the coordinator", error))?;
        Ok(Self { child, log })
    }

    /// Ends it and its children.
    async fn stop(&mut self) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        // A process that was not waited for keeps its pid, so the pid cannot belong to another process.
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM);
        }
        if timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

/// Opens a new log file, and keeps the previous one.
fn open_log(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::rename(path, path.with_extension("log.old")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Only the owner can read the log, because it may contain parts of prompts.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn last_lines(log: &Path) -> Vec<String> {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
    last.iter().map(|line| (*line).to_owned()).collect()
}
