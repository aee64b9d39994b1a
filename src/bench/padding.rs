//! Lengthens prompts with unrelated text, for measurements with a longer context.

use std::fmt::Write;

use super::Prompt;
use crate::upstream::LlamaServer;

/// Characters per token, if the target cannot count tokens.
const CHARACTERS_PER_TOKEN: usize = 4;
/// Characters of the sample whose tokens the target counts.
const SAMPLE: usize = 8000;

const NAMES: [&str; 7] = ["Clara", "Hugo", "Mia", "Otto", "Ruth", "Leo", "Nora"];
const THINGS: [&str; 9] = [
    "ladder",
    "map",
    "clock",
    "kettle",
    "bicycle",
    "lamp",
    "violin",
    "suitcase",
    "telescope",
];
const PLACES: [&str; 11] = [
    "library", "harbour", "workshop", "station", "market", "school", "museum", "farm", "theatre", "bakery", "tower",
];

/// Lengthens each prompt to about `tokens` tokens, with unrelated notes before the question. `target` counts the tokens; if it cannot,
/// a token is taken as four characters.
pub async fn pad(prompts: &mut [Prompt], tokens: usize, target: &LlamaServer) {
    let sample = notes(0, SAMPLE);
    let wanted = match target.tokenize(&sample).await {
        Ok(counted) if !counted.is_empty() => tokens * sample.len() / counted.len(),
        Ok(_) | Err(_) => tokens * CHARACTERS_PER_TOKEN,
    };
    for (index, prompt) in prompts.iter_mut().enumerate() {
        let own: usize = prompt
            .messages
            .iter()
            .map(|message| message.content.chars().count())
            .sum();
        let Some(last) = prompt.messages.last_mut() else {
            continue;
        };
        if let Some(missing) = wanted.checked_sub(own).filter(|missing| *missing > 0) {
            // Each prompt begins with another note, so that no prompt is a prefix of another.
            last.content = format!(
                "Here are some notes, which you do not need.\n\n{}\n\n{}",
                notes(index * 1000, missing),
                last.content
            );
        }
    }
}

/// Different sentences, numbered from `first`.
fn notes(first: usize, characters: usize) -> String {
    let mut text = String::new();
    for number in first.. {
        if text.len() >= characters {
            break;
        }
        let pick = |words: &[&'static str], salt: usize| words[(number / 3 + number * salt) % words.len()];
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "Note {number}: {} took the {} to the {} at {}:{:02} and paid {} for it.",
            pick(&NAMES, 3),
            pick(&THINGS, 5),
            pick(&PLACES, 7),
            8 + number % 11,
            number * 7 % 60,
            20 + number * 13 % 71,
        );
    }
    text.truncate(characters);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notes_are_as_long_as_wanted_and_all_different() {
        let text = notes(0, 5000);
        assert_eq!(text.len(), 5000);
        let mut lines: Vec<&str> = text.lines().collect();
        let all = lines.len();
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), all);
    }

    #[tokio::test]
    async fn the_question_stays_last_and_a_long_prompt_as_it_is() {
        let unreachable = LlamaServer::new("http://127.0.0.1:9", None).unwrap();
        let mut prompts = Prompt::shipped().unwrap();
        let before = prompts.clone();
        pad(&mut prompts, 100, &unreachable).await;
        for (padded, prompt) in prompts.iter().zip(&before) {
            assert!(padded.question().ends_with(prompt.question()));
            if prompt.question().len() >= 400 {
                assert_eq!(padded, prompt);
            } else {
                assert!(
                    (380..480).contains(&padded.question().len()),
                    "{}",
                    padded.question().len()
                );
            }
        }
    }
}
