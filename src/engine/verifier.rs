//! A server that verifies a draft when it is asked to, as the engine sees it. [`crate::rounds`] implements it.

use std::fmt::Debug;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value};

use crate::speculation::Token;
use crate::upstream::UpstreamError;

/// A server that verifies drafts when it is asked to.
pub trait Verifier: Debug + Send + Sync {
    /// The request's prompt as this server reads it; `None` when it cannot be known.
    fn prompt<'a>(&'a self, request: &'a PromptRequest) -> BoxFuture<'a, Result<Option<Prompt>, UpstreamError>>;

    /// Verifies a draft in one step, or generates. Without a draft at least one token comes back.
    fn verify<'a>(&'a self, request: VerifyRequest<'a>) -> BoxFuture<'a, Result<Verdict, UpstreamError>>;

    /// The text of `tokens` where they follow `before`. It may end with U+FFFD where a character is not complete.
    fn text<'a>(&'a self, before: &'a [Token], tokens: &'a [Token]) -> BoxFuture<'a, Result<String, UpstreamError>>;

    /// The tokens of a text that is no prompt.
    fn tokens<'a>(&'a self, text: &'a str) -> BoxFuture<'a, Result<Vec<Token>, UpstreamError>>;

    /// The server's own answer of at most `n` tokens to a prompt at temperature 0, as its clients get it.
    fn complete<'a>(&'a self, prompt: &'a [Token], n: usize) -> BoxFuture<'a, Result<String, UpstreamError>>;
}

/// An endpoint whose answers can be made in steps that the proxy drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

/// The source of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum PromptContent {
    /// `messages`, as they came.
    Messages(Value),
    /// `prompt`
    Text(String),
    /// `prompt` as token ids.
    Tokens(Vec<Token>),
}

/// The parts of a request that decide its prompt and its length.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRequest {
    /// The endpoint that received the request.
    pub endpoint: Endpoint,
    /// The source of its prompt.
    pub content: PromptContent,
    /// `model`.
    pub model: Option<String>,
    /// Most tokens of the answer; `None` when the request does not say.
    pub max_tokens: Option<usize>,
}

/// A request's prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Most tokens of the answer.
    pub limit: usize,
    /// The model's name in the answer.
    pub model: String,
}

/// One verification step.
#[derive(Debug, Clone, Copy)]
pub struct VerifyRequest<'a> {
    /// Names the answer that the step is a part of; unguessable.
    pub answer: &'a str,
    /// The prompt and the answer so far.
    pub context: &'a [Token],
    /// The draft that may follow.
    pub draft: &'a [Token],
    /// Most tokens to generate when there is no draft.
    pub n: usize,
    /// Further fields of the request, all without effect on a greedy choice but for what they turn off.
    pub sampling: &'a Map<String, Value>,
}

/// The result of a verification step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Draft tokens that the server compared, from the first.
    pub judged: usize,
    /// Of these, the ones that it would have chosen, from the first.
    pub accepted: usize,
    /// The tokens that it chooses after them; a server need not tell them when there was a draft.
    pub next: Vec<Token>,
    /// Whether the last of `next` ends the text.
    pub ended: bool,
}

/// Limits and drafters for the next step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VerifyContext {
    /// Most draft tokens that the target can verify at once.
    pub n_max: usize,
    /// The drafters that can be asked, the best first.
    pub drafters: Vec<usize>,
}
