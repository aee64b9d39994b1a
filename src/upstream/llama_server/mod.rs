//! Client of llama.cpp's llama-server: its state, its tokenizer, and completions of token ids.
//!
//! Wire formats: build b11434, `tools/server`. Nothing that is asked here changes the server, so a request may be sent again.
//!
//! | file | what it does |
//! | --- | --- |
//! | `props` | reads `GET /props` |
//! | `draft` | reads a draft as a draft server generates it |
//! | `offer` | offers a draft to a running completion: `POST /draft` |

mod draft;
mod offer;
mod props;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::draft::{DraftPiece, DraftStream, StreamEnd};
pub use self::offer::{DraftAnswer, DraftCall, DraftState};
pub use self::props::Props;
use self::props::{MOST_TOKENS, count};
use super::connection::{Connection, LONG, METADATA_TIMEOUT, SHORT, UpstreamError};
use crate::config::Secret;
use crate::http::headers::{MEASURING, X_DRAFT_KEY};
use crate::speculation::{Spelled, Token};

const COMPLETION: &str = "/completion";

/// One llama-server.
#[derive(Debug, Clone)]
pub struct LlamaServer {
    connection: Connection,
}

/// Tokens that `POST /completion` generated after one of its prompts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Generated {
    /// The tokens, including the one that ends the text.
    pub tokens: Vec<Token>,
    /// Whether the last token ends the text.
    pub ended: bool,
}

impl LlamaServer {
    /// A client of the server at `base` (without a path). Fails only when the system cannot set up TLS.
    pub fn new(base: &str, key: Option<Secret>) -> Result<Self, reqwest::Error> {
        let connection = Connection::new(base, key)?;
        Ok(Self { connection })
    }

    /// Sends `draft_key` too, which a pool's coordinator asks of drafters.
    #[must_use]
    pub fn with_draft_key(self, draft_key: Option<Secret>) -> Self {
        let connection = self.connection.with_draft_key(draft_key);
        Self { connection }
    }

    /// The base URL.
    #[must_use]
    pub fn url(&self) -> &str {
        self.connection.base()
    }

    /// Whether the model is loaded: `GET /health`.
    pub async fn health(&self) -> Result<(), UpstreamError> {
        self.connection.get::<serde::de::IgnoredAny>("/health").await.map(drop)
    }

    /// Whether the server's task loop answers within `time`: `GET /slots` is a task, while the other paths are answered by
    /// threads beside the loop. A server without that path counts as one that does.
    pub async fn takes_tasks(&self, time: Duration) -> bool {
        let slots = self.connection.get_within::<serde::de::IgnoredAny>("/slots", time);
        !matches!(slots.await, Err(UpstreamError::TimedOut { .. }))
    }

    /// Whether `GET /v1/models` is answered, be it with a client error other than a refused key.
    pub async fn answers(&self) -> Result<(), UpstreamError> {
        match self.connection.get::<serde::de::IgnoredAny>("/v1/models").await {
            Err(UpstreamError::Refused { status, .. })
                if (400..500).contains(&status) && status != 401 && status != 403 =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// `GET /props`.
    pub async fn props(&self) -> Result<Props, UpstreamError> {
        self.connection.get("/props").await
    }

    /// Number of tokens in the vocabulary, from `GET /v1/models`.
    pub async fn vocabulary_size(&self) -> Result<usize, UpstreamError> {
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            // A pool lists models that are not loaded, too.
            meta: Option<Meta>,
        }
        #[derive(Deserialize)]
        struct Meta {
            #[serde(deserialize_with = "count::<_, _, MOST_TOKENS>")]
            n_vocab: usize,
        }
        let models: Models = self.connection.get("/v1/models").await?;
        models
            .data
            .iter()
            .find_map(|entry| entry.meta.as_ref())
            .map(|meta| meta.n_vocab)
            .ok_or_else(|| {
                self.connection
                    .malformed("/v1/models", "no model is listed with its vocabulary")
            })
    }

    /// The text of `tokens`.
    pub async fn detokenize(&self, tokens: &[Token]) -> Result<String, UpstreamError> {
        #[derive(Deserialize)]
        struct Text {
            content: String,
        }
        let body = serde_json::json!({ "tokens": tokens });
        let answer: Text = self
            .connection
            .post("/detokenize", &body, Some(METADATA_TIMEOUT), SHORT)
            .await?;
        Ok(answer.content)
    }

    /// The tokens of `text`, with markers such as `<|im_start|>` read as special tokens.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<Token>, UpstreamError> {
        self.tokens(&serde_json::json!({ "content": text, "parse_special": true }))
            .await
    }

