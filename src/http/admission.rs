//! Reads a request's body and refuses it if the server behind could not answer it or would fail on it.
//!
//! The body is only inspected: the bytes that came are the bytes that are forwarded.

use std::fmt;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::body::{self, BodyError, discard};
use super::bounds::{self, Bounded};
use super::excerpt::excerpt;
use super::nesting;
use super::refusal::Refusal;
use crate::failure;

/// Refuses a body that cannot be looked into, and JSON that is nested deeper than servers bear.
pub(crate) fn check_form(headers: &HeaderMap, body: &[u8]) -> Result<(), Refusal> {
    let mut encodings = headers.get_all(header::CONTENT_ENCODING).iter();
    if let Some(encoding) = encodings.find(|it| !it.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity")) {
        let encoding = excerpt(&String::from_utf8_lossy(encoding.as_bytes()));
        return Err(Refusal::Encoded { encoding });
    }
    if nesting::is_too_deep(body) {
        return Err(Refusal::TooDeep);
    }
    Ok(())
}

/// Reads a body of at most `limit` bytes.
pub(crate) async fn read(body: Body, parts: &Parts, limit: u64) -> Result<Bytes, Refusal> {
    let (refusal, rest) = match body::read(body, parts, limit).await {
        Ok(whole) => return Ok(whole),
        Err(BodyError::TooSlow) => return Err(Refusal::TooSlow),
        Err(BodyError::Cut(error)) => return Err(Refusal::BodyCut(failure::explain(&error))),
        Err(BodyError::TooLarge(rest)) => (Refusal::TooLarge { limit }, rest),
        Err(BodyError::NoMemory(rest)) => (Refusal::NoMemory, rest),
    };
    discard(rest, &parts.headers);
    Err(refusal)
}

/// The parts of a completion request that decide how it is handled.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    /// `stream`
    pub(crate) streamed: bool,
    /// The text of `prediction` (OpenAI's predicted outputs).
    pub(crate) prediction: Option<String>,
    /// `model`
    pub(crate) model: Option<String>,
}

/// Checks the body of any other request: llama-server may read the bounded members on every path.
pub(crate) fn check_bounds(body: &[u8]) -> Result<(), Refusal> {
    match nesting::first_byte(body) {
        Some(b'{') => fields_of(body).map(drop),
        Some(b'[') => Ok(()),
        _ if names_grammar(body) => Err(Refusal::GrammarInForm),
        _ => Ok(()),
    }
}

/// Whether a form (`multipart/form-data`) has a field `grammar`, which llama-server reads as it does that of an object.
fn names_grammar(body: &[u8]) -> bool {
    const NAME: &[u8] = b"grammar";
    body.windows(NAME.len()).enumerate().any(|(at, bytes)| {
        let is_value = || {
            let before = body[..at].trim_ascii_end();
            let before = before.strip_suffix(b"\"").unwrap_or(before);
            before.trim_ascii_end().ends_with(b"=")
        };
        bytes == NAME && is_value()
    })
}

/// The members of interest; an error if one exceeds its bound.
fn fields_of(body: &[u8]) -> Result<Fields<'_>, Refusal> {
    let fields: Fields<'_> = serde_json::from_slice(nesting::without_bom(body))?;
    for (param, bounded, value) in &fields.bounded {
        let excess = bounded.check(value.get());
        excess.map_err(|excess| Refusal::Unbearable { param, excess })?;
    }
    Ok(fields)
}

