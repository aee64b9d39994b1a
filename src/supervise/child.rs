//! One running child process. Dropping the guard kills the child.
//!
//! Each line of output goes to the log, and the last lines are kept to explain a death.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::ChildStdin;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::command::{Launch, Role};
use super::parent_bound;

/// Lines of output that are kept to explain a death.
const TAIL_LINES: usize = 40;
/// Longest line in bytes; the rest of a longer line is dropped.
const MAX_LINE: usize = 2000;
/// Time limit for reading the output of a child that has ended. A grandchild may hold the pipe open for ever.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(300);

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    process: tokio::process::Child,
    pid: u32,
    tail: Tail,
    readers: JoinSet<()>,
    /// Standard input of a child that ends when its input closes.
    lifeline: Option<ChildStdin>,
}

/// Receives each line first. Returns true for a line that it has used, which then is not logged.
pub type Listener = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// The last lines that a child wrote.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Child {
    /// Starts `launch` and writes its output to the log under the name `role`.
    pub async fn spawn(role: Role, launch: &Launch) -> io::Result<Self> {
        Self::spawn_with(role, launch, None).await
    }

    /// Like [`Self::spawn`]. With a listener, the child's standard input stays open until [`Self::stop`].
    pub async fn spawn_with(role: Role, launch: &Launch, listener: Option<Listener>) -> io::Result<Self> {
        let mut command = parent_bound::command(launch);
        let stdin = if listener.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // A separate process group, so that Ctrl-C reaches only the supervisor, which then stops its children in order.
        command.process_group(0);
        let mut process = parent_bound::spawn(command).await?;
        let pid = process
            .id()
            .ok_or_else(|| io::Error::other("the child has no process id"))?;
        let tail = Tail::default();
        let mut readers = JoinSet::new();
        if let Some(stdout) = process.stdout.take() {
            readers.spawn(forward(role, stdout, tail.clone(), listener));
        }
        if let Some(stderr) = process.stderr.take() {
            readers.spawn(forward(role, stderr, tail.clone(), None));
        }
        // Taken out of the process, because waiting for a process closes its standard input.
        let lifeline = process.stdin.take();
        Ok(Self {
            process,
            pid,
            tail,
            readers,
            lifeline,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it ends. Cancel-safe.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.process.wait().await
    }

    /// Its last lines. Call this after the child has ended.
    pub async fn last_lines(&mut self) -> Vec<String> {
        let _ = timeout(DRAIN_TIMEOUT, async {
            while self.readers.join_next().await.is_some() {}
        })
        .await;
        self.tail.lines()
    }

    /// Its last lines, kept up to date.
    #[must_use]
    pub fn tail(&self) -> Tail {
        self.tail.clone()
    }

    /// Ends it with SIGTERM, and with SIGKILL after `patience`.
    pub async fn stop(&mut self, patience: Duration) -> io::Result<ExitStatus> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // `id` is `Some` until the process was waited for, so the pid cannot belong to another process.
        if let (Some(pid), Some(_)) = (pid, self.process.id()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        drop(self.lifeline.take());
        if let Ok(status) = timeout(patience, self.process.wait()).await {
            return status;
        }
        tracing::warn!(
            pid = self.pid,
            "still there after {} s, killing it",
            patience.as_secs_f32()
        );
        if let (Some(pid), Some(_)) = (pid, self.process.id()) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        self.process.wait().await
    }
}

/// What `/proc/PID/stat` tells of a process (see proc(5)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    /// Whether a signal or a debugger has stopped it.
    pub is_stopped: bool,
    /// Processor time that it has used, in ticks of the kernel.
    pub ticks: u64,
}

impl Activity {
    /// The present activity of a process; none if that cannot be read.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses may itself contain spaces and parentheses.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let is_stopped = matches!(fields.next(), Some("T" | "t"));
        // The state is field 3, the times are 14 and 15.
        let ticks = fields.skip(10).take(2).filter_map(|ticks| ticks.parse::<u64>().ok());
        Self {
            is_stopped,
            ticks: ticks.sum(),
        }
    }
}

impl Tail {
    fn push(&self, line: &str) {
        let mut lines = self.0.lock();
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
    }

    /// The lines, oldest first.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().iter().cloned().collect()
    }
}

/// Reads lines until the stream ends. Accepts invalid UTF-8 and lines of any length.
async fn forward(role: Role, stream: impl AsyncRead + Unpin, tail: Tail, listener: Option<Listener>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        let Ok(chunk) = stream.fill_buf().await else { return };
        let (taken, complete) = match chunk.iter().position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (chunk.len(), chunk.is_empty()),
        };
        let room = MAX_LINE.saturating_sub(line.len()).min(taken);
        line.extend_from_slice(&chunk[..room]);
        stream.consume(taken);
        if complete {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            let used = listener.as_ref().is_some_and(|listener| listener(text));
            if !text.is_empty() && !used {
                log(role, text);
                tail.push(text);
            }
            line.clear();
            if taken == 0 {
                return;
            }
        }
    }
}

/// Warnings of llama-server about intended behaviour, which are logged at level debug: a request that its client has ended, a
/// prompt that is wholly in the cache, a cache for all slots that is larger than the context of each, and a refused web page.
const ROUTINE_WARNINGS: [&str; 6] = [
    "cancel task",
    "need to evaluate at least 1 token",
    "n_past was set to",
    "possible training context overflow",
    "exceeds the training context of the model",
    "(CORS) skip non-localhost origin",
];

/// Logs a line with the level that llama.cpp gives it: `0.00.123.456 I srv  …`. Level I becomes debug, because llama-server
/// writes such lines for each request. A ggml-rpc-server writes no level, and a line for each part of a model.
fn log(role: Role, line: &str) {
    let routine = ROUTINE_WARNINGS.iter().any(|words| line.contains(words));
    match line.split_whitespace().nth(1) {
        Some("E") => tracing::error!(target: "tightwad::child", "{role}: {line}"),
        Some("I") => tracing::debug!(target: "tightwad::child", "{role}: {line}"),
        Some("W") if routine => tracing::debug!(target: "tightwad::child", "{role}: {line}"),
        Some("W") => tracing::warn!(target: "tightwad::child", "{role}: {line}"),
        Some("D") => tracing::debug!(target: "tightwad::child", "{role}: {line}"),
        _ if role == Role::Rpc => tracing::debug!(target: "tightwad::child", "{role}: {line}"),
        _ => tracing::info!(target: "tightwad::child", "{role}: {line}"),
    }
}
