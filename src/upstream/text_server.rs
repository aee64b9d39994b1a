//! Drafts as text: Ollama, any server with OpenAI's completion API, and llama-server continue a text greedily.
//!
//! Wire formats: llama-server, `tools/server/README.md` of build b11434, `POST /completion`; Ollama, `docs/api.md` and
//! `server/routes.go` (`GenerateHandler`), `POST /api/generate` with `raw`: one JSON object per line; OpenAI's API
//! reference, "Completions (legacy)", and vLLM's `vllm/entrypoints/openai`: `POST /v1/completions`, server-sent events.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::StreamEnd;
use super::connection::{Connection, SHORT, UpstreamError, error_message};
use super::sse;
use crate::config::{Backend, Secret};

/// Timeout for Ollama to load a model. Ollama stops loading when the client that asked for it leaves.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);
/// Time for which Ollama keeps the model after each request; its own default is 5 minutes.
const KEEP_ALIVE: &str = "15m";

/// Most bytes of a token's text; the longest known are runs of some hundred blanks.
const LONGEST_TOKEN: usize = 1024;

/// Text as the server generates it.
pub type TextStream = BoxStream<'static, Result<TextPiece, UpstreamError>>;

/// A piece of a [`TextStream`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextPiece {
    /// The next characters.
    Text(String),
    /// The last piece.
    End(StreamEnd),
}

/// A server that continues texts.
#[derive(Debug, Clone)]
pub struct TextServer {
    connection: Connection,
    backend: Backend,
    /// The configured model.
    configured: Option<String>,
    /// The server's only model at the last check, where none is configured.
    only: Arc<Mutex<Option<String>>>,
}

impl TextServer {
    /// A client of the server at `base` (without a path). Without `model`, the server's only one is used. Fails only if the
    /// system cannot set up TLS.
    pub fn new(
        base: &str,
        key: Option<Secret>,
        backend: Backend,
        model: Option<String>,
    ) -> Result<Self, reqwest::Error> {
        Ok(Self {
            connection: Connection::new(base, key)?,
            backend,
            configured: model,
            only: Arc::default(),
        })
    }

    /// Whether it can continue texts now. Makes Ollama load the model, which may take a while.
    pub async fn ready(&self) -> Result<(), UpstreamError> {
        // The server may have another model by now.
        *self.only.lock() = None;
        let model = self.model().await?;
        if self.backend == Backend::Ollama {
            // A request without a prompt loads the model.
            let body = json!({ "model": model, "stream": false, "keep_alive": KEEP_ALIVE });
            let _loaded: Value = self
                .connection
                .post("/api/generate", &body, Some(LOAD_TIMEOUT), SHORT)
                .await?;
        }
        Ok(())
    }

    /// Continues `prompt` greedily by at most `n` of the server's tokens. llama-server keeps the prompt in `slot`.
    #[must_use]
    pub fn complete(&self, prompt: String, n: usize, slot: usize) -> TextStream {
        let server = self.clone();
        let start = async move {
            match server.begin(&prompt, n, slot).await {
                Ok(stream) => stream,
                Err(error) => stream::iter([Err(error)]).boxed(),
            }
        };
        stream::once(start).flatten().boxed()
    }

    async fn begin(&self, prompt: &str, n: usize, slot: usize) -> Result<TextStream, UpstreamError> {
        let (path, body) = match self.backend {
            Backend::Llamacpp => {
                let fields = ["content", "stop", "stop_type"];
                let body = json!({
                    "prompt": prompt, "n_predict": n, "id_slot": slot, "stream": true, "cache_prompt": true,
                    "samplers": ["top_k"], "top_k": 1, "response_fields": fields,
                });
                ("/completion", body)
            }
            Backend::Ollama => {
                // Refuse a text that is too long: cutting its beginning would make Ollama read all of it again. Penalties
                // would change the model's choice. A draft continues the text, without separate thoughts.
                let options = json!({
                    "num_predict": n, "temperature": 0, "repeat_penalty": 1, "presence_penalty": 0,
                    "frequency_penalty": 0,
                });
                let body = json!({
                    "model": self.model().await?, "prompt": prompt, "raw": true, "stream": true, "think": false,
                    "truncate": false, "shift": false, "keep_alive": KEEP_ALIVE, "options": options,
                });
                ("/api/generate", body)
            }
            Backend::Openai | Backend::Vllm | Backend::Sglang => {
                let body = json!({
                    "model": self.model().await?, "prompt": prompt, "max_tokens": n, "temperature": 0, "stream": true,
                });
                ("/v1/completions", body)
            }
        };
        let request = self.connection.request(path, &body);
        let response = self.connection.send(path, request).await?;
        let (backend, url) = (self.backend, self.connection.url(path));
        let broke_off = self.connection.broke_off(path);
        let pieces = self.connection.lines(path, response).flat_map(move |line| {
            let pieces = line.and_then(|line| read(backend, &url, &line));
            let pieces = pieces.map_or_else(|error| vec![Err(error)], |told| told.into_iter().map(Ok).collect());
            stream::iter(pieces)
        });
        let room = n.saturating_mul(LONGEST_TOKEN);
        let until_the_end = stream::unfold(Some((pieces, broke_off, room)), |answer| async move {
            let (mut pieces, broke_off, room) = answer?;
            match pieces.next().await {
                // Stop reading a server that sends more than it was asked for.
                Some(Ok(TextPiece::Text(text))) if text.len() > room => {
                    Some((Ok(TextPiece::End(StreamEnd::Length)), None))
                }
                Some(Ok(TextPiece::Text(text))) => {
                    let room = room - text.len();
                    Some((Ok(TextPiece::Text(text)), Some((pieces, broke_off, room))))
                }
                Some(Ok(end)) => {
                    Connection::read_out(pieces);
                    Some((Ok(end), None))
                }
                Some(Err(error)) => Some((Err(error), None)),
                None => Some((Err(broke_off), None)),
            }
        });
        Ok(until_the_end.boxed())
    }

