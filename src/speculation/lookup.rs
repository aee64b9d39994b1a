//! A drafter without a model: text that was there before may come again.
//!
//! The last tokens are looked for in the prompt, in the answer so far and in the client's own prediction of the answer; what
//! followed there is the draft (prompt lookup decoding, Saxena 2023; predicted outputs, OpenAI 2024). It costs no time
//! worth naming and is right when text is copied: edits of code, quotes, lists of the same shape.
//!
//! An edit differs here and there from what it copies, and goes on as before behind that. So the place in the copied text is
//! followed through the answer: after a token that does not stand there, the copy is taken up near it, before as many
//! tokens agree as it takes to find a place anywhere in the text.

use std::collections::HashMap;

use super::copied_text::Copied;
use super::{Token, TokenClass};

/// Tokens that must agree at least.
pub(super) const SHORTEST: usize = 3;
/// Tokens that are compared at most; agreement over more says nothing more.
const LONGEST: usize = 32;
/// Places remembered for the same few tokens; older ones are forgotten.
const PLACES: usize = 8;
/// So many agreeing tokens make sure that the answer copies the text there.
const SURE: usize = 8;
/// Separates the prediction from the prompt; no token.
const GAP: Token = Token::MIN;

/// What may follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The tokens.
    pub tokens: Vec<Token>,
    /// How many of the last tokens stand before them in the place that they were found in; 32 at most. Fewer than three where
    /// a copied text is taken up again after a change.
    pub matched: usize,
    /// They stand in the client's prediction.
    pub predicted: bool,
}

impl Proposal {
    /// What is known of each of these tokens: when its turn comes, those before it match as well.
    pub fn classes(&self) -> impl Iterator<Item = TokenClass> {
        let class = if self.predicted {
            TokenClass::of_prediction
        } else {
            TokenClass::of_match
        };
        (self.matched..).take(self.tokens.len()).map(class)
    }
}

/// An index of one completion's text.
#[derive(Debug, Default)]
pub struct Lookup {
    /// The prediction, a gap, the committed tokens.
    text: Vec<Token>,
    /// Length of the prediction.
    predicted: usize,
    /// Where the committed tokens begin, and where the answer does.
    begin: usize,
    answer: Option<usize>,
    /// Ends of the places where these tokens stand, the latest last.
    places: HashMap<[Token; SHORTEST], Vec<usize>>,
    /// The text that the answer copies.
    copied: Option<Copied>,
}

impl Lookup {
    /// An index of nothing but what the client predicts of the answer (perhaps nothing).
    #[must_use]
    pub fn new(prediction: &[Token]) -> Self {
        let mut lookup = Self::default();
        lookup.push(prediction);
        lookup.predicted = prediction.len();
        lookup.text.push(GAP);
        lookup.begin = lookup.text.len();
        lookup.copied = (!prediction.is_empty()).then_some(Copied::new(0, 0));
        lookup
    }

    /// Takes in committed tokens; the first call brings the prompt.
    pub fn extend(&mut self, committed: &[Token]) {
        if self.answer.is_none() {
            self.push(committed);
            self.answer = Some(self.text.len());
            return;
        }
        for token in committed {
            self.copied = self.copied.and_then(|copied| copied.after(*token, &self.text));
            self.push(&[*token]);
            let tail = &self.text[self.text.len() - self.committed().min(LONGEST)..];
            if let Some((matched, at)) = self.place(tail).filter(|(matched, _)| *matched >= SURE) {
                self.copied = Some(Copied::new(at, matched));
            }
        }
    }

    /// Number of committed tokens taken in.
    fn committed(&self) -> usize {
        self.text.len() - self.begin
    }

    /// At most `n` tokens that may follow the committed ones and `drafted` after them.
    #[must_use]
    pub fn propose(&self, drafted: &[Token], n: usize) -> Option<Proposal> {
        if n == 0 {
            return None;
        }
        let kept = LONGEST.saturating_sub(drafted.len()).min(self.committed());
        let tail = [
            &self.text[self.text.len() - kept..],
            &drafted[drafted.len().saturating_sub(LONGEST)..],
        ]
        .concat();
        self.predicted_from_the_start(drafted, n)
            .or_else(|| self.found(&tail, n))
            .or_else(|| self.taken_up_again(drafted, n))
    }

    /// What follows the longest match of the end of `tail`.
    fn found(&self, tail: &[Token], n: usize) -> Option<Proposal> {
        let (matched, at) = self.place(tail)?;
        Some(self.proposal(at, matched, n))
    }

    /// What follows in the copied text after a change.
    fn taken_up_again(&self, drafted: &[Token], n: usize) -> Option<Proposal> {
        let Copied { at, agreeing, .. } = self.copied.filter(|_| drafted.is_empty())?;
        let proposal = self.proposal(at, agreeing.min(LONGEST), n);
        (!proposal.tokens.is_empty()).then_some(proposal)
    }

    /// How many tokens of the end of `tail` stand in a place, and where that ends: the place of the longest match, of equally
    /// long ones that of the text that is copied, else of the client's prediction, else the latest.
    fn place(&self, tail: &[Token]) -> Option<(usize, usize)> {
        let places = self.places.get(tail.last_chunk::<SHORTEST>()?)?;
        let copied = self.copied.map(|copied| copied.at);
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

    /// At most `n` tokens from there on.
    fn proposal(&self, at: usize, matched: usize, n: usize) -> Proposal {
        let text = self.text.get(at..).unwrap_or_default();
        Proposal {
            tokens: text.iter().copied().take(n).take_while(|token| *token != GAP).collect(),
            matched,
            predicted: at < self.predicted,
        }
    }

    /// Before the answer has begun it may be what the client predicts.
    fn predicted_from_the_start(&self, drafted: &[Token], n: usize) -> Option<Proposal> {
        let begun = self.answer? < self.text.len() || !drafted.is_empty();
        (self.predicted > 0 && !begun).then(|| self.proposal(0, SHORTEST, n))
    }

    fn push(&mut self, tokens: &[Token]) {
        for token in tokens {
            self.text.push(*token);
            if let Some(last) = self.text.last_chunk::<SHORTEST>().filter(|last| !last.contains(&GAP)) {
                let places = self.places.entry(*last).or_default();
                if places.len() == PLACES {
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
    fn what_followed_the_same_words_before_is_proposed() {
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
    fn an_answer_begins_as_the_client_predicts_and_is_found_again_after_a_change() {
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
    fn what_the_client_predicts_goes_before_the_same_text_elsewhere() {
        // An edit: the text stands in the prompt and in the prediction.
        let mut lookup = indexed(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5, 50]);
        let predicted = |lookup: &Lookup| lookup.propose(&[], 2).map(|it| (it.tokens, it.predicted));
        assert_eq!(predicted(&lookup), Some((vec![1, 2], true)));
        lookup.extend(&[1, 2, 3]);
        assert_eq!(predicted(&lookup), Some((vec![4, 5], true)));
    }

    #[test]
    fn a_copy_is_taken_up_again_right_behind_a_change() {
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
            // ... one of which stands near
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
    fn a_copy_that_an_answer_has_left_is_not_proposed_any_more() {
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
        fn a_proposal_stands_in_the_text_after_what_matched(
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
