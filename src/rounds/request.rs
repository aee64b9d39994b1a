//! Finds the requests that can be answered in rounds.
//!
//! Invariant: a request with any unknown field is not answered in rounds.

use serde_json::{Map, Value};

use crate::engine::{Endpoint, PromptContent, PromptRequest};
use crate::speculation::Token;

/// The endpoint at a path of the target.
#[must_use]
pub fn endpoint_at(path: &str) -> Option<Endpoint> {
    match path {
        "/v1/chat/completions" => Some(Endpoint::Chat),
        "/v1/completions" => Some(Endpoint::Completion),
        _ => None,
    }
}

/// A request that can be answered in rounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The endpoint and the fields that decide the prompt.
    pub prompt: PromptRequest,
    /// Whether the client asks for an event stream.
    pub streamed: bool,
    /// Whether the stream ends with the usage.
    pub(super) include_usage: bool,
    pub(super) stop: Vec<String>,
    /// `temperature` and other fields whose values leave a greedy choice unchanged.
    pub(super) sampling: Map<String, Value>,
}

impl Request {
    /// Reads the body of a request; `None` if it asks for anything that rounds cannot do exactly as the target would.
    #[must_use]
    pub fn of(endpoint: Endpoint, body: &[u8]) -> Option<Self> {
        let fields: Map<String, Value> = serde_json::from_slice(body).ok()?;
        let mut request = Self {
            prompt: PromptRequest {
                endpoint,
                content: PromptContent::Tokens(Vec::new()),
                model: None,
                max_tokens: None,
            },
            streamed: false,
            include_usage: false,
            stop: Vec::new(),
            sampling: Map::new(),
        };
        let mut is_greedy = false;
        for (name, value) in fields {
            if value.is_null() {
                continue;
            }
            match (name.as_str(), endpoint) {
                ("messages", Endpoint::Chat) => request.prompt.content = messages(value)?,
                ("prompt", Endpoint::Completion) => request.prompt.content = prompt(value)?,
                ("model", _) => request.prompt.model = Some(value.as_str()?.to_owned()),
                ("stream", _) => request.streamed = value.as_bool()?,
                ("stream_options", _) => request.include_usage = include_usage(&value)?,
                ("max_tokens", _) | ("max_completion_tokens", Endpoint::Chat) => {
                    let count = usize::try_from(value.as_u64()?).ok().filter(|count| *count > 0)?;
                    // If both are set, the server decides which one counts.
                    if request
                        .prompt
                        .max_tokens
                        .replace(count)
                        .is_some_and(|other| other != count)
                    {
                        return None;
                    }
                }
                ("stop", _) => request.stop = stops(value)?,
                ("temperature", _) => {
                    is_greedy = value.as_f64()? == 0.0;
                    request.sampling.insert(name, value);
                }
                ("presence_penalty" | "frequency_penalty", _) => {
                    (value.as_f64()? == 0.0).then_some(())?;
                    request.sampling.insert(name, value);
                }
                // No effect on a greedy choice.
                ("top_p", _) => value.as_f64().filter(|p| *p > 0.0 && *p <= 1.0).map(drop)?,
                ("seed", _) => value.as_i64().map(drop)?,
                ("n", _) => (value.as_u64()? == 1).then_some(())?,
                ("logprobs", Endpoint::Chat) | ("echo", Endpoint::Completion) => (!value.as_bool()?).then_some(())?,
                // No effect on the text.
                ("prediction", Endpoint::Chat) | ("user" | "metadata" | "cache_prompt", _) => {}
                _ => return None,
            }
        }
        let asks = request.prompt.content != PromptContent::Tokens(Vec::new());
        if request.include_usage && !request.streamed {
            return None;
        }
        (is_greedy && asks).then_some(request)
    }
}

/// Messages of plain text that end with one of the user. Templates treat others differently.
fn messages(value: Value) -> Option<PromptContent> {
    let messages = value.as_array()?;
    let plain = messages.iter().all(|message| {
        message.as_object().is_some_and(|message| {
            let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
            ["system", "user", "assistant"].contains(&role)
                && message.get("content").is_some_and(is_text)
                && message.keys().all(|key| key == "role" || key == "content")
        })
    });
    let asks = messages.last()?.get("role")? == "user";
    (plain && asks).then_some(PromptContent::Messages(value))
}

fn is_text(content: &Value) -> bool {
    match content {
        Value::String(_) => true,
        Value::Array(parts) => parts.iter().all(|part| {
            part.as_object().is_some_and(|part| {
                part.len() == 2
                    && part.get("type").is_some_and(|kind| kind == "text")
                    && part.get("text").is_some_and(Value::is_string)
            })
        }),
        _ => false,
    }
}

fn prompt(value: Value) -> Option<PromptContent> {
    match value {
        Value::String(text) => Some(PromptContent::Text(text)),
        Value::Array(ids) => {
            let id = |id: &Value| Token::try_from(id.as_u64()?).ok();
            ids.iter()
                .map(id)
                .collect::<Option<Vec<Token>>>()
                .map(PromptContent::Tokens)
        }
        _ => None,
    }
}

