//! Client of vLLM that verifies drafts by the log-probabilities of a prompt.
//!
//! Wire formats, from vLLM's source as of mid-2026: `POST /inference/v1/generate`
//! (`vllm/entrypoints/serve/disagg/protocol.py`: `GenerateRequest`, `GenerateResponse`), `POST /tokenize` and `/detokenize`
//! (`vllm/entrypoints/serve/tokenize/protocol.py`), `POST /v1/completions` with `prompt_logprobs` and `return_token_ids`.
//!
//! With `prompt_logprobs`, vLLM computes the whole prompt again unless `skip_reading_prefix_cache` is false. Only
//! `/inference/v1/generate` takes that field (vllm#28194). If the prefix cache is used, the rows of cached tokens hold stale
//! memory (vllm#42019). So this client reads only the rows of the draft, and those must not be cached: `cache_salt` gives each
//! answer a cache of its own, and two scored prompts of one answer differ in a token before any row that is read.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::Generated;
use super::connection::{LONG, METADATA_TIMEOUT, SHORT, UpstreamError};
use super::scoring::{COMPLETIONS, ModelConnection, SCORES, Scores, ScoringServer, Tokenized};
use crate::config::Secret;
use crate::speculation::Token;

const GENERATE: &str = "/inference/v1/generate";

/// One vLLM.
#[derive(Debug, Clone)]
pub struct Vllm {
    server: ModelConnection,
    /// It has no [`GENERATE`].
    is_old: Arc<AtomicBool>,
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    #[serde(default)]
    prompt_logprobs: Option<Rows>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    token_ids: Option<Vec<Token>>,
    #[serde(default)]
    finish_reason: Option<String>,
    /// [`COMPLETIONS`] reports them here.
    #[serde(default)]
    prompt_logprobs: Option<Rows>,
}

/// One for each token of the prompt; most of them are not looked at.
type Rows = Vec<Option<Box<RawValue>>>;

/// Score of a token in a row.
#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    rank: Option<u64>,
}

impl Vllm {
    /// A client of the server at `base`. Fails only when the system cannot set up TLS.
    pub fn new(base: &str, key: Option<Secret>, model: Option<String>) -> Result<Self, reqwest::Error> {
        Ok(Self {
            server: ModelConnection::new(base, key, model)?,
            is_old: Arc::default(),
        })
    }

    async fn score_cached(
        &self,
        answer: &str,
        tokens: &[Token],
        draft: &[Token],
        n: usize,
    ) -> Result<Scores, UpstreamError> {
        let mut sampling = json!({ "temperature": 0, "max_tokens": n });
        if !draft.is_empty() {
            sampling["prompt_logprobs"] = json!(1);
            sampling["skip_reading_prefix_cache"] = json!(false);
        }
        let body = json!({ "token_ids": tokens, "sampling_params": sampling, "cache_salt": answer });
        let answer = self
            .server
            .connection
            .post_once(GENERATE, &self.server.named(body), SCORES)
            .await?;
        self.read(GENERATE, answer, draft)
    }

    /// With the endpoint that every vLLM has.
    async fn score_anew(&self, tokens: &[Token], draft: &[Token], n: usize) -> Result<Scores, UpstreamError> {
        let mut body = json!({ "prompt": tokens, "temperature": 0, "max_tokens": n, "return_token_ids": true });
        if !draft.is_empty() {
            body["prompt_logprobs"] = json!(1);
        }
        let body = self.server.named(body);
        let answer = self.server.connection.post(COMPLETIONS, &body, None, SCORES).await?;
        self.read(COMPLETIONS, answer, draft)
    }

    fn read(&self, path: &str, answer: Completion, draft: &[Token]) -> Result<Scores, UpstreamError> {
        let choice = answer.choices.into_iter().next();
        let (Some(generated), ended, rows) = choice.map_or((None, false, None), |choice| {
            let ended = choice.finish_reason.as_deref() == Some("stop");
            (choice.token_ids, ended, choice.prompt_logprobs)
        }) else {
            return Err(self.server.connection.malformed(path, "there are no `token_ids`"));
        };
        let rows = answer.prompt_logprobs.or(rows).unwrap_or_default();
        let first = rows.len().saturating_sub(draft.len());
        let mut likeliest: Vec<Option<Token>> = rows[first..]
            .iter()
            .zip(draft)
            .map(|(row, token)| likeliest(row.as_deref()?, *token))
            .collect();
        likeliest.resize(draft.len(), None);
        Ok(Scores {
            likeliest,
            generated: Generated {
                tokens: generated,
                ended,
            },
        })
    }
}

