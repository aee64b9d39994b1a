//! Adds the counts of a request's `prediction` to the usage of its answer.
//!
//! OpenAI's API reference (chat completions, the object `usage`) has `completion_tokens_details.accepted_prediction_tokens`
//! and `rejected_prediction_tokens` for predicted outputs, which llama-server does not know. They are put into the bytes of
//! the answer as they pass; every other byte stays as it is.

use std::future::Future;

use bytes::{Bytes, BytesMut};
use futures_util::future::{BoxFuture, FutureExt, Shared};
use futures_util::stream::{self, BoxStream, Stream, StreamExt};

use crate::engine::Counts;
use crate::http::members::Members;

const USAGE: &str = "usage";
const DETAILS: &str = "completion_tokens_details";

/// Most bytes that are held back to find the usage; a longer line or answer passes unchanged.
const LONGEST: usize = 16 * 1024 * 1024;

/// The bytes of a successful answer, an event stream (`streamed`) or one JSON object, with `counts` in its usage. Of an
/// event stream only unfinished lines are kept back. `counts` is waited for where a usage stands.
pub(super) fn completed<E: Send + 'static>(
    bytes: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    streamed: bool,
    counts: impl Future<Output = Counts> + Send + 'static,
) -> BoxStream<'static, Result<Bytes, E>> {
    let completing = Completing {
        source: bytes.boxed().fuse(),
        streamed,
        counts: counts.boxed().shared(),
        kept: BytesMut::new(),
        broken: None,
        gave_up: false,
    };
    stream::unfold(completing, |mut completing| async move {
        Some((completing.next().await?, completing))
    })
    .boxed()
}

struct Completing<E> {
    source: stream::Fuse<BoxStream<'static, Result<Bytes, E>>>,
    streamed: bool,
    counts: Shared<BoxFuture<'static, Counts>>,
    kept: BytesMut,
    /// The error with which the source broke off, not yet passed on.
    broken: Option<E>,
    /// More came than is held back.
    gave_up: bool,
}

impl<E> Completing<E> {
    async fn next(&mut self) -> Option<Result<Bytes, E>> {
        loop {
            if let Some(error) = self.broken.take() {
                return Some(Err(error));
            }
            match self.source.next().await {
                Some(Ok(bytes)) if self.gave_up => return Some(Ok(bytes)),
                Some(Ok(bytes)) => {
                    self.kept.extend_from_slice(&bytes);
                    let ready = self.complete_lines();
                    if ready > 0 {
                        let ready = self.kept.split_to(ready).freeze();
                        return Some(Ok(self.complete(ready).await));
                    }
                    if self.kept.len() > LONGEST {
                        self.gave_up = true;
                        return Some(Ok(self.kept.split().freeze()));
                    }
                }
                Some(Err(error)) => {
                    self.broken = Some(error);
                    if !self.kept.is_empty() {
                        return Some(Ok(self.kept.split().freeze()));
                    }
                }
                None if self.kept.is_empty() => return None,
                None => {
                    let rest = self.kept.split().freeze();
                    return Some(Ok(self.complete(rest).await));
                }
            }
        }
    }

    /// Number of kept bytes to the end of the last complete line; an answer that is no stream is one line.
    fn complete_lines(&self) -> usize {
        let end = self
            .kept
            .iter()
            .rposition(|byte| ends_line(*byte))
            .filter(|_| self.streamed);
        end.map_or(0, |end| end + 1)
    }

    async fn complete(&mut self, bytes: Bytes) -> Bytes {
        // Most events have none.
        if !bytes.windows(USAGE.len()).any(|it| it == USAGE.as_bytes()) {
            return bytes;
        }
        let Ok(text) = std::str::from_utf8(&bytes) else {
            return bytes;
        };
        if !self.streamed {
            return self.complete_object(text).await.map_or(bytes, Bytes::from);
        }
        let mut lines = String::with_capacity(text.len() + 128);
        for line in text.split_inclusive(['\n', '\r']) {
            let data = line.strip_prefix("data:").map(str::trim);
            let completed = match data {
                Some(data) => self.complete_object(data).await.map(|new| line.replacen(data, &new, 1)),
                None => None,
            };
            lines.push_str(completed.as_deref().unwrap_or(line));
        }
        lines.into()
    }

