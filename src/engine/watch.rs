//! Watches the two servers: who answers, what the target can verify, whether the vocabularies agree.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{BoxFuture, FutureExt, OptionFuture};
use futures_util::stream::{self, BoxStream};

use super::slots::Slots;
use super::vocabulary::{self, Comparison};
use super::{ServerStatus, Verification};
use crate::config::{Backend, Upstream};
use crate::upstream::{LlamaServer, Props, UpstreamError};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// The reason while it is not known yet whether the drafter fits.
const COMPARING: &str = "the vocabularies are being compared";

/// A configured server and its client.
#[derive(Debug, Clone)]
pub struct Server {
    /// The configuration.
    pub config: Upstream,
    /// The client.
    pub client: LlamaServer,
}

/// What is known of both servers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sight {
    /// The drafter, when one is configured.
    pub draft: Option<ServerStatus>,
    /// The target.
    pub target: ServerStatus,
    /// How the target verifies.
    pub verification: Verification,
    /// Why it does not, or what keeps the drafter from being used.
    pub reason: Option<String>,
    /// Most draft tokens of one step of the target.
    pub n_max: usize,
    /// Size of the target's vocabulary.
    pub vocabulary: usize,
    /// Whether the drafter can be used now.
    pub can_draft: bool,
}

/// Looks again and again, and remembers what does not change while the servers stay the same. Nothing waits for a server
/// that does not answer: neither the looks at the other one, nor what is told of it.
#[derive(Debug)]
pub struct Watcher {
    draft: Option<Server>,
    target: Option<Server>,
    slots: Slots,
    /// The pair of servers that was compared last, and the outcome.
    compared: Option<Compared>,
    /// The drafter was looked at since: a comparison that failed may work now.
    compare_again: bool,
}

/// Two servers, as far as it takes to notice that one of them is another one now.
type Pair = (Props, Props);

type Compared = (Pair, Result<Comparison, UpstreamError>);

impl Watcher {
    /// Watches these servers.
    #[must_use]
    pub fn new(draft: Option<Server>, target: Option<Server>, slots: Slots) -> Self {
        Self {
            draft,
            target,
            slots,
            compared: None,
            compare_again: false,
        }
    }

    /// What is known before the first look.
    #[must_use]
    pub fn first_sight(&self) -> Sight {
        self.judge(&Look::before(self.target.as_ref()), &Look::before(self.draft.as_ref()))
            .0
    }

    /// Looks for ever; publishes what changed.
    pub async fn run(mut self, sight: tokio::sync::watch::Sender<Sight>) {
        let (mut target_looks, mut draft_looks) = (looks(self.target.clone()), looks(self.draft.clone()));
        let mut target = Look::before(self.target.as_ref());
        let mut draft = Look::before(self.draft.as_ref());
        let mut comparing: Option<BoxFuture<'static, Compared>> = None;
        loop {
            tokio::select! {
                Some(look) = target_looks.next() => target = look,
                Some(look) = draft_looks.next() => {
                    draft = look;
                    self.compare_again = true;
                }
                Some(compared) = OptionFuture::from(comparing.as_mut()) => {
                    comparing = None;
                    self.compared = Some(compared);
                }
            }
            let (seen, missing) = self.judge(&target, &draft);
            if comparing.is_none() {
                comparing = missing.and_then(|pair| self.compare(pair));
                self.compare_again &= comparing.is_none();
            }
            sight.send_if_modified(|old| {
                if *old == seen {
                    return false;
                }
                log_change(old, &seen);
                *old = seen;
                true
            });
        }
    }

    /// What the last looks come to, and the pair that has yet to be compared.
    fn judge(&self, target: &Look, draft: &Look) -> (Sight, Option<Pair>) {
        let mut sight = Sight {
            target: target.status.clone(),
            draft: self.draft.as_ref().map(|_| draft.status.clone()),
            ..Sight::default()
        };
        match verification(self.target.as_ref(), target.props.as_ref()) {
            Ok(n_max) => {
                sight.verification = Verification::Attached;
                sight.n_max = n_max;
            }
            Err(reason) => {
                sight.reason = Some(reason);
                return (sight, None);
            }
        }
        let Some(target_props) = &target.props else {
            return (sight, None);
        };
        let Some(server) = &self.draft else {
            sight.reason =
                Some("no drafter is configured (`proxy.draft`), so only text that comes again is drafted".into());
            return (sight, None);
        };
        if server.config.backend != Backend::Llamacpp {
            sight.reason = Some(format!(
                "a drafter with `backend: {}` gives no token ids; run the draft model with llama-server",
                backend_name(server.config.backend)
            ));
            return (sight, None);
        }
        let Some(draft_props) = &draft.props else {
            return (sight, None);
        };
        self.slots.resize(draft_props.total_slots);
        let pair = (draft_props.clone(), target_props.clone());
        match &self.compared {
            Some((compared, outcome)) if *compared == pair => match outcome {
                Ok(Comparison::Same { target_size }) => {
                    sight.vocabulary = *target_size;
                    sight.can_draft = true;
                }
                Ok(Comparison::Different(difference)) => sight.reason = Some(difference.clone()),
                Err(error) => {
                    sight.reason = Some(format!("the vocabularies could not be compared: {error}"));
                    return (sight, self.compare_again.then_some(pair));
                }
            },
            _ => {
                sight.reason = Some(COMPARING.into());
                return (sight, Some(pair));
            }
        }
        (sight, None)
    }

