//! Turns the text of a drafter with another vocabulary into tokens of the target.
//!
//! A tokenizer may join the drafter's text with the text before it or with the text that follows. So the text is tokenised
//! together with a look-back over the committed text, and its end is held back until the word is complete. The target reports
//! the bytes of each token, which show exactly where the drafter's text begins. Invariant: the tokens handed out are a prefix
//! of the drafter's text and cut no character.
//!
//! The method is "universal assisted generation" (SLEM in Timor et al., "Accelerating LLM Inference with Lossless Speculative
//! Decoding Algorithms for Heterogeneous Vocabularies", 2025), which looks back over tokens of both vocabularies instead. The
//! engine's text drafter runs one [`Retokeniser`] per draft.

use super::Token;

/// Fewest bytes of look-back, if the text is that long.
const MIN_LOOK_BACK: usize = 48;
/// Characters held back at the end of a text in a script without spaces. Common tokens span no more.
const HELD_BACK_UNSPACED: usize = 4;

/// A token of the target and its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spelled {
    /// The token.
    pub token: Token,
    /// Its bytes; not valid UTF-8 where a character spans several tokens.
    pub bytes: Vec<u8>,
}

/// The text to tokenise next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    /// The look-back and the drafter's whole text.
    LookBack,
    /// Only the text that was not handed out: for a word that the target cut where its tokenizer would not.
    Alone,
}

/// Turns one text of a drafter into tokens of the target while it arrives.
///
/// The caller tokenises: while [`Self::question`] returns a text, pass its tokens to [`Self::answer`].
#[derive(Debug)]
pub struct Retokeniser {
    look_back: String,
    /// Committed tokens that are part of the first character of the drafter's text.
    partial: Vec<Token>,
    /// The drafter's text so far.
    text: String,
    /// Whether the text is complete, so that nothing is held back.
    complete: bool,
    handed_out: Vec<Token>,
    /// Bytes of `text` that these tokens cover.
    handed_bytes: usize,
    /// Bytes of `text` that were examined and may be handed out.
    examined: usize,
    /// The question to answer, and the bytes of `text` that may be handed out with it.
    asked: Option<(Question, usize)>,
}

impl Retokeniser {
    /// For text that follows `before`. `partial` are the tokens after `before` that are not a whole character: the drafter
    /// cannot read them and repeats the character.
    #[must_use]
    pub fn new(before: &str, partial: Vec<Token>) -> Self {
        Self {
            look_back: before[look_back(before)..].to_owned(),
            partial,
            text: String::new(),
            complete: false,
            handed_out: Vec::new(),
            handed_bytes: 0,
            examined: 0,
            asked: None,
        }
    }

    /// Appends to the drafter's text.
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Marks the drafter's text as complete: its last word is whole.
    pub fn complete(&mut self) {
        self.complete = true;
    }

    /// Whether any token was handed out.
    #[must_use]
    pub fn handed_out(&self) -> bool {
        !self.handed_out.is_empty()
    }

    /// The next text to tokenise; `None` until more text is pushed.
    pub fn question(&mut self) -> Option<String> {
        if self.asked.is_none() {
            let settled = if self.complete {
                self.text.len()
            } else {
                settled(&self.text)
            };
            self.asked = (settled > self.examined).then_some((Question::LookBack, settled));
        }
        let (question, _) = self.asked?;
        Some(match question {
            Question::LookBack => format!("{}{}", self.look_back, self.text),
            Question::Alone => self.text[self.handed_bytes..].to_owned(),
        })
    }

