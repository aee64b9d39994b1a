//! Watches the servers: who answers, what the target can verify, whether the vocabularies agree.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{self, BoxStream, FuturesUnordered, SelectAll};
use tracing::Level;

use super::in_flight::InFlightRequests;
use super::slots::DraftSlots;
use super::vocabulary::{self, VocabularyComparison};
use super::{ServerStatus, Verification};
use crate::config::{Backend, Upstream, VerificationMode};
use crate::failure;
use crate::speculation::Token;
use crate::upstream::{LlamaServer, Props, TextServer, UpstreamError};

/// Time between two looks.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
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
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Time between two questions whether the target takes tasks.
const TASK_INTERVAL: Duration = Duration::from_secs(10);

/// A configured server and its client.
#[derive(Debug, Clone)]
pub struct ConfiguredServer {
    /// The configuration.
    pub config: Upstream,
    /// The client.
    pub client: LlamaServer,
    /// The client for text, of a drafter.
    pub text: Option<TextServer>,
}

/// How a drafter is talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DraftProtocol {
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

impl DraftProtocol {
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
pub struct ClusterSnapshot {
    /// The drafters.
    pub drafts: Vec<DrafterSnapshot>,
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

impl ClusterSnapshot {
    /// How the drafter of this number can be talked to.
    #[must_use]
    pub fn protocol(&self, number: usize) -> Option<&DraftProtocol> {
        self.drafts.get(number)?.protocol.as_ref()
    }
}

/// What is known of a drafter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DrafterSnapshot {
    /// Its health.
    pub status: ServerStatus,
    /// How it can be talked to; `None` while it cannot be used.
    pub protocol: Option<DraftProtocol>,
}

/// Looks again and again, and remembers what does not change while the servers stay the same. Nothing waits for a server
/// that does not answer: neither the looks at the others, nor what is told of them.
#[derive(Debug)]
pub struct Watcher {
    drafts: Vec<WatchedDrafter>,
    target: Option<ConfiguredServer>,
    mode: VerificationMode,
    in_flight: InFlightRequests,
    stall_after: Duration,
}

#[derive(Debug)]
struct WatchedDrafter {
    server: ConfiguredServer,
    slots: DraftSlots,
    /// The pair of servers that was compared last, and the outcome.
    compared: Option<PairComparison>,
    /// The drafter was looked at since: a comparison that failed may work now.
    compare_again: bool,
    comparing: bool,
}

/// Two servers, as far as it takes to notice that one of them is another one now.
type ServerPair = (Props, Props);

type PairComparison = (ServerPair, Result<VocabularyComparison, UpstreamError>);

impl Watcher {
    /// Watches these servers; each drafter has its slots, and the target has stalled when it has requests and takes no
    /// task for `stall_after`.
    #[must_use]
    pub fn new(
        drafts: Vec<ConfiguredServer>,
        target: Option<ConfiguredServer>,
        slots: Vec<DraftSlots>,
        mode: VerificationMode,
        in_flight: InFlightRequests,
        stall_after: Duration,
    ) -> Self {
        let draft = |(server, slots)| WatchedDrafter {
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
            in_flight,
            stall_after,
        }
    }

    /// What is known before the first look.
    #[must_use]
    pub fn initial_snapshot(&self) -> ClusterSnapshot {
        self.evaluate(&Probe::before(self.target.as_ref()), false, &self.initial_probes())
            .0
    }

    fn initial_probes(&self) -> Vec<Probe> {
        self.drafts
            .iter()
            .map(|draft| Probe::before(Some(&draft.server)))
            .collect()
    }

