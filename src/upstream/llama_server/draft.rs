//! A draft as it comes: a llama-server continues a prompt greedily, and its tokens are read with their probabilities.
//!
//! A [`DraftStream`] has at most as many tokens as were asked for, in order, and ends with [`DraftPiece::End`] or an error.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use serde::Deserialize;

use super::{COMPLETION, LlamaServer};
use crate::speculation::Token;
use crate::upstream::WrittenTokens;
use crate::upstream::connection::{Connection, SHORT, UpstreamError};
use crate::upstream::sse::data;

/// Draft tokens as the draft server generates them.
pub type DraftStream = BoxStream<'static, Result<DraftPiece, UpstreamError>>;

/// A piece of a [`DraftStream`].
#[derive(Debug, Clone, PartialEq)]
pub enum DraftPiece {
    /// The next tokens, each with its probability where the server reports it.
    Tokens(Vec<(Token, Option<f64>)>),
    /// The last piece.
    End {
        /// Why the draft ends.
        why: StreamEnd,
        /// Time for all tokens but the first, where the server reports it.
        took: Option<Duration>,
    },
}

impl DraftPiece {
    /// The end of a draft that the server itself did not end.
    fn cut() -> Self {
        Self::End {
            why: StreamEnd::Length,
            took: None,
        }
    }

    fn is_end_of_text(&self) -> bool {
        matches!(
            self,
            Self::End {
                why: StreamEnd::EndOfText,
                ..
            }
        )
    }
}

/// Why a draft ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    /// All requested tokens came, or the context is full.
    Length,
    /// The draft model ended the text.
    EndOfText,
}

#[derive(Deserialize)]
struct CompletionEvent {
    #[serde(default)]
    tokens: Vec<Token>,
    #[serde(default)]
    stop: bool,
    #[serde(default)]
    stop_type: String,
    /// Tokens generated so far, including those that no event had because they end inside a character.
    #[serde(default)]
    tokens_predicted: usize,
    #[serde(default)]
    completion_probabilities: Vec<TokenProbability>,
    /// In the last event: milliseconds from the first token to the last one.
    #[serde(default, rename = "timings/predicted_ms")]
    predicted_ms: Option<f64>,
}

#[derive(Deserialize)]
struct TokenProbability {
    id: Token,
    /// Natural logarithm; null for minus infinity.
    #[serde(default)]
    logprob: Option<f64>,
}

impl CompletionEvent {
    fn tokens(&self) -> Vec<(Token, Option<f64>)> {
        let mut told = self.completion_probabilities.iter();
        let probability = |token: &Token| {
            let logprob = told.next().filter(|it| it.id == *token)?.logprob?;
            Some(logprob.exp())
        };
        self.tokens
            .iter()
            .copied()
            .zip(self.tokens.iter().map(probability))
            .collect()
    }

    fn end(&self) -> Option<DraftPiece> {
        let why = if self.stop_type == "eos" {
            StreamEnd::EndOfText
        } else {
            StreamEnd::Length
        };
        let took = self
            .predicted_ms
            .and_then(|ms| Duration::try_from_secs_f64(ms / 1e3).ok());
        self.stop.then_some(DraftPiece::End { why, took })
    }
}

impl LlamaServer {
    /// Continues `prefix` greedily by at most `n` tokens in slot `slot`: token by token, or in one piece with `at_once`, which
    /// saves both sides the time of an event per token. `written` keeps the prompt's JSON from one request to the next.
    ///
    /// llama-server leaves tokens out of its stream that end inside a character. Where one is missing, a second request that
    /// is not streamed fetches the rest.
    #[must_use]
    pub fn draft(
        &self,
        prefix: Vec<Token>,
        written: &mut WrittenTokens,
        n: usize,
        slot: usize,
        at_once: bool,
    ) -> DraftStream {
        let server = self.clone();
        let request = self.completion(written.write(&prefix), n, slot, !at_once);
        if at_once {
            let pieces = async move { server.draft_at_once(request, n).await };
            return futures_util::stream::once(pieces)
                .map_ok(|pieces| futures_util::stream::iter(pieces.map(Ok)))
                .try_flatten()
                .boxed();
        }
        let start = async move {
            let events = match server.connection.send(COMPLETION, request).await {
                Ok(response) => events(&server.connection, response),
                Err(error) => futures_util::stream::iter([Err(error)]).boxed(),
            };
            RunningDraft {
                server,
                prefix,
                n,
                slot,
                events: Some(events),
                received: 0,
                pending: VecDeque::new(),
            }
        };
        futures_util::stream::once(start)
            .flat_map(|draft| futures_util::stream::unfold(draft, RunningDraft::next))
            .boxed()
    }

