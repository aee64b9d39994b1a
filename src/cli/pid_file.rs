//! The file that tells `stop` and `proxy stop` whom to stop.
//!
//! Its lock says whether somebody runs: the kernel drops the lock with the process. Its content says who: the process id and
//! the time at which that process started, so that another process which got the same number later is never meant.

use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::exit::{Exit, Failure};
use crate::config::local_key::own_folder;

/// Pause between two looks at whether it has ended.
const POLL: Duration = Duration::from_millis(50);
/// A look holds the lock for less than this.
const A_LOOK: Duration = Duration::from_millis(500);
/// Nobody else reads the file or takes its lock.
const PRIVATE: u32 = 0o600;
/// More bytes than two numbers have.
const LONGEST: u64 = 64;

/// A running instance's claim; the lock is held until this is dropped.
#[derive(Debug)]
pub struct PidFile {
    _locked: File,
}

/// What became of an attempt to stop somebody.
#[derive(Debug, PartialEq, Eq)]
pub enum Stopped {
    /// It has ended.
    Yes(i32),
    /// Nobody runs.
    NotRunning,
    /// It was asked to end and has not yet.
    StillRunning(i32),
}

impl PidFile {
    /// Claims the name for this process; `Err(Some(pid))` when another one has it.
    pub fn claim(name: &str) -> Result<Self, Claimed> {
        let path = path(name)?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = open(&path)?;
        // It may be one of an older version, or was copied.
        file.set_permissions(Permissions::from_mode(PRIVATE))?;
        let began = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                // Somebody may just be looking.
                Err(TryLockError::WouldBlock) if began.elapsed() < A_LOOK => std::thread::sleep(POLL / 5),
                Err(TryLockError::WouldBlock) => return Err(Claimed::By(Process::read(&mut file)?.pid)),
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
        file.set_len(0)?;
        write!(file, "{}", Process::this()?)?;
        Ok(Self { _locked: file })
    }
}

/// Why a name could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum Claimed {
    /// This process has it.
    #[error("process {0} has it")]
    By(i32),
    /// The file cannot be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Claims the name for `what`, which `stop` ends: a name that another process has is a failure, one that cannot be claimed
/// is not.
pub fn claim(name: &str, what: &str, stop: &str) -> Result<Option<PidFile>, Failure> {
    match PidFile::claim(name) {
        Ok(claim) => Ok(Some(claim)),
        Err(Claimed::By(pid)) => Err(Failure::new(
            Exit::PortInUse,
            format!("the {what} already runs (process {pid}); stop it with `{stop}`"),
        )),
        // A system service without a home has its own way to be stopped.
        Err(Claimed::Io(error)) => {
            tracing::warn!("`{stop}` will not find this {what}: cannot write its pid file: {error}");
            Ok(None)
        }
    }
}

/// Asks whoever holds the name to end and waits, but not longer than `patience`.
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
    // From here on the handle cannot come to mean another process. That it means the one that wrote the file shows when that
    // one started at the same time, and still holds the lock.
    if start_time(number) != Some(known.started) || !is_locked(&file)? {
        return Ok(Stopped::NotRunning);
    }
    pidfd_send_signal(&process, Signal::TERM)?;
    let began = Instant::now();
    while is_locked(&file)? {
        if began.elapsed() >= patience {
            return Ok(Stopped::StillRunning(number));
        }
        std::thread::sleep(POLL);
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

/// Whether somebody runs. The lock of a look is shared, so that looks are no hindrance to each other.
fn is_locked(file: &File) -> io::Result<bool> {
    match file.try_lock_shared() {
        Ok(()) => file.unlock().map(|()| false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// A process, as the file names it: `1234 567890`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    /// In ticks of the kernel's clock since the machine started.
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
        file.take(LONGEST).read_to_string(&mut text)?;
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

/// When a process started; `None` of one that does not exist (proc(5), `/proc/PID/stat`).
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may have spaces and parentheses of its own; the state follows, which is field 3.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(22 - 3)?.parse().ok()
}

/// `$XDG_RUNTIME_DIR/tightwad/`, else `$XDG_STATE_HOME/tightwad/`, else `~/.local/state/tightwad/`.
fn path(name: &str) -> io::Result<PathBuf> {
    own_folder(&["XDG_RUNTIME_DIR", "XDG_STATE_HOME"]).map(|folder| folder.join(format!("{name}.pid")))
}

/// Where something that runs in the background writes its log: `$XDG_STATE_HOME/tightwad/`, else
/// `~/.local/state/tightwad/`.
pub fn log_path(name: &str) -> io::Result<PathBuf> {
    own_folder(&["XDG_STATE_HOME"]).map(|folder| folder.join(format!("{name}.log")))
}
