//! Probes whether a target verifies drafts exactly: once when it comes up, before any client depends on it.
//!
//! The target continues a short text as for a client; then the verifier continues it without a draft, with a right one and
//! with a wrong one. The results differ, for example, if the server applies a default of the model to each choice
//! (`repetition_penalty` in `generation_config.json`), which prompt scores do not include.

use std::time::{Duration, Instant};

use serde_json::Map;

use super::verifier::{Verifier, VerifyRequest};
use crate::http::auth::unguessable;
use crate::speculation::Token;
use crate::upstream::UpstreamError;

/// The text to continue. It repeats itself, so that a repetition penalty shows.
pub const PROBE_TEXT: &str = "one two three four one two three four one two three four one two";
/// Number of tokens to generate.
const N: usize = 12;

/// Why a target is not used as a verifier.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProbeError {
    /// The target did not answer.
    #[error("the target could not be tried: {0}")]
    Failed(#[from] UpstreamError),
    /// The verifier gives another answer than the target.
    #[error(
        "{what} differs from what the target itself answers, so nothing is drafted; a default of the model may bend its \
         choices (start vLLM with `--generation-config vllm`, SGLang with `--sampling-defaults openai`)"
    )]
    Differs {
        /// The compared result.
        what: &'static str,
    },
}

/// Probes a target. Returns the durations of steps by their number of draft tokens, and the tokens of [`PROBE_TEXT`].
pub async fn probe(target: &dyn Verifier) -> Result<(Vec<(usize, Duration)>, Vec<Token>), ProbeError> {
    let prompt = target.tokens(PROBE_TEXT).await?;
    let own = target.complete(&prompt, N).await?;
    // Each step is an answer of its own, so that no cached result of one serves another.
    let answers: [String; 3] = std::array::from_fn(|_| unguessable());
    let sampling = Map::from_iter([("temperature".to_owned(), 0.into())]);
    let ask = |nth: usize, draft, n| VerifyRequest {
        answer: &answers[nth],
        context: &prompt,
        draft,
        n,
        sampling: &sampling,
    };
    let begun = Instant::now();
    let plain = target.verify(ask(0, &[], N)).await?;
    let plain_cost = begun.elapsed() / u32::try_from(plain.next.len().max(1)).unwrap_or(1);
    let said = &plain.next[..plain.next.len().saturating_sub(usize::from(plain.ended))];
    let text = target.text(&prompt, said).await?;
    if text.trim_end_matches('\u{fffd}') != own.trim_end_matches('\u{fffd}') {
        return Err(ProbeError::Differs {
            what: "what the target generates token by token",
        });
    }
    let Some((last, draft)) = said.split_last() else {
        return Ok((vec![(0, plain_cost)], prompt));
    };
    let begun = Instant::now();
    let right = target.verify(ask(1, draft, 1)).await?;
    let cost = begun.elapsed();
    let differs = |what| Err(ProbeError::Differs { what });
    if right.accepted != draft.len() || right.next.first().is_some_and(|next| next != last) {
        return differs("the verdict on a right draft");
    }
    if let [first, second, ..] = draft {
        let wrong = if *first == prompt[0] { prompt[1] } else { prompt[0] };
        let verdict = target.verify(ask(2, &[wrong, *second], 1)).await?;
        let next = verdict.next.first();
        if verdict.accepted != 0 || next.is_some_and(|next| next != first) {
            return differs("the verdict on a wrong draft");
        }
    }
    Ok((vec![(0, plain_cost), (draft.len(), cost)], prompt))
}
