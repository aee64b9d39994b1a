//! A llama-server that drafts in its own process, to compare with. Keeps the draft length that is fastest in a short trial.

use std::time::{Duration, Instant};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::contender::{Contender, Mode};
use super::prompts::Prompt;
use super::statistics::ratio;
use crate::config::{self, Binaries, MaxDraftTokens, Model, Secret};
use crate::http::auth::unguessable;
use crate::supervise::command::Role;
use crate::supervise::preflight::{self, PreflightError};
use crate::supervise::service::{GaveUp, Service};
use crate::upstream::ChatServer;
use crate::upstream::chat::{ChatError, Wishes};

/// Draft lengths (`--spec-draft-n-max`) to try, the most likely ones first.
const LENGTHS: [u16; 8] = [4, 8, 2, 16, 1, 12, 6, 3];
/// Time limit for new prompts in the first trial. The other trials ask the same prompts.
const FIRST_TRIAL_LIMIT: Duration = Duration::from_secs(20);
/// Time limit for new trials.
const TRIALS_LIMIT: Duration = Duration::from_secs(300);
/// Longest answer in a trial, in tokens.
const TRIAL_TOKENS: u32 = 64;

/// The two models, and the settings of their server.
#[derive(Debug, Clone)]
pub struct ModelPair {
    /// The programs.
    pub binaries: Binaries,
    /// The section `target`.
    pub server: config::Server,
    /// The target model and its name.
    pub target: (String, Model),
    /// The draft model.
    pub draft: Model,
    /// CPU threads for the draft model. `None`: those of the target.
    pub draft_threads: Option<u16>,
}

/// Speed with one draft length.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LengthTrial {
    /// Most draft tokens per step.
    pub n_max: u16,
    /// Tokens per second over the trial's prompts.
    pub tokens_per_second: Option<f64>,
}

/// The running server with the draft length that was best.
#[derive(Debug)]
pub struct NativeDraft {
    /// The server to ask.
    pub contender: Contender,
    /// Most draft tokens per step.
    pub n_max: u16,
    /// All trials, the shortest length first.
    pub tried: Vec<LengthTrial>,
    service: Service,
}

