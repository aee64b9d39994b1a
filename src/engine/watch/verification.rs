//! Chooses how the target verifies drafts, from the configuration and what the target reports.
//!
//! Each choice that is not possible gives the reason and the remedy in one sentence. [`super::Watcher`] asks at each change.

use super::super::Verification;
use super::ConfiguredServer;
use super::probe::Probe;
use crate::config::{Backend, VerificationMode};
use crate::upstream::Props;

/// Most draft tokens that a server scores per request.
const MAX_SCORED: usize = 16;

/// How the target verifies and the most draft tokens per step, or the reason why it cannot verify.
pub(super) fn verification(
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
                Ok((Verification::Scored, MAX_SCORED))
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

/// Reason while the target does not answer.
pub(super) const NOT_YET: &str = "the target does not answer yet, so it is not known what it can verify";

/// For a llama-server that drafts can attach to.
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

/// For a stock llama-server with several slots.
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

/// A backend as the configuration spells it.
pub(super) fn backend_name(backend: Backend) -> &'static str {
    match backend {
        Backend::Llamacpp => "llamacpp",
        Backend::Ollama => "ollama",
        Backend::Openai => "openai",
        Backend::Vllm => "vllm",
        Backend::Sglang => "sglang",
    }
}
