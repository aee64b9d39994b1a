//! One draft of a completion: tokens that may follow the committed ones.
//!
//! The buffer holds only tokens that the target has not contradicted. [`super::Session`] keeps one buffer for text that is
//! found in the completion itself and one per drafter.

use super::{Policy, Token, TokenClass};

/// Tokens that may follow `committed[..base]`.
#[derive(Debug, Default)]
pub(super) struct DraftBuffer {
    pub(super) tokens: Vec<Token>,
    /// The class of each token.
    pub(super) classes: Vec<TokenClass>,
    base: usize,
}

impl DraftBuffer {
    /// Number of draft tokens beyond `committed` tokens.
    pub(super) fn beyond(&self, committed: usize) -> usize {
        (self.base + self.tokens.len()).saturating_sub(committed)
    }

    /// The draft tokens beyond `committed` tokens, and their classes.
    pub(super) fn ahead(&self, committed: usize) -> (&[Token], &[TokenClass]) {
        let start = self.tokens.len() - self.beyond(committed);
        (&self.tokens[start..], &self.classes[start..])
    }

    /// Removes the tokens that `committed` confirms, and tells the policy how they compare. Returns false when the draft is
    /// contradicted, or behind by more than `max_lag` tokens; the caller then restarts it.
    pub(super) fn reconcile(&mut self, committed: &[Token], max_lag: usize, policy: &mut impl Policy) -> bool {
        let unseen = &committed[self.base..];
        let compared = unseen.len().min(self.tokens.len());
        let agreed = unseen.iter().zip(&self.tokens).take_while(|(a, b)| a == b).count();
        for (i, class) in self.classes[..compared].iter().enumerate().take(agreed + 1) {
            policy.observe(*class, i < agreed);
        }
        if agreed < compared || unseen.len() - compared > max_lag {
            return false;
        }
        self.tokens.drain(..compared);
        self.classes.drain(..compared);
        self.base += compared;
        true
    }

    /// Starts an empty draft after `base` tokens.
    pub(super) fn restart(&mut self, base: usize) {
        *self = Self {
            base,
            ..Self::default()
        };
    }
}