/// Why the server cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum NativeDraftError {
    /// A program or a file is missing.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// It does not start.
    #[error(transparent)]
    GaveUp(#[from] GaveUp),
    /// It does not answer.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// No port is free.
    #[error("cannot find a free port: {0}")]
    Port(#[from] std::io::Error),
}

impl NativeDraft {
    /// Tries draft lengths on a prompt of each kind, and keeps a server with the fastest. Calls `on_trial` with the length before each
    /// trial.
    pub async fn start(
        pair: &ModelPair,
        prompts: &[Prompt],
        wishes: Wishes,
        on_trial: impl Fn(u16),
    ) -> Result<Self, NativeDraftError> {
        preflight::model(&pair.draft.path)?;
        let mut trial = Prompt::first_of_each_kind(prompts, 1);
        let wishes = Wishes {
            max_tokens: Some(wishes.max_tokens.map_or(TRIAL_TOKENS, |most| most.min(TRIAL_TOKENS))),
            ..wishes
        };
        let began = Instant::now();
        let mut tried: Vec<LengthTrial> = Vec::new();
        for n_max in LENGTHS {
            if began.elapsed() > TRIALS_LIMIT {
                break;
            }
            on_trial(n_max);
            let (contender, service) = serve(pair, n_max).await?;
            let bound = if tried.is_empty() {
                FIRST_TRIAL_LIMIT
            } else {
                Duration::MAX
            };
            let (asked, tokens_per_second) = speed(&contender, &trial, wishes, bound).await?;
            trial.truncate(asked);
            tried.push(LengthTrial {
                n_max,
                tokens_per_second,
            });
            service.stop().await;
        }
        tried.sort_by_key(|tried| tried.n_max);
        let n_max = best(&tried);
        let (contender, service) = serve(pair, n_max).await?;
        Ok(Self {
            contender,
            n_max,
            tried,
            service,
        })
    }

    /// Ends the server.
    pub async fn stop(self) {
        self.service.stop().await;
    }
}

/// Starts a server and waits until it is ready.
async fn serve(pair: &ModelPair, n_max: u16) -> Result<(Contender, Service), NativeDraftError> {
    // A random key, because only this process uses the server.
    let key = Secret::new(unguessable());
    let server = config::Server {
        api_key: Some(key.clone()),
        api_key_file: None,
        extra_args: arguments(pair, n_max, preflight::free_port()?),
        ..pair.server.clone()
    };
    let (name, model) = &pair.target;
    let drafts = MaxDraftTokens::AtMost(0);
    let launch = preflight::llama_server(Role::Target, &pair.binaries, &server, (name, model), drafts).await?;
    let server = ChatServer::new(launch.url(), Some(key), None)?;
    let mut service = Service::start(Role::Target, launch, &CancellationToken::new());
    service.ready().await?;
    let contender = Contender {
        mode: Mode::NativeDraft,
        verifier: Some(server.clone()),
        server,
    };
    Ok((contender, service))
}

/// The target's own arguments, then those for drafting and for another address, which win.
fn arguments(pair: &ModelPair, n_max: u16, port: u16) -> Vec<String> {
    let mut arguments = pair.server.extra_args.clone();
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    option("-md", pair.draft.path.display().to_string());
    option("--spec-type", "draft-simple".into());
    option("--spec-draft-n-max", n_max.to_string());
    if let Some(threads) = pair.draft_threads {
        option("-td", threads.to_string());
    }
    option("--host", "127.0.0.1".into());
    option("--port", port.to_string());
    arguments
}

/// Asks prompts until the bound, but at least one. Returns their number and tokens per second. Asks the first prompt once more before,
/// to warm up.
async fn speed(
    contender: &Contender,
    prompts: &[Prompt],
    wishes: Wishes,
    bound: Duration,
) -> Result<(usize, Option<f64>), ChatError> {
    if let Some(prompt) = prompts.first() {
        contender.ask(prompt, wishes).await?;
    }
    let began = Instant::now();
    let (mut asked, mut tokens, mut time) = (0, 0, Duration::ZERO);
    for prompt in prompts {
        if asked > 0 && began.elapsed() > bound {
            break;
        }
        asked += 1;
        let answer = contender.ask(prompt, wishes).await?;
        tokens += answer.tokens.saturating_sub(1);
        time += answer.duration;
    }
    Ok((asked, ratio(tokens as f64, time.as_secs_f64())))
}

/// The fastest length, or the shortest if no speed is known.
fn best(tried: &[LengthTrial]) -> u16 {
    let speed = |tried: &LengthTrial| tried.tokens_per_second.unwrap_or(0.0);
    let fastest = tried
        .iter()
        .rev()
        .max_by(|one, other| speed(one).total_cmp(&speed(other)));
    fastest.map_or(LENGTHS[0], |tried| tried.n_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> ModelPair {
        let model = |path: &str| -> Model { serde_json::from_value(serde_json::json!({ "path": path })).unwrap() };
        ModelPair {
            binaries: Binaries::default(),
            server: config::Server {
                extra_args: vec!["--port".into(), "8080".into()],
                ..config::Server::default()
            },
            target: ("big".into(), model("/m/big.gguf")),
            draft: model("/m/small.gguf"),
            draft_threads: Some(2),
        }
    }

    #[test]
    fn its_arguments_make_it_draft_and_win_over_the_targets() {
        assert_eq!(
            arguments(&pair(), 4, 9000).join(" "),
            "--port 8080 -md /m/small.gguf --spec-type draft-simple --spec-draft-n-max 4 -td 2 --host 127.0.0.1 \
             --port 9000"
        );
    }

    #[test]
    fn the_fastest_length_is_kept() {
        let tried = |speeds: [Option<f64>; 3]| {
            let tried = [2, 4, 8].into_iter().zip(speeds);
            tried
                .map(|(n_max, tokens_per_second)| LengthTrial {
                    n_max,
                    tokens_per_second,
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(best(&tried([Some(10.0), Some(12.0), Some(9.0)])), 4);
        assert_eq!(best(&tried([None, Some(12.0), Some(15.0)])), 8);
        assert_eq!(best(&tried([None, None, None])), 2);
    }
}
