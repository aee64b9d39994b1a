//! The proxy's part of the cluster file, checked before it serves.

use std::time::Duration;

use crate::config::{self, Backend, Secret, Upstream};
use crate::http::Limits;

/// Time that running answers get after the shutdown.
const DRAIN: Duration = Duration::from_secs(10);

/// The proxy's part of the cluster file, checked. Secrets that lie in files have been read already.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The address that it listens on, as configured: a name of it.
    pub host: String,
    /// The web pages of other servers that may use it.
    pub cors_origins: Vec<String>,
    /// Limits towards clients.
    pub limits: Limits,
    /// Base URL of the target, without `/v1`.
    pub target: reqwest::Url,
    /// Kind of the target.
    pub backend: Backend,
    /// Names of the drafters' models, which clients cannot ask for.
    pub draft_models: Vec<String>,
    /// API key of the target.
    pub target_api_key: Option<Secret>,
    /// `coordinator.draft_key` of a target that is a pool's coordinator.
    pub target_draft_key: Option<Secret>,
    /// Token that clients must send. `None`: every client is served.
    pub auth_token: Option<Secret>,
    /// Largest `max_tokens` a request may ask for.
    pub max_tokens_limit: Option<u64>,
    /// Largest request body in bytes.
    pub max_body_size: u64,
    /// Silence after which an event stream gets a comment. `None`: never.
    pub keepalive: Option<Duration>,
    /// Whether completions are answered while the drafter is down.
    pub fallback_on_draft_failure: bool,
    /// The drafter whose agreement with a target that cannot verify drafts is measured. `None`: none.
    pub measure_agreement_with: Option<Upstream>,
    /// Time that running answers get after the shutdown.
    pub drain: Duration,
}

/// Why [`Settings`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// There is nothing to forward to.
    #[error(
        "`proxy.target` is not set: name the server that answers, e.g. `target: {{ url: \"http://127.0.0.1:8080\" }}`"
    )]
    NoTarget,
    /// The target's URL is not one.
    #[error(
        "`proxy.target.url` is `{url}`, which is not a URL of a server ({problem}); write e.g. `http://192.168.1.100:8080`"
    )]
    TargetUrl {
        /// As configured.
        url: String,
        /// The reason.
        problem: String,
    },
}

impl TryFrom<&config::Proxy> for Settings {
    type Error = SettingsError;

    fn try_from(proxy: &config::Proxy) -> Result<Self, SettingsError> {
        let target = proxy.target.as_ref().ok_or(SettingsError::NoTarget)?;
        Ok(Self {
            host: proxy.host.clone(),
            cors_origins: proxy.cors_origins.clone(),
            limits: Limits::default().for_bodies_of(proxy.max_body_size),
            target: base_url(&target.url)?,
            backend: target.backend,
            draft_models: draft_models(proxy, target),
            target_api_key: target.api_key.clone(),
            target_draft_key: target.draft_key.clone(),
            auth_token: proxy.auth_token.clone(),
            max_tokens_limit: proxy.max_tokens_limit,
            max_body_size: proxy.max_body_size,
            keepalive: (proxy.keepalive_seconds > 0).then(|| Duration::from_secs(proxy.keepalive_seconds)),
            fallback_on_draft_failure: proxy.fallback_on_draft_failure,
            measure_agreement_with: proxy.draft.first().cloned().filter(|_| proxy.measure_agreement),
            drain: DRAIN,
        })
    }
}

/// Names of the drafters' models, without those that the target has too.
fn draft_models(proxy: &config::Proxy, target: &Upstream) -> Vec<String> {
    let names = proxy.draft.iter().filter_map(|draft| draft.model_name.clone());
    let answers = |name: &String| target.backend != Backend::Llamacpp || target.model_name.as_ref() == Some(name);
    names.filter(|name| !answers(name)).collect()
}

fn base_url(text: &str) -> Result<reqwest::Url, SettingsError> {
    let wrong = |problem: String| SettingsError::TargetUrl {
        url: text.to_owned(),
        problem,
    };
    let url = reqwest::Url::parse(text).map_err(|error| wrong(error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(wrong(format!("its scheme is `{}`", url.scheme())));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("it has a query or a fragment".to_owned()));
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_is_measured_only_when_asked_for_and_with_a_drafter() {
        let (target, draft) = (Upstream::at("http://t:1"), Upstream::at("http://d:1"));
        let with = |measure_agreement, draft: Option<&Upstream>| {
            let proxy = config::Proxy {
                target: Some(target.clone()),
                draft: draft.cloned().into_iter().collect(),
                measure_agreement,
                ..config::Proxy::default()
            };
            Settings::try_from(&proxy).unwrap().measure_agreement_with
        };
        assert_eq!(with(config::Proxy::default().measure_agreement, Some(&draft)), None);
        assert_eq!(with(true, None), None);
        assert_eq!(with(true, Some(&draft)), Some(draft));
    }

    #[test]
    fn a_target_url_without_a_scheme_is_explained() {
        for url in [
            "192.168.1.100:8080",
            "localhost:8080",
            "ftp://there",
            "http://there/?x=1",
        ] {
            let error = base_url(url).unwrap_err().to_string();
            assert!(
                error.contains(url) && error.contains("http://192.168.1.100:8080"),
                "{error}"
            );
        }
    }
}
