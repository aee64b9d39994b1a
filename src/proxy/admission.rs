//! Reads a request's body and refuses what cannot be answered, before the target is bothered.
//!
//! The body is only looked at: what is forwarded are the bytes that came.

use std::fmt;

use axum::body::Body;
use axum::http::request::Parts;
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::respond::Refusal;
pub(crate) use crate::http::body::discard;
use crate::http::body::{self, Unread};

/// Reads a body of at most `limit` bytes.
pub(crate) async fn read(body: Body, parts: &Parts, limit: u64) -> Result<Bytes, Refusal> {
    let (refusal, rest) = match body::read(body, parts, limit).await {
        Ok(whole) => return Ok(whole),
        Err(Unread::TooSlow) => return Err(Refusal::TooSlow),
        Err(Unread::Cut(error)) => return Err(Refusal::BodyCut(super::target::root_cause(&error))),
        Err(Unread::TooLarge(rest)) => (Refusal::TooLarge { limit }, rest),
        Err(Unread::NoMemory(rest)) => (Refusal::NoMemory, rest),
    };
    discard(rest, &parts.headers);
    Err(refusal)
}

/// What a completion request asks for, as far as the proxy cares.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    /// `stream`
    pub(crate) streamed: bool,
    /// The text of `prediction` (OpenAI's predicted outputs).
    pub(crate) prediction: Option<String>,
    /// `model`
    pub(crate) model: Option<String>,
}

/// Looks at the body of a completion request.
pub(crate) fn check(body: &[u8], max_tokens_limit: Option<u64>) -> Result<Asked, Refusal> {
    let fields: Fields<'_> = serde_json::from_slice(body)?;
    for (param, value) in COUNTS.into_iter().zip(fields.counts) {
        if let Some(value) = value {
            check_count(param, value.get(), max_tokens_limit)?;
        }
    }
    Ok(Asked {
        streamed: fields.stream.is_some_and(|value| value.get() == "true"),
        prediction: fields.prediction.and_then(|value| predicted_text(value.get())),
        model: fields.model.and_then(|value| serde_json::from_str(value.get()).ok()),
    })
}

/// The text of `{"type": "content", "content": "…"}`, where the content may come in parts. Anything else predicts nothing.
fn predicted_text(value: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Prediction {
        content: Content,
    }
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Content {
        Whole(String),
        Parts(Vec<Part>),
    }
    #[derive(serde::Deserialize)]
    struct Part {
        text: String,
    }
    let Prediction { content } = serde_json::from_str(value).ok()?;
    let text = match content {
        Content::Whole(text) => text,
        Content::Parts(parts) => parts.into_iter().map(|part| part.text).collect(),
    };
    (!text.is_empty()).then_some(text)
}

fn check_count(param: &'static str, value: &str, limit: Option<u64>) -> Result<(), Refusal> {
    if value == "null" {
        return Ok(());
    }
    let count = value.parse::<i64>().ok().filter(|count| *count >= -1);
    let Some(given) = count else {
        return Err(Refusal::NotACount {
            param,
            given: excerpt(value),
        });
    };
    match limit {
        // -1, no limit, is more than any limit.
        Some(limit) if u64::try_from(given).map_or(true, |given| given > limit) => {
            Err(Refusal::TooManyTokens { param, given, limit })
        }
        _ => Ok(()),
    }
}

fn excerpt(value: &str) -> String {
    const MOST: usize = 40;
    if value.chars().count() <= MOST {
        return value.to_owned();
    }
    value.chars().take(MOST).chain(['…']).collect()
}

/// The names under which the endpoints know the largest number of tokens to generate.
const COUNTS: [&str; 4] = ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"];

