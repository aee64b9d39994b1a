//! Drafts from text: the tokens that followed the same tokens before may follow them again.
//!
//! The last tokens are searched in the prompt, the answer so far and the client's prediction of the answer; the text that
//! followed there is the draft (prompt lookup decoding, Saxena 2023; predicted outputs, OpenAI 2024). A draft never crosses the
//! border between prediction and prompt. [`super::Session`] asks for a draft at each step; it costs microseconds, and it is
//! right where text is copied: edits of code, quotes, repeated structures.
//!
//! An edited copy differs in places and then continues as before. Therefore the position in the copied text follows the
//! answer ([`CopyPosition`]): after a difference the draft resumes near it, with fewer agreeing tokens than a search needs.

use std::collections::HashMap;

use super::copied_text::CopyPosition;
use super::{Token, TokenClass};

/// Fewest tokens that must agree for a match.
pub(super) const MIN_MATCH: usize = 3;
/// Most tokens that are compared; longer matches are no better.
const MAX_MATCH: usize = 32;
/// Places remembered per sequence of [`MIN_MATCH`] tokens; older ones are dropped.
const MAX_PLACES: usize = 8;
/// Agreeing tokens after which the answer counts as a copy of the text there.
const COPY_MATCH: usize = 8;
/// Separates the prediction from the prompt; not a token id.
const GAP: Token = Token::MIN;

/// A draft from text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The tokens.
    pub tokens: Vec<Token>,
    /// Number of the last tokens that are the same before the place where they were found, at most 32. Fewer than three where
    /// a copy resumes after a difference.
    pub matched: usize,
    /// Whether they are from the client's prediction.
    pub predicted: bool,
}

impl Proposal {
    /// The class of each token: the target verifies a token only if it accepted those before it, so they count as matching.
    pub fn classes(&self) -> impl Iterator<Item = TokenClass> {
        let class = if self.predicted {
            TokenClass::of_prediction
        } else {
            TokenClass::of_match
        };
        (self.matched..).take(self.tokens.len()).map(class)
    }
}

/// Index of one completion's text.
#[derive(Debug, Default)]
pub struct Lookup {
    /// The prediction, a gap, the committed tokens.
    text: Vec<Token>,
    /// Length of the prediction.
    predicted: usize,
    /// Where the committed tokens begin.
    begin: usize,
    /// Where the answer begins; `None` before the prompt is known.
    answer: Option<usize>,
    /// Ends of the places where these tokens occur, the latest last.
    places: HashMap<[Token; MIN_MATCH], Vec<usize>>,
    /// Position in the text that the answer copies.
    copied: Option<CopyPosition>,
}

impl Lookup {
    /// An index that holds only the client's prediction of the answer, which may be empty.
    #[must_use]
    pub fn new(prediction: &[Token]) -> Self {
        let mut lookup = Self::default();
        lookup.push(prediction);
        lookup.predicted = prediction.len();
        lookup.text.push(GAP);
        lookup.begin = lookup.text.len();
        lookup.copied = (!prediction.is_empty()).then_some(CopyPosition::new(0, 0));
        lookup
    }

    /// Appends committed tokens; the first call brings the prompt.
    pub fn extend(&mut self, committed: &[Token]) {
        if self.answer.is_none() {
            self.push(committed);
            self.answer = Some(self.text.len());
            return;
        }
        for token in committed {
            self.copied = self.copied.and_then(|copied| copied.advance(*token, &self.text));
            self.push(&[*token]);
            let tail = &self.text[self.text.len() - self.committed().min(MAX_MATCH)..];
            if let Some((matched, at)) = self.place(tail).filter(|(matched, _)| *matched >= COPY_MATCH) {
                self.copied = Some(CopyPosition::new(at, matched));
            }
        }
    }

    /// Number of committed tokens.
    fn committed(&self) -> usize {
        self.text.len() - self.begin
    }

    /// Drafts at most `n` tokens to follow the committed ones and then `drafted`.
    #[must_use]
    pub fn propose(&self, drafted: &[Token], n: usize) -> Option<Proposal> {
        if n == 0 {
            return None;
        }
        let kept = MAX_MATCH.saturating_sub(drafted.len()).min(self.committed());
        let tail = [
            &self.text[self.text.len() - kept..],
            &drafted[drafted.len().saturating_sub(MAX_MATCH)..],
        ]
        .concat();
        self.start_of_prediction(drafted, n)
            .or_else(|| self.longest_match(&tail, n))
            .or_else(|| self.resumed_copy(drafted, n))
    }

