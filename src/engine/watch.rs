//! Watches the two servers: who answers, what the target can verify, whether the vocabularies agree.

use std::time::Duration;

use super::slots::Slots;
use super::vocabulary::{self, Comparison};
use super::{ServerStatus, Verification};
use crate::config::{Backend, Upstream};
use crate::upstream::{LlamaServer, Props, UpstreamError};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

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

/// Looks again and again, and remembers what does not change while the servers stay the same.
#[derive(Debug)]
pub struct Watcher {
    draft: Option<Server>,
    target: Option<Server>,
    slots: Slots,
    /// The pair of servers that was compared last, and the outcome.
    compared: Option<((Props, Props), Comparison)>,
}

impl Watcher {
    /// Watches these servers.
    #[must_use]
    pub fn new(draft: Option<Server>, target: Option<Server>, slots: Slots) -> Self {
        Self {
            draft,
            target,
            slots,
            compared: None,
        }
    }

    /// Looks for ever; publishes what changed.
    pub async fn run(mut self, sight: tokio::sync::watch::Sender<Sight>) {
        loop {
            let seen = self.look().await;
            sight.send_if_modified(|old| {
                if *old == seen {
                    return false;
                }
                log_change(old, &seen);
                *old = seen;
                true
            });
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn look(&mut self) -> Sight {
        let (target, draft) = tokio::join!(look_at(self.target.as_ref()), look_at(self.draft.as_ref()));
        let mut sight = Sight {
            target: target.status,
            draft: self.draft.as_ref().map(|_| draft.status),
            ..Sight::default()
        };
        match verification(self.target.as_ref(), target.props.as_ref()) {
            Ok(n_max) => {
                sight.verification = Verification::Attached;
                sight.n_max = n_max;
            }
            Err(reason) => {
                sight.reason = Some(reason);
                return sight;
            }
        }
        let (Some(target_props), Some(target)) = (target.props, &self.target) else {
            return sight;
        };
        let Some(server) = &self.draft else {
            sight.reason = Some("no drafter is configured; name one under `proxy.draft`".into());
            return sight;
        };
        if server.config.backend != Backend::Llamacpp {
            sight.reason = Some(format!(
                "a drafter with `backend: {}` gives no token ids; run the draft model with llama-server",
                backend_name(server.config.backend)
            ));
            return sight;
        }
        let Some(draft_props) = draft.props else { return sight };
        self.slots.resize(draft_props.total_slots);
        let pair = (draft_props, target_props);
        if self.compared.as_ref().is_none_or(|(compared, _)| *compared != pair) {
            match vocabulary::compare(&server.client, &target.client).await {
                Ok(comparison) => self.compared = Some((pair, comparison)),
                Err(error) => {
                    sight.reason = Some(format!("the vocabularies could not be compared: {error}"));
                    return sight;
                }
            }
        }
        match &self.compared {
            Some((_, Comparison::Same { target_size })) => {
                sight.vocabulary = *target_size;
                sight.can_draft = true;
            }
            Some((_, Comparison::Different(difference))) => sight.reason = Some(difference.clone()),
            None => {}
        }
        sight
    }
}

struct Look {
    status: ServerStatus,
    /// Of a llama-server that answers.
    props: Option<Props>,
}

async fn look_at(server: Option<&Server>) -> Look {
    let Some(Server { config, client }) = server else {
        return Look {
            status: ServerStatus::default(),
            props: None,
        };
    };
    let mut status = ServerStatus {
        url: config.url.clone(),
        model: config.model_name.clone(),
        ..ServerStatus::default()
    };
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
        return Err("the target has not told yet what it can verify".into());
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
            None => tracing::info!("verification: attached, up to {} draft tokens per step", new.n_max),
            Some(reason) => tracing::warn!("not drafting: {reason}"),
        }
    }
}
