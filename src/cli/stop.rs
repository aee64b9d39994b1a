//! `tightwad stop`: ends the coordinator of this host.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::coordinator::{self, Client};
use super::exit::{Exit, Failure};
use super::output::print_line;
use super::pid_file::{self, Stopped};
use super::progress::Steps;
use crate::config::Config;

/// Pause between two lines on a terminal.
const LOOK: Duration = Duration::from_millis(200);
/// It answers that from memory.
const PATIENCE: Duration = Duration::from_secs(2);
/// What ending its server and returning its leases may take, beside `drain_seconds`.
const END_PATIENCE: Duration = Duration::from_secs(40);

/// Asks it to end, and waits until running answers are finished and the workers are free.
pub async fn stop(config: &Config) -> Result<(), Failure> {
    let section = coordinator::section(config)?;
    let name = coordinator::pid_name(section);
    let client = Client::new(section)?;
    // A coordinator that is ending takes no more questions, so this is the last chance.
    let before = client.status(PATIENCE).await;
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
    let patience = Duration::from_secs(section.drain_seconds) + END_PATIENCE;
    let mut stopping = tokio::task::spawn_blocking(move || pid_file::stop(&name, patience));
    let (began, mut steps) = (Instant::now(), Steps::new());
    let stopped = loop {
        tokio::select! {
            stopped = &mut stopping => break stopped,
            () = sleep(LOOK) => steps.show(&waiting, None, &format!(" ({:.0} s)", began.elapsed().as_secs_f32())),
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