impl ScoringServer for Vllm {
    async fn models(&self) -> Result<Vec<String>, UpstreamError> {
        // The server may have been replaced by another version since the last call.
        self.is_old.store(false, Ordering::Relaxed);
        self.server.connection.own_models().await
    }

    async fn tokenize(&self, prompt: Value) -> Result<Tokenized, UpstreamError> {
        #[derive(Deserialize)]
        struct Tokens {
            tokens: Vec<Token>,
            max_model_len: usize,
        }
        let body = self.server.named(prompt);
        let answer: Tokens = self
            .server
            .connection
            .post("/tokenize", &body, Some(METADATA_TIMEOUT), LONG)
            .await?;
        Ok(Tokenized {
            tokens: answer.tokens,
            n_ctx: Some(answer.max_model_len),
        })
    }

    /// The text of `tokens`, special ones included.
    async fn detokenize(&self, tokens: &[Token]) -> Result<String, UpstreamError> {
        #[derive(Deserialize)]
        struct Text {
            prompt: String,
        }
        let body = self.server.named(json!({ "tokens": tokens }));
        let answer: Text = self
            .server
            .connection
            .post("/detokenize", &body, Some(METADATA_TIMEOUT), SHORT)
            .await?;
        Ok(answer.prompt)
    }

    async fn score(&self, answer: &str, context: &[Token], draft: &[Token], n: usize) -> Result<Scores, UpstreamError> {
        let tokens = [context, draft].concat();
        if !self.is_old.load(Ordering::Relaxed) {
            match self.score_cached(answer, &tokens, draft, n).await {
                Err(UpstreamError::Refused { status: 404 | 405, .. }) => self.is_old.store(true, Ordering::Relaxed),
                // Garbage in a cached row may be a number that JSON does not have; a connection may have been closed.
                Err(
                    UpstreamError::Refused { status: 500.., .. }
                    | UpstreamError::Malformed { .. }
                    | UpstreamError::Unreachable { .. },
                ) if !draft.is_empty() => {}
                outcome => return outcome,
            }
        }
        self.score_anew(&tokens, draft, n).await
    }

    async fn complete(&self, prompt: &[Token], n: usize) -> Result<String, UpstreamError> {
        let body = json!({ "prompt": prompt, "temperature": 0, "max_tokens": n });
        self.server.complete(body).await
    }
}

/// The token of the first rank, if the row is that of the place where `token` stands: each has the token that stands
/// there beside the likeliest ones.
fn likeliest(row: &RawValue, token: Token) -> Option<Token> {
    let row: HashMap<Token, Entry> = serde_json::from_str(row.get()).ok()?;
    row.contains_key(&token).then_some(())?;
    let mut first = row.iter().filter(|(_, entry)| entry.rank == Some(1));
    match (first.next(), first.next()) {
        (Some((token, _)), None) => Some(*token),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(row: &str, token: Token) -> Option<Token> {
        let row: Box<RawValue> = serde_json::from_str(row).unwrap();
        likeliest(&row, token)
    }

    #[test]
    fn a_row_tells_the_likeliest_token_only_if_it_is_that_of_its_place() {
        let right = r#"{"7":{"logprob":-0.1,"rank":1,"decoded_token":"a"}}"#;
        assert_eq!(read(right, 7), Some(7));
        let other = r#"{"9":{"logprob":-4.0,"rank":12},"7":{"logprob":-0.1,"rank":1}}"#;
        assert_eq!(read(other, 9), Some(7));
        for garbage in [
            right,
            "null",
            "{}",
            "[1]",
            r#"{"8":{"logprob":0.0,"rank":0}}"#,
            r#"{"8":{"rank":1},"9":{"rank":1}}"#,
        ] {
            assert_eq!(read(garbage, 8), None, "{garbage}");
        }
    }
}
