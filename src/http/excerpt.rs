//! Shortens and escapes untrusted text, so that it is harmless in a log or an error.

/// Most characters that are shown.
const MOST: usize = 128;

/// The beginning of `text` on one line, with control characters escaped.
pub(crate) fn excerpt(text: &str) -> String {
    let mut shown: String = text.chars().take(MOST).flat_map(shown).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}

/// Control characters and the marks that change the direction of text are escaped; quotes and umlauts are not.
fn shown(character: char) -> impl Iterator<Item = char> {
    let escaped =
        (character.escape_debug().len() > 1 && !"'\"\\".contains(character)).then(|| character.escape_debug());
    let plain = escaped.is_none().then_some(character);
    escaped.into_iter().flatten().chain(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_text_stays_on_its_line_and_is_cut() {
        assert_eq!(excerpt("qwen3:8b \"größe\""), "qwen3:8b \"größe\"");
        assert_eq!(
            excerpt("a\r\nWARN b\u{1b}[31m\u{202e}"),
            "a\\r\\nWARN b\\u{1b}[31m\\u{202e}"
        );
        let long = excerpt(&"/a".repeat(30_000));
        assert_eq!(long.chars().count(), MOST + 1);
        assert!(long.ends_with('…'));
        assert_eq!(excerpt(&"a".repeat(MOST)).len(), MOST);
    }
}