    /// Takes the tokens of the last question. Returns the tokens that may be offered after those returned before.
    pub fn answer(&mut self, spelled: &[Spelled]) -> Vec<Token> {
        let Some((question, settled)) = self.asked.take() else {
            return Vec::new();
        };
        let found = match question {
            Question::LookBack => {
                let known = [&self.partial[..], &self.handed_out].concat();
                self.tokens_after(spelled, 0, &known, settled)
            }
            Question::Alone => {
                let known = if self.handed_bytes == 0 {
                    self.partial.clone()
                } else {
                    Vec::new()
                };
                self.tokens_after(spelled, self.handed_bytes, &known, settled)
            }
        };
        let Some((tokens, end)) = found else {
            if question == Question::LookBack {
                self.asked = Some((Question::Alone, settled));
            } else {
                self.examined = settled;
            }
            return Vec::new();
        };
        self.examined = settled;
        self.handed_bytes = self.handed_bytes.max(end);
        self.handed_out.extend_from_slice(&tokens);
        tokens
    }

    /// Takes the tokens of a text that ends with `self.text[from..]`. Returns those after the `known` ones, up to `settled` and
    /// to a whole character, and where in `self.text` they end. `None` if the tokens do not begin with the `known` ones.
    fn tokens_after(
        &self,
        spelled: &[Spelled],
        from: usize,
        known: &[Token],
        settled: usize,
    ) -> Option<(Vec<Token>, usize)> {
        // A tokenizer may add a space at the beginning, so positions count from the end.
        let bytes: Vec<u8> = spelled.iter().flat_map(|it| it.bytes.iter().copied()).collect();
        let start = bytes.len().checked_sub(self.text.len() - from)?;
        if bytes[start..] != self.text.as_bytes()[from..] {
            return None;
        }
        let mut place = 0;
        let first = spelled.iter().position(|it| {
            let here = place;
            place += it.bytes.len();
            here >= start
        })?;
        place = spelled[..first].iter().map(|it| it.bytes.len()).sum();
        let spelled = &spelled[first..];
        let repeats = spelled.len() >= known.len() && spelled.iter().zip(known).all(|(it, token)| it.token == *token);
        if place != start || !repeats {
            return None;
        }
        let mut end = from;
        let (mut tokens, mut safe) = (Vec::new(), (0, from.max(self.handed_bytes)));
        for (i, it) in spelled.iter().enumerate() {
            end += it.bytes.len();
            if end > settled {
                break;
            }
            if i >= known.len() {
                tokens.push(it.token);
                if self.text.is_char_boundary(end) {
                    safe = (tokens.len(), end);
                }
            }
        }
        tokens.truncate(safe.0);
        Some((tokens, safe.1))
    }
}

/// Where the look-back begins: at the start of a word, if one is found.
fn look_back(before: &str) -> usize {
    let mut near = before.len().saturating_sub(MIN_LOOK_BACK);
    while !before.is_char_boundary(near) {
        near -= 1;
    }
    settled(&before[..near])
}

/// Kinds of characters that tokenizers separate.
#[derive(PartialEq, Eq)]
enum CharClass {
    Letter,
    Digit,
    Other,
}

fn class(c: char) -> CharClass {
    if c.is_alphabetic() {
        CharClass::Letter
    } else if c.is_numeric() {
        CharClass::Digit
    } else {
        CharClass::Other
    }
}

/// Whether a character is a letter of a script without capitals, which usually has no spaces either.
fn is_unspaced(c: char) -> bool {
    !c.is_ascii() && c.is_alphabetic() && !c.is_lowercase() && !c.is_uppercase()
}

/// Length of the part of a text whose tokens do not change when more text follows: up to the end of the last word or number
/// that is followed by something else. The usual tokenizers (GPT-2's pattern and its successors, the spaces of
/// `SentencePiece`) always split there. A space, a bracket or a line break may belong to the text that follows, and a mark
/// outside ASCII to the letter before it.
fn settled(text: &str) -> usize {
    let mut following = text.chars().count();
    let mut settled = 0;
    for ((at, next), previous) in text.char_indices().skip(1).zip(text.chars()) {
        following -= 1;
        let ends = match class(previous) {
            CharClass::Other => false,
            kind => kind != class(next) && (next.is_ascii() || next.is_whitespace() || class(next) != CharClass::Other),
        };
        if ends || (is_unspaced(previous) && following > HELD_BACK_UNSPACED) {
            settled = at;
        }
    }
    settled
}

#[cfg(test)]
mod tests;
