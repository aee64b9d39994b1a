//! Follows the text that an answer copies through its edits; [`super::Lookup`] drafts from there.

use super::Token;
use super::lookup::SHORTEST;

/// Tokens before and behind the place in a copied text, among which it is taken up again.
const NEAR: (usize, usize) = (4, 12);
/// Tokens of an answer that do not stand near there, at most: after more it does not copy that text any more.
const STRANGE: usize = 32;

/// A place in a text that an answer copies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copied {
    /// The index of the token that comes next.
    pub(super) at: usize,
    /// How many of the last tokens of the answer stand before it.
    pub(super) agreeing: usize,
    /// Where enough of them agreed last, and how many have come since that do not stand near there.
    left: usize,
    strange: usize,
}

impl Copied {
    /// That many tokens agree before it.
    pub(super) fn new(at: usize, agreeing: usize) -> Self {
        Self {
            at,
            agreeing,
            left: at,
            strange: 0,
        }
    }

    /// Where the copy of this text goes on after the answer's next token; `None`: the answer has left it.
    pub(super) fn after(self, token: Token, text: &[Token]) -> Option<Self> {
        let is_there = |at: &usize| text.get(*at) == Some(&token);
        let (at, agreeing) = (self.at + 1, self.agreeing + 1);
        if is_there(&self.at) {
            return Some(if agreeing < SHORTEST {
                Self { at, agreeing, ..self }
            } else {
                Self::new(at, agreeing)
            });
        }
        // Something was put in, left out, or stands in place of what is there.
        let left = self.left;
        let near = (left..left + NEAR.1)
            .chain((left.saturating_sub(NEAR.0)..left).rev())
            .find(is_there);
        if let Some(at) = near {
            let (at, agreeing) = (at + 1, 1);
            return Some(Self { at, agreeing, ..self });
        }
        let strange = self.strange + 1;
        (strange <= STRANGE).then_some(Self {
            at: left + strange,
            agreeing: 0,
            left,
            strange,
        })
    }
}
