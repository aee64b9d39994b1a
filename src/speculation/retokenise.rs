//! Text of a drafter with another vocabulary, as tokens of the target.
//!
//! A tokenizer may join what a drafter says with what stands before it, or with what it says next. So the text is tokenised
//! together with a look-back over the committed text, and the end of it is held back until the word is complete. The tokens
//! are told with their bytes: where exactly the drafter's text begins among them is seen, not guessed. That is the way of
//! "universal assisted generation" (SLEM in Timor et al., "Accelerating LLM Inference with Lossless Speculative Decoding
//! Algorithms for Heterogeneous Vocabularies", 2025), which looks back over tokens of both vocabularies instead.

use super::Token;

/// Bytes of look-back, at least, where the text is that long.
const LOOK_BACK: usize = 48;
/// In scripts without spaces so many characters at the end are held back. No token that is common spans more.
const UNSPACED: usize = 4;

/// A token of the target and the bytes that it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spelled {
    /// The token.
    pub token: Token,
    /// Its bytes; no valid text where a character is spread over several tokens.
    pub bytes: Vec<u8>,
}

/// What to tokenise next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    /// The look-back and all of the drafter's text.
    LookBack,
    /// What was not handed out yet, alone: where the target has cut a word that its tokenizer would not cut.
    Alone,
}

/// Turns one text of a drafter into tokens of the target, as it comes.
///
/// Tokenising is left to the caller: as long as [`Self::question`] gives a text, [`Self::answer`] wants its tokens.
#[derive(Debug)]
pub struct Retokeniser {
    look_back: String,
    /// Tokens of the first character of the drafter's text that are committed already.
    begun: Vec<Token>,
    /// What the drafter has said.
    text: String,
    /// Nothing is held back any more.
    complete: bool,
    handed_out: Vec<Token>,
    /// Bytes of `text` that these are.
    handed: usize,
    /// Bytes of `text` that were looked at, as far as they may be handed out.
    seen: usize,
    asked: Option<(Question, usize)>,
}

impl Retokeniser {
    /// For text that follows `before`. `begun` are the tokens after it that are no whole character yet: the drafter, who
    /// cannot be told of them, says that character once more.
    #[must_use]
    pub fn new(before: &str, begun: Vec<Token>) -> Self {
        Self {
            look_back: before[look_back(before)..].to_owned(),
            begun,
            text: String::new(),
            complete: false,
            handed_out: Vec::new(),
            handed: 0,
            seen: 0,
            asked: None,
        }
    }

    /// The drafter's text goes on.
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// The drafter's text ends here, as a text: its last word is one.
    pub fn complete(&mut self) {
        self.complete = true;
    }

    /// Whether any token was handed out.
    #[must_use]
    pub fn handed_out(&self) -> bool {
        !self.handed_out.is_empty()
    }

    /// A text whose tokens are needed to go on; `None` until there is more text.
    pub fn question(&mut self) -> Option<String> {
        if self.asked.is_none() {
            let settled = if self.complete {
                self.text.len()
            } else {
                settled(&self.text)
            };
            self.asked = (settled > self.seen).then_some((Question::LookBack, settled));
        }
        let (ask, _) = self.asked?;
        Some(match ask {
            Question::LookBack => format!("{}{}", self.look_back, self.text),
            Question::Alone => self.text[self.handed..].to_owned(),
        })
    }

    /// Takes the tokens of the last question's text; returns those that may be offered, after those returned before.
    pub fn answer(&mut self, spelled: &[Spelled]) -> Vec<Token> {
        let Some((ask, settled)) = self.asked.take() else {
            return Vec::new();
        };
        let found = match ask {
            Question::LookBack => {
                let known = [&self.begun[..], &self.handed_out].concat();
                self.after(spelled, 0, &known, settled)
            }
            Question::Alone => {
                let known = if self.handed == 0 {
                    self.begun.clone()
                } else {
                    Vec::new()
                };
                self.after(spelled, self.handed, &known, settled)
            }
        };
        let Some((tokens, end)) = found else {
            if ask == Question::LookBack {
                self.asked = Some((Question::Alone, settled));
            } else {
                self.seen = settled;
            }
            return Vec::new();
        };
        self.seen = settled;
        self.handed = self.handed.max(end);
        self.handed_out.extend_from_slice(&tokens);
        tokens
    }

