//! Numbers with their nouns: `1 answer`, `2 answers`.

use std::fmt::Display;

/// The number with the words for one or for several: `1 answer runs`, `2 answers run`.
pub fn count(number: impl Into<u64>, one: impl Display, several: impl Display) -> String {
    match number.into() {
        1 => format!("1 {one}"),
        number => format!("{number} {several}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_other_words_than_none_and_several() {
        let answers = |number: u64| count(number, "answer runs", "answers run");
        assert_eq!(
            [answers(0), answers(1), answers(2)],
            ["0 answers run", "1 answer runs", "2 answers run"]
        );
    }
}
