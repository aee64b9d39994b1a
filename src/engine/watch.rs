//! Watches the servers: who answers, what the target can verify, whether the vocabularies agree.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{self, BoxStream, FuturesUnordered, SelectAll};
use tracing::Level;

use super::in_flight::Occupancy;
use super::slots::Slots;
use super::vocabulary::{self, Comparison};
use super::{ServerStatus, Verification};
use crate::config::{Backend, Upstream, VerificationMode};
use crate::speculation::Token;
use crate::upstream::failure;
use crate::upstream::{LlamaServer, Props, TextServer, UpstreamError};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Completions drafted for at once by a server that does not tell how many it takes; Ollama queues those that are too many.
const TEXT_SLOTS: usize = 4;
/// Most draft tokens that a server is asked to score at once.
const SCORED_MAX: usize = 16;
/// The reason while it is not known yet whether the drafter fits.
const COMPARING: &str = "the vocabularies are being compared";
/// What is wrong with a llama-server that has just been started.
const LOADING: &str = "it is loading its model";
/// What is wrong begins so with a server that nobody has seen yet …
const NOT_UP_YET: &str = "it is not up yet: ";
/// … for so long: servers that are started together with the proxy take a while.
const PATIENCE: Duration = Duration::from_secs(10);

/// Time between two questions whether the target takes tasks.
const TASK_INTERVAL: Duration = Duration::from_secs(10);

/// A configured server and its client.
#[derive(Debug, Clone)]
pub struct Server {
    /// The configuration.
    pub config: Upstream,
    /// The client.
    pub client: LlamaServer,
    /// The client for text, of a drafter.
    pub text: Option<TextServer>,
}

/// How a drafter is talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Language {
    /// In token ids, which both servers know below this number.
    Tokens {
        /// Size of the target's vocabulary.
        vocabulary: usize,
    },
    /// In text.
    Text {
        /// That of the target's token for the beginning of a sequence.
        bos: String,
    },
}

impl Language {
    /// Whether a drafter's token can be offered to the target.
    #[must_use]
    pub fn knows(&self, token: Token) -> bool {
        match self {
            Self::Tokens { vocabulary } => usize::try_from(token).is_ok_and(|id| id < *vocabulary),
            // The target has made it.
            Self::Text { .. } => true,
        }
    }
}

/// What is known of the servers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sight {
    /// The drafters.
    pub drafts: Vec<DraftSight>,
    /// The target.
    pub target: ServerStatus,
    /// What the target tells of its model: when that changes, what was learnt of it holds no longer, even if it was never
    /// seen down. `None` while it does not answer, or if it is no llama-server.
    pub model: Option<Props>,
    /// How the target verifies.
    pub verification: Verification,
    /// Why it does not, or what keeps all drafters from being used.
    pub reason: Option<String>,
    /// Most draft tokens of one step of the target.
    pub n_max: usize,
}

impl Sight {
    /// How the drafter of this number can be talked to.
    #[must_use]
    pub fn language(&self, number: usize) -> Option<&Language> {
        self.drafts.get(number)?.language.as_ref()
    }
}

/// What is known of a drafter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DraftSight {
    /// Its health.
    pub status: ServerStatus,
    /// How it can be talked to; `None` while it cannot be used.
    pub language: Option<Language>,
}

/// Looks again and again, and remembers what does not change while the servers stay the same. Nothing waits for a server
/// that does not answer: neither the looks at the others, nor what is told of them.
#[derive(Debug)]
pub struct Watcher {
    drafts: Vec<Draft>,
    target: Option<Server>,
    mode: VerificationMode,
    occupancy: Occupancy,
    stall_after: Duration,
}

#[derive(Debug)]
struct Draft {
    server: Server,
    slots: Slots,
    /// The pair of servers that was compared last, and the outcome.
    compared: Option<Compared>,
    /// The drafter was looked at since: a comparison that failed may work now.
    compare_again: bool,
    comparing: bool,
}