/// The values of interest as they stand in the body. Where a key comes twice the last one counts, as with the target.
#[derive(Default)]
struct Fields<'a> {
    stream: Option<&'a RawValue>,
    prediction: Option<&'a RawValue>,
    model: Option<&'a RawValue>,
    counts: [Option<&'a RawValue>; COUNTS.len()],
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Fields::default();
                while let Some(key) = map.next_key()? {
                    match key {
                        Key::Stream => fields.stream = Some(map.next_value()?),
                        Key::Prediction => fields.prediction = Some(map.next_value()?),
                        Key::Model => fields.model = Some(map.next_value()?),
                        Key::Count(which) => {
                            let slot = fields
                                .counts
                                .get_mut(which)
                                .ok_or_else(|| A::Error::custom("unknown count"))?;
                            *slot = Some(map.next_value()?);
                        }
                        Key::Other => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

enum Key {
    Stream,
    Prediction,
    Model,
    /// Index into [`COUNTS`].
    Count(usize),
    Other,
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, name: &str) -> Result<Key, E> {
                let count = || COUNTS.iter().position(|it| *it == name);
                Ok(if name == "stream" {
                    Key::Stream
                } else if name == "prediction" {
                    Key::Prediction
                } else if name == "model" {
                    Key::Model
                } else {
                    count().map_or(Key::Other, Key::Count)
                })
            }
        }
        deserializer.deserialize_str(Name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str, limit: Option<u64>) -> String {
        check(body.as_bytes(), limit).unwrap_err().to_string()
    }

    #[test]
    fn a_prediction_is_read_whole_and_in_parts_and_otherwise_left_alone() {
        for (body, text) in [
            (r#"{"prediction":{"type":"content","content":"a\nb"}}"#, Some("a\nb")),
            (
                r#"{"prediction":{"content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}}"#,
                Some("ab"),
            ),
            (r#"{"prediction":{"content":""}}"#, None),
            (r#"{"prediction":"a"}"#, None),
            (r#"{"prediction":null}"#, None),
            ("{}", None),
        ] {
            let prediction = check(body.as_bytes(), None).unwrap().prediction;
            assert_eq!(prediction.as_deref(), text, "{body}");
        }
    }

    #[test]
    fn the_model_is_read_where_it_is_a_name() {
        for (body, model) in [
            (r#"{"model":"a\u0062"}"#, Some("ab")),
            (r#"{"model":"a","model":"b"}"#, Some("b")),
            (r#"{"model":1}"#, None),
            ("{}", None),
        ] {
            assert_eq!(check(body.as_bytes(), None).unwrap().model.as_deref(), model, "{body}");
        }
    }

    #[test]
    fn only_a_true_stream_is_a_stream() {
        for (body, streamed) in [
            (r#"{"stream":true}"#, true),
            (r#"{ "\u0073tream" : true }"#, true),
            (r#"{"stream":false,"stream":true}"#, true),
            (r#"{"stream":true,"stream":false}"#, false),
            (r#"{"stream":null}"#, false),
            (r#"{"stream":"true"}"#, false),
            (r#"{"messages":[{"stream":true}]}"#, false),
            ("{}", false),
        ] {
            assert_eq!(check(body.as_bytes(), None).unwrap().streamed, streamed, "{body}");
        }
    }

    #[test]
    fn broken_json_is_refused_with_its_position() {
        assert!(
            refused("{\"a\":1,\n \"b\": tru}", None).contains("line 2 column"),
            "{}",
            refused("{\"b\": tru}", None)
        );
        for body in ["", "[1]", "\"text\"", "{} {}", "{\"a\":1"] {
            assert!(
                refused(body, None).contains("line 1 column"),
                "{body}: {}",
                refused(body, None)
            );
        }
    }

    #[test]
    fn counts_are_whole_numbers_within_the_limit() {
        for value in ["0", "1", "-1", "null", "4096"] {
            assert!(
                check(format!(r#"{{"max_tokens":{value}}}"#).as_bytes(), None).is_ok(),
                "{value}"
            );
        }
        for value in ["-2", "1.5", "1e3", "\"10\"", "true", "[1]", "99999999999999999999"] {
            for param in COUNTS {
                let message = refused(&format!(r#"{{"{param}":{value}}}"#), None);
                assert!(
                    message.starts_with(&format!("`{param}` must be a whole number")),
                    "{message}"
                );
            }
        }
        assert!(check(br#"{"n_predict":100}"#, Some(100)).is_ok());
        assert!(refused(r#"{"n_predict":101}"#, Some(100)).contains("at most 100 tokens"));
        assert!(refused(r#"{"max_tokens":-1}"#, Some(100)).contains("at most 100 tokens"));
    }

    #[test]
    fn nesting_however_deep_is_no_reason_to_refuse() {
        let body = format!(r#"{{"a":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
        assert!(check(body.as_bytes(), None).is_ok());
    }
}
