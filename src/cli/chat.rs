//! `tightwad chat`: asks prompts from the terminal or a pipe. Answers go to stdout, everything else to stderr.

use std::io::{self, BufRead, IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use tokio::sync::mpsc;

use super::exit::{Exit, Failure};
use super::output::{say, say_part};
use super::status::{self, Counts};
use crate::config::{self, Config, Secret};
use crate::upstream::ChatServer;
use crate::upstream::chat::{Answer, Message, Piece, Wishes};

/// Time limit for the list of models.
const MODELS_TIMEOUT: Duration = Duration::from_secs(5);

/// Options of `chat`.
#[derive(Debug, Args)]
pub struct Options {
    /// Talk to the target directly, without the proxy
    #[arg(long)]
    direct: bool,
}

/// One conversation.
struct Chat {
    server: ChatServer,
    /// URL and token of the proxy, for the counts of drafting; `None` with `--direct`.
    proxy: Option<(String, Option<Secret>)>,
    /// Whether the server gets the shared key of this host.
    sends_local_key: bool,
    messages: Vec<Message>,
    interactive: bool,
}

/// Reads prompts, one per line, and prints the answers; everything else goes to stderr.
pub async fn chat(config: &Config, options: &Options) -> Result<(), Failure> {
    let mut chat = Chat::new(config, options)?;
    let mut prompts = read_lines();
    let mut last = Ok(());
    let mut asked = false;
    loop {
        chat.ask_for_prompt();
        let prompt = tokio::select! {
            prompt = prompts.recv() => prompt,
            _ = tokio::signal::ctrl_c() => {
                // No answer was running. To a person at the prompt, this is a way to end.
                if chat.interactive {
                    say("");
                    return Ok(());
                }
                return Err(Failure::silent(Exit::Interrupted));
            }
        };
        let Some(prompt) = prompt.transpose()? else { break };
        if prompt.trim().is_empty() {
            continue;
        }
        asked = true;
        last = chat.turn(prompt).await;
        match &last {
            Err(failure) if chat.interactive => say(format_args!("error: {failure}")),
            Err(_) => return last,
            Ok(()) => {}
        }
    }
    if chat.interactive {
        say("");
        // Each failure has been printed already.
        return Ok(());
    }
    if !asked {
        // Without a question, a server that is down must still be a failure.
        let models = chat.server.get("/v1/models", MODELS_TIMEOUT).await;
        models.map_err(|error| Failure::from(error).with_local_key(chat.sends_local_key))?;
    }
    last
}

impl Chat {
    fn new(config: &Config, options: &Options) -> Result<Self, Failure> {
        let (_, target) = config.proxy_upstreams();
        let model = target.as_ref().and_then(|target| target.model_name.clone());
        let interactive = io::stdin().is_terminal();
        let sends_local_key = options.direct && target.as_ref().is_some_and(|target| target.asks_local_key);
        let (server, proxy) = if options.direct {
            let target = target.ok_or_else(|| {
                Failure::new(
                    Exit::Config,
                    "the config names no target; set `proxy.target`, or leave out --direct",
                )
            })?;
            (
                ChatServer::new(target.url.trim_end_matches('/'), target.api_key()?, model)?,
                None,
            )
        } else {
            let proxy = config.proxy.clone().unwrap_or_default();
            let url = config::local_url(&proxy.host, proxy.port);
            let token = proxy.token()?;
            (ChatServer::new(&url, token.clone(), model)?, Some((url, token)))
        };
        if interactive {
            say(format_args!(
                "Talking to {}. Ctrl-C cancels an answer or ends, Ctrl-D ends.",
                server.url()
            ));
        }
        Ok(Self {
            server,
            proxy,
            sends_local_key,
            messages: Vec::new(),
            interactive,
        })
    }

    fn ask_for_prompt(&self) {
        if self.interactive {
            say_part(format_args!("> "));
        }
    }

    /// Asks one prompt. A cancelled answer keeps its text so far.
    async fn turn(&mut self, prompt: String) -> Result<(), Failure> {
        let before = self.counts().await;
        self.messages.push(Message::user(prompt));
        let mut printer = Printer::default();
        let began = Instant::now();
        let answer = tokio::select! {
            answer = self.server.chat(&self.messages, None, Wishes::default(), |piece| printer.print(piece)) => answer,
            _ = tokio::signal::ctrl_c() => {
                printer.end()?;
                if !self.interactive {
                    return Err(Failure::new(Exit::Interrupted, "interrupted"));
                }
                say(format_args!("(cancelled)"));
                self.messages.push(Message::assistant(printer.text));
                return Ok(());
            }
        };
        printer.end()?;
        match answer {
            Ok(answer) => {
                let since = before
                    .zip(self.counts().await)
                    .map(|(before, after)| after.since(before));
                say(format_args!(
                    "{}",
                    summary(&answer, began.elapsed().as_secs_f64(), since)
                ));
                self.messages.push(Message::assistant(answer.text));
                Ok(())
            }
            Err(failure) => {
                self.messages.pop();
                Err(Failure::from(failure).with_local_key(self.sends_local_key))
            }
        }
    }

    /// The proxy's counts. A failure is no error, because the counts are only for information.
    async fn counts(&self) -> Option<Counts> {
        let (url, token) = self.proxy.as_ref()?;
        status::fetch(url, token.as_ref())
            .await
            .ok()
            .map(|status| Counts::of(&status.counts))
    }
}

fn summary(answer: &Answer, seconds: f64, counts: Option<Counts>) -> String {
    let mut words = vec![format!("{} tokens in {seconds:.1} s", answer.tokens)];
    words.extend(answer.tokens_per_second().map(|speed| format!("{speed:.1} tok/s")));
    words.extend(counts.and_then(Counts::describe));
    format!("[{}]", words.join(", "))
}

/// Prints an answer as it arrives: the text to stdout, reasoning to stderr if that is a terminal.
#[derive(Default)]
struct Printer {
    text: String,
    thinking: bool,
}

impl Printer {
    fn print(&mut self, piece: &Piece) -> io::Result<()> {
        match piece {
            Piece::Text(text) => {
                if self.thinking {
                    self.thinking = false;
                    say("");
                }
                self.text.push_str(text);
                let mut stdout = io::stdout().lock();
                stdout.write_all(text.as_bytes())?;
                stdout.flush()
            }
            Piece::Reasoning(text) => {
                if io::stderr().is_terminal() {
                    self.thinking = true;
                    say_part(format_args!("{text}"));
                }
                Ok(())
            }
        }
    }

    fn end(&self) -> io::Result<()> {
        if self.text.is_empty() || self.text.ends_with('\n') {
            Ok(())
        } else {
            writeln!(io::stdout().lock())
        }
    }
}

/// The lines of stdin. A separate thread reads them, because a read from a terminal cannot be cancelled, and the program must end without
/// a press of Enter.
fn read_lines() -> mpsc::Receiver<io::Result<String>> {
    let (lines, queue) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    queue
}
