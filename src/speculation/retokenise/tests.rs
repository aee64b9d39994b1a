use std::collections::HashMap;
use std::sync::OnceLock;

use proptest::prelude::*;

use super::*;

/// A byte-level BPE with GPT-2's splitting: the tokens 0 to 255 are bytes, the others are learnt from a text.
struct ToyTokenizer {
    merges: HashMap<(Token, Token), Token>,
    bytes: Vec<Vec<u8>>,
    /// Text that it puts before every text, as `SentencePiece` does.
    adds: &'static str,
}

impl ToyTokenizer {
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

    /// All tokens drafted from these pieces.
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
                if retokeniser.partial.is_empty() {
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

fn toy() -> &'static ToyTokenizer {
    static TOY: OnceLock<ToyTokenizer> = OnceLock::new();
    TOY.get_or_init(|| ToyTokenizer::learn(SAMPLE, 120))
}

fn toy_that_adds_a_space() -> &'static ToyTokenizer {
    static TOY: OnceLock<ToyTokenizer> = OnceLock::new();
    TOY.get_or_init(|| ToyTokenizer {
        adds: " ",
        ..ToyTokenizer::learn(SAMPLE, 120)
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
fn the_rest_of_a_word_that_the_target_cut_is_drafted() {
    let toy = toy();
    let joined = toy.tokens("the recursion");
    assert_ne!(joined, [toy.tokens("the recurs"), toy.tokens("ion")].concat());
    let tokens = toy.draft(Retokeniser::new("the recurs", Vec::new()), &["ion of"]);
    assert_eq!(toy.bytes(&tokens), b"ion of");
}

#[test]
fn a_partial_character_is_completed() {
    let toy = ToyTokenizer::learn("abc", 2);
    let begun = toy.tokens("😀")[..2].to_vec();
    let tokens = toy.draft(Retokeniser::new("so ", begun.clone()), &["😀 it"]);
    assert_eq!(toy.bytes(&[begun, tokens].concat()), "😀 it".as_bytes());
    let other = toy.draft(Retokeniser::new("so ", toy.tokens("é")[..1].to_vec()), &["😀 it"]);
    assert_eq!(other, Vec::<Token>::new(), "a contradiction is not offered");
}

#[test]
fn a_space_that_the_tokenizer_adds_is_not_part_of_the_draft() {
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
    assert_eq!(retokeniser.question(), None, "there is nothing else to try");
}

#[test]
fn text_without_spaces_is_not_held_back_forever() {
    let toy = toy();
    let mut retokeniser = Retokeniser::new("", Vec::new());
    retokeniser.push("日本語日本語日本語");
    let question = retokeniser.question().unwrap();
    assert!(!retokeniser.answer(&toy.spell(&question)).is_empty());
}

#[test]
fn tokens_that_end_inside_a_character_are_handed_out_with_its_rest() {
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
    fn the_pieces_in_which_text_arrives_make_no_difference(
        before in text(), after in text(), at: Vec<prop::sample::Index>,
    ) {
        let toy = toy();
        let whole = toy.draft(Retokeniser::new(&before, Vec::new()), &[&after]);
        let pieces = toy.draft(Retokeniser::new(&before, Vec::new()), &cut(&after, &at));
        prop_assert_eq!(&pieces, &whole);
        prop_assert_eq!(toy.bytes(&whole), after.as_bytes(), "all of it comes in the end");
    }

    /// Text that the target itself would write is offered in the target's own tokens.
    #[test]
    fn text_that_continues_at_a_token_border_has_the_tokens_of_the_whole_text(
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

    /// The assertions are in [`ToyTokenizer::draft`].
    #[test]
    fn no_text_is_cut_inside_a_character_or_extended(
        before in unspaced_text(), after in unspaced_text(), at: Vec<prop::sample::Index>,
    ) {
        let toy = toy();
        let tokens = toy.draft(Retokeniser::new(&before, Vec::new()), &cut(&after, &at));
        prop_assert_eq!(toy.bytes(&tokens), after.as_bytes());
    }

    /// A partial character of the target, followed by any text of the drafter.
    #[test]
    fn a_partial_character_is_completed_or_nothing_is_offered(
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