/// Two servers, as far as it takes to notice that one of them is another one now.
type Pair = (Props, Props);

type Compared = (Pair, Result<Comparison, UpstreamError>);

impl Watcher {
    /// Watches these servers; each drafter has its slots, and the target has stalled when it has requests and takes no
    /// task for `stall_after`.
    #[must_use]
    pub fn new(
        drafts: Vec<Server>,
        target: Option<Server>,
        slots: Vec<Slots>,
        mode: VerificationMode,
        occupancy: Occupancy,
        stall_after: Duration,
    ) -> Self {
        let draft = |(server, slots)| Draft {
            server,
            slots,
            compared: None,
            compare_again: false,
            comparing: false,
        };
        Self {
            drafts: drafts.into_iter().zip(slots).map(draft).collect(),
            target,
            mode,
            occupancy,
            stall_after,
        }
    }

    /// What is known before the first look.
    #[must_use]
    pub fn first_sight(&self) -> Sight {
        self.judge(&Look::before(self.target.as_ref()), false, &self.not_seen())
            .0
    }

    fn not_seen(&self) -> Vec<Look> {
        self.drafts
            .iter()
            .map(|draft| Look::before(Some(&draft.server)))
            .collect()
    }

    /// Looks for ever; publishes what changed.
    pub async fn run(mut self, sight: tokio::sync::watch::Sender<Sight>) {
        let mut target_looks = looks(self.target.clone());
        let mut draft_looks: SelectAll<_> = (self.drafts.iter().enumerate())
            .map(|(number, draft)| {
                looks(Some(draft.server.clone()))
                    .map(move |look| (number, look))
                    .boxed()
            })
            .collect();
        let mut stalls = stalls(self.target.clone(), self.occupancy.clone(), self.stall_after);
        let mut target = Look::before(self.target.as_ref());
        let mut stalled = false;
        let mut drafts = self.not_seen();
        let mut comparisons: FuturesUnordered<BoxFuture<'static, (usize, Compared)>> = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(look) = target_looks.next() => target = look,
                Some(now) = stalls.next() => stalled = now,
                Some((number, look)) = draft_looks.next() => {
                    self.drafts[number].resize_slots(&look);
                    self.drafts[number].compare_again = true;
                    drafts[number] = look;
                }
                Some((number, compared)) = comparisons.next() => {
                    self.drafts[number].comparing = false;
                    self.drafts[number].compared = Some(compared);
                }
            }
            let (seen, missing) = self.judge(&target, stalled, &drafts);
            for (number, pair) in missing {
                comparisons.extend(self.compare(number, pair));
            }
            sight.send_if_modified(|old| {
                if *old == seen {
                    return false;
                }
                for (level, sentence) in news(old, &seen) {
                    if level == Level::WARN {
                        tracing::warn!("{sentence}");
                    } else {
                        tracing::info!("{sentence}");
                    }
                }
                *old = seen;
                true
            });
        }
    }

    /// What the last looks come to, and the pairs that have yet to be compared.
    fn judge(&self, target: &Look, stalled: bool, looks: &[Look]) -> (Sight, Vec<(usize, Pair)>) {
        let mut sight = Sight {
            target: target.status.clone(),
            model: target.props.clone(),
            ..Sight::default()
        };
        if stalled && target.status.healthy {
            sight.target.healthy = false;
            sight.target.problem = Some(format!(
                "it has taken no task for {} s, though it answers how it is: it hangs, or reads a very long prompt",
                self.stall_after.as_secs()
            ));
        }
        match verification(self.mode, self.target.as_ref(), target) {
            Ok((verification, n_max)) => {
                sight.verification = verification;
                sight.n_max = n_max;
            }
            Err(reason) => sight.reason = Some(reason),
        }
        let mut missing = Vec::new();
        for (number, (draft, look)) in self.drafts.iter().zip(looks).enumerate() {
            let mut seen = DraftSight {
                status: look.status.clone(),
                language: None,
            };
            if sight.verification != Verification::None && look.status.problem.is_none() {
                match draft.fits(look, sight.verification, target.props.as_ref()) {
                    Fit::Fits { language, but } => {
                        seen.language = Some(language);
                        seen.status.problem = but;
                    }
                    Fit::Not(why) => seen.status.problem = Some(why),
                    Fit::Unknown { why, pair } => {
                        seen.status.problem = Some(why);
                        missing.extend(pair.map(|pair| (number, *pair)));
                    }
                }
            }
            sight.drafts.push(seen);
        }
        if sight.verification != Verification::None && !sight.drafts.iter().any(|draft| draft.language.is_some()) {
            let mut problems = sight.drafts.iter().filter(|draft| draft.status.healthy);
            sight.reason = if self.drafts.is_empty() {
                Some("no drafter is configured (`proxy.draft`), so only text that comes again is drafted".into())
            } else {
                problems.find_map(|draft| draft.status.problem.clone())
            };
        }
        (sight, missing)
    }

    fn compare(&mut self, number: usize, pair: Pair) -> Option<BoxFuture<'static, (usize, Compared)>> {
        let target = self.target.as_ref()?.client.clone();
        let draft = &mut self.drafts[number];
        if draft.comparing {
            return None;
        }
        draft.comparing = true;
        draft.compare_again = false;
        let client = draft.server.client.clone();
        Some(async move { (number, (pair, vocabulary::compare(&client, &target).await)) }.boxed())
    }
}

