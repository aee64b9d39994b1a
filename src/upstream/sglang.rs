//! Client of SGLang that verifies drafts by the log-probabilities of a prompt.
//!
//! Wire formats, from SGLang's source as of mid-2026: `POST /generate` (`GenerateReqInput` in
//! `python/sglang/srt/managers/io_struct.py`; `meta_info` in `tokenizer_manager.py`), `POST /tokenize` and `/detokenize`
//! (`entrypoints/openai/serving_tokenize.py`; `messages` in newer versions, sglang#29444).
//!
//! Its cache is read up to `logprob_start_len` and no further, so that the rows are always computed. The row of that
//! first position is null: nothing stands before it.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Generated;
use super::connection::{LONG, METADATA_TIMEOUT, SHORT, UpstreamError};
use super::scoring::{ModelConnection, SCORES, Scores, ScoringServer, Tokenized};
use crate::config::Secret;
use crate::speculation::Token;

const GENERATE: &str = "/generate";

/// One SGLang.
#[derive(Debug, Clone)]
pub struct Sglang {
    server: ModelConnection,
}

#[derive(Deserialize)]
struct Generation {
    #[serde(default)]
    output_ids: Option<Vec<Token>>,
    meta_info: MetaInfo,
}

#[derive(Deserialize)]
struct MetaInfo {
    #[serde(default)]
    finish_reason: Option<FinishReason>,
    #[serde(default)]
    input_token_logprobs: Option<Vec<Scored>>,
    #[serde(default)]
    input_top_logprobs: Option<Vec<Option<Vec<Scored>>>>,
    #[serde(default)]
    output_token_logprobs: Option<Vec<Scored>>,
}

/// The logarithm of a token's probability (null for the first token), the token, its text (null if not asked for).
#[derive(Deserialize)]
struct Scored(Option<f64>, Token, #[serde(default)] serde::de::IgnoredAny);

#[derive(Deserialize)]
struct FinishReason {
    r#type: String,
    /// The token that ended the text, or the words.
    #[serde(default)]
    matched: Value,
}

impl Sglang {
    /// A client of the server at `base`. Fails only when the system cannot set up TLS.
    pub fn new(base: &str, key: Option<Secret>, model: Option<String>) -> Result<Self, reqwest::Error> {
        Ok(Self {
            server: ModelConnection::new(base, key, model)?,
        })
    }
}

impl ScoringServer for Sglang {
    async fn models(&self) -> Result<Vec<String>, UpstreamError> {
        self.server.connection.own_models().await
    }

    /// Not every version can do chats. How many tokens there may be is not told: `max_model_len` is here what the tokeniser
    /// thinks.
    async fn tokenize(&self, prompt: Value) -> Result<Tokenized, UpstreamError> {
        #[derive(Deserialize)]
        struct Tokens {
            tokens: Vec<Token>,
        }
        let body = self.server.named(prompt);
        let answer: Tokens = self
            .server
            .connection
            .post("/tokenize", &body, Some(METADATA_TIMEOUT), LONG)
            .await?;
        Ok(Tokenized {
            tokens: answer.tokens,
            n_ctx: None,
        })
    }

    /// The text of `tokens` without the special ones.
    async fn detokenize(&self, tokens: &[Token]) -> Result<String, UpstreamError> {
        #[derive(Deserialize)]
        struct Text {
            text: String,
        }
        let body = self
            .server
            .named(json!({ "tokens": tokens, "skip_special_tokens": true }));
        let answer: Text = self
            .server
            .connection
            .post("/detokenize", &body, Some(METADATA_TIMEOUT), SHORT)
            .await?;
        Ok(answer.text)
    }

    async fn score(&self, _: &str, context: &[Token], draft: &[Token], n: usize) -> Result<Scores, UpstreamError> {
        let tokens = [context, draft].concat();
        let mut body = json!({
            "input_ids": tokens,
            "sampling_params": { "temperature": 0, "max_new_tokens": n },
            "return_logprob": true,
            "return_text_in_logprobs": false,
        });
        if !draft.is_empty() {
            body["logprob_start_len"] = json!(context.len().saturating_sub(1));
            body["top_logprobs_num"] = json!(1);
        }
        let answer: Generation = self.server.connection.post(GENERATE, &body, None, SCORES).await?;
        let meta = answer.meta_info;
        let mut likeliest = rows(
            draft,
            &meta.input_token_logprobs.unwrap_or_default(),
            &meta.input_top_logprobs.unwrap_or_default(),
        );
        likeliest.resize(draft.len(), None);
        let scored = meta.output_token_logprobs.unwrap_or_default();
        let mut tokens = answer
            .output_ids
            .unwrap_or_else(|| scored.iter().map(|Scored(_, token, _)| *token).collect());
        let stopped_by = meta.finish_reason.filter(|reason| reason.r#type == "stop");
        let last = stopped_by.as_ref().and_then(|reason| reason.matched.as_i64());
        if let Some(last) = last.and_then(|last| Token::try_from(last).ok())
            && tokens.last() != Some(&last)
        {
            tokens.push(last);
        }
        Ok(Scores {
            likeliest,
            generated: Generated {
                tokens,
                ended: stopped_by.is_some(),
            },
        })
    }

    async fn complete(&self, prompt: &[Token], n: usize) -> Result<String, UpstreamError> {
        let body = json!({ "model": "default", "prompt": prompt, "temperature": 0, "max_tokens": n });
        self.server.complete(body).await
    }
}

/// The likeliest token of each of the last rows, as long as they are those of the draft.
fn rows(draft: &[Token], stands: &[Scored], top: &[Option<Vec<Scored>>]) -> Vec<Option<Token>> {
    let last = |n: usize| n.saturating_sub(draft.len());
    let (stands, top) = (&stands[last(stands.len())..], &top[last(top.len())..]);
    if stands.len() != draft.len() || top.len() != draft.len() {
        return Vec::new();
    }
    draft
        .iter()
        .zip(stands.iter().zip(top))
        .map(|(token, (Scored(_, there, _), row))| {
            let best = row.as_ref()?.iter().filter(|Scored(logprob, ..)| logprob.is_some());
            let best =
                best.max_by(|Scored(a, ..), Scored(b, ..)| a.unwrap_or(f64::MIN).total_cmp(&b.unwrap_or(f64::MIN)));
            (there == token).then_some(best?.1)
        })
        .collect()
}
