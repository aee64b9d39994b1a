//! Children that cannot outlive their supervisor.
//!
//! A supervisor that SIGKILL ends cannot clean up, and a llama-server left behind keeps its GPU memory and its port. Linux can kill a
//! child with its parent, but the child must request this itself between `fork` and `exec`, where Rust offers no safe code. So the
//! supervisor starts its own binary a second time. That process requests the signal, checks that its parent still lives, and becomes
//! the program.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{LazyLock, mpsc};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use tokio::sync::oneshot;

use super::command::Launch;
use super::environment;

/// Name of the hidden subcommand that ends in [`become_program`].
pub const SUBCOMMAND: &str = "exec-child";

/// The running binary, even after an update has replaced it on disk.
const OWN_BINARY: &str = "/proc/self/exe";

/// Turns this process into `program`, bound to live no longer than its parent `parent`.
///
/// Returns only if that fails.
#[must_use]
pub fn become_program(parent: u32, program: &OsString, args: &[OsString]) -> io::Error {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // A parent that died before the line above sends no signal.
    let still_there = getppid().is_some_and(|pid| u32::try_from(pid.as_raw_nonzero().get()) == Ok(parent));
    if !still_there {
        return io::Error::other("the supervisor is gone");
    }
    Command::new(program).args(args).exec()
}

/// The command that starts a program through [`become_program`].
#[must_use]
pub fn command(launch: &Launch) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(OWN_BINARY);
    environment::apply(&mut command, &launch.env);
    command
        .arg0("tightwad")
        .arg(SUBCOMMAND)
        .arg("--parent")
        .arg(std::process::id().to_string());
    command.arg("--").arg(&launch.program).args(&launch.args);
    command
}

/// Starts `command` from a thread that lives as long as this process: the death signal is sent when the *thread* that
/// started the child ends, and threads of a runtime come and go.
pub async fn spawn(command: tokio::process::Command) -> io::Result<tokio::process::Child> {
    let (reply, child) = oneshot::channel();
    let gone = || io::Error::other("the thread that starts children is gone");
    let job = Job {
        command,
        runtime: tokio::runtime::Handle::current(),
        reply,
    };
    SPAWNER.send(job).map_err(|_| gone())?;
    child.await.map_err(|_| gone())?
}

struct Job {
    command: tokio::process::Command,
    runtime: tokio::runtime::Handle,
    reply: oneshot::Sender<io::Result<tokio::process::Child>>,
}

static SPAWNER: LazyLock<mpsc::Sender<Job>> = LazyLock::new(|| {
    let (jobs, queue) = mpsc::channel::<Job>();
    std::thread::spawn(move || {
        for mut job in queue {
            let _runtime = job.runtime.enter();
            // If the receiver is gone, dropping the child kills it.
            let _ = job.reply.send(job.command.spawn());
        }
    });
    jobs
});