/// Whether a drafter can draft for the target.
enum Fit {
    Fits { language: Language, but: Option<String> },
    Not(String),
    Unknown { why: String, pair: Option<Box<Pair>> },
}

impl Draft {
    /// Takes in for how many completions at once the drafter can draft, where that is known.
    fn resize_slots(&self, look: &Look) {
        match (&look.props, self.server.config.backend) {
            (Some(props), _) => self.slots.resize(props.total_slots),
            (None, Backend::Llamacpp) => {}
            (None, _) => self.slots.resize(TEXT_SLOTS),
        }
    }

    fn fits(&self, look: &Look, verification: Verification, target: Option<&Props>) -> Fit {
        let text = || match target {
            Some(target) if verification == Verification::Attached => Some(Language::Text {
                bos: target.bos_token.clone(),
            }),
            _ => None,
        };
        if self.server.config.backend != Backend::Llamacpp {
            return match text() {
                Some(language) => Fit::Fits { language, but: None },
                None => Fit::Not(format!(
                    "a drafter with `backend: {}` drafts as text, and an answer in rounds ({}) takes token ids only; run the \
                     draft model with llama-server",
                    backend_name(self.server.config.backend),
                    verification.name()
                )),
            };
        }
        let Some(props) = &look.props else {
            return Fit::Unknown {
                why: COMPARING.into(),
                pair: None,
            };
        };
        let Some(target) = target else {
            // Who scores prompts does not tell its vocabulary so; a text is compared when it is tried.
            return Fit::Fits {
                language: Language::Tokens { vocabulary: usize::MAX },
                but: None,
            };
        };
        let pair = (props.clone(), target.clone());
        match &self.compared {
            Some((compared, outcome)) if *compared == pair => match outcome {
                Ok(Comparison::Same { target_size }) => Fit::Fits {
                    language: Language::Tokens {
                        vocabulary: *target_size,
                    },
                    but: None,
                },
                Ok(Comparison::Different(difference)) => match text() {
                    Some(language) => Fit::Fits {
                        language,
                        but: Some(format!("it drafts as text: {difference}")),
                    },
                    None => Fit::Not(format!(
                        "it could draft as text only, and an answer in rounds ({}) takes token ids only: {difference}",
                        verification.name()
                    )),
                },
                Err(error) => Fit::Unknown {
                    why: format!("the vocabularies could not be compared: {error}"),
                    pair: self.compare_again.then(|| Box::new(pair)),
                },
            },
            _ => Fit::Unknown {
                why: COMPARING.into(),
                pair: Some(Box::new(pair)),
            },
        }
    }
}