    /// The tokens of `text`, read as in [`Self::tokenize`], each with its bytes.
    pub async fn spell(&self, text: &str) -> Result<Vec<Spelled>, UpstreamError> {
        #[derive(Deserialize)]
        struct Spelling {
            tokens: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            id: Token,
            piece: Piece,
        }
        /// Bytes only where they are no text by themselves.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Piece {
            Text(String),
            Bytes(Vec<u8>),
        }
        let body = serde_json::json!({ "content": text, "parse_special": true, "with_pieces": true });
        let answer: Spelling = self
            .connection
            .post("/tokenize", &body, Some(METADATA_TIMEOUT), LONG)
            .await?;
        let spelled = |Entry { id, piece }| Spelled {
            token: id,
            bytes: match piece {
                Piece::Text(text) => text.into_bytes(),
                Piece::Bytes(bytes) => bytes,
            },
        };
        Ok(answer.tokens.into_iter().map(spelled).collect())
    }

    /// The tokens of a prompt, with the special tokens that the model adds.
    pub async fn tokenize_prompt(&self, text: &str) -> Result<Vec<Token>, UpstreamError> {
        self.tokens(&serde_json::json!({ "content": text, "add_special": true, "parse_special": true }))
            .await
    }

    /// `POST /tokenize` without the bytes of the tokens.
    async fn tokens(&self, body: &serde_json::Value) -> Result<Vec<Token>, UpstreamError> {
        #[derive(Deserialize)]
        struct Tokens {
            tokens: Vec<Token>,
        }
        let answer: Tokens = self
            .connection
            .post("/tokenize", body, Some(METADATA_TIMEOUT), LONG)
            .await?;
        Ok(answer.tokens)
    }

    /// The prompt that the model's template makes of a chat.
    pub async fn apply_template(&self, messages: &serde_json::Value) -> Result<String, UpstreamError> {
        #[derive(Deserialize)]
        struct Templated {
            prompt: String,
        }
        let body = serde_json::json!({ "messages": messages });
        let answer: Templated = self
            .connection
            .post("/apply-template", &body, Some(METADATA_TIMEOUT), LONG)
            .await?;
        Ok(answer.prompt)
    }

    /// Generates at most `n` tokens after each of `prompts`, in the same steps where there are as many slots. `sampling` has
    /// further fields of the request.
    pub async fn generate(
        &self,
        prompts: &[&[Token]],
        n: usize,
        sampling: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<Vec<Generated>, UpstreamError> {
        #[derive(Serialize)]
        struct Body<'a> {
            #[serde(flatten)]
            sampling: &'a serde_json::Map<String, serde_json::Value>,
            prompt: &'a [&'a [Token]],
            n_predict: usize,
            stream: bool,
            cache_prompt: bool,
            return_tokens: bool,
            response_fields: [&'static str; 3],
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Continued {
            Several(Vec<One>),
            Single(One),
        }
        #[derive(Deserialize)]
        struct One {
            #[serde(default)]
            index: usize,
            tokens: Vec<Token>,
            stop_type: String,
        }
        let body = Body {
            sampling,
            prompt: prompts,
            n_predict: n,
            stream: false,
            cache_prompt: true,
            return_tokens: true,
            response_fields: ["index", "tokens", "stop_type"],
        };
        let mut answers = match self.connection.post(COMPLETION, &body, None, SHORT).await? {
            Continued::Several(several) => several,
            Continued::Single(one) => vec![one],
        };
        if answers.len() != prompts.len() || answers.iter().any(|one| one.tokens.is_empty()) {
            return Err(self.connection.malformed(COMPLETION, "not each prompt was continued"));
        }
        // The request names no stop strings, and the place where the server would have cut its answer is unknown here.
        if answers.iter().any(|one| one.stop_type == "word") {
            let own = "it stops at strings of its own (`--reverse-prompt`), so answers to it cannot be made in rounds";
            return Err(self.connection.malformed(COMPLETION, own));
        }
        answers.sort_by_key(|one| one.index);
        let generated = |one: One| Generated {
            ended: one.stop_type == "eos",
            tokens: one.tokens,
        };
        Ok(answers.into_iter().map(generated).collect())
    }

    /// Begins a completion of `n` tokens that no end-of-text token ends, for which drafts are taken under `key`. Dropping the
    /// response ends it.
    pub async fn begin_endless(&self, key: &str, n: usize) -> Result<reqwest::Response, UpstreamError> {
        let body = serde_json::json!({
            "prompt": "One, two, three,", "n_predict": n, "stream": true, "ignore_eos": true, "cache_prompt": false,
            "temperature": 0,
        });
        let request = self.connection.request(COMPLETION, &body).header(X_DRAFT_KEY, key);
        let request = request.header(MEASURING, "1");
        self.connection.send(COMPLETION, request).await
    }
}