    /// Of the tokens of some text that ends with `self.text[from..]`: those that follow the `known` ones, as far as whole
    /// characters and `settled` reach, and where in `self.text` they end. `None` if they do not follow.
    fn after(&self, spelled: &[Spelled], from: usize, known: &[Token], settled: usize) -> Option<(Vec<Token>, usize)> {
        // A tokenizer may add a space at the beginning, so that places are counted from the end.
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
        let (mut tokens, mut safe) = (Vec::new(), (0, from.max(self.handed)));
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

/// Where the look-back begins: at a word, if that can be told.
fn look_back(before: &str) -> usize {
    let mut near = before.len().saturating_sub(LOOK_BACK);
    while !before.is_char_boundary(near) {
        near -= 1;
    }
    settled(&before[..near])
}

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

/// A letter of a script that knows no capitals, and in most cases no spaces.
fn unspaced(c: char) -> bool {
    !c.is_ascii() && c.is_alphabetic() && !c.is_lowercase() && !c.is_uppercase()
}

/// Up to where the tokens of a text stay what they are when more text follows: to the end of the last word or number that
/// something else follows. What splits a text for the usual tokenizers (GPT-2's pattern and its successors, the spaces of
/// `SentencePiece`) always splits there, while a space, a bracket or a line break may belong to what comes next. Marks
/// outside of ASCII may belong to the letter before them.
fn settled(text: &str) -> usize {
    let mut following = text.chars().count();
    let mut settled = 0;
    for ((at, next), previous) in text.char_indices().skip(1).zip(text.chars()) {
        following -= 1;
        let ends = match class(previous) {
            CharClass::Other => false,
            kind => kind != class(next) && (next.is_ascii() || next.is_whitespace() || class(next) != CharClass::Other),
        };
        if ends || (unspaced(previous) && following > UNSPACED) {
            settled = at;
        }
    }
    settled
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;

    /// A byte-level BPE with GPT-2's way of splitting: the tokens 0 to 255 are bytes, the others are learnt from a text.
    struct Toy {
        merges: HashMap<(Token, Token), Token>,
        bytes: Vec<Vec<u8>>,
        /// What it puts before every text, as `SentencePiece` does.
        adds: &'static str,
    }

    impl Toy {
        fn learn(from: &str, n: usize) -> Self {
            let mut toy = Self {
                merges: HashMap::new(),
                adds: "",
                bytes: (0..=255).map(|byte| vec![byte]).collect(),
            };
            for _ in 0..n {
                let mut pairs: HashMap<(Token, Token), usize> = HashMap::new();
                for word in words(from) {
                    for pair in toy.word(word).windows(2) {
                        *pairs.entry((pair[0], pair[1])).or_default() += 1;
                    }
                }
                let Some((pair, _)) = pairs.into_iter().max_by_key(|(pair, count)| (*count, *pair)) else {
                    break;
                };
                toy.merges.insert(pair, Token::try_from(toy.bytes.len()).unwrap());
                let joined = [pair.0, pair.1].map(|it| toy.bytes[usize::try_from(it).unwrap()].clone());
                toy.bytes.push(joined.concat());
            }
            toy
        }

        fn word(&self, word: &str) -> Vec<Token> {
            let mut tokens: Vec<Token> = word.bytes().map(Token::from).collect();
            while let Some((i, joined)) = (1..tokens.len())
                .filter_map(|i| Some((i, *self.merges.get(&(tokens[i - 1], tokens[i]))?)))
                .min_by_key(|(_, joined)| *joined)
            {
                tokens.splice(i - 1..=i, [joined]);
            }
            tokens
        }

        fn tokens(&self, text: &str) -> Vec<Token> {
            words(text).into_iter().flat_map(|word| self.word(word)).collect()
        }

        fn bytes(&self, tokens: &[Token]) -> Vec<u8> {
            tokens
                .iter()
                .flat_map(|token| self.bytes[usize::try_from(*token).unwrap()].clone())
                .collect()
        }

        fn spell(&self, text: &str) -> Vec<Spelled> {
            let spelled = |token| Spelled {
                token,
                bytes: self.bytes(&[token]),
            };
            let text = format!("{}{text}", self.adds);
            self.tokens(&text).into_iter().map(spelled).collect()
        }

        /// All that comes of these pieces.
        fn draft(&self, mut retokeniser: Retokeniser, pieces: &[&str]) -> Vec<Token> {
            let mut tokens = Vec::new();
            for i in 0..=pieces.len() {
                match pieces.get(i) {
                    Some(piece) => retokeniser.push(piece),
                    None => retokeniser.complete(),
                }
                while let Some(question) = retokeniser.question() {
                    let more = retokeniser.answer(&self.spell(&question));
                    let text = self.bytes(&[&tokens[..], &more[..]].concat());
                    tokens.extend(more);
                    if retokeniser.begun.is_empty() {
                        assert!(retokeniser.text.as_bytes().starts_with(&text));
                        assert!(retokeniser.text.is_char_boundary(text.len()), "a character is cut");
                    }
                }
            }
            tokens
        }
    }

    /// ` ?letters`, ` ?digits`, ` ?others`, spaces but for the last before something else.
    fn words(text: &str) -> Vec<&str> {
        let mut words = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let spaces = rest.len() - rest.trim_start().len();
            let first_word = &rest[spaces..];
            let length = if spaces > 1 && !first_word.is_empty() {
                spaces - rest[..spaces].chars().next_back().map_or(1, char::len_utf8)
            } else if first_word.is_empty() {
                spaces
            } else if spaces == 1 && !rest.starts_with(' ') {
                1
            } else {
                let kind = class(first_word.chars().next().unwrap());
                let same = |c: char| !c.is_whitespace() && class(c) == kind;
                spaces + first_word.find(|c| !same(c)).unwrap_or(first_word.len())
            };
            let (word, others) = rest.split_at(length);
            words.push(word);
            rest = others;
        }
        words
    }

    const SAMPLE: &str = "the recursion of a recursive function is recurring; the base case (see 10, 100, 1000) ends \
                          the recursion. Ünïcode ïs the ünion of 日本語 and 日本 and 😀😀. the cat\n\n    the hat\n    10";

    fn toy() -> &'static Toy {
        static TOY: OnceLock<Toy> = OnceLock::new();
        TOY.get_or_init(|| Toy::learn(SAMPLE, 120))
    }

