//! The prompts of a measurement: the set that ships with the program, or a file of the user.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::upstream::chat::Message;

/// The shipped prompts, in the format of a user's file: one JSON object per line.
const SHIPPED: &str = include_str!("prompts.jsonl");

/// A conversation without its next answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Kind of the answer: `code`, `chat`, …
    pub kind: String,
    /// The conversation; never empty.
    pub messages: Vec<Message>,
    /// Text that the answer is likely to repeat, such as the text to edit: `prediction` of the request.
    pub prediction: Option<String>,
}

/// Why there are no prompts.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The file is missing or cannot be read.
    #[error("cannot read the prompts in {}: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line is not a prompt.
    #[error(
        "line {line} of the prompts is no prompt ({problem}); write e.g. {{\"kind\": \"chat\", \"prompt\": \"Hello\"}}"
    )]
    Line {
        /// Counted from 1.
        line: usize,
        /// The problem.
        problem: String,
    },
    /// The file has no prompts.
    #[error("there are no prompts in the file")]
    Empty,
    /// No prompt is of that kind.
    #[error("no prompt is of the kind `{kind}`; the kinds are {kinds}")]
    UnknownKind {
        /// As asked for.
        kind: String,
        /// Those that there are.
        kinds: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    kind: String,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    prediction: Option<String>,
}

impl Line {
    fn into_prompt(self) -> Result<Prompt, String> {
        let messages = match (self.prompt, self.messages) {
            (Some(prompt), None) => vec![Message::user(prompt)],
            (None, Some(messages)) if !messages.is_empty() => messages,
            (None, _) => return Err("it has neither `prompt` nor `messages`".into()),
            (Some(_), Some(_)) => return Err("it has both `prompt` and `messages`".into()),
        };
        Ok(Prompt {
            kind: self.kind,
            messages,
            prediction: self.prediction,
        })
    }
}

impl Prompt {
    /// The prompts that ship with the program.
    pub fn shipped() -> Result<Vec<Self>, PromptError> {
        parse(SHIPPED)
    }

    /// The prompts of a file.
    pub fn read(path: &Path) -> Result<Vec<Self>, PromptError> {
        let text = std::fs::read_to_string(path).map_err(|source| PromptError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        parse(&text)
    }

    /// The prompts of these kinds, in the order of `prompts`; all prompts if `kinds` is empty.
    pub fn of_kinds(prompts: Vec<Self>, kinds: &[String]) -> Result<Vec<Self>, PromptError> {
        if kinds.is_empty() {
            return Ok(prompts);
        }
        if let Some(kind) = kinds
            .iter()
            .find(|kind| prompts.iter().all(|prompt| prompt.kind != **kind))
        {
            return Err(PromptError::UnknownKind {
                kind: kind.clone(),
                kinds: Self::kinds(&prompts).join(", "),
            });
        }
        Ok(prompts
            .into_iter()
            .filter(|prompt| kinds.contains(&prompt.kind))
            .collect())
    }

    /// The first `n` prompts of each kind, in the order of `prompts`.
    #[must_use]
    pub fn first_of_each_kind(prompts: &[Self], n: usize) -> Vec<Self> {
        let of_kind_before = |index: usize| {
            prompts[..index]
                .iter()
                .filter(|earlier| earlier.kind == prompts[index].kind)
                .count()
        };
        (0..prompts.len())
            .filter(|index| of_kind_before(*index) < n)
            .map(|index| prompts[index].clone())
            .collect()
    }

    /// The kinds, each once, in the order of `prompts`.
    #[must_use]
    pub fn kinds(prompts: &[Self]) -> Vec<&str> {
        let mut kinds: Vec<&str> = Vec::new();
        for prompt in prompts {
            if !kinds.contains(&prompt.kind.as_str()) {
                kinds.push(&prompt.kind);
            }
        }
        kinds
    }

    /// The last message.
    #[must_use]
    pub fn question(&self) -> &str {
        self.messages.last().map_or("", |message| &message.content)
    }
}

fn parse(text: &str) -> Result<Vec<Prompt>, PromptError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines
        .map(|(index, line)| {
            serde_json::from_str::<Line>(line)
                .map_err(|error| error.to_string())
                .and_then(Line::into_prompt)
                .map_err(|problem| PromptError::Line {
                    line: index + 1,
                    problem,
                })
        })
        .collect::<Result<Vec<_>, _>>()?;
    if prompts.is_empty() {
        return Err(PromptError::Empty);
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_set_has_at_least_five_prompts_of_each_of_seven_kinds() {
        let prompts = Prompt::shipped().unwrap();
        let kinds = Prompt::kinds(&prompts);
        assert_eq!(
            kinds,
            ["code", "chat", "list", "reasoning", "creative", "edit", "summary"]
        );
        for kind in kinds {
            let of_kind: Vec<_> = prompts.iter().filter(|prompt| prompt.kind == kind).collect();
            assert!(of_kind.len() >= 5, "{kind}");
            // With an answer of the usual length a context of 2048 tokens holds each of them.
            assert!(of_kind.iter().all(|prompt| prompt.question().len() < 2000), "{kind}");
            // The question of the kind `edit` contains its prediction.
            let predicted = |prompt: &&Prompt| {
                prompt
                    .prediction
                    .as_ref()
                    .is_some_and(|it| prompt.question().contains(it))
            };
            assert_eq!(of_kind.iter().all(predicted), kind == "edit", "{kind}");
        }
    }

    #[test]
    fn a_line_that_is_no_prompt_is_named() {
        for (line, words) in [
            ("{\"kind\": \"chat\"}", "neither"),
            ("{\"kind\": \"chat\", \"messages\": []}", "neither"),
            ("{\"kind\": \"chat\", \"prompt\": \"a\", \"messages\": []}", "both"),
            ("{\"prompt\": \"a\"}", "kind"),
            ("Hello", "expected"),
        ] {
            let text = format!("{{\"kind\": \"chat\", \"prompt\": \"Hi\"}}\n\n{line}\n");
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains("line 3") && error.contains(words), "{error}");
        }
        assert!(matches!(parse("\n"), Err(PromptError::Empty)));
    }

    #[test]
    fn kinds_are_chosen_and_a_wrong_one_is_answered_with_the_right_ones() {
        let prompts = Prompt::shipped().unwrap();
        let chosen = Prompt::of_kinds(prompts.clone(), &["list".into(), "code".into()]).unwrap();
        assert_eq!(Prompt::kinds(&chosen), ["code", "list"]);
        let error = Prompt::of_kinds(prompts.clone(), &["prose".into()]).unwrap_err();
        assert!(error.to_string().contains("code, chat, list"), "{error}");
        assert_eq!(Prompt::first_of_each_kind(&prompts, 1).len(), 7);
    }

    #[test]
    fn a_conversation_is_a_prompt() {
        let line = r#"{"kind": "chat", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}"#;
        assert_eq!(parse(line).unwrap()[0].question(), "Hi");
    }
}