fn include_usage(options: &Value) -> Option<bool> {
    let options = options.as_object()?;
    options.keys().all(|key| key == "include_usage").then_some(())?;
    options.get("include_usage").map_or(Some(false), Value::as_bool)
}

fn stops(value: Value) -> Option<Vec<String>> {
    let stops = match value {
        Value::String(stop) => vec![stop],
        Value::Array(stops) => {
            let text = |stop: Value| stop.as_str().map(str::to_owned);
            stops.into_iter().map(text).collect::<Option<Vec<String>>>()?
        }
        _ => return None,
    };
    Some(stops.into_iter().filter(|stop| !stop.is_empty()).collect())
}

/// Whether a prompt ends inside of a reasoning block, whose answer the target may split into fields.
pub(super) fn opens_reasoning(prompt: &str) -> bool {
    let last_line = prompt.trim_end().rsplit('\n').next().unwrap_or_default().to_lowercase();
    let after = last_line.rsplit(['<', '[']).next().unwrap_or_default();
    last_line.contains(['<', '[']) && after.starts_with(['t', '|']) && after.contains("think")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(more: &str) -> Option<Request> {
        let body = format!(r#"{{"messages":[{{"role":"user","content":"Hi"}}],"temperature":0{more}}}"#);
        Request::of(Endpoint::Chat, body.as_bytes())
    }

    fn completion(body: &str) -> Option<Request> {
        Request::of(Endpoint::Completion, body.as_bytes())
    }

    #[test]
    fn greedy_requests_of_text_are_taken() {
        for more in [
            "",
            r#","temperature":0.0,"stream":true,"stream_options":{"include_usage":true}"#,
            r#","max_tokens":5,"max_completion_tokens":5,"stop":["a","b"],"n":1,"top_p":0.9,"seed":3"#,
            r#","presence_penalty":0,"frequency_penalty":0.0,"logprobs":false,"tools":null,"user":"me""#,
            r#","messages":[{"role":"system","content":"S"},{"role":"user","content":[{"type":"text","text":"Hi"}]}]"#,
        ] {
            assert!(chat(more).is_some(), "{more}");
        }
        assert!(completion(r#"{"prompt":"Once","temperature":0,"echo":false}"#).is_some());
        assert!(completion(r#"{"prompt":[1,2,3],"temperature":0,"stop":"."}"#).is_some());
    }

    #[test]
    fn whatever_is_not_understood_is_left_to_the_target() {
        for more in [
            r#","temperature":0.7"#,
            r#","temperature":null"#,
            r#","n":2"#,
            r#","tools":[]"#,
            r#","tool_choice":"none""#,
            r#","response_format":{"type":"text"}"#,
            r#","grammar":"root ::= x""#,
            r#","logprobs":true"#,
            r#","top_logprobs":2"#,
            r#","presence_penalty":0.1"#,
            r#","repeat_penalty":1.1"#,
            r#","logit_bias":{}"#,
            r#","max_tokens":0"#,
            r#","max_tokens":-1"#,
            r#","top_p":5"#,
            r#","stream_options":{"include_usage":true}"#,
            r#","max_tokens":5,"max_completion_tokens":6"#,
            r#","something":1"#,
            r#","stream_options":{"include_usage":true,"continuous_usage_stats":true}"#,
            r#","messages":[]"#,
            r#","messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"He"}]"#,
            r#","messages":[{"role":"tool","content":"1"},{"role":"user","content":"Hi"}]"#,
            r#","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]"#,
            r#","messages":[{"role":"user","content":"Hi","tool_calls":[]}]"#,
        ] {
            assert!(chat(more).is_none(), "{more}");
        }
        for body in [
            r#"{"prompt":"Once"}"#,
            r#"{"temperature":0}"#,
            r#"{"prompt":[],"temperature":0}"#,
            r#"{"prompt":["a","b"],"temperature":0}"#,
            r#"{"prompt":[[1],[2]],"temperature":0}"#,
            r#"{"prompt":"a","temperature":0,"suffix":"b"}"#,
            r#"{"prompt":"a","temperature":0,"echo":true}"#,
            r#"{"prompt":"a","temperature":0,"logprobs":0}"#,
            r#"{"prompt":"a","temperature":0,"messages":[]}"#,
        ] {
            assert!(completion(body).is_none(), "{body}");
        }
    }

    #[test]
    fn a_prompt_that_opens_a_reasoning_block_is_known_from_one_that_closes_it() {
        for prompt in ["<|im_start|>assistant\n<think>\n", "[/INST][THINK]", "x<|thinking|>"] {
            assert!(opens_reasoning(prompt), "{prompt}");
        }
        for prompt in [
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "<|im_start|>assistant\n",
            "I think",
            "",
        ] {
            assert!(!opens_reasoning(prompt), "{prompt}");
        }
    }
}
