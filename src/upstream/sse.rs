//! The lines of a server-sent event stream, as a client reads them.

/// The data of a line that begins with `data:`.
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
