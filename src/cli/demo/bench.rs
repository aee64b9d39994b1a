//! The measurement: every prompt once plain and once drafted, by the same clock.

use std::time::Duration;

use serde::Serialize;

use super::prompts::{MAX_TOKENS, PROMPTS, WARM_UP};
use crate::cli::completion::{Answer, Message, Sampling, Server};
use crate::cli::exit::Failure;
use crate::engine::{Counts, Engine};

/// One prompt, both ways.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Kind of prompt.
    pub kind: &'static str,
    /// The prompt.
    pub prompt: &'static str,
    /// Tokens of the plain answer.
    pub tokens: u64,
    /// Tokens per second of the target alone, from the first token to the last.
    pub plain_tokens_per_second: Option<f64>,
    /// The same with the drafter.
    pub drafted_tokens_per_second: Option<f64>,
    /// Drafted over plain.
    pub ratio: Option<f64>,
    /// Tokens that one pass of the target yielded.
    pub tokens_per_step: Option<f64>,
    /// Whether both texts are the same.
    pub equal: bool,
}

/// All rows and their sum.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Each prompt.
    pub rows: Vec<Row>,
    /// All tokens over all seconds.
    pub plain_tokens_per_second: Option<f64>,
    /// The same with the drafter.
    pub drafted_tokens_per_second: Option<f64>,
    /// Drafted over plain.
    pub ratio: Option<f64>,
    /// Over all prompts.
    pub tokens_per_step: Option<f64>,
    /// Whether all texts are the same.
    pub equal: bool,
}

/// Tokens over seconds, summed.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    tokens: u64,
    duration: Duration,
}

impl Sum {
    fn add(&mut self, answer: &Answer) {
        // The clock starts with the first token.
        self.tokens += answer.tokens.saturating_sub(1);
        self.duration += answer.duration;
    }

    fn speed(self) -> Option<f64> {
        let seconds = self.duration.as_secs_f64();
        (seconds > 0.0).then(|| self.tokens as f64 / seconds)
    }
}

/// Asks everything, alternately plain and drafted first, and calls `on_row` after each prompt.
pub async fn run(plain: &Server, drafted: &Server, engine: &Engine, on_row: impl Fn(&Row)) -> Result<Report, Failure> {
    ask(plain, WARM_UP).await?;
    ask(drafted, WARM_UP).await?;
    let before = engine.status().counts;
    let mut rows = Vec::new();
    let (mut plain_sum, mut drafted_sum) = (Sum::default(), Sum::default());
    for (number, (kind, prompt)) in PROMPTS.into_iter().enumerate() {
        let earlier = engine.status().counts;
        // Whoever comes second finds the prompt in the target's cache, so they take turns.
        let (one, other) = if number % 2 == 0 {
            let one = ask(plain, prompt).await?;
            (one, ask(drafted, prompt).await?)
        } else {
            let other = ask(drafted, prompt).await?;
            (ask(plain, prompt).await?, other)
        };
        plain_sum.add(&one);
        drafted_sum.add(&other);
        let (slow, fast) = (one.tokens_per_second(), other.tokens_per_second());
        let row = Row {
            kind,
            prompt,
            tokens: one.tokens,
            plain_tokens_per_second: slow,
            drafted_tokens_per_second: fast,
            ratio: ratio(slow, fast),
            tokens_per_step: tokens_per_step(earlier, engine.status().counts),
            equal: one.text == other.text && one.reasoning == other.reasoning,
        };
        on_row(&row);
        rows.push(row);
    }
    let (slow, fast) = (plain_sum.speed(), drafted_sum.speed());
    Ok(Report {
        equal: rows.iter().all(|row| row.equal),
        rows,
        plain_tokens_per_second: slow,
        drafted_tokens_per_second: fast,
        ratio: ratio(slow, fast),
        tokens_per_step: tokens_per_step(before, engine.status().counts),
    })
}

async fn ask(server: &Server, prompt: &str) -> Result<Answer, Failure> {
    let message = Message {
        role: "user",
        content: prompt.to_owned(),
    };
    let sampling = Sampling {
        max_tokens: Some(MAX_TOKENS),
        temperature: Some(0.0),
    };
    server.chat(&[message], sampling, |_| Ok(())).await
}

fn ratio(slow: Option<f64>, fast: Option<f64>) -> Option<f64> {
    slow.zip(fast).map(|(slow, fast)| fast / slow)
}

fn tokens_per_step(before: Counts, after: Counts) -> Option<f64> {
    let steps = after.steps.saturating_sub(before.steps);
    (steps > 0).then(|| after.generated.saturating_sub(before.generated) as f64 / steps as f64)
}
