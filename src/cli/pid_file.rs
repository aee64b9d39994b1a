//! Pid files, by which `stop` and `proxy stop` find the process to stop, and `status` finds a running role.
//!
//! A held lock means that the process runs: the kernel releases the lock with the process. The file contains the process id and the start
//! time of the process, so that a later process with the same id is never signalled.

use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::exit::{Exit, Failure};
use crate::config::local_key::state_folder;

/// Interval between checks whether the process has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Another process that checks the lock holds it for less than this.
const LOCK_CHECK_TIME: Duration = Duration::from_millis(500);
/// File mode: only the owner can read the file or take its lock.
const PRIVATE: u32 = 0o600;
/// Largest size of the file, more than two numbers need.
const MAX_SIZE: u64 = 64;

/// Guard of a claimed name. Holds the lock until it is dropped.
#[derive(Debug)]
pub struct PidFile {
    _locked: File,
}

/// Result of a stop.
#[derive(Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The process has ended.
    Yes(i32),
    /// No process runs.
    NotRunning,
    /// The process got SIGTERM and has not ended yet.
    StillRunning(i32),
}

impl PidFile {
    /// Claims the name for this process. Fails with [`ClaimError::By`] if another process holds it.
    pub fn claim(name: &str) -> Result<Self, ClaimError> {
        let path = path(name)?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = open(&path)?;
        // An older version may have made the file with another mode.
        file.set_permissions(Permissions::from_mode(PRIVATE))?;
        let began = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                // Another process may be checking the lock.
                Err(TryLockError::WouldBlock) if began.elapsed() < LOCK_CHECK_TIME => {
                    std::thread::sleep(POLL_INTERVAL / 5);
                }
                Err(TryLockError::WouldBlock) => return Err(ClaimError::By(Process::read(&mut file)?.pid)),
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
        file.set_len(0)?;
        write!(file, "{}", Process::this()?)?;
        Ok(Self { _locked: file })
    }
}

/// Why a name cannot be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another process holds it.
    #[error("process {0} has it")]
    By(i32),
    /// The file cannot be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Claims the name for `what`, which the command `stop` ends. Fails if another process holds the name. A file that cannot be written is only
/// a warning.
pub fn claim(name: &str, what: &str, stop: &str) -> Result<Option<PidFile>, Failure> {
    match PidFile::claim(name) {
        Ok(claim) => Ok(Some(claim)),
        Err(ClaimError::By(pid)) => Err(Failure::new(
            Exit::PortInUse,
            format!("the {what} already runs (process {pid}); stop it with `{stop}`"),
        )),
        // A system service without a home folder is stopped with systemctl.
        Err(ClaimError::Io(error)) => {
            tracing::warn!("`{stop}` will not find this {what}: cannot write its pid file: {error}");
            Ok(None)
        }
    }
}

/// Sends SIGTERM to the process that holds the name, and waits until it ends, for at most `patience`.
pub fn stop(name: &str, patience: Duration) -> io::Result<Stopped> {
    let mut file = match open(&path(name)?) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Stopped::NotRunning),
        Err(error) => return Err(error),
    };
    if !is_locked(&file)? {
        return Ok(Stopped::NotRunning);
    }
    let known = Process::read(&mut file)?;
    let number = known.pid;
    let pid = Pid::from_raw(number).ok_or_else(no_process)?;
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(Stopped::NotRunning),
        Err(error) => return Err(error.into()),
    };
    // The handle now refers to one process for good. It is the process that wrote the file if the start times agree and the lock is still
    // held.
    if start_time(number) != Some(known.started) || !is_locked(&file)? {
        return Ok(Stopped::NotRunning);
    }
    pidfd_send_signal(&process, Signal::TERM)?;
    let began = Instant::now();
    while is_locked(&file)? {
        if began.elapsed() >= patience {
            return Ok(Stopped::StillRunning(number));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(Stopped::Yes(number))
}

/// The process that holds the name; `None` if no process does, or the file cannot be read.
pub fn holder(name: &str) -> Option<i32> {
    let mut file = File::open(path(name).ok()?).ok()?;
    let held = is_locked(&file).ok()?;
    held.then(|| Process::read(&mut file).ok())
        .flatten()
        .map(|process| process.pid)
}

fn open(path: &PathBuf) -> io::Result<File> {
    let exists = path.try_exists()?;
    if !exists && path.parent().is_some_and(|folder| !folder.is_dir()) {
        return Err(io::ErrorKind::NotFound.into());
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(PRIVATE)
        .open(path)
}

/// Whether a process holds the lock. Checks with a shared lock, so that several checks can run at once.
fn is_locked(file: &File) -> io::Result<bool> {
    match file.try_lock_shared() {
        Ok(()) => file.unlock().map(|()| false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// A process in the format of the file: `1234 567890`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    /// Start time in ticks of the kernel's clock since boot.
    started: u64,
}

impl Process {
    fn this() -> io::Result<Self> {
        let pid = std::process::id().cast_signed();
        let started =
            start_time(pid).ok_or_else(|| io::Error::other("/proc does not tell when this process started"))?;
        Ok(Self { pid, started })
    }

    fn read(file: &mut File) -> io::Result<Self> {
        let mut text = String::new();
        file.take(MAX_SIZE).read_to_string(&mut text)?;
        let (pid, started) = text.split_once(' ').ok_or_else(no_process)?;
        Ok(Self {
            pid: pid.parse().map_err(|_| no_process())?,
            started: started.trim().parse().map_err(|_| no_process())?,
        })
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.started)
    }
}

fn no_process() -> io::Error {
    io::Error::other("the pid file names no process; delete it once you have ended what it was for")
}

/// Start time of a process, from `/proc/PID/stat` (see proc(5)); `None` if it does not exist.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself contain spaces and parentheses. The state, field 3, follows it.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(22 - 3)?.parse().ok()
}

/// `$XDG_RUNTIME_DIR/tightwad/`, else `$XDG_STATE_HOME/tightwad/`, else `~/.local/state/tightwad/`.
fn path(name: &str) -> io::Result<PathBuf> {
    state_folder(&["XDG_RUNTIME_DIR", "XDG_STATE_HOME"]).map(|folder| folder.join(format!("{name}.pid")))
}

/// Log file of a background process: in `$XDG_STATE_HOME/tightwad/`, else in `~/.local/state/tightwad/`.
pub fn log_path(name: &str) -> io::Result<PathBuf> {
    state_folder(&["XDG_STATE_HOME"]).map(|folder| folder.join(format!("{name}.log")))
}
