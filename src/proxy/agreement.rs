//! Measures how far a drafter agrees with a target that cannot verify drafts.
//!
//! This makes no answer faster; it shows how well drafting would work with a target that verifies. When an answer is
//! complete and no other request runs, the drafter gets the same request greedily, and the two texts are compared up to
//! the first difference. No request ever waits for this.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use reqwest::Url;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::observed::Observed;
use crate::config::Upstream;
use crate::http::client;
use crate::upstream::sse::data;

/// The paths whose answers are compared: OpenAI's chat and text completions, which llama-server, Ollama and vLLM have too.
const PATHS: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];
/// Largest request that the drafter gets, in bytes.
const LARGEST: usize = 64 * 1024;
/// Most bytes of an answer that are compared: enough for the first tokens, even with one event per token.
const LOOKED_AT: usize = 64 * 1024;
/// Most bytes of the drafter's answer.
const LONGEST: usize = 1 << 20;
/// Most tokens that the drafter generates.
const MAX_TOKENS: u64 = 64;
/// Timeout of the drafter's answer.
const DRAFTER_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval at which the measurement checks for requests, which may need the drafter's machine.
const BUSY_CHECK_INTERVAL: Duration = Duration::from_millis(20);

const MEANING: &str = "share of the drafter's characters that equal the target's, up to the first difference; nothing is \
                       drafted, since this target cannot verify: run its model with Tightwad's llama-server \
                       (`tightwad run target`) to turn agreement into speed";

/// The measurement so far, and the drafter to measure.
#[derive(Debug)]
pub(super) struct Agreement {
    drafter: Upstream,
    client: reqwest::Client,
    sums: Mutex<Sums>,
    /// Held while the drafter answers.
    asking: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    answers: u64,
    characters: u64,
    equal: u64,
}

/// The measured part of the status.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measured {
    /// Answers that were compared.
    pub answers: u64,
    /// Characters of the drafter's that were compared.
    pub characters: u64,
    /// Share of these before the first difference of their answer; absent before the first answer.
    pub share: Option<f64>,
    /// Explanation of the share, and how to gain speed from it.
    pub meaning: Cow<'static, str>,
}

impl Agreement {
    pub(super) fn new(drafter: Upstream) -> Result<Self, reqwest::Error> {
        Ok(Self {
            drafter,
            client: client::builder().timeout(DRAFTER_TIMEOUT).build()?,
            sums: Mutex::default(),
            asking: Arc::default(),
        })
    }

    pub(super) fn measured(&self) -> Measured {
        let Sums {
            answers,
            characters,
            equal,
        } = *self.sums.lock();
        Measured {
            answers,
            characters,
            share: (characters > 0).then(|| equal as f64 / characters as f64),
            meaning: MEANING.into(),
        }
    }

    /// A request whose answer may be compared.
    pub(super) fn question(self: &Arc<Self>, path: &'static str, body: &Bytes) -> Option<Question> {
        (PATHS.contains(&path) && body.len() <= LARGEST).then(|| Question {
            agreement: Arc::clone(self),
            path,
            body: body.clone(),
            answer: BytesMut::new(),
        })
    }

    /// The text with which the drafter answers a request; `None` when it does not, or the request is none.
    async fn ask(&self, path: &str, request: &[u8]) -> Option<String> {
        let request = greedy(request, self.drafter.model_name.as_deref())?;
        let url = Url::parse(&format!("{}{path}", self.drafter.url.trim_end_matches('/'))).ok()?;
        let mut post = self.client.post(url).json(&request);
        if let Some(key) = &self.drafter.api_key {
            post = post.bearer_auth(key.expose());
        }
        match post.send().await.and_then(reqwest::Response::error_for_status) {
            Ok(answer) => text(&client::bytes(answer, LONGEST).await.ok()?),
            Err(error) => {
                tracing::debug!(%error, "the drafter's agreement could not be measured");
                None
            }
        }
    }

    fn add(&self, targets: &str, drafters: &str) {
        let characters = targets.chars().count().min(drafters.chars().count());
        if characters == 0 {
            return;
        }
        let equal = targets
            .chars()
            .zip(drafters.chars())
            .take_while(|(a, b)| a == b)
            .count();
        let mut sums = self.sums.lock();
        sums.answers += 1;
        sums.characters += characters as u64;
        sums.equal += equal as u64;
    }
}

/// A request that the target is answering.
#[derive(Debug)]
pub(super) struct Question {
    agreement: Arc<Agreement>,
    path: &'static str,
    body: Bytes,
    /// The beginning of the answer.
    answer: BytesMut,
}

