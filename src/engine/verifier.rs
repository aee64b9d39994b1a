//! What a target must be able to do to answer in rounds.

use std::fmt::Debug;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value};

use super::Request;
use crate::speculation::Token;
use crate::upstream::UpstreamError;

/// A server that verifies drafts when it is asked to.
pub trait Target: Debug + Send + Sync {
    /// The request's prompt as this server reads it; `None` when it cannot be known.
    fn prompt<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Result<Option<Prompt>, UpstreamError>>;

    /// One round. When nothing was drafted, at least one token comes back.
    fn verify<'a>(&'a self, ask: Ask<'a>) -> BoxFuture<'a, Result<Verdict, UpstreamError>>;

    /// The text of `tokens` where they follow `before`. It may end with U+FFFD where a character is not complete.
    fn text<'a>(&'a self, before: &'a [Token], tokens: &'a [Token]) -> BoxFuture<'a, Result<String, UpstreamError>>;

    /// The tokens of a text that is no prompt.
    fn tokens<'a>(&'a self, text: &'a str) -> BoxFuture<'a, Result<Vec<Token>, UpstreamError>>;

    /// The server's own answer of at most `n` tokens to a prompt at temperature 0, as its clients get it.
    fn complete<'a>(&'a self, prompt: &'a [Token], n: usize) -> BoxFuture<'a, Result<String, UpstreamError>>;
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

/// What the target is asked in one round.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Names the answer that the round is a part of; unguessable.
    pub answer: &'a str,
    /// The prompt and what is said of the answer.
    pub context: &'a [Token],
    /// What may follow.
    pub draft: &'a [Token],
    /// Most tokens to generate when nothing is drafted.
    pub n: usize,
    /// Further fields of the request, all without effect on a greedy choice but for what they turn off.
    pub sampling: &'a Map<String, Value>,
}

/// What the target found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Tokens of the draft that it looked at, from the first.
    pub judged: usize,
    /// Of these, the ones that it would have chosen, from the first.
    pub accepted: usize,
    /// What it chooses after them; it may not tell when something was drafted.
    pub next: Vec<Token>,
    /// The last of `next` ends the text.
    pub ended: bool,
}