/// Checks the body of a completion request and returns what it asks for.
pub(crate) fn check(body: &[u8], max_tokens_limit: Option<u64>) -> Result<Asked, Refusal> {
    let fields = fields_of(body)?;
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

/// The text of `{"type": "content", "content": "…"}`, whose content may come in parts; `None` for any other value.
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
    let count = value.parse::<i64>().ok().or_else(|| whole(value.parse().ok()?));
    let Some(given) = count.filter(|count| *count >= -1) else {
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

/// A number such as `5.0`, which servers take for 5.
fn whole(number: f64) -> Option<i64> {
    /// Every whole number up to here is exact.
    const LARGEST: f64 = 9_007_199_254_740_992.0;
    #[allow(clippy::cast_possible_truncation)]
    (number.fract() == 0.0 && number.abs() <= LARGEST).then_some(number as i64)
}

/// The names under which the endpoints know the largest number of tokens to generate.
const COUNTS: [&str; 4] = ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"];

/// The values of interest as they stand in the body. Of a key that comes twice the last one counts, as in llama-server.
#[derive(Default)]
struct Fields<'a> {
    stream: Option<&'a RawValue>,
    prediction: Option<&'a RawValue>,
    model: Option<&'a RawValue>,
    counts: [Option<&'a RawValue>; COUNTS.len()],
    /// Every occurrence: llama-server uses the last one but parses them all.
    bounded: Vec<(&'static str, Bounded, &'a RawValue)>,
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
                        Key::Bounded(name, bounded) => fields.bounded.push((name, bounded, map.next_value()?)),
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
    Bounded(&'static str, Bounded),
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
                let count = || COUNTS.iter().position(|it| *it == name).map(Key::Count);
                let bounded = || bounds::MEMBERS.into_iter().find(|(it, _)| *it == name);
                let bounded = || bounded().map(|(name, bounded)| Key::Bounded(name, bounded));
                Ok(if name == "stream" {
                    Key::Stream
                } else if name == "prediction" {
                    Key::Prediction
                } else if name == "model" {
                    Key::Model
                } else {
                    count().or_else(bounded).unwrap_or(Key::Other)
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
        for value in ["0", "1", "-1", "null", "4096", "5.0", "1e3", "-1.0"] {
            assert!(
                check(format!(r#"{{"max_tokens":{value}}}"#).as_bytes(), None).is_ok(),
                "{value}"
            );
        }
        for value in [
            "-2",
            "1.5",
            "-2.0",
            "1e300",
            "\"10\"",
            "true",
            "[1]",
            "99999999999999999999",
        ] {
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
    fn a_byte_order_mark_is_no_part_of_the_json() {
        let asked = check("\u{feff}{\"stream\":true}".as_bytes(), None).unwrap();
        assert!(asked.streamed);
    }

    #[test]
    fn what_the_target_would_not_bear_is_refused_on_every_path_and_however_it_is_written() {
        for body in [
            r#"{"repeat_last_n":500000000}"#,
            r#"{"dry_penalty_last_n":5e8}"#,
            r#"{"gramm\u0061r":"root ::= GROUPS"}"#,
            r#"{"grammar":"root ::= GROUPS","grammar":"root ::= \"a\""}"#,
            r#"{"grammar_triggers":[{"type":3,"value":"(a*)*b"}]}"#,
        ] {
            let body = body.replace("GROUPS", &"(".repeat(100_000));
            let refused = check_bounds(body.as_bytes()).unwrap_err();
            assert!(matches!(refused, Refusal::Unbearable { .. }), "{refused}");
            assert!(check(body.as_bytes(), None).is_err());
        }
        for body in [
            r#"{"repeat_last_n":-1,"dry_penalty_last_n":64,"grammar":null,"grammar_triggers":[]}"#,
            r#"[{"grammar":"left to the target, which wants an object"}]"#,
            "--b\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\na grammar of \"grammar\"\r\n--b--",
            "",
        ] {
            assert!(check_bounds(body.as_bytes()).is_ok(), "{body}");
        }
    }

    #[test]
    fn a_form_has_no_grammar_however_its_name_is_written() {
        for name in ["\"grammar\"", "grammar", " \"grammar\"", "\t grammar"] {
            let form = format!("--b\r\nContent-Disposition: form-data; name={name}\r\n\r\nroot ::= x\r\n--b--");
            assert!(check_bounds(form.as_bytes()).is_err(), "{form}");
        }
    }
}
