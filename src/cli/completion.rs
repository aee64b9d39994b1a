//! A streamed chat completion, as a client of any OpenAI-compatible server sees it.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::{Client, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::sse::Data;
use crate::config::Secret;

/// How long a connection may take to come about.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// One message of a conversation.
#[derive(Debug, Clone, Serialize)]
pub struct Message {
    /// `user` or `assistant`.
    pub role: &'static str,
    /// What it says.
    pub content: String,
}

/// A server with `/v1/chat/completions`.
#[derive(Debug, Clone)]
pub struct Server {
    client: Client,
    url: String,
    token: Option<Secret>,
    model: Option<String>,
}

/// What of a request differs from the server's defaults.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sampling {
    /// Most tokens of the answer.
    pub max_tokens: Option<u32>,
    /// Temperature.
    pub temperature: Option<f64>,
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
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// The thoughts before it.
    pub reasoning: String,
    /// Its length as the server counts, else in pieces.
    pub tokens: u64,
    /// From its first piece to its last.
    pub duration: Duration,
}

impl Answer {
    /// Tokens per second from the first token to the last; `None` for an answer too short to tell.
    #[must_use]
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.duration.as_secs_f64();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }
}

/// An HTTP client for servers that this user's own machines run: never through a proxy of the environment, and with a
/// connection per request, because llama-server closes idle ones whenever it likes and a POST must not be sent twice.
pub fn client() -> Result<Client, Failure> {
    Client::builder()
        .no_proxy()
        .pool_max_idle_per_host(0)
        .connect_timeout(CONNECT_PATIENCE)
        .build()
        .map_err(|error| Failure::other("make an HTTP client", error))
}

impl Server {
    /// A server at a base URL without `/v1`.
    pub fn new(url: impl Into<String>, token: Option<Secret>, model: Option<String>) -> Result<Self, Failure> {
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

    /// Asks, calls `on_piece` with every piece as it comes, and returns the whole. Dropping the future cancels.
    pub async fn chat(
        &self,
        messages: &[Message],
        sampling: Sampling,
        mut on_piece: impl FnMut(&Piece) -> std::io::Result<()>,
    ) -> Result<Answer, Failure> {
        let mut body = json!({
            "messages": messages,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if let Some(model) = &self.model {
            body["model"] = json!(model);
        }
        if let Some(max_tokens) = sampling.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        if let Some(temperature) = sampling.temperature {
            body["temperature"] = json!(temperature);
        }
        let mut request = self
            .client
            .post(format!("{}/v1/chat/completions", self.url))
            .json(&body);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        let response = request.send().await.map_err(|error| unreachable(&self.url, &error))?;
        if !response.status().is_success() {
            return Err(refused(&self.url, response).await);
        }
        let mut answer = Progress::default();
        let mut data = Data::default();
        let mut stream = response.bytes_stream();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|error| unreachable(&self.url, &error))?;
            for event in data.push(&bytes) {
                if event == "[DONE]" {
                    return Ok(answer.finish());
                }
                for piece in answer.event(&self.url, &event)? {
                    on_piece(&piece)?;
                }
            }
        }
        Err(Failure::new(
            Exit::Unreachable,
            format!("{} ended the answer before it was complete", self.url),
        ))
    }
}

/// An answer while it comes.
#[derive(Debug, Default)]
struct Progress {
    answer: Answer,
    pieces: u64,
    counted: Option<u64>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Progress {
    fn event(&mut self, url: &str, event: &str) -> Result<Vec<Piece>, Failure> {
        let event: Value = serde_json::from_str(event).map_err(|error| {
            Failure::new(
                Exit::Unreachable,
                format!("{url} sent an event that is no JSON: {error}"),
            )
        })?;
        if let Some(error) = event.get("error") {
            let message = error["message"].as_str().unwrap_or("no reason given");
            return Err(Failure::new(
                Exit::Unreachable,
                format!("{url} broke off the answer: {message}"),
            ));
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            self.counted = Some(tokens);
        }
        let delta = &event["choices"][0]["delta"];
        let mut pieces = Vec::new();
        if let Some(text) = delta["reasoning_content"].as_str().filter(|text| !text.is_empty()) {
            self.answer.reasoning.push_str(text);
            pieces.push(Piece::Reasoning(text.to_owned()));
        }
        if let Some(text) = delta["content"].as_str().filter(|text| !text.is_empty()) {
            self.answer.text.push_str(text);
            pieces.push(Piece::Text(text.to_owned()));
        }
        if !pieces.is_empty() {
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
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
            duration,
            ..self.answer
        }
    }
}

/// The failure to talk to a server.
pub fn unreachable(url: &str, error: &reqwest::Error) -> Failure {
    let why = if error.is_connect() {
        "nothing answers there; start it, or check the URL"
    } else if error.is_timeout() {
        "it took too long to answer"
    } else {
        "the connection broke"
    };
    Failure::new(Exit::Unreachable, format!("cannot talk to {url}: {why}"))
}

/// The failure that a server answered with.
pub async fn refused(url: &str, response: reqwest::Response) -> Failure {
    let status = response.status();
    let text = response.text().await.unwrap_or_default();
    let message = serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|body| {
            body["error"]["message"]
                .as_str()
                .or_else(|| body["error"].as_str())
                .map(str::to_owned)
        })
        .unwrap_or_else(|| text.chars().take(200).collect());
    let hint = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "; check the token or key in the config",
        _ => "",
    };
    Failure::new(
        Exit::Unreachable,
        format!("{url} answers {}: {message}{hint}", status.as_u16()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(events: &[&str]) -> Result<Answer, Failure> {
        let mut progress = Progress::default();
        for event in events {
            progress.event("http://there", event)?;
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
    fn an_error_in_the_stream_is_a_failure_with_its_words() {
        let failure = events(&[r#"{"error":{"message":"the slot is gone","code":500}}"#]).unwrap_err();
        assert!(failure.message.contains("the slot is gone"), "{failure}");
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
}
