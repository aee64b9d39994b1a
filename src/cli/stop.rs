//! `tightwad stop`: ends the coordinator of this host once its running answers are finished.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::coordinator::{self, Client};
use super::exit::{Exit, Failure};
use super::output::print_line;
use super::pid_file::{self, Stopped};
use super::progress::Steps;
use crate::config::Config;

/// Interval between updates on a terminal.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Time limit for the status, which the coordinator answers from memory.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for ending the server and returning the leases, in addition to `drain_seconds`.
const END_TIMEOUT: Duration = Duration::from_secs(40);

/// Sends SIGTERM, and waits until running answers are finished and the workers are free.
pub async fn stop(config: &Config) -> Result<(), Failure> {
    let section = coordinator::section(config)?;
    let name = coordinator::pid_name(section);
    let client = Client::new(section)?;
    // Asked before SIGTERM, because a coordinator that is ending answers no requests.
    let before = client.status(STATUS_TIMEOUT).await;
    let running = before.as_ref().ok().map(|status| status.now.running);
    let waiting = running.filter(|running| *running > 0).map_or_else(
        || "stopping the coordinator".to_owned(),
        |running| {
            format!(
                "stopping the coordinator: {running} running answers have {} s to finish",
                section.drain_seconds
            )
        },
    );
    let patience = Duration::from_secs(section.drain_seconds) + END_TIMEOUT;
    let mut stopping = tokio::task::spawn_blocking(move || pid_file::stop(&name, patience));
    let (began, mut steps) = (Instant::now(), Steps::new());
    let stopped = loop {
        tokio::select! {
            stopped = &mut stopping => break stopped,
            () = sleep(POLL_INTERVAL) => steps.show(&waiting, None, &format!(" ({:.0} s)", began.elapsed().as_secs_f32())),
        }
    };
    steps.end();
    let stopped = stopped
        .map_err(|error| Failure::other("stop the coordinator", error))?
        .map_err(|error| Failure::other("stop the coordinator", error))?;
    match stopped {
        Stopped::Yes(pid) => print_line(format_args!("stopped the coordinator (process {pid})")),
        Stopped::NotRunning => {
            let hint = if before.is_ok() {
                "; the one that answers there is stopped where it was started: with Ctrl-C or `systemctl stop tightwad-coordinator`"
            } else {
                ""
            };
            let message = format!("no coordinator of this user runs on port {}{hint}", section.port);
            Err(Failure::new(Exit::NotRunning, message))
        }
        Stopped::StillRunning(pid) => Err(Failure::new(
            Exit::Other,
            format!(
                "process {pid} was asked to end and has not after {} s",
                patience.as_secs()
            ),
        )),
    }
}
