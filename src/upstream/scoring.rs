//! Servers that score the tokens of a prompt: the interface of vLLM and SGLang, by which a draft is verified without our
//! patch.

use std::fmt::Debug;
use std::future::Future;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Generated;
use super::connection::{Connection, SHORT, UpstreamError};
use crate::config::Secret;
use crate::speculation::Token;

pub(super) const COMPLETIONS: &str = "/v1/completions";

/// Most bytes of an answer with a score for each token of a prompt.
pub(super) const SCORES: usize = 64 << 20;

/// Scores of a draft after a text, and the tokens generated after both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scores {
    /// For each draft token, the model's likeliest token in its place; `None` where the server does not report it.
    pub likeliest: Vec<Option<Token>>,
    /// Tokens generated after the draft.
    pub generated: Generated,
}

/// The tokens of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// The tokens.
    pub tokens: Vec<Token>,
    /// Context in tokens, where the server reports it.
    pub n_ctx: Option<usize>,
}

/// A server that scores prompts.
pub trait ScoringServer: Debug + Send + Sync {
    /// The names of its model, without those of adapters.
    fn models(&self) -> impl Future<Output = Result<Vec<String>, UpstreamError>> + Send;
    /// The tokens of a chat (`{"messages": …}`) or of a text (`{"prompt": …}`) as a prompt.
    fn tokenize(&self, prompt: Value) -> impl Future<Output = Result<Tokenized, UpstreamError>> + Send;
    /// The text of tokens.
    fn detokenize(&self, tokens: &[Token]) -> impl Future<Output = Result<String, UpstreamError>> + Send;
    /// Scores `draft` after `context` and generates at most `n` tokens after both, greedily. `answer` names the answer
    /// that this is a part of and must not be known to others; the same draft must not be scored twice under one name.
    fn score(
        &self,
        answer: &str,
        context: &[Token],
        draft: &[Token],
        n: usize,
    ) -> impl Future<Output = Result<Scores, UpstreamError>> + Send;
    /// The server's own completion of a prompt at temperature 0, with its other defaults.
    fn complete(&self, prompt: &[Token], n: usize) -> impl Future<Output = Result<String, UpstreamError>> + Send;
}

/// A connection whose requests may name the model.
#[derive(Debug, Clone)]
pub(super) struct ModelConnection {
    pub(super) connection: Connection,
    /// Model name for requests that have none.
    model: Option<String>,
}

impl ModelConnection {
    pub(super) fn new(base: &str, key: Option<Secret>, model: Option<String>) -> Result<Self, reqwest::Error> {
        Ok(Self {
            connection: Connection::new(base, key)?,
            model,
        })
    }

    pub(super) fn named(&self, mut body: Value) -> Value {
        if let Some(model) = &self.model {
            body["model"] = json!(model);
        }
        body
    }

    /// The text of a completion.
    pub(super) async fn complete(&self, body: Value) -> Result<String, UpstreamError> {
        #[derive(Deserialize)]
        struct Completion {
            choices: Vec<Choice>,
        }
        #[derive(Deserialize)]
        struct Choice {
            text: String,
        }
        let answer: Completion = self
            .connection
            .post(COMPLETIONS, &self.named(body), None, SHORT)
            .await?;
        let choice = answer.choices.into_iter().next();
        choice
            .map(|choice| choice.text)
            .ok_or_else(|| self.connection.malformed(COMPLETIONS, "there are no choices"))
    }
}
