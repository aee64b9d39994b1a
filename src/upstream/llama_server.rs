//! llama.cpp's llama-server, as far as speculation needs it. Wire formats: build b11434, `tools/server`; `POST /draft` is
//! our patch (`nix/llama-cpp`).

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use super::WrittenTokens;
use super::connection::{Connection, LONG, PATIENCE, SHORT, UpstreamError};
use super::sse::data;
use crate::config::Secret;
use crate::http::headers::MEASURING;
use crate::speculation::{Spelled, Token};

const COMPLETION: &str = "/completion";

/// One llama-server.
#[derive(Debug, Clone)]
pub struct LlamaServer {
    connection: Connection,
}

/// What `GET /props` tells.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Props {
    /// Requests served at once.
    #[serde(deserialize_with = "count::<_, _, MOST_SLOTS>")]
    pub total_slots: usize,
    /// The model's name.
    #[serde(default)]
    pub model_alias: Option<String>,
    /// The model's file.
    #[serde(default)]
    pub model_path: String,
    /// The text of the token that begins a sequence; empty where the model has none.
    #[serde(default)]
    pub bos_token: String,
    /// Version of llama.cpp.
    #[serde(default)]
    pub build_info: String,
    /// Most draft tokens per step; absent without our patch, 0 when drafting is turned off.
    #[serde(default, deserialize_with = "maybe_count::<_, _, MOST_DRAFTED>")]
    pub draft_external_max: Option<usize>,
    /// Why a pool's coordinator takes no drafts from us.
    #[serde(default)]
    pub draft_refused: Option<String>,
    /// What holds for a request that says nothing else.
    #[serde(default)]
    pub default_generation_settings: GenerationSettings,
}

/// Part of [`Props`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct GenerationSettings {
    /// Tokens that a slot has room for; 0 when it is not told.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_ctx: usize,
}

/// Most slots of a llama-server (`LLAMA_MAX_SEQ`).
const MOST_SLOTS: i64 = 256;
/// Most draft tokens of a step: they have to fit the physical batch, which has 512 tokens unless its owner wants more.
const MOST_DRAFTED: i64 = 1024;
/// Most tokens of a vocabulary; 262144 is the largest known.
const MOST_TOKENS: i64 = 1 << 22;
/// Most of anything else that a llama-server counts.
const ANY: i64 = (1 << 31) - 1;
/// Longest step, in microseconds: an hour.
const LONGEST_STEP_US: i64 = 3_600_000_000;

/// Reads a count. One that is negative or beyond 63 bits is an error, one beyond `MOST` counts as that: it sizes what is
/// kept of the server.
fn count<'de, D: Deserializer<'de>, T: TryFrom<i64>, const MOST: i64>(deserializer: D) -> Result<T, D::Error> {
    let told = i64::deserialize(deserializer)?;
    T::try_from(told.min(MOST)).map_err(|_| D::Error::custom(format!("{told} is not a count")))
}

/// As [`count`], of a count that may be left out.
fn maybe_count<'de, D: Deserializer<'de>, T: TryFrom<i64>, const MOST: i64>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let told = Option::<i64>::deserialize(deserializer)?;
    let count = |told: i64| T::try_from(told.min(MOST)).map_err(|_| D::Error::custom(format!("{told} is not a count")));
    told.map(count).transpose()
}

/// What a `POST /completion` generated after one of its prompts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Generated {
    /// The tokens, with the one that ends the text.
    pub tokens: Vec<Token>,
    /// Whether the last token ends the text.
    pub ended: bool,
}

/// Body of `POST /draft`.
#[derive(Debug, Clone, Serialize)]
pub struct DraftCall<'a> {
    /// Names the completion.
    pub key: &'a str,
    /// Position of the first token.
    pub pos: usize,
    /// Tokens that may stand there.
    pub tokens: &'a [Token],
    /// The next step may wait for this many tokens …
    pub n_min: usize,
    /// … but no longer than this, in microseconds.
    pub hold_us: u64,
    /// Answer only when something is committed beyond `pos`.
    pub wait: bool,
}

