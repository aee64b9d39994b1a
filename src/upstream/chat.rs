//! A streamed chat completion, as a client of any OpenAI-compatible server sees it, with its times.
//!
//! A request is never sent twice, because each one makes the server generate. `bench`, `verify` and `chat` use this module.

use std::borrow::Cow;
use std::io;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::connection::error_message;
use super::sse::data;
use crate::config::Secret;
use crate::failure;
use crate::http::client::{self, ReadError};

/// Timeout for connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of an answer in one piece, of an event, and of an error.
const LONGEST: (usize, usize, usize) = (16 << 20, 4 << 20, 64 << 10);
/// Timeout for the end of a stream whose answer is complete.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no answer, or only a part of one.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The system cannot set up a client.
    #[error("cannot make an HTTP client: {0}")]
    NoClient(#[source] reqwest::Error),
    /// No connection, or it broke.
    #[error("cannot talk to {url}: {why}")]
    Unreachable {
        /// The server.
        url: String,
        /// The cause and the remedy.
        why: String,
    },
    /// An answer with an error status.
    #[error("{url} answers {}: {message}{}", .status.as_u16(), hint(*.status))]
    Refused {
        /// The server.
        url: String,
        /// The HTTP status.
        status: StatusCode,
        /// The server's message.
        message: String,
    },
    /// An error in the stream, or its early end.
    #[error("{url} broke off the answer: {message}")]
    BrokenOff {
        /// The server.
        url: String,
        /// Why, in the server's words if it had any.
        message: String,
    },
    /// An event that is not JSON.
    #[error("{url} sent an event that is no JSON: {cause}")]
    Malformed {
        /// The server.
        url: String,
        /// The error of the JSON parser.
        cause: serde_json::Error,
    },
    /// The receiver of the pieces failed.
    #[error(transparent)]
    Reader(#[from] io::Error),
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `user`, `assistant`, `system`.
    pub role: Cow<'static, str>,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self {
            role: "user".into(),
            content: content.into(),
        }
    }

    /// A message of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self {
            role: "assistant".into(),
            content: content.into(),
        }
    }
}

/// A server with `/v1/chat/completions`.
#[derive(Debug, Clone)]
pub struct ChatServer {
    client: Client,
    url: String,
    token: Option<Secret>,
    model: Option<String>,
}

/// Options of a request; `None` leaves the server's default.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Wishes {
    /// Most tokens of the answer.
    pub max_tokens: Option<u32>,
    /// Temperature.
    pub temperature: Option<f64>,
    /// Seed of the sampler.
    pub seed: Option<u64>,
    /// Read the whole prompt, whatever the server remembers of it (a field of llama-server's).
    pub forget_prompt: bool,
    /// Ask for the ids of the answer's tokens, which llama-server sends with the log-probabilities.
    pub token_ids: bool,
}

/// A piece of a streamed answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Of the answer.
    Text(String),
    /// Of the thoughts before it.
    Reasoning(String),
}

/// A finished answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// The thoughts before it.
    pub reasoning: String,
    /// Its length as the server counts, else in pieces.
    pub tokens: u64,
    /// From the sending of the request to the first piece; `None` for an answer without any.
    pub first_token: Option<Duration>,
    /// From the first piece to the event that ends the answer.
    pub duration: Duration,
    /// Counts of its drafting; `None` where the server reports none.
    pub drafting: Option<Drafting>,
    /// The ids of its tokens, if they were asked for and the server reports them.
    pub token_ids: Vec<i64>,
}

/// The drafting of one answer, as llama-server's `timings` tell it, or the counts of a proxy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drafting {
    /// Tokens that the target generated.
    pub generated: u64,
    /// Draft tokens that it verified.
    pub drafted: u64,
    /// Draft tokens that it kept.
    pub accepted: u64,
}

impl Answer {
    /// Tokens per second from the first token to the last; `None` for an answer too short to tell.
    #[must_use]
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.duration.as_secs_f64();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }
}

/// An HTTP client that opens a connection per request: llama-server may close an idle one at any time, and a POST must not
/// be sent twice.
pub fn client() -> Result<Client, ChatError> {
    client::builder()
        .pool_max_idle_per_host(0)
        .connect_timeout(CONNECT_TIMEOUT)
        .build()
        .map_err(ChatError::NoClient)
}

impl ChatServer {
    /// A server at a base URL without `/v1`.
    pub fn new(url: impl Into<String>, token: Option<Secret>, model: Option<String>) -> Result<Self, ChatError> {
        Ok(Self {
            client: client()?,
            url: url.into(),
            token,
            model,
        })
    }