    /// Looks for ever; publishes what changed.
    pub async fn run(mut self, snapshot: tokio::sync::watch::Sender<ClusterSnapshot>) {
        let mut target_probes = probes(self.target.clone());
        let mut draft_probes: SelectAll<_> = (self.drafts.iter().enumerate())
            .map(|(number, draft)| {
                probes(Some(draft.server.clone()))
                    .map(move |probe| (number, probe))
                    .boxed()
            })
            .collect();
        let mut stalls = stalls(self.target.clone(), self.in_flight.clone(), self.stall_after);
        let mut target = Probe::before(self.target.as_ref());
        let mut stalled = false;
        let mut drafts = self.initial_probes();
        let mut comparisons: FuturesUnordered<BoxFuture<'static, (usize, PairComparison)>> = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(probe) = target_probes.next() => target = probe,
                Some(now) = stalls.next() => stalled = now,
                Some((number, probe)) = draft_probes.next() => {
                    self.drafts[number].resize_slots(&probe);
                    self.drafts[number].compare_again = true;
                    drafts[number] = probe;
                }
                Some((number, compared)) = comparisons.next() => {
                    self.drafts[number].comparing = false;
                    self.drafts[number].compared = Some(compared);
                }
            }
            let (seen, missing) = self.evaluate(&target, stalled, &drafts);
            for (number, pair) in missing {
                comparisons.extend(self.compare(number, pair));
            }
            snapshot.send_if_modified(|old| {
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
    fn evaluate(&self, target: &Probe, stalled: bool, probes: &[Probe]) -> (ClusterSnapshot, Vec<(usize, ServerPair)>) {
        let mut snapshot = ClusterSnapshot {
            target: target.status.clone(),
            model: target.props.clone(),
            ..ClusterSnapshot::default()
        };
        if stalled && target.status.healthy {
            snapshot.target.healthy = false;
            snapshot.target.problem = Some(format!(
                "it has taken no task for {} s, though it answers how it is: it hangs, or reads a very long prompt",
                self.stall_after.as_secs()
            ));
        }
        match verification(self.mode, self.target.as_ref(), target) {
            Ok((verification, n_max)) => {
                snapshot.verification = verification;
                snapshot.n_max = n_max;
            }
            Err(reason) => snapshot.reason = Some(reason),
        }
        let mut missing = Vec::new();
        for (number, (draft, probe)) in self.drafts.iter().zip(probes).enumerate() {
            let mut seen = DrafterSnapshot {
                status: probe.status.clone(),
                protocol: None,
            };
            if snapshot.verification != Verification::None && probe.status.problem.is_none() {
                match draft.fits(probe, snapshot.verification, target.props.as_ref()) {
                    DrafterFit::Fits { protocol, but } => {
                        seen.protocol = Some(protocol);
                        seen.status.problem = but;
                    }
                    DrafterFit::Not(why) => seen.status.problem = Some(why),
                    DrafterFit::Unknown { why, pair } => {
                        seen.status.problem = Some(why);
                        missing.extend(pair.map(|pair| (number, *pair)));
                    }
                }
            }
            snapshot.drafts.push(seen);
        }
        if snapshot.verification != Verification::None && !snapshot.drafts.iter().any(|draft| draft.protocol.is_some())
        {
            let mut problems = snapshot.drafts.iter().filter(|draft| draft.status.healthy);
            snapshot.reason = if self.drafts.is_empty() {
                Some("no drafter is configured (`proxy.draft`), so only text that comes again is drafted".into())
            } else {
                problems.find_map(|draft| draft.status.problem.clone())
            };
        }
        (snapshot, missing)
    }

    fn compare(&mut self, number: usize, pair: ServerPair) -> Option<BoxFuture<'static, (usize, PairComparison)>> {
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
enum DrafterFit {
    Fits {
        protocol: DraftProtocol,
        but: Option<String>,
    },
    Not(String),
    Unknown {
        why: String,
        pair: Option<Box<ServerPair>>,
    },
}

impl WatchedDrafter {
    /// Takes in for how many completions at once the drafter can draft, where that is known.
    fn resize_slots(&self, probe: &Probe) {
        match (&probe.props, self.server.config.backend) {
            (Some(props), _) => self.slots.resize(props.total_slots),
            (None, Backend::Llamacpp) => {}
            (None, _) => self.slots.resize(TEXT_SLOTS),
        }
    }

    fn fits(&self, probe: &Probe, verification: Verification, target: Option<&Props>) -> DrafterFit {
        let text = || match target {
            Some(target) if verification == Verification::Attached => Some(DraftProtocol::Text {
                bos: target.bos_token.clone(),
            }),
            _ => None,
        };
        if self.server.config.backend != Backend::Llamacpp {
            return match text() {
                Some(protocol) => DrafterFit::Fits { protocol, but: None },
                None => DrafterFit::Not(format!(
                    "a drafter with `backend: {}` drafts as text, and an answer in rounds ({}) takes token ids only; run the \
                     draft model with llama-server",
                    backend_name(self.server.config.backend),
                    verification.name()
                )),
            };
        }
        let Some(props) = &probe.props else {
            return DrafterFit::Unknown {
                why: COMPARING.into(),
                pair: None,
            };
        };
        let Some(target) = target else {
            // Who scores prompts does not tell its vocabulary so; a text is compared when it is tried.
            return DrafterFit::Fits {
                protocol: DraftProtocol::Tokens { vocabulary: usize::MAX },
                but: None,
            };
        };
        let pair = (props.clone(), target.clone());
        match &self.compared {
            Some((compared, outcome)) if *compared == pair => match outcome {
                Ok(VocabularyComparison::Same { target_size }) => DrafterFit::Fits {
                    protocol: DraftProtocol::Tokens {
                        vocabulary: *target_size,
                    },
                    but: None,
                },
                Ok(VocabularyComparison::Different(difference)) => match text() {
                    Some(protocol) => DrafterFit::Fits {
                        protocol,
                        but: Some(format!("it drafts as text: {difference}")),
                    },
                    None => DrafterFit::Not(format!(
                        "it could draft as text only, and an answer in rounds ({}) takes token ids only: {difference}",
                        verification.name()
                    )),
                },
                Err(error) => DrafterFit::Unknown {
                    why: format!("the vocabularies could not be compared: {error}"),
                    pair: self.compare_again.then(|| Box::new(pair)),
                },
            },
            _ => DrafterFit::Unknown {
                why: COMPARING.into(),
                pair: Some(Box::new(pair)),
            },
        }
    }
}

/// Looks at a server again and again.
fn probes(server: Option<ConfiguredServer>) -> BoxStream<'static, Probe> {
    let Some(server) = server else {
        return stream::pending().boxed();
    };
    let give_up = Instant::now() + STARTUP_TIMEOUT;
    stream::unfold(
        (server, Duration::ZERO, false),
        move |(server, pause, seen)| async move {
            tokio::time::sleep(pause).await;
            let mut probe = probe_server(&server).await;
            let problem = probe.status.problem.as_mut().filter(|problem| *problem != LOADING);
            let seen = seen || probe.status.healthy || problem.is_none();
            if let Some(problem) = problem.filter(|_| !seen && Instant::now() < give_up) {
                problem.insert_str(0, NOT_UP_YET);
            }
            Some((probe, (server, PROBE_INTERVAL, seen)))
        },
    )
    .boxed()
}

/// Tells whether a llama-server takes no task, as often as that is asked: only while it has requests or may hang over one,
/// because one that nobody uses may sleep, and is woken by such a question.
fn stalls(server: Option<ConfiguredServer>, in_flight: InFlightRequests, after: Duration) -> BoxStream<'static, bool> {
    let Some(server) = server.filter(|server| server.config.backend == Backend::Llamacpp) else {
        return stream::pending().boxed();
    };
    let asks = (server, in_flight, Duration::ZERO, 0);
    stream::unfold(asks, move |(server, in_flight, pause, seen)| async move {
        tokio::time::sleep(pause).await;
        let changes = in_flight.since(seen).await;
        if server.client.takes_tasks(after).await {
            Some((false, (server, in_flight, TASK_INTERVAL, changes)))
        } else {
            // It is asked again whether it has requests or not.
            Some((true, (server, in_flight, Duration::ZERO, seen)))
        }
    })
    .boxed()
}

struct Probe {
    status: ServerStatus,
    /// Of a llama-server that answers.
    props: Option<Props>,
}

impl Probe {
    /// Nobody has looked.
    fn before(server: Option<&ConfiguredServer>) -> Self {
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

impl ConfiguredServer {
    fn unknown(&self) -> ServerStatus {
        ServerStatus {
            url: self.config.url.clone(),
            model: self.config.model_name.clone(),
            ..ServerStatus::default()
        }
    }
}

async fn probe_server(server: &ConfiguredServer) -> Probe {
    let ConfiguredServer { config, client, text } = server;
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
    Probe { status, props }
}

/// What to do where nothing listens.
fn remedy(server: &ConfiguredServer, error: &UpstreamError) -> &'static str {
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
fn verification(
    mode: VerificationMode,
    target: Option<&ConfiguredServer>,
    probe: &Probe,
) -> Result<(Verification, usize), String> {
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
            if probe.status.healthy {
                Ok((Verification::Scored, SCORED_MAX))
            } else {
                Err(NOT_YET.into())
            }
        }
        (VerificationMode::Scored, _) => wants("scored", "vLLM or SGLang"),
        (VerificationMode::FanOut, Backend::Llamacpp) => fan_out(probe.props.as_ref()),
        (VerificationMode::FanOut, _) => wants("fan-out", "a llama-server"),
        (VerificationMode::Auto | VerificationMode::Attached, Backend::Llamacpp) => attached(probe.props.as_ref()),
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
fn news(old: &ClusterSnapshot, new: &ClusterSnapshot) -> Vec<(Level, String)> {
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
    fn snapshot(draft: (bool, Option<&str>), target: (bool, Option<&str>)) -> ClusterSnapshot {
        let status = |name: &str, (healthy, problem): (bool, Option<&str>)| ServerStatus {
            url: format!("http://{name}"),
            healthy,
            problem: problem.map(str::to_owned),
            ..ServerStatus::default()
        };
        let waits = (!target.0).then(|| NOT_YET.to_owned());
        let compares = draft.1.filter(|problem| *problem == COMPARING).map(str::to_owned);
        ClusterSnapshot {
            target: status("t", target),
            drafts: vec![DrafterSnapshot {
                status: status("d", draft),
                protocol: None,
            }],
            verification: if target.0 {
                Verification::Attached
            } else {
                Verification::None
            },
            reason: waits.or(compares),
            n_max: 16,
            ..ClusterSnapshot::default()
        }
    }

    #[test]
    fn servers_that_start_after_the_proxy_are_told_of_once() {
        let (up, gone) = ((true, None), (false, Some("it is unreachable")));
        let waits = (false, Some("it is not up yet: it is unreachable"));
        let sights = [
            snapshot(
                (false, Some("it was not asked yet")),
                (false, Some("it was not asked yet")),
            ),
            snapshot(waits, (false, Some("it was not asked yet"))),
            snapshot(waits, waits),
            snapshot(up, waits),
            snapshot(up, gone),
            snapshot(up, (false, Some(LOADING))),
            snapshot((true, Some(COMPARING)), up),
            snapshot(up, up),
            snapshot(up, gone),
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