    async fn complete_object(&mut self, json: &str) -> Option<String> {
        usage(json)?;
        let counts = self.counts.clone().await;
        with_counts(json, &counts)
    }
}

fn ends_line(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

/// The object `usage` in the text of an answer or event.
fn usage(json: &str) -> Option<&str> {
    Members::of(json)?.get(USAGE).filter(|usage| usage.starts_with('{'))
}

/// The text of an answer or event with the tokens of the prediction in its usage; `None` when it has no usage.
fn with_counts(json: &str, counts: &Counts) -> Option<String> {
    let usage = usage(json)?;
    let mut details = Members::of(usage)?
        .get(DETAILS)
        .filter(|details| details.starts_with('{'))
        .unwrap_or("{}")
        .to_owned();
    for (name, count) in [
        ("accepted_prediction_tokens", counts.accepted_prediction_tokens),
        ("rejected_prediction_tokens", counts.rejected_prediction_tokens),
    ] {
        details = Members::of(&details)?.with(name, &count.to_string());
    }
    let usage = Members::of(usage)?.with(DETAILS, &details);
    Some(Members::of(json)?.with(USAGE, &usage))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn counts(accepted: u64, rejected: u64) -> Counts {
        Counts {
            accepted_prediction_tokens: accepted,
            rejected_prediction_tokens: rejected,
            ..Counts::default()
        }
    }

    #[test]
    fn the_counts_stand_at_the_end_of_the_usage_and_all_else_is_as_it_was() {
        const DETAILS: &str =
            r#""completion_tokens_details":{"accepted_prediction_tokens":3,"rejected_prediction_tokens":4}"#;
        for (json, expected) in [
            (
                r#"{ "id":1.50, "usage": {"total_tokens": 7 }, "x":"\u00e9" }"#,
                format!(r#"{{ "id":1.50, "usage": {{"total_tokens": 7,{DETAILS} }}, "x":"\u00e9" }}"#),
            ),
            (r#"{"usage":{ }}"#, format!(r#"{{"usage":{{{DETAILS} }}}}"#)),
            (
                r#"{"usage":{"completion_tokens_details":null,"a":1}}"#,
                format!(r#"{{"usage":{{{DETAILS},"a":1}}}}"#),
            ),
            (
                r#"{"usage":{"completion_tokens_details": {"reasoning_tokens": 1}}}"#,
                r#"{"usage":{"completion_tokens_details": {"reasoning_tokens": 1,"accepted_prediction_tokens":3,"rejected_prediction_tokens":4}}}"#.to_owned(),
            ),
            (
                r#"{"usage":{"completion_tokens_details":{"rejected_prediction_tokens" : 0, "accepted_prediction_tokens":0}}}"#,
                r#"{"usage":{"completion_tokens_details":{"rejected_prediction_tokens" : 4, "accepted_prediction_tokens":3}}}"#.to_owned(),
            ),
        ] {
            assert_eq!(with_counts(json, &counts(3, 4)), Some(expected), "{json}");
        }
    }

    #[test]
    fn what_has_no_usage_is_left_alone() {
        for json in [
            r#"{"usage":null}"#,
            r#"{"usage":"{}"}"#,
            r#"{"choices":[{"usage":{}}]}"#,
            r#"[{"usage":{}}]"#,
            r#"{"usage":{}"#,
            "[DONE]",
            "",
        ] {
            assert_eq!(with_counts(json, &counts(3, 4)), None, "{json}");
        }
    }

    #[tokio::test]
    async fn what_breaks_off_comes_as_far_as_it_came() {
        let chunks = [Ok(Bytes::from_static(b"data: {\"usa")), Err("reset")];
        let completed = completed(stream::iter(chunks), true, std::future::ready(counts(1, 2)));
        let passed: Vec<_> = completed.collect().await;
        assert_eq!(passed, [Ok(Bytes::from_static(b"data: {\"usa")), Err("reset")]);
    }

    #[tokio::test]
    async fn lines_without_a_usage_wait_for_nothing() {
        let chunks = [
            Ok::<_, Infallible>("data: {\"usage\":null}\n\ndata: {\"a"),
            Ok("\":1}\n\n"),
        ];
        let bytes = stream::iter(chunks.map(|chunk| chunk.map(Bytes::from)));
        let completed = completed(bytes, true, std::future::pending());
        let passed: Vec<_> = completed.map(Result::unwrap).collect().await;
        assert_eq!(passed, ["data: {\"usage\":null}\n\n", "data: {\"a\":1}\n\n"]);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-z\"\\\\\n{}é]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map("[a-zé\"]{0,4}", inner, 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    fn an_object() -> impl Strategy<Value = Value> {
        prop::collection::hash_map("[a-zé\"{]{0,4}", any_json(), 0..4)
            .prop_map(|members| Value::Object(members.into_iter().collect()))
    }

    /// An answer with a usage, and perhaps with details in it.
    fn an_answer() -> impl Strategy<Value = Value> {
        (an_object(), an_object(), prop::option::of(an_object())).prop_map(|(mut answer, mut usage, details)| {
            if let Some(details) = details {
                usage[DETAILS] = details;
            }
            answer[USAGE] = usage;
            answer
        })
    }

    fn written(json: &Value, pretty: bool) -> String {
        if pretty {
            serde_json::to_string_pretty(json).unwrap()
        } else {
            json.to_string()
        }
    }

    /// The texts of an answer as an event stream, cut into pieces.
    fn passed(text: &str, size: usize, streamed: bool) -> String {
        let chunks: Vec<_> = text.as_bytes().chunks(size).map(Bytes::copy_from_slice).collect();
        let bytes = stream::iter(chunks).map(Ok::<_, Infallible>);
        let completed = completed(bytes, streamed, std::future::ready(counts(3, 4)));
        let passed = completed.map(|bytes| bytes.unwrap().to_vec()).collect::<Vec<_>>();
        String::from_utf8(passed.now_or_never().unwrap().concat()).unwrap()
    }

    proptest! {
        #[test]
        fn nothing_but_the_counts_is_put_in(answer in an_answer(), pretty: bool) {
            let text = written(&answer, pretty);
            let with = with_counts(&text, &counts(3, 4)).unwrap();
            let mut expected = answer.clone();
            expected[USAGE][DETAILS]["accepted_prediction_tokens"] = json!(3);
            expected[USAGE][DETAILS]["rejected_prediction_tokens"] = json!(4);
            prop_assert_eq!(serde_json::from_str::<Value>(&with).unwrap(), expected);
            // One piece was put in somewhere.
            let common = text.bytes().zip(with.bytes()).take_while(|(a, b)| a == b).count();
            prop_assert!(with.as_bytes().ends_with(&text.as_bytes()[common..]), "{}\n{}", text, with);
        }

        #[test]
        fn how_the_bytes_are_cut_makes_no_difference(
            answers in prop::collection::vec((any_json(), prop::option::of(an_answer())), 0..4),
            size in 1_usize..50,
        ) {
            let (mut stream, mut expected) = (String::new(), String::new());
            for (other, answer) in answers {
                for part in [format!("data: {other}\n\n"), ": comment\r\n\r\n".into()] {
                    stream += &part;
                    expected += &part;
                }
                if let Some(answer) = answer {
                    let text = answer.to_string();
                    let event = |data: &str| format!("data:  {data} \r\n\r\n");
                    stream += &event(&text);
                    expected += &event(&with_counts(&text, &counts(3, 4)).unwrap());
                }
            }
            prop_assert_eq!(passed(&stream, size, true), expected);
        }

        #[test]
        fn an_answer_in_one_piece_is_completed_at_its_end(answer in an_answer(), pretty: bool, size in 1_usize..50) {
            let text = written(&answer, pretty);
            prop_assert_eq!(passed(&text, size, false), with_counts(&text, &counts(3, 4)).unwrap());
        }

        #[test]
        fn any_other_bytes_pass_as_they_are(text in "(data: |\\{\"usage\"|[:{}\n\r,\"a])*", size in 1_usize..50, streamed: bool) {
            if !text.contains("{\"usage\":{") {
                prop_assert_eq!(passed(&text, size, streamed), text);
            }
        }
    }
}
