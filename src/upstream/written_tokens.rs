//! Token ids as JSON, kept from one request to the next.

use crate::speculation::Token;

/// A prompt's token ids in JSON. Between requests only the end of a long prompt changes, so only the end is rewritten.
#[derive(Debug, Clone, Default)]
pub struct WrittenTokens {
    tokens: Vec<Token>,
    /// Without the brackets.
    json: String,
}

impl WrittenTokens {
    /// The ids of `tokens` with commas between.
    pub fn write(&mut self, tokens: &[Token]) -> &str {
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        for _ in common..self.tokens.len() {
            self.json.truncate(self.json.rfind(',').unwrap_or_default());
        }
        self.tokens.truncate(common);
        for token in &tokens[common..] {
            if !self.json.is_empty() {
                self.json.push(',');
            }
            self.json.push_str(&token.to_string());
        }
        self.tokens.extend_from_slice(&tokens[common..]);
        &self.json
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_was_written_before_the_tokens_are_those_of_now(
            prompts in prop::collection::vec(prop::collection::vec(prop_oneof![0..3, any::<Token>()], 0..12), 1..12),
        ) {
            let mut written = WrittenTokens::default();
            for prompt in prompts {
                let json = format!("[{}]", written.write(&prompt));
                prop_assert_eq!(json, serde_json::to_string(&prompt).unwrap());
            }
        }
    }
}
