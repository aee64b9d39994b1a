use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::UnixDatagram;
use tokio::time::timeout;

use super::llama_server::Program;

/// Often enough to be a clock.
const WATCHDOG_USEC: &str = "200000";

/// What systemd is to a unit of `Type=notify`.
pub struct NotifySocket {
    socket: UnixDatagram,
    folder: TempDir,
    /// All that was told so far, line by line.
    pub heard: Vec<String>,
}

impl NotifySocket {
    pub fn bind() -> Self {
        // The path of a socket must be short.
        let folder = tempfile::tempdir().expect("a folder");
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("a socket");
        Self {
            socket,
            folder,
            heard: Vec::new(),
        }
    }

    /// Runs `tightwad`, with more variables, as a unit of it with a watchdog.
    pub fn run(&self, variables: &[String], args: &[&str]) -> Program {
        let folder = self.folder.path().display();
        let mut words = vec![
            format!("NOTIFY_SOCKET={folder}/notify"),
            format!("WATCHDOG_USEC={WATCHDOG_USEC}"),
            format!("XDG_RUNTIME_DIR={folder}"),
            format!("XDG_STATE_HOME={folder}"),
        ];
        words.extend(variables.iter().cloned());
        words.push(env!("CARGO_BIN_EXE_tightwad").to_owned());
        words.extend(args.iter().map(|arg| (*arg).to_owned()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Program::start(Path::new("env"), &words)
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until a new line is as wanted, and returns it.
    pub async fn hears(&mut self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        let heard = timeout(Duration::from_secs(30), async {
            loop {
                let mut buffer = vec![0; 8192];
                let length = self.socket.recv(&mut buffer).await.expect("a message");
                let message = String::from_utf8(buffer[..length].to_vec()).expect("UTF-8");
                let new = self.heard.len();
                self.heard.extend(message.lines().map(str::to_owned));
                if let Some(line) = self.heard[new..].iter().find(|line| is_so(line)) {
                    return line.clone();
                }
            }
        });
        let heard = heard.await;
        heard.unwrap_or_else(|_| panic!("{what} was not told, but {:?}", self.heard))
    }

    pub async fn hears_ready(&mut self) {
        self.hears("that it is ready", |line| line == "READY=1").await;
    }

    /// Waits until a status has these words.
    pub async fn hears_status(&mut self, words: &str) -> String {
        self.hears(words, |line| line.starts_with("STATUS=") && line.contains(words))
            .await
    }

    /// Waits until the process has told twice that it lives.
    pub async fn hears_life(&mut self) {
        for _ in 0..2 {
            self.hears("that it lives", |line| line == "WATCHDOG=1").await;
        }
    }

    /// Whether it said that it is ready.
    pub fn heard_ready(&self) -> bool {
        self.heard.iter().any(|line| line == "READY=1")
    }
}