impl Question {
    /// Notes that these bytes of the answer passed.
    pub(super) fn answered(&mut self, bytes: &[u8]) {
        let room = LOOKED_AT.saturating_sub(self.answer.len());
        self.answer.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// Asks the drafter in the background, unless it is busy with another comparison or a request is being answered. Gives
    /// up when a request comes.
    pub(super) fn compare(self, observed: &Arc<Observed>) {
        let is_idle = |observed: &Observed| observed.metrics.in_flight.get() == 0;
        let asking = Arc::clone(&self.agreement.asking).try_lock_owned();
        let (Ok(asking), Ok(runtime), true) = (asking, tokio::runtime::Handle::try_current(), is_idle(observed)) else {
            return;
        };
        let observed = Arc::clone(observed);
        runtime.spawn(async move {
            let _asking = asking;
            let Some(targets) = text(&self.answer) else { return };
            let busy = async {
                while is_idle(&observed) {
                    tokio::time::sleep(BUSY_CHECK_INTERVAL).await;
                }
            };
            tokio::select! {
                drafters = self.agreement.ask(self.path, &self.body) => {
                    self.agreement.add(&targets, &drafters.unwrap_or_default());
                }
                () = busy => {}
            }
        });
    }
}

/// The request as the drafter gets it: greedy, short, in one piece, for its own model.
fn greedy(request: &[u8], model: Option<&str>) -> Option<Value> {
    let mut request: Value = serde_json::from_slice(request).ok()?;
    let fields = request.as_object_mut()?;
    let limits = ["max_tokens", "max_completion_tokens", "n_predict"].map(|name| fields.remove(name));
    let limit = limits.iter().flatten().filter_map(Value::as_u64).min();
    for name in ["stream", "stream_options", "n", "prediction"] {
        fields.remove(name);
    }
    fields.insert("max_tokens".into(), json!(limit.unwrap_or(MAX_TOKENS).min(MAX_TOKENS)));
    fields.insert("temperature".into(), json!(0));
    fields.insert("stream".into(), json!(false));
    if let Some(model) = model {
        fields.insert("model".into(), json!(model));
    }
    Some(request)
}

/// The text of an answer, thoughts included: of one JSON object, or of the events of a stream.
fn text(answer: &[u8]) -> Option<String> {
    if let Ok(answer) = serde_json::from_slice::<Value>(answer) {
        return piece(&answer);
    }
    let events = answer.split_inclusive(|byte| *byte == b'\n').filter_map(data);
    let events = events.filter_map(|event| serde_json::from_slice::<Value>(event).ok());
    let text: String = events.filter_map(|event| piece(&event)).collect();
    (!text.is_empty()).then_some(text)
}

/// Text of an answer or event. The reasoning text is called `reasoning_content` by llama-server (b11434) and `reasoning` by
/// Ollama (docs/openai.md) and vLLM.
fn piece(answer: &Value) -> Option<String> {
    let choice = answer["choices"].get(0)?;
    let said = [
        &choice["message"]["reasoning_content"],
        &choice["message"]["reasoning"],
        &choice["message"]["content"],
        &choice["delta"]["reasoning_content"],
        &choice["delta"]["reasoning"],
        &choice["delta"]["content"],
        &choice["text"],
    ];
    Some(said.iter().filter_map(|text| text.as_str()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drafter_is_asked_the_same_but_greedily_briefly_and_for_its_own_model() {
        let request = br#"{"model":"big","messages":[{"role":"user","content":"Hi"}],"temperature":1.0,"n":2,
            "stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":500,"top_p":0.9}"#;
        let expected = json!({
            "model": "small", "messages": [{ "role": "user", "content": "Hi" }], "temperature": 0, "stream": false,
            "max_tokens": 64, "top_p": 0.9,
        });
        assert_eq!(greedy(request, Some("small")), Some(expected));
        assert_eq!(greedy(br#"{"max_tokens":5}"#, None).unwrap()["max_tokens"], 5);
        assert_eq!(greedy(b"[]", None), None);
    }

    #[test]
    fn the_text_is_read_from_every_kind_of_answer() {
        for answer in [
            r#"{"choices":[{"message":{"reasoning":"so","content":" it is"}}]}"#,
            r#"{"choices":[{"text":"so it is"}]}"#,
            "data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"so \"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"it is\"}}]}\n\ndata: {\"choices\":[],\"usage\":{}}\n\ndata: [DONE]\n\n",
            "data: {\"choices\":[{\"text\":\"so it\"}]}\n\ndata: {\"choices\":[{\"text\":\" is\"}]}\n\ndata: {\"choi",
        ] {
            assert_eq!(text(answer.as_bytes()).as_deref(), Some("so it is"), "{answer}");
        }
        assert_eq!(text(b"\x1f\x8b"), None);
    }

    #[test]
    fn texts_agree_up_to_their_first_difference() {
        let agreement = Agreement::new(Upstream::at("http://127.0.0.1:1")).unwrap();
        for (targets, drafters) in [
            ("grün und blau", "grün oder"),
            ("gleich", "gleich und länger"),
            ("", "x"),
        ] {
            agreement.add(targets, drafters);
        }
        let measured = agreement.measured();
        assert_eq!((measured.answers, measured.characters), (2, 15));
        assert_eq!(measured.share, Some(11.0 / 15.0));
    }
}
