//! The lines of an event stream.

/// What a line says, if it is one with `data:`.
#[must_use]
pub fn data(line: &[u8]) -> Option<&[u8]> {
    line.strip_prefix(b"data:").map(<[u8]>::trim_ascii)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_with_data_say_something() {
        assert_eq!(data(b"data: {} \r"), Some(&b"{}"[..]));
        assert_eq!(data(b"data:x"), Some(&b"x"[..]));
        for line in [&b": comment"[..], b"event: error", b""] {
            assert_eq!(data(line), None);
        }
    }
}
