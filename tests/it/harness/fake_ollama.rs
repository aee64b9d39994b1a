use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Deserialize;
use serde_json::{Value, json};

use super::fake_upstream::{Act, FakeUpstream, Seen, chunk, json as whole, send};

/// The only model that it has.
pub const MODEL: &str = "tiny:latest";

/// `POST /api/generate`, as far as the tests look at it.
#[derive(Clone, Debug, Deserialize)]
pub struct Generate {
    pub model: String,
    #[serde(default)]
    pub prompt: String,
    #[serde(default)]
    pub raw: bool,
    #[serde(default)]
    pub options: Value,
}

/// A server that answers as Ollama does (`server/routes.go`), with drafts that follow a script.
pub struct FakeOllama {
    pub server: FakeUpstream,
    /// Whether it has the model.
    pub has_model: Arc<AtomicBool>,
}

impl FakeOllama {
    pub async fn start(script: impl Fn(&Generate) -> Vec<Act> + Send + Sync + 'static) -> Self {
        let has_model = Arc::new(AtomicBool::new(true));
        let knows = has_model.clone();
        let server = FakeUpstream::start(move |seen| match (seen.method.as_str(), seen.target.as_str()) {
            ("GET", "/v1/models") => {
                let models =
                    json!({ "object": "list", "data": [{ "id": MODEL, "object": "model", "owned_by": "library" }] });
                whole("200 OK", &models.to_string())
            }
            ("POST", "/api/generate") => {
                let request: Generate = serde_json::from_slice(&seen.body).expect("a request as Ollama knows them");
                if request.model != MODEL || !knows.load(Ordering::SeqCst) {
                    let error = json!({ "error": format!("model '{}' not found", request.model) });
                    whole("404 Not Found", &error.to_string())
                } else if request.prompt.is_empty() {
                    let loaded = json!({
                        "model": MODEL, "created_at": "2026-11-01T00:00:00Z", "response": "", "done": true,
                        "done_reason": "load",
                    });
                    whole("200 OK", &loaded.to_string())
                } else {
                    script(&request)
                }
            }
            _ => whole("404 Not Found", "404 page not found"),
        })
        .await;
        Self { server, has_model }
    }

    /// Knows these texts, and says what comes next in them, three characters at a time.
    pub async fn knowing(texts: Vec<String>) -> Self {
        Self::start(move |request| {
            let n = request.options["num_predict"].as_u64().and_then(|n| n.try_into().ok());
            let n: usize = n.expect("a number");
            let next = texts.iter().find_map(|text| text.strip_prefix(&request.prompt));
            let next: Vec<char> = next.unwrap_or_default().chars().collect();
            let pieces: Vec<String> = next.chunks(3).take(n).map(|piece| piece.iter().collect()).collect();
            let reason = if pieces.len() < n { "stop" } else { "length" };
            answer(&pieces, reason)
        })
        .await
    }

    /// Answers as `first` does, and from then on as `then`.
    pub async fn at_first(first: Vec<Act>, then: Vec<Act>) -> Self {
        let first = Mutex::new(Some(first));
        Self::start(move |_| first.lock().unwrap().take().unwrap_or_else(|| then.clone())).await
    }

    pub fn url(&self) -> String {
        self.server.url()
    }

    /// Requests for text so far.
    pub fn asked(&self) -> Vec<(Seen, Generate)> {
        let seen = self.server.seen().into_iter();
        seen.filter(|seen| seen.target == "/api/generate")
            .map(|seen| {
                let request: Generate = serde_json::from_slice(&seen.body).expect("a request");
                (seen, request)
            })
            .filter(|(_, request)| !request.prompt.is_empty())
            .collect()
    }
}

/// The head of a stream.
pub fn head() -> Act {
    send("HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n")
}

/// One piece of a stream.
pub fn piece(text: &str) -> Act {
    let line = json!({ "model": MODEL, "created_at": "2026-11-01T00:00:00Z", "response": text, "done": false });
    chunk(format!("{line}\n"))
}

/// A whole stream.
pub fn answer(pieces: &[String], done_reason: &str) -> Vec<Act> {
    let end = json!({
        "model": MODEL, "created_at": "2026-11-01T00:00:00Z", "response": "", "done": true, "done_reason": done_reason,
        "total_duration": 5_191_566, "load_duration": 2_154_458, "prompt_eval_count": 26,
        "prompt_eval_duration": 383_809, "eval_count": pieces.len(), "eval_duration": 4_799_921,
    });
    let mut acts = vec![head()];
    acts.extend(pieces.iter().map(|text| piece(text)));
    acts.extend([chunk(format!("{end}\n")), Act::EndChunks]);
    acts
}