    fn compare(&self, pair: Pair) -> Option<BoxFuture<'static, Compared>> {
        let (draft, target) = (
            self.draft.as_ref()?.client.clone(),
            self.target.as_ref()?.client.clone(),
        );
        Some(async move { (pair, vocabulary::compare(&draft, &target).await) }.boxed())
    }
}

/// Looks at a server again and again.
fn looks(server: Option<Server>) -> BoxStream<'static, Look> {
    let Some(server) = server else {
        return stream::pending().boxed();
    };
    stream::unfold((server, Duration::ZERO), |(server, pause)| async move {
        tokio::time::sleep(pause).await;
        Some((look_at(&server).await, (server, INTERVAL)))
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
    let Server { config, client } = server;
    let mut status = server.unknown();
    let mut props = None;
    let answer = if config.backend == Backend::Llamacpp {
        match client.health().await {
            Ok(()) => client.props().await.map(|found| props = Some(found)),
            Err(error) => Err(error),
        }
    } else {
        client.answers().await
    };
    match answer {
        Ok(()) => status.healthy = true,
        // Something answers that is no llama-server, or no longer one with our routes.
        Err(UpstreamError::Refused { status: 404 | 405, .. } | UpstreamError::Malformed { .. }) => {
            status.healthy = true;
            status.problem = Some("it answers, but not like llama-server; set `backend` to what it is".into());
        }
        Err(UpstreamError::Refused { status: 503, .. }) => status.problem = Some("it is loading its model".into()),
        Err(error) => status.problem = Some(error.to_string()),
    }
    if status.model.is_none() {
        status.model = props.as_ref().and_then(|props| props.model_alias.clone());
    }
    Look { status, props }
}

/// How many draft tokens the target can verify at once, or why it cannot.
fn verification(target: Option<&Server>, props: Option<&Props>) -> Result<usize, String> {
    let Some(target) = target else {
        return Err("no target is configured; name one under `proxy.target`".into());
    };
    if target.config.backend != Backend::Llamacpp {
        return Err(format!(
            "a target with `backend: {}` cannot verify drafts; run the model with Tightwad's llama-server to draft for it",
            backend_name(target.config.backend)
        ));
    }
    let Some(props) = props else {
        return Err("the target does not answer yet, so it is not known what it can verify".into());
    };
    match props.draft_external_max {
        None => Err(format!(
            "the target is a stock llama-server ({}), which cannot verify drafts; run the one of `scripts/llama-cpp` or of \
             the flake",
            props.build_info
        )),
        Some(0) => {
            Err("the target was started without `--spec-draft-external-max`; `tightwad run target` sets it".into())
        }
        Some(n) => Ok(n),
    }
}

fn backend_name(backend: Backend) -> &'static str {
    match backend {
        Backend::Llamacpp => "llamacpp",
        Backend::Ollama => "ollama",
        Backend::Openai => "openai",
    }
}

fn log_change(old: &Sight, new: &Sight) {
    for (role, old, new) in [
        ("target", Some(&old.target), Some(&new.target)),
        ("draft", old.draft.as_ref(), new.draft.as_ref()),
    ] {
        let Some(new) = new else { continue };
        if old.is_none_or(|old| old.healthy != new.healthy || old.problem != new.problem) {
            match &new.problem {
                None if new.healthy => tracing::info!("{role} server {} is up", new.url),
                Some(problem) => tracing::warn!("{role} server {}: {problem}", new.url),
                None => {}
            }
        }
    }
    if old.verification != new.verification || old.reason != new.reason {
        match &new.reason {
            Some(reason) if reason == COMPARING => tracing::debug!("{reason}"),
            None => tracing::info!("verification: attached, up to {} draft tokens per step", new.n_max),
            Some(reason) => tracing::warn!("drafting: {reason}"),
        }
    }
}
