//! Verifies drafts with vLLM and SGLang, which report the likeliest token at each position of a prompt: the greedy choice.
//!
//! The scores do not tell whether that token ends the text; only generating it does. So scores count only for ordinary
//! tokens, which cannot end a text. Before any other token the draft is cut off, so that the target generates it. A token is
//! ordinary if it was generated and did not end its text, or if its own text has no bracket: all known vocabularies write
//! tokens that end texts in brackets (`</s>`, `<|im_end|>`, `[EOS]`).

use std::collections::HashMap;
use std::fmt::Debug;

use futures_util::future::{BoxFuture, FutureExt, try_join, try_join_all};
use parking_lot::Mutex;
use serde_json::json;

use super::request::opens_reasoning;
use crate::engine::{Endpoint, Prompt, PromptContent, PromptRequest, Verdict, Verifier, VerifyRequest};
use crate::speculation::Token;
use crate::upstream::{Scores, ScoringServer, Tokenized, UpstreamError};

/// Default for `max_tokens` of a completion (OpenAI's, which both servers keep).
const COMPLETION_LIMIT: usize = 16;
/// Number of last prompt tokens that are searched for an open reasoning block.
const TAIL: usize = 8;

/// A verifier that uses a server which scores prompts.
#[derive(Debug)]
pub struct Scored<S> {
    server: S,
    /// Whether each token seen so far is ordinary.
    ordinary: Mutex<HashMap<Token, bool>>,
}

impl<S: ScoringServer> Scored<S> {
    /// A verifier that uses this server.
    #[must_use]
    pub fn new(server: S) -> Self {
        Self {
            server,
            ordinary: Mutex::default(),
        }
    }

    /// Number of leading tokens that are ordinary.
    async fn ordinary_ones(&self, tokens: &[Token]) -> Result<usize, UpstreamError> {
        let unknown: Vec<Token> = {
            let known = self.ordinary.lock();
            tokens
                .iter()
                .copied()
                .filter(|token| !known.contains_key(token))
                .collect()
        };
        let texts = try_join_all(
            unknown
                .iter()
                .map(|token| self.server.detokenize(std::slice::from_ref(token))),
        )
        .await?;
        let mut known = self.ordinary.lock();
        for (token, text) in unknown.iter().zip(texts) {
            known.entry(*token).or_insert_with(|| is_ordinary(&text));
        }
        Ok(tokens
            .iter()
            .take_while(|token| known.get(token) == Some(&true))
            .count())
    }

    async fn prompt_of(&self, request: &PromptRequest) -> Result<Option<Prompt>, UpstreamError> {
        let models = self.server.models().await?;
        // Another name is an adapter, which answers as another model.
        let Some(model) = models
            .into_iter()
            .find(|name| request.model.as_ref().is_none_or(|asked| asked == name))
        else {
            return Ok(None);
        };
        let prompt = match &request.content {
            PromptContent::Messages(messages) => {
                let prompt = self.server.tokenize(json!({ "messages": messages })).await?;
                let tail = prompt.tokens.len().saturating_sub(TAIL);
                if opens_reasoning(&self.server.detokenize(&prompt.tokens[tail..]).await?) {
                    return Ok(None);
                }
                prompt
            }
            PromptContent::Text(text) => self.server.tokenize(json!({ "prompt": text })).await?,
            PromptContent::Tokens(tokens) => Tokenized {
                tokens: tokens.clone(),
                n_ctx: self.server.tokenize(json!({ "prompt": "a" })).await?.n_ctx,
            },
        };
        let room = prompt.n_ctx.map(|n_ctx| n_ctx.saturating_sub(prompt.tokens.len()));
        let asked = match request.endpoint {
            Endpoint::Chat => request.max_tokens,
            Endpoint::Completion => Some(request.max_tokens.unwrap_or(COMPLETION_LIMIT)),
        };
        let limit = match (asked, room) {
            // These servers refuse a limit beyond the context with their own message.
            (Some(asked), Some(room)) if asked > room => None,
            (asked, room) => asked.or(room),
        };
        Ok(limit
            .filter(|limit| *limit > 0 && !prompt.tokens.is_empty())
            .map(|limit| Prompt {
                limit,
                model,
                tokens: prompt.tokens,
            }))
    }

    async fn round(&self, ask: VerifyRequest<'_>) -> Result<Verdict, UpstreamError> {
        let judged = self.ordinary_ones(ask.draft).await?;
        let draft = &ask.draft[..judged];
        let n = if ask.draft.is_empty() { ask.n } else { 1 };
        let Scores { likeliest, generated } = self.server.score(ask.answer, ask.context, draft, n).await?;
        let said = generated.tokens.len() - usize::from(generated.ended).min(generated.tokens.len());
        self.ordinary
            .lock()
            .extend(generated.tokens[..said].iter().map(|token| (*token, true)));
        let accepted = likeliest
            .iter()
            .zip(draft)
            .take_while(|(likeliest, token)| **likeliest == Some(**token))
            .count();
        if accepted == judged {
            return Ok(Verdict {
                judged,
                accepted,
                next: generated.tokens,
                ended: generated.ended,
            });
        }
        let instead = likeliest.get(accepted).copied().flatten();
        let next: Vec<Token> = instead.into_iter().collect();
        let known = self.ordinary_ones(&next).await?;
        Ok(Verdict {
            judged: if instead.is_some() { judged } else { accepted },
            accepted,
            next: next[..known].to_vec(),
            ended: false,
        })
    }

    /// Some detokenisers drop a leading space, so preceding tokens are detokenised too.
    async fn text_of(&self, before: &[Token], tokens: &[Token]) -> Result<String, UpstreamError> {
        let all = [before, tokens].concat();
        let (known, text) = try_join(self.server.detokenize(before), self.server.detokenize(&all)).await?;
        match text.strip_prefix(&known) {
            Some(rest) => Ok(rest.to_owned()),
            None => self.server.detokenize(tokens).await,
        }
    }
}

fn is_ordinary(text: &str) -> bool {
    !text.is_empty() && !text.contains(['<', '>', '[', ']', '|', '｜'])
}

impl<S: ScoringServer> Verifier for Scored<S> {
    fn prompt<'a>(&'a self, request: &'a PromptRequest) -> BoxFuture<'a, Result<Option<Prompt>, UpstreamError>> {
        self.prompt_of(request).boxed()
    }

    fn verify<'a>(&'a self, ask: VerifyRequest<'a>) -> BoxFuture<'a, Result<Verdict, UpstreamError>> {
        self.round(ask).boxed()
    }

    fn text<'a>(&'a self, before: &'a [Token], tokens: &'a [Token]) -> BoxFuture<'a, Result<String, UpstreamError>> {
        self.text_of(before, tokens).boxed()
    }

    fn tokens<'a>(&'a self, text: &'a str) -> BoxFuture<'a, Result<Vec<Token>, UpstreamError>> {
        async move {
            let prompt = json!({ "prompt": text, "add_special_tokens": false });
            Ok(self.server.tokenize(prompt).await?.tokens)
        }
        .boxed()
    }

    fn complete<'a>(&'a self, prompt: &'a [Token], n: usize) -> BoxFuture<'a, Result<String, UpstreamError>> {
        self.server.complete(prompt, n).boxed()
    }
}