/// Answer to `POST /draft`.
#[derive(Debug, Clone, Deserialize)]
pub struct DraftAnswer {
    /// How the completion stands.
    pub state: DraftState,
    /// Why it will not be drafted for.
    #[serde(default)]
    pub reason: Option<String>,
    /// Position of the first of `tokens`.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub pos: usize,
    /// Committed tokens from `pos` on.
    #[serde(default)]
    pub tokens: Vec<Token>,
    /// Tokens of the prompt.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_prompt: usize,
    /// Most draft tokens that the next step would verify.
    #[serde(default, deserialize_with = "count::<_, _, MOST_DRAFTED>")]
    pub n_max: usize,
    /// Steps so far.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_steps: u64,
    /// Draft tokens verified so far.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_drafted: u64,
    /// Draft tokens accepted so far.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_accepted: u64,
    /// Draft tokens verified in the last step.
    #[serde(default, deserialize_with = "count::<_, _, MOST_DRAFTED>")]
    pub step_n: usize,
    /// Draft tokens accepted in the last step.
    #[serde(default, deserialize_with = "count::<_, _, MOST_DRAFTED>")]
    pub step_accepted: usize,
    /// Tokens in the last step, of all completions and prompts that it brought forward.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub step_batch: usize,
    /// Duration of the last step in microseconds.
    #[serde(default, deserialize_with = "count::<_, _, LONGEST_STEP_US>")]
    pub step_us: u64,
}

impl DraftAnswer {
    /// Nothing was answered yet.
    #[must_use]
    pub fn none() -> Self {
        Self {
            state: DraftState::Unknown,
            reason: None,
            pos: 0,
            tokens: Vec::new(),
            n_prompt: 0,
            n_max: 0,
            n_steps: 0,
            n_drafted: 0,
            n_accepted: 0,
            step_n: 0,
            step_accepted: 0,
            step_batch: 0,
            step_us: 0,
        }
    }
}

/// How a completion stands with its drafter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DraftState {
    /// No completion has this key (yet, or any more).
    Unknown,
    /// No token was generated yet.
    Waiting,
    /// It generates.
    Running,
    /// It ended.
    Done,
    /// It will not be drafted for.
    Refused,
}

/// Tokens from the drafter as they come.
pub type DraftStream = BoxStream<'static, Result<DraftPiece, UpstreamError>>;

/// A piece of a [`DraftStream`].
#[derive(Debug, Clone, PartialEq)]
pub enum DraftPiece {
    /// The next tokens, each with the probability that the drafter gives it, where it tells.
    Tokens(Vec<(Token, Option<f64>)>),
    /// The last piece.
    End {
        /// Why it is the last.
        why: StreamEnd,
        /// How long all tokens but the first took, where the server tells.
        took: Option<Duration>,
    },
}

impl DraftPiece {
    /// The end of a draft that the server did not end.
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
    /// As many tokens as were asked for, or no room for more.
    Length,
    /// The drafter thinks that the text ends here.
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
    /// Tokens generated so far; an event leaves out those that ended inside of a character.
    #[serde(default)]
    tokens_predicted: usize,
    #[serde(default)]
    completion_probabilities: Vec<TokenProbability>,
    /// Milliseconds from the first token to the last one; of the last event.
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
    /// A client of the server at `base` (without a path). Fails only when the system cannot set up TLS.
    pub fn new(base: &str, key: Option<Secret>) -> Result<Self, reqwest::Error> {
        let connection = Connection::new(base, key)?;
        Ok(Self { connection })
    }

    /// The same, with the key that a pool's coordinator asks of those who draft.
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

    /// Whether it comes back to its tasks within this time: `GET /slots`, which is a task like any other, while the rest is
    /// answered by threads that know nothing of the model's. A server without that path does not tell.
    pub async fn takes_tasks(&self, time: Duration) -> bool {
        let slots = self.connection.get_within::<serde::de::IgnoredAny>("/slots", time);
        !matches!(slots.await, Err(UpstreamError::TimedOut { .. }))
    }

    /// Whether anything that is not an error of the server itself comes back from `GET /v1/models`.
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