/// Looks at a server again and again.
fn looks(server: Option<Server>) -> BoxStream<'static, Look> {
    let Some(server) = server else {
        return stream::pending().boxed();
    };
    let give_up = Instant::now() + PATIENCE;
    stream::unfold(
        (server, Duration::ZERO, false),
        move |(server, pause, seen)| async move {
            tokio::time::sleep(pause).await;
            let mut look = look_at(&server).await;
            let problem = look.status.problem.as_mut().filter(|problem| *problem != LOADING);
            let seen = seen || look.status.healthy || problem.is_none();
            if let Some(problem) = problem.filter(|_| !seen && Instant::now() < give_up) {
                problem.insert_str(0, NOT_UP_YET);
            }
            Some((look, (server, INTERVAL, seen)))
        },
    )
    .boxed()
}

/// Tells whether a llama-server takes no task, as often as that is asked: only while it has requests or may hang over one,
/// because one that nobody uses may sleep, and is woken by such a question.
fn stalls(server: Option<Server>, occupancy: Occupancy, after: Duration) -> BoxStream<'static, bool> {
    let Some(server) = server.filter(|server| server.config.backend == Backend::Llamacpp) else {
        return stream::pending().boxed();
    };
    let asks = (server, occupancy, Duration::ZERO, 0);
    stream::unfold(asks, move |(server, occupancy, pause, seen)| async move {
        tokio::time::sleep(pause).await;
        let changes = occupancy.since(seen).await;
        if server.client.takes_tasks(after).await {
            Some((false, (server, occupancy, TASK_INTERVAL, changes)))
        } else {
            // It is asked again whether it has requests or not.
            Some((true, (server, occupancy, Duration::ZERO, seen)))
        }
    })
    .boxed()
}

struct Look {
    status: ServerStatus,
    /// Of a llama-server that answers.
    props: Option<Props>,
}

impl Look {
    /// Nobody has looked.
    fn before(server: Option<&Server>) -> Self {
        let status = server.map(|server| ServerStatus {
            problem: Some("it was not asked yet".into()),
            ..server.unknown()
        });
        Self {
            status: status.unwrap_or_default(),
            props: None,
        }
    }
}

impl Server {
    fn unknown(&self) -> ServerStatus {
        ServerStatus {
            url: self.config.url.clone(),
            model: self.config.model_name.clone(),
            ..ServerStatus::default()
        }
    }
}

async fn look_at(server: &Server) -> Look {
    let Server { config, client, text } = server;
    let text = text.as_ref().filter(|_| config.backend != Backend::Llamacpp);
    let mut status = server.unknown();
    let mut props = None;
    let answer = if config.backend == Backend::Llamacpp {
        match client.health().await {
            Ok(()) => client.props().await.map(|found| props = Some(found)),
            Err(error) => Err(error),
        }
    } else {
        match (client.answers().await, text) {
            (Ok(()), Some(text)) => text.ready().await,
            (answer, _) => answer,
        }
    };
    match answer {
        Ok(()) => status.healthy = true,
        // Something answers that is no llama-server, or no longer one with our routes.
        Err(error @ (UpstreamError::Refused { status: 404 | 405, .. } | UpstreamError::Malformed { .. }))
            if text.is_none() =>
        {
            status.healthy = true;
            status.problem = Some(format!(
                "it answers, but not like llama-server; set `backend` to what it is ({error})"
            ));
        }
        Err(UpstreamError::Refused { status: 503, .. }) => status.problem = Some(LOADING.into()),
        Err(error) => status.problem = Some(format!("{error}{}", remedy(server, &error))),
    }
    if status.model.is_none() {
        status.model = props.as_ref().and_then(|props| props.model_alias.clone());
    }
    Look { status, props }
}