    fn toy_that_adds_a_space() -> &'static Toy {
        static TOY: OnceLock<Toy> = OnceLock::new();
        TOY.get_or_init(|| Toy {
            adds: " ",
            ..Toy::learn(SAMPLE, 120)
        })
    }

    #[test]
    fn the_toy_is_a_tokenizer() {
        let toy = toy();
        assert_eq!(toy.bytes(&toy.tokens(SAMPLE)), SAMPLE.as_bytes());
        assert!(toy.tokens(SAMPLE).len() * 2 < SAMPLE.len());
        assert_eq!(words("a  b\n\n c1; "), ["a", " ", " b", "\n\n", " c", "1", ";", " "]);
    }

    #[test]
    fn a_word_is_held_back_until_it_is_complete() {
        let toy = toy();
        let mut retokeniser = Retokeniser::new("the", Vec::new());
        for piece in [" rec", "urs", "ion"] {
            retokeniser.push(piece);
            assert_eq!(retokeniser.question(), None);
        }
        retokeniser.push(" of");
        let question = retokeniser.question().unwrap();
        assert_eq!(question, "the recursion of");
        assert_eq!(
            retokeniser.answer(&toy.spell(&question)),
            toy.tokens(" recursion"),
            "as one would tokenise it at once"
        );
        assert_eq!(retokeniser.question(), None);
    }

    #[test]
    fn where_the_target_has_cut_a_word_the_rest_is_a_draft_too() {
        let toy = toy();
        let joined = toy.tokens("the recursion");
        assert_ne!(joined, [toy.tokens("the recurs"), toy.tokens("ion")].concat());
        let tokens = toy.draft(Retokeniser::new("the recurs", Vec::new()), &["ion of"]);
        assert_eq!(toy.bytes(&tokens), b"ion of");
    }

    #[test]
    fn a_character_that_was_begun_is_finished() {
        let toy = Toy::learn("abc", 2);
        let begun = toy.tokens("😀")[..2].to_vec();
        let tokens = toy.draft(Retokeniser::new("so ", begun.clone()), &["😀 it"]);
        assert_eq!(toy.bytes(&[begun, tokens].concat()), "😀 it".as_bytes());
        let other = toy.draft(Retokeniser::new("so ", toy.tokens("é")[..1].to_vec()), &["😀 it"]);
        assert_eq!(other, Vec::<Token>::new(), "what contradicts is not offered");
    }

    #[test]
    fn a_space_that_the_tokenizer_adds_is_no_part_of_the_draft() {
        let spelled = |text: &str, token| Spelled {
            token,
            bytes: text.as_bytes().to_vec(),
        };
        let mut retokeniser = Retokeniser::new("the", Vec::new());
        retokeniser.push(" cat sat");
        assert_eq!(retokeniser.question().as_deref(), Some("the cat sat"));
        let answer = [spelled(" the", 1), spelled(" cat", 2), spelled(" sat", 3)];
        assert_eq!(retokeniser.answer(&answer), [2]);
        retokeniser.push("on.");
        assert_eq!(retokeniser.question().as_deref(), Some("the cat saton."));
        let changed = [spelled(" the", 1), spelled(" cat", 2), spelled(" SATON.", 4)];
        assert!(retokeniser.answer(&changed).is_empty());
        assert_eq!(retokeniser.question().as_deref(), Some(" saton."));
        assert!(retokeniser.answer(&[spelled(" SATON.", 4)]).is_empty());
        assert_eq!(retokeniser.question(), None, "nothing can be done with that");
    }

    #[test]
    fn scripts_without_spaces_are_not_held_back_for_ever() {
        let toy = toy();
        let mut retokeniser = Retokeniser::new("", Vec::new());
        retokeniser.push("日本語日本語日本語");
        let question = retokeniser.question().unwrap();
        assert!(!retokeniser.answer(&toy.spell(&question)).is_empty());
    }

    #[test]
    fn tokens_that_end_inside_of_a_character_are_handed_out_with_its_rest() {
        let spelled = |token, bytes: &[u8]| Spelled {
            token,
            bytes: bytes.to_vec(),
        };
        let text = "日本語日本語";
        let mut retokeniser = Retokeniser::new("", Vec::new());
        retokeniser.push(text);
        assert_eq!(settled(text), "日".len());
        assert!(retokeniser.question().is_some());
        let bytes = text.as_bytes();
        let answer = [
            spelled(1, &bytes[..2]),
            spelled(2, &bytes[2..6]),
            spelled(3, &bytes[6..]),
        ];
        assert!(retokeniser.answer(&answer).is_empty());
        retokeniser.push("語。.");
        retokeniser.complete();
        let whole = retokeniser.question().unwrap();
        let answer = [&answer[..], &[spelled(4, &whole.as_bytes()[text.len()..])]].concat();
        assert_eq!(retokeniser.answer(&answer), [1, 2, 3, 4]);
    }

    /// Words of the sample, with pieces of them and things in between.
    fn text() -> impl Strategy<Value = String> {
        let word = prop_oneof![
            Just("the"),
            Just("recurs"),
            Just("ion"),
            Just("recursion"),
            Just("cat"),
            Just("ünïon"),
            Just("10"),
            Just("0"),
            Just(" "),
            Just(" "),
            Just(" "),
            Just("  "),
            Just("\n"),
            Just("\n    "),
            Just("("),
            Just(")"),
            Just("; "),
            Just(". "),
            Just("'s"),
            Just("😀"),
        ];
        prop::collection::vec(word, 0..24).prop_map(|words| words.concat())
    }

    fn unspaced_text() -> impl Strategy<Value = String> {
        prop::collection::vec(prop_oneof![text(), "[日本語の]{0,12}"], 0..4).prop_map(|parts| parts.concat())
    }

    fn cut<'a>(text: &'a str, at: &[prop::sample::Index]) -> Vec<&'a str> {
        let mut places: Vec<usize> = at
            .iter()
            .map(|at| at.index(text.len() + 1))
            .filter(|at| text.is_char_boundary(*at))
            .chain([0, text.len()])
            .collect();
        places.sort_unstable();
        places.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect()
    }

    proptest! {
        #[test]
        fn how_the_text_is_cut_into_pieces_makes_no_difference(
            before in text(), after in text(), at: Vec<prop::sample::Index>,
        ) {
            let toy = toy();
            let whole = toy.draft(Retokeniser::new(&before, Vec::new()), &[&after]);
            let pieces = toy.draft(Retokeniser::new(&before, Vec::new()), &cut(&after, &at));
            prop_assert_eq!(&pieces, &whole);
            prop_assert_eq!(toy.bytes(&whole), after.as_bytes(), "all of it comes in the end");
        }

        /// What the target would say of its own accord is offered as it would say it.
        #[test]
        fn a_text_that_goes_on_where_a_token_ends_has_the_tokens_of_the_whole(
            text in text(), place: prop::sample::Index, at: Vec<prop::sample::Index>, adds_a_space: bool,
        ) {
            let toy = if adds_a_space { toy_that_adds_a_space() } else { toy() };
            let text = format!("it is;{text}");
            let tokens = toy.tokens(&text);
            let prompt = toy.tokens("it is;").len();
            let place = prompt + place.index(tokens.len() + 1 - prompt);
            let before = toy.bytes(&tokens[..place]);
            if let Ok(before) = String::from_utf8(before) {
                let after = &text[before.len()..];
                let drafted = toy.draft(Retokeniser::new(&before, Vec::new()), &cut(after, &at));
                prop_assert_eq!(&drafted, &tokens[place..]);
            }
        }

        /// The assertions are in [`Toy::draft`].
        #[test]
        fn whatever_the_text_no_character_is_cut_and_nothing_is_added(
            before in unspaced_text(), after in unspaced_text(), at: Vec<prop::sample::Index>,
        ) {
            let toy = toy();
            let tokens = toy.draft(Retokeniser::new(&before, Vec::new()), &cut(&after, &at));
            prop_assert_eq!(toy.bytes(&tokens), after.as_bytes());
        }

        /// A character that the target has begun, whatever the drafter makes of it.
        #[test]
        fn a_character_in_the_making_is_finished_or_nothing_is_offered(
            before in unspaced_text(), c: char, said in unspaced_text(), right: bool, n in 1_usize..4,
        ) {
            let toy = toy();
            let spelled = toy.tokens(&c.to_string());
            if n < spelled.len() {
                let begun = spelled[..n].to_vec();
                let after = if right { format!("{c}{said}") } else { said };
                let tokens = toy.draft(Retokeniser::new(&before, begun.clone()), &[&after]);
                let text = toy.bytes(&[begun, tokens.clone()].concat());
                prop_assert!(tokens.is_empty() || after.as_bytes() == text);
            }
        }
    }
}
