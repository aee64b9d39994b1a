//! Compares drafted answers with plain ones: by token ids if the server sends them, otherwise by text.

use serde::Serialize;

use super::contender::Mode;
use super::measure::{Measurements, Sample};
use super::prompts::Prompt;
use super::statistics::ratio;
use crate::upstream::chat::Answer;

/// Number of characters to show from the first difference on.
const SHOWN: usize = 40;

/// Comparison of the drafted answers with the plain ones at one temperature.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verified {
    /// The temperature.
    pub temperature: f64,
    /// Prompts with an answer in both modes.
    pub prompts: usize,
    /// Prompts with equal answers, in text and in tokens.
    pub equal: usize,
    /// Tokens of the plain answers.
    pub tokens: u64,
    /// Tokens before the first difference. A differing answer without token ids counts none.
    pub equal_tokens: u64,
    /// Equal tokens over tokens.
    pub token_equal_rate: Option<f64>,
    /// Whether token ids were compared. `false`: the server sends none, and the texts were compared.
    pub by_token: bool,
    /// Draft tokens that the target verified.
    pub drafted: u64,
    /// Draft tokens that the target kept.
    pub accepted: u64,
    /// Differences between answers.
    pub divergences: Vec<Divergence>,
}

/// The first difference of two answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// Kind of the prompt.
    pub kind: String,
    /// The prompt.
    pub prompt: String,
    /// The first token that differs, counted from 0; `None` if the server sends no token ids.
    pub token: Option<usize>,
    /// The first character that differs, counted from 0.
    pub character: usize,
    /// The plain answer from there on.
    pub plain: String,
    /// The drafted answer from there on.
    pub drafted: String,
}

/// Compares the answers of [`Mode::Attached`] with those of [`Mode::Plain`].
#[must_use]
pub fn verify(temperature: f64, measured: &Measurements, prompts: &[Prompt]) -> Verified {
    let mut verified = Verified {
        temperature,
        prompts: 0,
        equal: 0,
        tokens: 0,
        equal_tokens: 0,
        token_equal_rate: None,
        by_token: true,
        drafted: 0,
        accepted: 0,
        divergences: Vec::new(),
    };
    let of_mode = |mode: Mode| measured.samples.iter().filter(move |sample| sample.mode == mode);
    for drafted in of_mode(Mode::Attached) {
        if let Some(drafting) = drafted.answer.drafting {
            verified.drafted += drafting.drafted;
            verified.accepted += drafting.accepted;
        }
        if let Some(plain) = of_mode(Mode::Plain).find(|plain| plain.question == drafted.question) {
            verified.add(plain, drafted, &prompts[drafted.prompt]);
        }
    }
    verified.token_equal_rate = ratio(verified.equal_tokens as f64, verified.tokens as f64);
    verified
}

impl Verified {
    fn add(&mut self, plain: &Sample, drafted: &Sample, prompt: &Prompt) {
        self.prompts += 1;
        self.tokens += plain.answer.tokens;
        self.by_token &= knows_tokens(&plain.answer) && knows_tokens(&drafted.answer);
        match difference(&plain.answer, &drafted.answer) {
            None => {
                self.equal += 1;
                self.equal_tokens += plain.answer.tokens;
            }
            Some(difference) => {
                self.equal_tokens += difference.equal_tokens;
                self.divergences.push(Divergence {
                    kind: prompt.kind.clone(),
                    prompt: prompt.question().to_owned(),
                    token: difference.token,
                    character: difference.character,
                    plain: difference.plain,
                    drafted: difference.drafted,
                });
            }
        }
    }
}

/// The first difference of two answers.
struct Difference {
    equal_tokens: u64,
    token: Option<usize>,
    character: usize,
    plain: String,
    drafted: String,
}

