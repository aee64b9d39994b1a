//! Numbers with their nouns, for people.

use std::fmt::Display;

/// `1 answer runs`, `2 answers run`: the number, and the words for one or for several.
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
    fn one_is_told_otherwise_than_none_and_several() {
        let answers = |number: u64| count(number, "answer runs", "answers run");
        assert_eq!(
            [answers(0), answers(1), answers(2)],
            ["0 answers run", "1 answer runs", "2 answers run"]
        );
    }
}
