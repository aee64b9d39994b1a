//! Finds the first token in an event stream that passes.
//!
//! An event brings a token if it has text under one of the names that the APIs of OpenAI, Anthropic, Ollama and llama-server
//! use for generated text. An event of a role, a state or the progress of the prefill has none. The bytes are only read.

use serde_json::Value;

/// Names of generated text in the events of all APIs.
const TEXT: [&str; 10] = [
    "arguments",
    "content",
    "delta",
    "partial_json",
    "reasoning",
    "reasoning_content",
    "refusal",
    "response",
    "text",
    "thinking",
];

/// Most bytes of an unfinished line that are kept. Only an event with generated text is longer.
const LONGEST: usize = 64 * 1024;

/// Reads an event stream up to its first token.
#[derive(Debug, Default)]
pub(super) struct FirstToken {
    /// The line that is not finished yet.
    line: Vec<u8>,
    found: bool,
}

impl FirstToken {
    /// Whether the first token is in these bytes, which follow those of the last call.
    pub(super) fn is_in(&mut self, bytes: &[u8]) -> bool {
        if self.found {
            return false;
        }
        for piece in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            self.line.extend_from_slice(piece);
            let is_finished = piece.ends_with(b"\n") || piece.ends_with(b"\r");
            self.found = if is_finished {
                brings_text(&self.line)
            } else {
                self.line.len() > LONGEST
            };
            if self.found {
                self.line = Vec::new();
                return true;
            }
            if is_finished {
                self.line.clear();
            }
        }
        false
    }
}

/// Whether a line of an event stream has generated text.
fn brings_text(line: &[u8]) -> bool {
    let data = line.strip_prefix(b"data:").map(serde_json::from_slice::<Value>);
    data.and_then(Result::ok).is_some_and(|event| has_text(&event))
}

fn has_text(value: &Value) -> bool {
    match value {
        Value::Object(members) => members.iter().any(|(name, value)| match value {
            Value::String(text) => !text.is_empty() && TEXT.contains(&name.as_str()),
            // A tool call begins with the name of the function.
            value => name == "function" && value["name"].is_string() || has_text(value),
        }),
        Value::Array(values) => values.iter().any(has_text),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: [&str; 6] = [
        ": waiting\n\n",
        r#"data: {"choices":[{"delta":{"role":"assistant","content":null}}],"model":"m"}"#,
        r#"data: {"choices":[{"delta":{"role":"assistant","content":""}}],"prompt_progress":{"total":9}}"#,
        r#"data: {"type":"message_start","message":{"role":"assistant","content":[]}}"#,
        r#"data: {"type":"content_block_start","content_block":{"type":"text","text":""}}"#,
        r#"data: {"type":"response.created","response":{"id":"r","output":[]}}"#,
    ];

    #[test]
    fn the_first_event_with_text_is_found_in_every_dialect() {
        for token in [
            r#"data: {"choices":[{"delta":{"content":"Hi"}}]}"#,
            r#"data: {"choices":[{"delta":{"reasoning_content":"Hm"}}]}"#,
            r#"data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"add","arguments":""}}]}}]}"#,
            r#"data: {"choices":[{"text":"Hi"}]}"#,
            r#"data: {"content":"Hi","stop":false}"#,
            r#"data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}"#,
            r#"data: {"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{"}}"#,
            r#"data: {"type":"response.output_text.delta","delta":"Hi"}"#,
        ] {
            let mut first = FirstToken::default();
            for line in BEFORE {
                assert!(!first.is_in(format!("{line}\n\n").as_bytes()), "{line}");
            }
            assert!(first.is_in(format!("{token}\n\n").as_bytes()), "{token}");
            assert!(!first.is_in(format!("{token}\n\n").as_bytes()), "only once");
        }
    }

    #[test]
    fn the_pieces_in_which_a_stream_arrives_make_no_difference() {
        let stream = format!("{}\r\n\r\ndata: {{\"content\":\"Hi\"}}\n\n", BEFORE[1]);
        let end = stream.find("Hi").unwrap() + "Hi\"}\n".len();
        for size in 1..stream.len() {
            let mut first = FirstToken::default();
            let mut read = 0;
            for piece in stream.as_bytes().chunks(size) {
                read += piece.len();
                assert_eq!(
                    first.is_in(piece),
                    read >= end && read - piece.len() < end,
                    "{size}, {read}"
                );
            }
        }
    }

    #[test]
    fn a_line_without_an_end_is_not_kept() {
        let mut first = FirstToken::default();
        assert!(!first.is_in(&vec![b'a'; LONGEST]));
        assert!(first.is_in(b"a"));
        assert_eq!(first.line.capacity(), 0);
    }
}