    async fn model(&self) -> Result<String, UpstreamError> {
        if let Some(model) = self.configured.clone().or_else(|| self.only.lock().clone()) {
            return Ok(model);
        }
        let models = self.connection.own_models().await?;
        let [model] = <[String; 1]>::try_from(models).map_err(|models| UpstreamError::WhichModel {
            url: self.connection.url("/v1/models"),
            count: models.len(),
        })?;
        *self.only.lock() = Some(model.clone());
        Ok(model)
    }
}

/// The pieces in one line of an answer.
fn read(backend: Backend, url: &str, line: &[u8]) -> Result<Vec<TextPiece>, UpstreamError> {
    let data = if backend == Backend::Ollama {
        Some(line)
    } else {
        sse::data(line)
    };
    let Some(data) = data.map(<[u8]>::trim_ascii).filter(|data| !data.is_empty()) else {
        return Ok(Vec::new());
    };
    // OpenAI's last event.
    if data == b"[DONE]" {
        return Ok(vec![TextPiece::End(StreamEnd::Length)]);
    }
    let malformed = |cause: String| UpstreamError::Malformed {
        url: url.to_owned(),
        cause,
    };
    let event: Value = serde_json::from_slice(data).map_err(|error| malformed(error.to_string()))?;
    if let Some(message) = event.get("error").and_then(error_message) {
        return Err(UpstreamError::Refused {
            url: url.to_owned(),
            status: 500,
            message,
        });
    }
    let (text, end) = match backend {
        Backend::Llamacpp => (&event["content"], end_of(&event["stop_type"], "eos")),
        Backend::Ollama => (&event["response"], end_of(&event["done_reason"], "stop")),
        Backend::Openai | Backend::Vllm | Backend::Sglang => {
            let choice = &event["choices"][0];
            (&choice["text"], end_of(&choice["finish_reason"], "stop"))
        }
    };
    // Ollama before 0.1.35 sends `done` without a reason.
    let end = end.or_else(|| (event["done"] == true).then_some(StreamEnd::Length));
    let text = text.as_str().unwrap_or_default();
    let text = (!text.is_empty()).then(|| TextPiece::Text(text.to_owned()));
    Ok(text.into_iter().chain(end.map(TextPiece::End)).collect())
}

/// Why the text ends, where a reason is given; `of_text` is the server's word for the end of the text itself.
fn end_of(reason: &Value, of_text: &str) -> Option<StreamEnd> {
    let reason = reason.as_str().filter(|reason| !matches!(*reason, "" | "none"))?;
    Some(if reason == of_text {
        StreamEnd::EndOfText
    } else {
        StreamEnd::Length
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that a body tells, up to the first mistake.
    fn told(backend: Backend, body: &str) -> Result<Vec<TextPiece>, UpstreamError> {
        let lines: Result<Vec<_>, _> = body
            .lines()
            .map(|line| read(backend, "http://there", line.as_bytes()))
            .collect();
        Ok(lines?.concat())
    }

    fn text(text: &str) -> TextPiece {
        TextPiece::Text(text.to_owned())
    }

    #[test]
    fn ollama_streams_objects() {
        let body = concat!(
            r#"{"model":"m","created_at":"2026-01-01T00:00:00Z","response":" a","done":false}"#,
            "\n",
            r#"{"model":"m","created_at":"2026-01-01T00:00:00Z","response":"é","done":false}"#,
            "\n",
            r#"{"model":"m","response":"","done":true,"done_reason":"stop","eval_count":2}"#,
            "\n",
        );
        let expected = [text(" a"), text("é"), TextPiece::End(StreamEnd::EndOfText)];
        assert_eq!(told(Backend::Ollama, body).unwrap(), expected);
        let cut = r#"{"response":"","done":true,"done_reason":"length"}"#;
        assert_eq!(told(Backend::Ollama, cut).unwrap(), [TextPiece::End(StreamEnd::Length)]);
        let old = r#"{"response":"","done":true}"#;
        assert_eq!(told(Backend::Ollama, old).unwrap(), [TextPiece::End(StreamEnd::Length)]);
    }

    #[test]
    fn an_error_in_ollamas_stream_is_told_in_its_words() {
        let error = told(Backend::Ollama, r#"{"error":"out of memory","status":500}"#).unwrap_err();
        assert!(error.to_string().contains("out of memory"), "{error}");
        assert!(told(Backend::Ollama, r#"{"response": "#).is_err());
    }

    #[test]
    fn openai_streams_events_with_a_last_one() {
        let body = concat!(
            ": a comment\n\n",
            "data: {\"choices\":[{\"text\":\" a\",\"index\":0,\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"text\":\"b\",\"index\":0,\"finish_reason\":\"length\"}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n",
            "data: [DONE]\n\n",
        );
        let end = TextPiece::End(StreamEnd::Length);
        for backend in [Backend::Openai, Backend::Vllm, Backend::Sglang] {
            let expected = [text(" a"), text("b"), end.clone(), end.clone()];
            assert_eq!(told(backend, body).unwrap(), expected);
        }
    }

    #[test]
    fn llama_server_says_why_it_stops() {
        let body = "data: {\"content\":\"x\",\"stop\":false}\n\ndata: {\"content\":\"\",\"stop\":true,\"stop_type\":\"eos\"}\n";
        assert_eq!(
            told(Backend::Llamacpp, body).unwrap(),
            [text("x"), TextPiece::End(StreamEnd::EndOfText)]
        );
    }
}