    /// The text after the longest match of the end of `tail`.
    fn longest_match(&self, tail: &[Token], n: usize) -> Option<Proposal> {
        let (matched, at) = self.place(tail)?;
        Some(self.proposal(at, matched, n))
    }

    /// The rest of the copied text after a difference.
    fn resumed_copy(&self, drafted: &[Token], n: usize) -> Option<Proposal> {
        let CopyPosition { next, agreeing, .. } = self.copied.filter(|_| drafted.is_empty())?;
        let proposal = self.proposal(next, agreeing.min(MAX_MATCH), n);
        (!proposal.tokens.is_empty()).then_some(proposal)
    }

    /// The place that matches most tokens at the end of `tail`: the number of tokens and where they end. Of equal matches, the
    /// copied text wins, then the client's prediction, then the latest place.
    fn place(&self, tail: &[Token]) -> Option<(usize, usize)> {
        let places = self.places.get(tail.last_chunk::<MIN_MATCH>()?)?;
        let copied = self.copied.map(|copied| copied.next);
        let (matched, _, _, end) = places
            .iter()
            .filter(|end| self.text.get(**end).is_some_and(|next| *next != GAP))
            .map(|end| {
                let before = self.text[..*end].iter().rev().zip(tail.iter().rev());
                let matched = before.take_while(|(a, b)| a == b).count();
                (matched, copied == Some(*end), *end < self.predicted, *end)
            })
            .max()?;
        Some((matched, end))
    }

    /// At most `n` tokens from `at` on.
    fn proposal(&self, at: usize, matched: usize, n: usize) -> Proposal {
        let text = self.text.get(at..).unwrap_or_default();
        Proposal {
            tokens: text.iter().copied().take(n).take_while(|token| *token != GAP).collect(),
            matched,
            predicted: at < self.predicted,
        }
    }

    /// The beginning of the prediction, before the answer has begun.
    fn start_of_prediction(&self, drafted: &[Token], n: usize) -> Option<Proposal> {
        let begun = self.answer? < self.text.len() || !drafted.is_empty();
        (self.predicted > 0 && !begun).then(|| self.proposal(0, MIN_MATCH, n))
    }