fn difference(plain: &Answer, drafted: &Answer) -> Option<Difference> {
    let whole = |answer: &Answer| format!("{}{}", answer.reasoning, answer.text);
    let texts = (whole(plain), whole(drafted));
    let same_text = (&plain.text, &plain.reasoning) == (&drafted.text, &drafted.reasoning);
    if same_text && plain.token_ids == drafted.token_ids && plain.tokens == drafted.tokens {
        return None;
    }
    let character = equal_items(texts.0.chars(), texts.1.chars());
    let known = knows_tokens(plain) && knows_tokens(drafted);
    let token = known.then(|| equal_items(plain.token_ids.iter(), drafted.token_ids.iter()));
    let rest = |text: &str| text.chars().skip(character).take(SHOWN).collect();
    Some(Difference {
        equal_tokens: token.map_or(0, |token| token as u64).min(plain.tokens),
        token,
        character,
        plain: rest(&texts.0),
        drafted: rest(&texts.1),
    })
}

/// Whether the server has sent the ids of the answer's tokens.
fn knows_tokens(answer: &Answer) -> bool {
    answer.tokens == 0 || !answer.token_ids.is_empty()
}

/// Number of equal items before the first difference.
fn equal_items<T: PartialEq>(one: impl Iterator<Item = T>, other: impl Iterator<Item = T>) -> usize {
    one.zip(other).take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::upstream::chat::{Drafting, Message};

    fn sample(mode: Mode, question: usize, text: &str) -> Sample {
        let token_ids: Vec<i64> = text.bytes().map(i64::from).collect();
        Sample {
            mode,
            prompt: 0,
            question,
            client: 0,
            answer: Answer {
                text: text.into(),
                tokens: token_ids.len() as u64,
                token_ids,
                drafting: Some(Drafting {
                    generated: 9,
                    drafted: if mode == Mode::Attached { 5 } else { 0 },
                    accepted: if mode == Mode::Attached { 4 } else { 0 },
                }),
                ..Answer::default()
            },
            took: Duration::ZERO,
        }
    }

    fn compare(pairs: &[(&str, &str)]) -> Verified {
        let samples = pairs.iter().enumerate().flat_map(|(question, (plain, drafted))| {
            [
                sample(Mode::Plain, question, plain),
                sample(Mode::Attached, question, drafted),
            ]
        });
        let measured = Measurements {
            samples: samples.collect(),
            blocks: Vec::new(),
        };
        let prompt = Prompt {
            kind: "chat".into(),
            messages: vec![Message::user("Hi")],
            prediction: None,
        };
        verify(0.0, &measured, &[prompt])
    }

    #[test]
    fn equal_answers_have_no_divergence() {
        let verified = compare(&[("one", "one"), ("two", "two")]);
        assert_eq!((verified.prompts, verified.equal, verified.tokens), (2, 2, 6));
        assert_eq!((verified.drafted, verified.accepted), (10, 8));
        assert_eq!(verified.token_equal_rate, Some(1.0));
        assert!(verified.by_token);
        assert!(verified.divergences.is_empty());
    }

    #[test]
    fn the_first_difference_is_shown_from_both_sides() {
        let verified = compare(&[("ten cats", "ten cats"), ("abc def", "abc xyz")]);
        assert_eq!((verified.equal, verified.equal_tokens, verified.tokens), (1, 12, 15));
        let divergence = &verified.divergences[0];
        assert_eq!((divergence.token, divergence.character), (Some(4), 4));
        assert_eq!((divergence.plain.as_str(), divergence.drafted.as_str()), ("def", "xyz"));
    }

    #[test]
    fn a_text_that_ends_early_differs_at_its_end_and_characters_are_not_cut() {
        let divergence = compare(&[("grün", "grü")]).divergences.remove(0);
        assert_eq!(divergence.character, 3);
        assert_eq!((divergence.plain.as_str(), divergence.drafted.as_str()), ("n", ""));
    }

    #[test]
    fn without_token_ids_texts_are_compared() {
        let (mut plain, mut drafted) = (
            sample(Mode::Plain, 0, "abc").answer,
            sample(Mode::Attached, 0, "abd").answer,
        );
        plain.token_ids.clear();
        drafted.token_ids.clear();
        assert!(difference(&plain, &plain).is_none());
        let found = difference(&plain, &drafted).unwrap();
        assert_eq!((found.token, found.character, found.equal_tokens), (None, 2, 0));
    }
}
