//! One running child process.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::ChildStdin;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::command::{Launch, Role};
use super::parent_bound;

/// Lines of output that are kept to explain a death.
const TAIL: usize = 40;
/// Longest line that is kept; the rest of a longer one is dropped.
const LINE: usize = 2000;
/// How long the output of a child that has ended is still read. A grandchild may hold the pipe open for ever.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    process: tokio::process::Child,
    pid: u32,
    tail: Tail,
    readers: JoinSet<()>,
    /// Its standard input, for one that ends when that is closed.
    lifeline: Option<ChildStdin>,
}

/// Takes lines that are news rather than log; says whether it took one.
pub type Listener = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// The last lines that a child wrote.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Child {
    /// Starts `launch` and forwards what it writes to the log, under the name `role`.
    pub async fn spawn(role: Role, launch: &Launch) -> io::Result<Self> {
        Self::spawn_with(role, launch, None).await
    }

    /// As [`Self::spawn`]; with a listener its standard input stays open until it is stopped.
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
        // A group of its own, so that Ctrl-C reaches the supervisor alone and it decides in which order things end.
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
        // Waiting for a process closes what is still its standard input.
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

    /// Its last lines; to be called once it has ended.
    pub async fn last_lines(&mut self) -> Vec<String> {
        let _ = timeout(LAST_WORDS, async { while self.readers.join_next().await.is_some() {} }).await;
        self.tail.lines()
    }

    /// Its last lines so far, and those to come.
    #[must_use]
    pub fn tail(&self) -> Tail {
        self.tail.clone()
    }

    /// Ends it: SIGTERM, and SIGKILL if it has not ended within `patience`.
    pub async fn stop(&mut self, patience: Duration) -> io::Result<ExitStatus> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // `id` is `Some` until the process was waited for, so the number cannot belong to another one yet.
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

/// Whether a process was stopped by a signal or a debugger, so that it runs no further; `false` where that cannot be told
/// (`/proc/PID/stat`, see proc(5)).
#[must_use]
pub fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may have spaces and parentheses of its own.
    let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next());
    matches!(state, Some("T" | "t"))
}

impl Tail {
    fn push(&self, line: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
    }

    /// The lines, oldest first.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .cloned()
            .collect()
    }
}

/// Reads lines until the stream ends; bytes that are no UTF-8 and endless lines do no harm.
async fn forward(role: Role, stream: impl AsyncRead + Unpin, tail: Tail, listener: Option<Listener>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        let Ok(chunk) = stream.fill_buf().await else { return };
        let (taken, complete) = match chunk.iter().position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (chunk.len(), chunk.is_empty()),
        };
        let room = LINE.saturating_sub(line.len()).min(taken);
        line.extend_from_slice(&chunk[..room]);
        stream.consume(taken);
        if complete {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            let heard = listener.as_ref().is_some_and(|listener| listener(text));
            if !text.is_empty() && !heard {
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

/// Warnings of llama-server about what is meant to be: a request that its client has ended, a prompt of which every token is in
/// the cache, one cache for all slots that is larger than the context of each, and a page that may not read answers.
const ROUTINE: [&str; 6] = [
    "cancel task",
    "need to evaluate at least 1 token",
    "n_past was set to",
    "possible training context overflow",
    "exceeds the training context of the model",
    "(CORS) skip non-localhost origin",
];

/// llama.cpp writes `0.00.123.456 I srv  …`: its level becomes ours, but for what it says of every single request. A
/// ggml-rpc-server gives no level, and tells of every part of a model.
fn log(role: Role, line: &str) {
    let routine = ROUTINE.iter().any(|words| line.contains(words));
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