    fn push(&mut self, tokens: &[Token]) {
        for token in tokens {
            self.text.push(*token);
            if let Some(last) = self.text.last_chunk::<MIN_MATCH>().filter(|last| !last.contains(&GAP)) {
                let places = self.places.entry(*last).or_default();
                if places.len() == MAX_PLACES {
                    places.remove(0);
                }
                places.push(self.text.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn indexed(prediction: &[Token], committed: &[Token]) -> Lookup {
        let mut lookup = Lookup::new(prediction);
        lookup.extend(committed);
        lookup
    }

    #[test]
    fn text_that_followed_the_same_tokens_is_proposed() {
        let lookup = indexed(&[], &[1, 2, 3, 4, 5, 6, 9, 2, 3, 4]);
        assert_eq!(
            lookup.propose(&[], 2),
            Some(Proposal {
                tokens: vec![5, 6],
                matched: 3,
                predicted: false,
            })
        );
        assert_eq!(
            lookup.propose(&[5], 2),
            Some(Proposal {
                tokens: vec![6, 9],
                matched: 4,
                predicted: false,
            })
        );
        assert_eq!(lookup.propose(&[7], 2), None);
    }

    #[test]
    fn the_longest_match_wins_and_then_the_latest() {
        let lookup = indexed(&[], &[8, 1, 2, 3, 4, 7, 1, 2, 3, 5, 8, 1, 2, 3]);
        assert_eq!(
            lookup.propose(&[], 1),
            Some(Proposal {
                tokens: vec![4],
                matched: 4,
                predicted: false,
            })
        );
        let lookup = indexed(&[], &[1, 2, 3, 4, 7, 1, 2, 3, 5, 9, 1, 2, 3]);
        assert_eq!(
            lookup.propose(&[], 1),
            Some(Proposal {
                tokens: vec![5],
                matched: 3,
                predicted: false,
            })
        );
    }

    #[test]
    fn a_prediction_is_drafted_from_its_start_and_resumes_after_a_difference() {
        let mut lookup = indexed(&[1, 2, 3, 4, 5, 6, 7], &[50, 51, 52]);
        assert_eq!(lookup.propose(&[], 3).map(|it| it.tokens), Some(vec![1, 2, 3]));
        lookup.extend(&[1, 60, 3, 4, 5]);
        assert_eq!(
            lookup.propose(&[], 9),
            Some(Proposal {
                tokens: vec![6, 7],
                matched: 3,
                predicted: true,
            })
        );
    }

    #[test]
    fn the_prediction_wins_over_the_same_text_elsewhere() {
        // An edit: the text is in the prompt and in the prediction.
        let mut lookup = indexed(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5, 50]);
        let predicted = |lookup: &Lookup| lookup.propose(&[], 2).map(|it| (it.tokens, it.predicted));
        assert_eq!(predicted(&lookup), Some((vec![1, 2], true)));
        lookup.extend(&[1, 2, 3]);
        assert_eq!(predicted(&lookup), Some((vec![4, 5], true)));
    }

    #[test]
    fn a_copy_resumes_right_after_a_difference() {
        let text: Vec<Token> = (1..30).collect();
        for (answer, next, matched) in [
            // another token
            (&[1, 2, 3, 60][..], 5, 0),
            // ... and one more
            (&[1, 2, 3, 60, 61], 6, 0),
            // one more
            (&[1, 2, 3, 60, 4], 5, 1),
            // many more
            (&[1, 2, 3, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 4], 5, 1),
            // ... one of which occurs near
            (&[1, 2, 3, 60, 8, 61, 4], 5, 1),
            // left out
            (&[1, 2, 3, 7], 8, 1),
        ] {
            let mut lookup = indexed(&text, &[50, 51, 52]);
            lookup.extend(answer);
            let proposal = lookup.propose(&[], 2).unwrap();
            assert_eq!(
                (proposal.tokens[0], proposal.matched, proposal.predicted),
                (next, matched, true),
                "{answer:?}"
            );
        }
        // A text of the prompt.
        let mut lookup = indexed(&[], &text);
        lookup.extend(&[70, 5, 6, 7, 8, 9, 10, 11, 12, 60]);
        let proposal = lookup.propose(&[], 2).unwrap();
        assert_eq!((&proposal.tokens[..], proposal.predicted), (&[14, 15][..], false));
    }

    #[test]
    fn a_copy_that_the_answer_left_is_not_proposed() {
        let mut lookup = indexed(&(1..30).collect::<Vec<_>>(), &[50, 51, 52]);
        lookup.extend(&[1, 2, 3]);
        lookup.extend(&(60..93).collect::<Vec<_>>());
        assert_eq!(lookup.propose(&[], 2), None);
    }

    #[test]
    fn nothing_is_proposed_beyond_the_end_of_a_text() {
        let mut lookup = indexed(&[1, 2, 3], &[9]);
        lookup.extend(&[1, 2, 3]);
        assert_eq!(lookup.propose(&[], 4), None);
        assert_eq!(indexed(&[], &[]).propose(&[], 4), None);
    }

    proptest! {
        #[test]
        fn a_proposal_follows_its_match_in_the_text(
            prediction in prop::collection::vec(0..4, 0..30),
            prompt in prop::collection::vec(0..4, 0..100),
            answer in prop::collection::vec(0..4, 0..100),
            drafted in prop::collection::vec(0..4, 0..40),
            n in 0_usize..9,
        ) {
            let mut lookup = indexed(&prediction, &prompt);
            lookup.extend(&answer);
            let committed = [prompt, answer].concat();
            let Some(proposal) = lookup.propose(&drafted, n) else { return Ok(()) };
            prop_assert!(!proposal.tokens.is_empty() && proposal.tokens.len() <= n);
            let tail = [&committed[..], &drafted[..]].concat();
            let copied = |text: &[Token]| {
                let matched = &tail[tail.len().saturating_sub(proposal.matched)..];
                let wanted = [matched, &proposal.tokens[..]].concat();
                text.windows(wanted.len()).any(|window| window == wanted)
            };
            let from_the_start = prediction.starts_with(&proposal.tokens) && drafted.is_empty();
            let found = if proposal.predicted { copied(&prediction) || from_the_start } else { copied(&committed) };
            prop_assert!(found);
        }
    }
}
