//! Verifies drafts with a stock llama-server that has several slots. A draft of `k` tokens becomes `k + 1` prompts, one for
//! each length of the draft, each followed by one generated token. The server reads them in one pass and generates with the
//! request's own sampler. This costs memory for `k + 1` contexts.

use futures_util::future::{BoxFuture, FutureExt};
use serde_json::Map;

use crate::engine::{Prompt, PromptContent, PromptRequest, Verdict, Verifier, VerifyRequest};
use crate::speculation::Token;
use crate::upstream::{LlamaServer, UpstreamError};

/// A llama-server without our patch.
#[derive(Debug)]
pub struct FanOut {
    server: LlamaServer,
}

impl FanOut {
    /// A verifier that uses this server.
    #[must_use]
    pub fn new(server: LlamaServer) -> Self {
        Self { server }
    }

    async fn prompt_of(&self, request: &PromptRequest) -> Result<Option<Prompt>, UpstreamError> {
        let props = self.server.props().await?;
        let tokens = match &request.content {
            PromptContent::Messages(messages) => {
                let prompt = self.server.apply_template(messages).await?;
                if super::request::opens_reasoning(&prompt) {
                    return Ok(None);
                }
                self.server.tokenize_prompt(&prompt).await?
            }
            PromptContent::Text(text) => self.server.tokenize_prompt(text).await?,
            PromptContent::Tokens(tokens) => tokens.clone(),
        };
        let room = props.default_generation_settings.n_ctx.saturating_sub(tokens.len());
        Ok((room > 0 && !tokens.is_empty()).then(|| Prompt {
            limit: request.max_tokens.map_or(room, |most| most.min(room)),
            model: props.model_alias.or_else(|| request.model.clone()).unwrap_or_default(),
            tokens,
        }))
    }

    async fn round(&self, ask: VerifyRequest<'_>) -> Result<Verdict, UpstreamError> {
        let VerifyRequest {
            context,
            draft,
            n,
            sampling,
            ..
        } = ask;
        let longest = [context, draft].concat();
        let prompts: Vec<&[Token]> = (0..=draft.len()).map(|k| &longest[..context.len() + k]).collect();
        let n = if draft.is_empty() { n } else { 1 };
        let generated = self.server.generate(&prompts, n, sampling).await?;
        let agrees = |(one, token): (&crate::upstream::Generated, &Token)| !one.ended && one.tokens == [*token];
        let accepted = generated.iter().zip(draft).take_while(|pair| agrees(*pair)).count();
        let next = generated.into_iter().nth(accepted).unwrap_or_default();
        Ok(Verdict {
            judged: draft.len(),
            accepted,
            next: next.tokens,
            ended: next.ended,
        })
    }
}

impl Verifier for FanOut {
    fn prompt<'a>(&'a self, request: &'a PromptRequest) -> BoxFuture<'a, Result<Option<Prompt>, UpstreamError>> {
        self.prompt_of(request).boxed()
    }

    fn verify<'a>(&'a self, ask: VerifyRequest<'a>) -> BoxFuture<'a, Result<Verdict, UpstreamError>> {
        self.round(ask).boxed()
    }

    fn text<'a>(&'a self, _before: &'a [Token], tokens: &'a [Token]) -> BoxFuture<'a, Result<String, UpstreamError>> {
        // llama-server joins the text of the tokens, whatever precedes them.
        self.server.detokenize(tokens).boxed()
    }

    fn tokens<'a>(&'a self, text: &'a str) -> BoxFuture<'a, Result<Vec<Token>, UpstreamError>> {
        self.server.tokenize(text).boxed()
    }

    fn complete<'a>(&'a self, prompt: &'a [Token], n: usize) -> BoxFuture<'a, Result<String, UpstreamError>> {
        async move {
            let greedy = Map::from_iter([("temperature".to_owned(), 0.into())]);
            let generated = self.server.generate(&[prompt], n, &greedy).await?;
            let tokens = generated.into_iter().next().unwrap_or_default();
            let said = tokens.tokens.len() - usize::from(tokens.ended);
            self.server.detokenize(&tokens.tokens[..said]).await
        }
        .boxed()
    }
}
