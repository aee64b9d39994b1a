//! Tokenises the client's prediction of the answer, up to the length of the context.
//!
//! A client may predict more than the answer can hold, and each token costs memory for as long as the answer lasts.

use std::future::Future;

use super::watch::ClusterSnapshot;
use crate::speculation::Token;

/// Most tokens, where the context is larger or not known.
const MOST: usize = 1 << 17;
/// Most bytes per token of a text that is worth reading: on average they have about four.
const BYTES: usize = 16;

/// The tokens of a prediction, as far as the target's context has room for them; none where the target does not tell.
pub(super) async fn tokens<E, F>(
    snapshot: &ClusterSnapshot,
    text: String,
    tokenize: impl FnOnce(String) -> F,
) -> Vec<Token>
where
    F: Future<Output = Result<Vec<Token>, E>>,
{
    let n_ctx = snapshot
        .model
        .as_ref()
        .map_or(0, |model| model.default_generation_settings.n_ctx);
    let most = if n_ctx == 0 { MOST } else { n_ctx.min(MOST) };
    let mut tokens = tokenize(cut(text, most * BYTES)).await.unwrap_or_default();
    tokens.truncate(most);
    tokens.shrink_to_fit();
    tokens
}

/// The beginning of a text, in at most so many bytes.
fn cut(mut text: String, most: usize) -> String {
    let end = (0..=most).rev().find(|end| text.is_char_boundary(*end));
    if let Some(end) = end.filter(|end| *end < text.len()) {
        text.truncate(end);
        text.shrink_to_fit();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::upstream::Props;

    fn read(n_ctx: usize, text: &str) -> usize {
        let props = serde_json::json!({ "total_slots": 1, "default_generation_settings": { "n_ctx": n_ctx } });
        let model: Props = serde_json::from_value(props).unwrap();
        let snapshot = ClusterSnapshot {
            model: Some(model),
            ..ClusterSnapshot::default()
        };
        let tokenize = async |text: String| Ok::<_, Infallible>(text.bytes().map(Token::from).collect());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(tokens(&snapshot, text.to_owned(), tokenize)).len()
    }

    #[test]
    fn a_prediction_ends_where_the_context_does() {
        assert_eq!(read(10, "short"), 5);
        assert_eq!(read(10, &"ab".repeat(1000)), 10);
        assert_eq!(read(0, &"ab".repeat(MOST)), MOST);
        assert_eq!(read(1 << 20, &"ab".repeat(MOST)), MOST);
        assert_eq!(cut("grün".to_owned(), 3), "gr");
        assert_eq!(cut("grün".to_owned(), 5), "grün");
    }
}