    /// Its base URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its answer to a GET, as text.
    pub async fn get(&self, path: &str, patience: Duration) -> Result<String, ChatError> {
        let request = self.client.get(format!("{}{path}", self.url)).timeout(patience);
        let response = self.send(request).await?;
        let text = client::bytes(response, LONGEST.0).await;
        let text = text.map_err(|error| unread(&self.url, error))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Asks, calls `on_piece` with every piece as it comes, and returns the whole. `prediction` is a text that much of the
    /// answer may repeat (OpenAI's predicted outputs). Dropping the future cancels.
    pub async fn chat(
        &self,
        messages: &[Message],
        prediction: Option<&str>,
        wishes: Wishes,
        mut on_piece: impl FnMut(&Piece) -> io::Result<()>,
    ) -> Result<Answer, ChatError> {
        let body = self.body(messages, prediction, wishes);
        let request = self
            .client
            .post(format!("{}/v1/chat/completions", self.url))
            .json(&body);
        let mut answer = Progress::begin();
        let response = self.send(request).await?;
        let mut lines = Box::pin(client::lines(response, LONGEST.1));
        while let Some(line) = lines.next().await {
            let line = line.map_err(|error| unread(&self.url, error))?;
            let Some(event) = data(&line) else { continue };
            if event == b"[DONE]" {
                // To the server, a client that leaves before the end of the stream has cancelled.
                let end = async { while let Some(Ok(_)) = lines.next().await {} };
                let _ = tokio::time::timeout(END_TIMEOUT, end).await;
                return Ok(answer.finish());
            }
            for piece in answer.event(&self.url, event)? {
                on_piece(&piece)?;
            }
        }
        Err(ChatError::BrokenOff {
            url: self.url.clone(),
            message: "it was not complete".into(),
        })
    }

    fn body(&self, messages: &[Message], prediction: Option<&str>, wishes: Wishes) -> Value {
        let mut body = json!({
            "messages": messages,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if let Some(model) = &self.model {
            body["model"] = json!(model);
        }
        if let Some(prediction) = prediction {
            body["prediction"] = json!({ "type": "content", "content": prediction });
        }
        if let Some(max_tokens) = wishes.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        if let Some(temperature) = wishes.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(seed) = wishes.seed {
            body["seed"] = json!(seed);
        }
        if wishes.forget_prompt {
            body["cache_prompt"] = json!(false);
        }
        if wishes.token_ids {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(1);
        }
        body
    }

    async fn send(&self, mut request: RequestBuilder) -> Result<Response, ChatError> {
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        let response = request.send().await.map_err(|error| unreachable(&self.url, &error))?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(refused(&self.url, response).await)
        }
    }
}

/// An answer while it comes.
#[derive(Debug)]
struct Progress {
    answer: Answer,
    pieces: u64,
    counted: Option<u64>,
    sent: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Progress {
    fn begin() -> Self {
        Self {
            answer: Answer::default(),
            pieces: 0,
            counted: None,
            sent: Instant::now(),
            first: None,
            last: None,
        }
    }

    fn event(&mut self, url: &str, event: &[u8]) -> Result<Vec<Piece>, ChatError> {
        let event: Value = serde_json::from_slice(event).map_err(|cause| ChatError::Malformed {
            url: url.to_owned(),
            cause,
        })?;
        if let Some(error) = event.get("error") {
            return Err(ChatError::BrokenOff {
                url: url.to_owned(),
                message: error["message"].as_str().unwrap_or("no reason given").to_owned(),
            });
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            self.counted = Some(tokens);
        }
        if let Some(generated) = event["timings"]["predicted_n"].as_u64() {
            // A server that has not drafted leaves both counts out.
            let count = |name: &str| event["timings"][name].as_u64().unwrap_or_default();
            self.answer.drafting = Some(Drafting {
                generated,
                drafted: count("draft_n"),
                accepted: count("draft_n_accepted"),
            });
        }
        let choice = &event["choices"][0];
        if let Some(tokens) = choice["logprobs"]["content"].as_array() {
            let ids = tokens.iter().filter_map(|token| token["id"].as_i64());
            self.answer.token_ids.extend(ids);
        }
        let delta = &choice["delta"];
        let mut pieces = Vec::new();
        // `reasoning_content` is llama.cpp's name for it, `reasoning` Ollama's and vLLM's.
        let reasoning = delta["reasoning_content"].as_str().or(delta["reasoning"].as_str());
        if let Some(text) = reasoning.filter(|text| !text.is_empty()) {
            self.answer.reasoning.push_str(text);
            pieces.push(Piece::Reasoning(text.to_owned()));
        }
        if let Some(text) = delta["content"].as_str().filter(|text| !text.is_empty()) {
            self.answer.text.push_str(text);
            pieces.push(Piece::Text(text.to_owned()));
        }
        // The last token often is one without a text: the end of the answer.
        if !pieces.is_empty() || choice["finish_reason"].is_string() {
            self.last = Some(Instant::now());
        }
        if !pieces.is_empty() {
            self.first = self.first.or(self.last);
            self.pieces += 1;
        }
        Ok(pieces)
    }

    fn finish(self) -> Answer {
        let duration = match (self.first, self.last) {
            (Some(first), Some(last)) => last - first,
            _ => Duration::ZERO,
        };
        Answer {
            tokens: self.counted.unwrap_or(self.pieces),
            first_token: self.first.map(|first| first - self.sent),
            duration,
            ..self.answer
        }
    }
}

/// The failure to talk to a server.
#[must_use]
pub fn unreachable(url: &str, error: &reqwest::Error) -> ChatError {
    let mut why = failure::explain(error);
    if error.is_connect() {
        why.push_str("; start it, or check the URL");
    }
    ChatError::Unreachable {
        url: url.to_owned(),
        why,
    }
}

/// The failure to read what a server answers.
#[must_use]
pub fn unread(url: &str, error: ReadError) -> ChatError {
    match error {
        ReadError::Broken(error) => unreachable(url, &error),
        error => ChatError::BrokenOff {
            url: url.to_owned(),
            message: error.to_string(),
        },
    }
}

/// The failure that a server answered with.
pub async fn refused(url: &str, response: Response) -> ChatError {
    let status = response.status();
    let text = client::beginning(response, LONGEST.2).await;
    let message = serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|body| error_message(body.get("error")?))
        .unwrap_or_else(|| {
            if text.trim_start().starts_with('<') {
                "a web page; is this the right server?".to_owned()
            } else {
                text.chars().take(200).collect()
            }
        });
    ChatError::Refused {
        url: url.to_owned(),
        status,
        message,
    }
}

fn hint(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "; check the token or key in the config",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(events: &[&str]) -> Result<Answer, ChatError> {
        let mut progress = Progress::begin();
        for event in events {
            progress.event("http://there", event.as_bytes())?;
        }
        Ok(progress.finish())
    }

    #[test]
    fn the_pieces_make_the_text_and_the_usage_its_length() {
        let answer = events(&[
            r#"{"choices":[{"delta":{"role":"assistant","content":null}}]}"#,
            r#"{"choices":[{"delta":{"reasoning_content":"hm"}}]}"#,
            r#"{"choices":[{"delta":{"content":"a"}}]}"#,
            r#"{"choices":[{"delta":{"content":"b"}}]}"#,
            r#"{"choices":[],"usage":{"completion_tokens":7}}"#,
        ])
        .unwrap();
        assert_eq!(
            (answer.text.as_str(), answer.reasoning.as_str(), answer.tokens),
            ("ab", "hm", 7)
        );
    }

    #[test]
    fn thoughts_are_thoughts_by_either_name_and_start_the_clock() {
        for name in ["reasoning_content", "reasoning"] {
            let thought = format!(r#"{{"choices":[{{"delta":{{"content":"","{name}":"hm"}}}}]}}"#);
            let answer = events(&[&thought, r#"{"choices":[{"delta":{"content":"a"}}]}"#]).unwrap();
            assert_eq!((answer.text.as_str(), answer.reasoning.as_str()), ("a", "hm"));
            assert_eq!(answer.tokens, 2);
        }
    }

    #[test]
    fn an_error_in_the_stream_is_a_failure_with_its_words() {
        let failure = events(&[r#"{"error":{"message":"the slot is gone","code":500}}"#]).unwrap_err();
        assert!(failure.to_string().contains("the slot is gone"), "{failure}");
    }

    #[test]
    fn one_token_has_no_speed() {
        let answer = Answer {
            tokens: 1,
            duration: Duration::from_secs(1),
            ..Answer::default()
        };
        assert_eq!(answer.tokens_per_second(), None);
        let answer = Answer { tokens: 11, ..answer };
        assert_eq!(answer.tokens_per_second(), Some(10.0));
    }

    #[test]
    fn the_timings_tell_of_drafting_and_without_them_nothing_is_told() {
        let silent = events(&[r#"{"choices":[{"delta":{"content":"a"}}]}"#]).unwrap();
        assert_eq!(silent.drafting, None);
        let plain = events(&[r#"{"choices":[],"timings":{"predicted_n":9}}"#]).unwrap();
        assert_eq!(plain.drafting.map(|drafting| drafting.drafted), Some(0));
        let drafted =
            events(&[r#"{"choices":[],"timings":{"predicted_n":9,"draft_n":8,"draft_n_accepted":6}}"#]).unwrap();
        assert_eq!(
            drafted.drafting,
            Some(Drafting {
                generated: 9,
                drafted: 8,
                accepted: 6
            })
        );
    }

    #[test]
    fn the_clock_runs_from_the_first_piece_to_the_event_that_ends_the_answer() {
        let mut progress = Progress::begin();
        let pause = || std::thread::sleep(Duration::from_millis(5));
        pause();
        progress
            .event("u", br#"{"choices":[{"delta":{"content":"a"}}]}"#)
            .unwrap();
        pause();
        progress
            .event("u", br#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#)
            .unwrap();
        pause();
        progress
            .event("u", br#"{"choices":[],"usage":{"completion_tokens":2}}"#)
            .unwrap();
        let (sent, last) = (progress.sent, progress.last.unwrap());
        let answer = progress.finish();
        assert_eq!(answer.first_token.unwrap() + answer.duration, last - sent);
        assert!(answer.duration >= Duration::from_millis(5));
    }
}