/// What to do where nothing listens.
fn remedy(server: &Server, error: &UpstreamError) -> &'static str {
    match (error, server.config.backend, &server.text) {
        (UpstreamError::Unreachable { cause, .. }, _, _) if !failure::is_refused(cause) => "",
        (UpstreamError::Unreachable { .. }, Backend::Llamacpp, Some(_)) => "; start `tightwad run draft` on that host",
        (UpstreamError::Unreachable { .. }, Backend::Llamacpp, None) => {
            "; start `tightwad run target` or `tightwad run coordinator` on that host"
        }
        (UpstreamError::Unreachable { .. }, ..) => "; start the server on that host",
        _ => "",
    }
}

/// How the target verifies, and how many draft tokens at once; or why it does not.
fn verification(mode: VerificationMode, target: Option<&Server>, look: &Look) -> Result<(Verification, usize), String> {
    let Some(target) = target else {
        return Err("no target is configured; name one under `proxy.target`".into());
    };
    let backend = target.config.backend;
    let wants = |mode: &str, what: &str| {
        Err(format!(
            "`proxy.verification: {mode}` needs {what}, and the target is configured as `backend: {}`; correct one of them",
            backend_name(backend)
        ))
    };
    match (mode, backend) {
        (VerificationMode::None, _) => Err("`proxy.verification` is none".into()),
        (VerificationMode::Auto | VerificationMode::Scored, Backend::Vllm | Backend::Sglang) => {
            if look.status.healthy {
                Ok((Verification::Scored, SCORED_MAX))
            } else {
                Err(NOT_YET.into())
            }
        }
        (VerificationMode::Scored, _) => wants("scored", "vLLM or SGLang"),
        (VerificationMode::FanOut, Backend::Llamacpp) => fan_out(look.props.as_ref()),
        (VerificationMode::FanOut, _) => wants("fan-out", "a llama-server"),
        (VerificationMode::Auto | VerificationMode::Attached, Backend::Llamacpp) => attached(look.props.as_ref()),
        (VerificationMode::Attached, _) => wants("attached", "Tightwad's llama-server"),
        (VerificationMode::Auto, Backend::Ollama | Backend::Openai) => Err(format!(
            "a target with `backend: {}` cannot verify drafts; run the model with Tightwad's llama-server to draft for it",
            backend_name(backend)
        )),
    }
}

const NOT_YET: &str = "the target does not answer yet, so it is not known what it can verify";

fn attached(props: Option<&Props>) -> Result<(Verification, usize), String> {
    let Some(props) = props else {
        return Err(NOT_YET.into());
    };
    if let Some(reason) = &props.draft_refused {
        return Err(reason.clone());
    }
    match props.draft_external_max {
        None => Err(format!(
            "the target is a stock llama-server ({}), which cannot verify drafts by itself; run the one of \
             `scripts/llama-cpp` or of the flake, or set `proxy.verification: fan-out`",
            props.build_info
        )),
        Some(0) => Err(
            "the target was started without `--spec-draft-external-max` (`tightwad run target` sets it), or with a \
                 micro batch (`-ub`) too small for a draft"
                .into(),
        ),
        Some(n) => Ok((Verification::Attached, n)),
    }
}

fn fan_out(props: Option<&Props>) -> Result<(Verification, usize), String> {
    let Some(props) = props else {
        return Err(NOT_YET.into());
    };
    match props.total_slots {
        0 | 1 => Err(
            "`proxy.verification: fan-out` needs a slot for each length of a draft, and the target has one; start it with \
             `-np 5` or more"
                .into(),
        ),
        slots => Ok((Verification::FanOut, slots - 1)),
    }
}

fn backend_name(backend: Backend) -> &'static str {
    match backend {
        Backend::Llamacpp => "llamacpp",
        Backend::Ollama => "ollama",
        Backend::Openai => "openai",
        Backend::Vllm => "vllm",
        Backend::Sglang => "sglang",
    }
}

