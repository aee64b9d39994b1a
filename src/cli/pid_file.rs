//! The file that tells `stop` and `proxy stop` whom to stop.
//!
//! Its lock, not its content, says whether somebody runs: the kernel drops the lock with the process, so neither a crash
//! nor a recycled process id can mislead.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::exit::{Exit, Failure};

/// Pause between two looks at whether it has ended.
const POLL: Duration = Duration::from_millis(50);

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
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Claimed::By(read_pid(&mut file)?)),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        file.set_len(0)?;
        write!(file, "{}", std::process::id())?;
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
    let number = read_pid(&mut file)?;
    let pid = Pid::from_raw(number).ok_or_else(|| io::Error::other("the pid file holds no process id"))?;
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(Stopped::NotRunning),
        Err(error) => return Err(error.into()),
    };
    // The handle cannot come to mean another process. That it means the right one shows when the lock is still held.
    if !is_locked(&file)? {
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
        .open(path)
}

fn is_locked(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => file.unlock().map(|()| false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn read_pid(file: &mut File) -> io::Result<i32> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::other("the pid file holds no process id"))
}

/// `$XDG_RUNTIME_DIR/tightwad/`, else `$XDG_STATE_HOME/tightwad/`, else `~/.local/state/tightwad/`.
fn path(name: &str) -> io::Result<PathBuf> {
    folder(&["XDG_RUNTIME_DIR", "XDG_STATE_HOME"]).map(|folder| folder.join(format!("{name}.pid")))
}

/// Where something that runs in the background writes its log: `$XDG_STATE_HOME/tightwad/`, else
/// `~/.local/state/tightwad/`.
pub fn log_path(name: &str) -> io::Result<PathBuf> {
    folder(&["XDG_STATE_HOME"]).map(|folder| folder.join(format!("{name}.log")))
}

/// The folder in the first of the variables that is set, else in the user's home.
fn folder(variables: &[&str]) -> io::Result<PathBuf> {
    let absolute = |variable: &str| {
        std::env::var_os(variable)
            .map(PathBuf::from)
            .filter(|folder| folder.is_absolute())
    };
    variables
        .iter()
        .find_map(|variable| absolute(variable))
        // That of a system user may be `/`.
        .or_else(|| {
            absolute("HOME")
                .filter(|home| home.parent().is_some())
                .map(|home| home.join(".local/state"))
        })
        .map(|base| base.join("tightwad"))
        .ok_or_else(|| io::Error::other(format!("this user has no home; set {}", variables.join(" or "))))
}
