//! Position in a text that an answer copies with edits; [`super::Lookup`] drafts from there.
//!
//! After a token that differs from the copied text, the position resumes near the last place where enough tokens agreed. It is
//! dropped once the answer has left the text.

use super::Token;
use super::lookup::MIN_MATCH;

/// Tokens before and after the last agreement among which the copy resumes.
const RESUME_BEFORE: usize = 4;
const RESUME_AFTER: usize = 12;
/// Tokens in a row that do not occur near the last agreement after which the copy counts as ended.
const MAX_FOREIGN: usize = 32;

/// Position in a text that an answer copies.
#[derive(Debug, Clone, Copy)]
pub(super) struct CopyPosition {
    /// Index of the next token.
    pub(super) next: usize,
    /// Number of the answer's last tokens that are the same before it.
    pub(super) agreeing: usize,
    /// Position at which at least [`MIN_MATCH`] tokens agreed last.
    anchor: usize,
    /// Tokens of the answer since then that do not occur near it.
    foreign: usize,
}

impl CopyPosition {
    /// The position `next`, with `agreeing` tokens before it.
    pub(super) fn new(next: usize, agreeing: usize) -> Self {
        Self {
            next,
            agreeing,
            anchor: next,
            foreign: 0,
        }
    }

    /// The position after the answer's next token; `None` when the answer has left the text.
    pub(super) fn advance(self, token: Token, text: &[Token]) -> Option<Self> {
        let is_token = |at: &usize| text.get(*at) == Some(&token);
        let (next, agreeing) = (self.next + 1, self.agreeing + 1);
        if is_token(&self.next) {
            return Some(if agreeing < MIN_MATCH {
                Self { next, agreeing, ..self }
            } else {
                Self::new(next, agreeing)
            });
        }
        // The answer inserts, omits or replaces tokens.
        let anchor = self.anchor;
        let near = (anchor..anchor + RESUME_AFTER)
            .chain((anchor.saturating_sub(RESUME_BEFORE)..anchor).rev())
            .find(is_token);
        if let Some(at) = near {
            let (next, agreeing) = (at + 1, 1);
            return Some(Self { next, agreeing, ..self });
        }
        let foreign = self.foreign + 1;
        (foreign <= MAX_FOREIGN).then_some(Self {
            next: anchor + foreign,
            agreeing: 0,
            anchor,
            foreign,
        })
    }
}