/// What a change is worth in the log. Comparing vocabularies is over at once, and no news.
fn news(old: &Sight, new: &Sight) -> Vec<(Level, String)> {
    let problem = |status: &ServerStatus| status.problem.clone().filter(|problem| problem != COMPARING);
    let drafts = new.drafts.iter().enumerate();
    let drafts = drafts.map(|(number, new)| ("draft", old.drafts.get(number).map(|old| &old.status), &new.status));
    let mut news = Vec::new();
    for (role, old, new) in std::iter::once(("target", Some(&old.target), &new.target)).chain(drafts) {
        if old.is_some_and(|old| old.healthy == new.healthy && problem(old) == problem(new)) {
            continue;
        }
        let url = &new.url;
        match problem(new) {
            None if new.healthy => news.push((Level::INFO, format!("{role} server {url} is up"))),
            Some(problem) => {
                let calm = problem == LOADING || problem.starts_with(NOT_UP_YET);
                let level = if calm { Level::INFO } else { Level::WARN };
                news.push((level, format!("{role} server {url}: {problem}")));
            }
            None => {}
        }
    }
    if old.verification != new.verification || old.reason != new.reason {
        match &new.reason {
            Some(reason) if reason == COMPARING => {}
            Some(reason) => news.push((Level::WARN, format!("drafting: {reason}"))),
            None => {
                let (how, n_max) = (new.verification.name(), new.n_max);
                let sentence = format!("verification: {how}, up to {n_max} draft tokens per step");
                news.push((Level::INFO, sentence));
            }
        }
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One drafter and the target, as they are after a look at both.
    fn sight(draft: (bool, Option<&str>), target: (bool, Option<&str>)) -> Sight {
        let status = |name: &str, (healthy, problem): (bool, Option<&str>)| ServerStatus {
            url: format!("http://{name}"),
            healthy,
            problem: problem.map(str::to_owned),
            ..ServerStatus::default()
        };
        let waits = (!target.0).then(|| NOT_YET.to_owned());
        let compares = draft.1.filter(|problem| *problem == COMPARING).map(str::to_owned);
        Sight {
            target: status("t", target),
            drafts: vec![DraftSight {
                status: status("d", draft),
                language: None,
            }],
            verification: if target.0 {
                Verification::Attached
            } else {
                Verification::None
            },
            reason: waits.or(compares),
            n_max: 16,
            ..Sight::default()
        }
    }

    #[test]
    fn servers_that_start_after_the_proxy_are_told_of_once() {
        let (up, gone) = ((true, None), (false, Some("it is unreachable")));
        let waits = (false, Some("it is not up yet: it is unreachable"));
        let sights = [
            sight(
                (false, Some("it was not asked yet")),
                (false, Some("it was not asked yet")),
            ),
            sight(waits, (false, Some("it was not asked yet"))),
            sight(waits, waits),
            sight(up, waits),
            sight(up, gone),
            sight(up, (false, Some(LOADING))),
            sight((true, Some(COMPARING)), up),
            sight(up, up),
            sight(up, gone),
        ];
        let told: Vec<String> = (sights.windows(2))
            .flat_map(|pair| news(&pair[0], &pair[1]))
            .map(|(level, sentence)| format!("{level} {sentence}"))
            .collect();
        assert_eq!(
            told,
            [
                "INFO draft server http://d: it is not up yet: it is unreachable",
                "INFO target server http://t: it is not up yet: it is unreachable",
                "INFO draft server http://d is up",
                "WARN target server http://t: it is unreachable",
                "INFO target server http://t: it is loading its model",
                "INFO target server http://t is up",
                "INFO verification: attached, up to 16 draft tokens per step",
                "WARN target server http://t: it is unreachable",
                "WARN drafting: the target does not answer yet, so it is not known what it can verify",
            ]
        );
    }
}