    /// Number of tokens in the vocabulary, of `GET /v1/models`.
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
        struct Answer {
            content: String,
        }
        let body = serde_json::json!({ "tokens": tokens });
        let answer: Answer = self
            .connection
            .post("/detokenize", &body, Some(PATIENCE), SHORT)
            .await?;
        Ok(answer.content)
    }

    /// The tokens of `text`, with markers such as `<|im_start|>` read as special tokens.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<Token>, UpstreamError> {
        #[derive(Deserialize)]
        struct Answer {
            tokens: Vec<Token>,
        }
        let body = serde_json::json!({ "content": text, "parse_special": true });
        let answer: Answer = self.connection.post("/tokenize", &body, Some(PATIENCE), LONG).await?;
        Ok(answer.tokens)
    }

    /// The tokens of `text`, read as in [`Self::tokenize`], each with its bytes.
    pub async fn spell(&self, text: &str) -> Result<Vec<Spelled>, UpstreamError> {
        #[derive(Deserialize)]
        struct Answer {
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
        let answer: Answer = self.connection.post("/tokenize", &body, Some(PATIENCE), LONG).await?;
        let spelled = |Entry { id, piece }| Spelled {
            token: id,
            bytes: match piece {
                Piece::Text(text) => text.into_bytes(),
                Piece::Bytes(bytes) => bytes,
            },
        };
        Ok(answer.tokens.into_iter().map(spelled).collect())
    }

    /// The tokens of a prompt, with those that the model wants around it.
    pub async fn tokenize_prompt(&self, text: &str) -> Result<Vec<Token>, UpstreamError> {
        #[derive(Deserialize)]
        struct Answer {
            tokens: Vec<Token>,
        }
        let body = serde_json::json!({ "content": text, "add_special": true, "parse_special": true });
        let answer: Answer = self.connection.post("/tokenize", &body, Some(PATIENCE), LONG).await?;
        Ok(answer.tokens)
    }

    /// The prompt that the model's template makes of a chat.
    pub async fn apply_template(&self, messages: &serde_json::Value) -> Result<String, UpstreamError> {
        #[derive(Deserialize)]
        struct Answer {
            prompt: String,
        }
        let body = serde_json::json!({ "messages": messages });
        let answer: Answer = self
            .connection
            .post("/apply-template", &body, Some(PATIENCE), LONG)
            .await?;
        Ok(answer.prompt)
    }

    /// Generates at most `n` tokens after each of `prompts`, all in the same passes if there are as many slots; `sampling`
    /// has further fields of the request.
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
        enum Answer {
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
            Answer::Several(several) => several,
            Answer::Single(one) => vec![one],
        };
        if answers.len() != prompts.len() || answers.iter().any(|one| one.tokens.is_empty()) {
            return Err(self.connection.malformed(COMPLETION, "not each prompt was continued"));
        }
        // The request names none. Where the target alone would have cut its answer is not known here.
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

    /// Offers draft tokens to a running completion, and learns what it has committed.
    pub async fn offer(&self, call: &DraftCall<'_>) -> Result<DraftAnswer, UpstreamError> {
        let answer: DraftAnswer = self.connection.post("/draft", call, None, LONG).await?;
        if answer.pos != call.pos {
            let cause = format!(
                "asked for the tokens from {} on, it tells those from {} on",
                call.pos, answer.pos
            );
            return Err(self.connection.malformed("/draft", &cause));
        }
        Ok(answer)
    }

    /// Begins a completion that goes on whatever it says, and whose steps can be drafted for under `key`; dropping the
    /// answer ends it.
    pub async fn begin_endless(&self, key: &str, n: usize) -> Result<reqwest::Response, UpstreamError> {
        let body = serde_json::json!({
            "prompt": "One, two, three,", "n_predict": n, "stream": true, "ignore_eos": true, "cache_prompt": false,
            "temperature": 0,
        });
        let request = self.connection.request(COMPLETION, &body).header("X-Draft-Key", key);
        let request = request.header(MEASURING, "1");
        self.connection.send(COMPLETION, request).await
    }

    /// Continues `prefix` greedily by at most `n` tokens in slot `slot`, as they come or `at_once`, when all are there: each
    /// event costs both sides some time. `written` is best what the last request for this text wrote.
    ///
    /// llama-server leaves tokens out of its stream that end inside of a character. Where that happens the rest comes in
    /// one piece, from a second request that is not streamed.
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
            Drafting {
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
            .flat_map(|drafting| futures_util::stream::unfold(drafting, Drafting::next))
            .boxed()
    }

    /// The answer to a request for at most `n` tokens that is not streamed.
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

    /// A request to continue a prompt, which is given by its tokens with commas between.
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
struct Drafting {
    server: LlamaServer,
    prefix: Vec<Token>,
    n: usize,
    slot: usize,
    /// The running request; `None` after the last piece.
    events: Option<Events>,
    received: usize,
    pending: VecDeque<DraftPiece>,
}

impl Drafting {
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
                    // A server that says more than it was asked for is not listened to any longer.
                    self.events = None;
                    self.pending.push_back(DraftPiece::cut());
                }
            }
        }
    }
}

/// The `data:` of an event stream.
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