    /// Sends a request for at most `n` tokens that is not streamed.
    async fn draft_at_once(
        &self,
        request: reqwest::RequestBuilder,
        n: usize,
    ) -> Result<[DraftPiece; 2], UpstreamError> {
        let response = self.connection.send(COMPLETION, request).await?;
        let event: CompletionEvent = self.connection.read(COMPLETION, response, SHORT).await?;
        let mut tokens = event.tokens();
        tokens.truncate(n);
        Ok([DraftPiece::Tokens(tokens), event.end().unwrap_or(DraftPiece::cut())])
    }

    /// A request to continue `prompt`: token ids with commas between.
    fn completion(&self, prompt: &str, n: usize, slot: usize, stream: bool) -> reqwest::RequestBuilder {
        let wanted = serde_json::json!({
            "n_predict": n, "id_slot": slot, "stream": stream, "cache_prompt": true, "return_tokens": true,
            "samplers": ["top_k"], "top_k": 1, "n_probs": 1,
            "response_fields": [
                "tokens", "stop", "stop_type", "tokens_predicted", "completion_probabilities", "timings/predicted_ms",
            ],
        });
        let wanted = wanted.to_string();
        let body = format!("{{\"prompt\":[{prompt}],{}", &wanted[1..]);
        self.connection.request_written(COMPLETION, body)
    }
}

type Events = BoxStream<'static, Result<CompletionEvent, UpstreamError>>;

/// State of a [`LlamaServer::draft`].
struct RunningDraft {
    server: LlamaServer,
    prefix: Vec<Token>,
    n: usize,
    slot: usize,
    /// The running request; `None` after the last piece.
    events: Option<Events>,
    received: usize,
    pending: VecDeque<DraftPiece>,
}

impl RunningDraft {
    async fn next(mut self) -> Option<(Result<DraftPiece, UpstreamError>, Self)> {
        loop {
            if let Some(piece) = self.pending.pop_front() {
                return Some((Ok(piece), self));
            }
            let event = match self.events.as_mut()?.next().await {
                Some(Ok(event)) => event,
                Some(Err(error)) => {
                    self.events = None;
                    return Some((Err(error), self));
                }
                None => {
                    self.events = None;
                    let broke_off = self.server.connection.broke_off(COMPLETION);
                    return Some((Err(broke_off), self));
                }
            };
            let missing = event.tokens_predicted > self.received + event.tokens.len();
            if let Some(end) = event.end().filter(|end| !missing || end.is_end_of_text()) {
                if let Some(rest) = self.events.take() {
                    Connection::read_out(rest);
                }
                self.pending.push_back(end);
            } else if missing {
                self.events = None;
                let n = self.n.saturating_sub(self.received).max(1);
                let prefix = WrittenTokens::default().write(&self.prefix).to_owned();
                let request = self.server.completion(&prefix, n, self.slot, false);
                match self.server.draft_at_once(request, n).await {
                    Ok(pieces) => self.pending.extend(pieces),
                    Err(error) => return Some((Err(error), self)),
                }
            } else if !event.tokens.is_empty() {
                let room = self.n.saturating_sub(self.received);
                let mut tokens = event.tokens();
                tokens.truncate(room);
                self.received += tokens.len();
                self.prefix.extend(tokens.iter().map(|(token, _)| token));
                self.pending.push_back(DraftPiece::Tokens(tokens));
                if event.tokens.len() > room {
                    // Stop reading a server that sends more than it was asked for.
                    self.events = None;
                    self.pending.push_back(DraftPiece::cut());
                }
            }
        }
    }
}

/// The events of a streamed completion.
fn events(connection: &Connection, response: reqwest::Response) -> Events {
    let lines = connection.lines(COMPLETION, response);
    let connection = connection.clone();
    lines
        .filter_map(move |line| {
            let event = line
                .map(|line| {
                    let event = serde_json::from_slice(data(&line)?);
                    Some(event.map_err(|error| connection.malformed(COMPLETION, &error.to_string())))
                })
                .transpose();
            std::future::ready(event.map(Result::flatten))
        })
        .boxed()
}
