//! Writes answers in OpenAI's format: <https://platform.openai.com/docs/api-reference/chat/streaming>.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Value, json};

use super::Finish;
use crate::engine::Endpoint;
use crate::http::auth::unguessable;

/// The last event of a stream.
pub(super) const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// Tokens of a request and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) completion: usize,
    /// Accepted and rejected tokens of the client's prediction, if it made one.
    pub(super) predicted: Option<(u64, u64)>,
}

/// The fields that all parts of an answer share.
#[derive(Debug)]
pub(super) struct Style {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
}

impl Style {
    pub(super) fn new(endpoint: Endpoint, model: String) -> Self {
        let kind = match endpoint {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completion => "cmpl",
        };
        Self {
            endpoint,
            id: format!("{kind}-{}", unguessable()),
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            model,
        }
    }

    /// A whole answer.
    pub(super) fn whole(&self, text: &str, finish: Finish, usage: Usage) -> Bytes {
        let (object, mut choice) = match self.endpoint {
            Endpoint::Chat => (
                "chat.completion",
                json!({ "message": { "role": "assistant", "content": text } }),
            ),
            Endpoint::Completion => ("text_completion", json!({ "text": text })),
        };
        choice["finish_reason"] = json!(finish.name());
        let mut answer = self.object(object, choice);
        answer["usage"] = usage.json();
        answer.to_string().into()
    }

    /// The first event of a chat's stream.
    pub(super) fn opening(&self) -> Option<Bytes> {
        (self.endpoint == Endpoint::Chat).then(|| {
            let delta = json!({ "role": "assistant", "content": "" });
            self.event(json!({ "delta": delta, "finish_reason": null }))
        })
    }

    /// An event with a piece of text.
    pub(super) fn piece(&self, text: &str) -> Bytes {
        self.event(match self.endpoint {
            Endpoint::Chat => json!({ "delta": { "content": text }, "finish_reason": null }),
            Endpoint::Completion => json!({ "text": text, "finish_reason": null }),
        })
    }

    /// The event with the reason for the end.
    pub(super) fn end(&self, finish: Finish) -> Bytes {
        let finish = finish.name();
        self.event(match self.endpoint {
            Endpoint::Chat => json!({ "delta": {}, "finish_reason": finish }),
            Endpoint::Completion => json!({ "text": "", "finish_reason": finish }),
        })
    }

    /// The event with the usage.
    pub(super) fn usage(&self, usage: Usage) -> Bytes {
        let mut object = self.object(self.chunk(), Value::Null);
        object["choices"] = json!([]);
        object["usage"] = usage.json();
        format!("data: {object}\n\n").into()
    }

    fn chunk(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }

    fn event(&self, choice: Value) -> Bytes {
        format!("data: {}\n\n", self.object(self.chunk(), choice)).into()
    }

    fn object(&self, object: &str, mut choice: Value) -> Value {
        if !choice.is_null() {
            choice["index"] = json!(0);
            choice["logprobs"] = Value::Null;
        }
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": [choice],
        })
    }
}

impl Usage {
    fn json(self) -> Value {
        let mut usage = json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        });
        if let Some((accepted, rejected)) = self.predicted {
            usage["completion_tokens_details"] =
                json!({ "accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected });
        }
        usage
    }
}
