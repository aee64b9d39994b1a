//! Depth of JSON, measured over bytes: llama-server copies and frees JSON by recursion, and deep JSON overflows its stack.

/// Deepest nesting of arrays and objects that a request may have. `serde_json` allows as many levels.
pub(crate) const DEEPEST: usize = 128;

/// A byte order mark in UTF-8. JSON parsers may skip it (RFC 8259, section 8.1), and llama-server does.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// The text without a byte order mark.
pub(crate) fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(BOM).unwrap_or(text)
}

/// The first byte of the value that JSON text consists of.
pub(crate) fn first_byte(text: &[u8]) -> Option<u8> {
    without_bom(text).trim_ascii_start().first().copied()
}

/// Whether arrays and objects are nested deeper than [`DEEPEST`]. Text that is not JSON counts as JSON up to the first
/// byte that a parser rejects; bytes after that never matter, because a parser stops there.
pub(crate) fn is_too_deep(text: &[u8]) -> bool {
    if !matches!(first_byte(text), Some(b'[' | b'{')) {
        return false;
    }
    let mut depth = 0_usize;
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                depth += 1;
                if depth > DEEPEST {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => skip_string(&mut bytes),
            _ => {}
        }
    }
    false
}

/// Moves past the closing quote of a string.
fn skip_string(bytes: &mut std::slice::Iter<'_, u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            b'\\' => {
                bytes.next();
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn depth_of(value: &Value) -> usize {
        match value {
            Value::Array(items) => 1 + items.iter().map(depth_of).max().unwrap_or(0),
            Value::Object(members) => 1 + members.values().map(depth_of).max().unwrap_or(0),
            _ => 0,
        }
    }

    /// `value` inside of as many arrays.
    fn wrapped(value: &str, times: usize) -> String {
        format!("{}{value}{}", "[".repeat(times), "]".repeat(times))
    }

    #[test]
    fn the_limit_is_exact_and_brackets_in_strings_do_not_count() {
        assert!(!is_too_deep(wrapped("", DEEPEST).as_bytes()));
        assert!(is_too_deep(wrapped("", DEEPEST + 1).as_bytes()));
        assert!(is_too_deep(
            &[BOM, b" \n", wrapped("", DEEPEST + 1).as_bytes()].concat()
        ));
        let text = format!(r#"{{"a\"{}":"\\","b":"{}"}}"#, "[".repeat(500), "{".repeat(500));
        assert!(!is_too_deep(text.as_bytes()));
        let text = format!(r#"{{"a":"\\","b":{}}}"#, wrapped("", DEEPEST));
        assert!(is_too_deep(text.as_bytes()));
    }

    #[test]
    fn only_what_begins_as_json_does_is_looked_at() {
        for text in [b"--boundary\r\n".as_slice(), b"\"", b"x", b" 1 "] {
            assert!(!is_too_deep(&[text, &b"[".repeat(1000)].concat()), "{text:?}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<f64>().prop_map(Value::from),
            "[a\\[\\]{}\"\\\\/\n\u{7f}é]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(8, 64, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map("[a\\[{\"\\\\]{0,4}", inner, 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_agrees_with_serde_json(value in any_json(), around in 110_usize..140, pretty: bool) {
            let inner = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let text = wrapped(&inner.unwrap(), around);
            let deep = around + depth_of(&value) > DEEPEST;
            prop_assert_eq!(is_too_deep(text.as_bytes()), deep, "{}", text);
            // serde_json counts a level more in its own limit.
            prop_assert_eq!(serde_json::from_str::<Value>(&text).is_err(), around + depth_of(&value) >= DEEPEST);
        }

        #[test]
        fn any_bytes_are_measured_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            is_too_deep(&bytes);
        }
    }
}
