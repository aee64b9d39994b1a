//! `POST /draft`: offers draft tokens to a running completion and learns what it has committed. This is the protocol of our
//! patch (`nix/llama-cpp`).

use serde::{Deserialize, Serialize};

use super::LlamaServer;
use super::props::{ANY, LONGEST_STEP_US, MOST_DRAFTED, count};
use crate::speculation::Token;
use crate::upstream::connection::{LONG, UpstreamError};

/// Body of `POST /draft`.
#[derive(Debug, Clone, Serialize)]
pub struct DraftCall<'a> {
    /// Key of the completion, from its header `X-Draft-Key`.
    pub key: &'a str,
    /// Position of the first token.
    pub pos: usize,
    /// Draft tokens from that position on.
    pub tokens: &'a [Token],
    /// The next step waits until this many draft tokens are there …
    pub n_min: usize,
    /// … but at most this long, in microseconds.
    pub hold_us: u64,
    /// Answer once a token is committed beyond `pos`.
    pub wait: bool,
}

/// Answer to `POST /draft`.
#[derive(Debug, Clone, Deserialize)]
pub struct DraftAnswer {
    /// State of the completion.
    pub state: DraftState,
    /// Why the server takes no drafts for it.
    #[serde(default)]
    pub reason: Option<String>,
    /// Position of the first of `tokens`.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub pos: usize,
    /// Committed tokens from `pos` on.
    #[serde(default)]
    pub tokens: Vec<Token>,
    /// Tokens of the prompt.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_prompt: usize,
    /// Most draft tokens that the next step can verify.
    #[serde(default, deserialize_with = "count::<_, _, MOST_DRAFTED>")]
    pub n_max: usize,
    /// Steps so far.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_steps: u64,
    /// Offered tokens verified so far.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_drafted: u64,
    /// Offered tokens accepted so far.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_accepted: u64,
    /// Offered tokens verified in the last step.
    #[serde(default, deserialize_with = "count::<_, _, MOST_DRAFTED>")]
    pub step_n: usize,
    /// Offered tokens accepted in the last step.
    #[serde(default, deserialize_with = "count::<_, _, MOST_DRAFTED>")]
    pub step_accepted: usize,
    /// Tokens in the batch of the last step, of all completions and prompts.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub step_batch: usize,
    /// Duration of the last step in microseconds.
    #[serde(default, deserialize_with = "count::<_, _, LONGEST_STEP_US>")]
    pub step_us: u64,
    /// Draft tokens verified in the last step, whoever drafted them: the offers or the target itself.
    #[serde(default, deserialize_with = "count::<_, _, MOST_DRAFTED>")]
    pub step_by_n: usize,
}

impl DraftAnswer {
    /// Tokens of this completion in the batch of the last step.
    #[must_use]
    pub fn step_tokens(&self) -> usize {
        1 + self.step_n.max(self.step_by_n)
    }

    /// Tokens in the batch of the last step as if the target had drafted nothing itself. A step with a draft of the target's own
    /// is a plain step of such a target.
    #[must_use]
    pub fn batch_without_own_draft(&self) -> usize {
        self.step_batch
            .saturating_sub(self.step_by_n.saturating_sub(self.step_n))
    }

    /// The state before the first answer.
    #[must_use]
    pub fn none() -> Self {
        Self {
            state: DraftState::Unknown,
            reason: None,
            pos: 0,
            tokens: Vec::new(),
            n_prompt: 0,
            n_max: 0,
            n_steps: 0,
            n_drafted: 0,
            n_accepted: 0,
            step_n: 0,
            step_accepted: 0,
            step_batch: 0,
            step_us: 0,
            step_by_n: 0,
        }
    }
}

/// State of a completion, as the draft protocol reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DraftState {
    /// No completion has this key now.
    Unknown,
    /// It has generated no token.
    Waiting,
    /// It generates.
    Running,
    /// It ended.
    Done,
    /// The server takes no drafts for it.
    Refused,
}

impl LlamaServer {
    /// Offers draft tokens to a running completion and returns what it has committed.
    pub async fn offer(&self, call: &DraftCall<'_>) -> Result<DraftAnswer, UpstreamError> {
        let answer: DraftAnswer = self.connection.post("/draft", call, None, LONG).await?;
        if answer.pos != call.pos {
            let cause = format!(
                "asked for the tokens from {} on, it tells those from {} on",
                call.pos, answer.pos
            );
            return Err(self.connection.malformed("/draft", &cause));
        }
        Ok(answer)
    }
}
