//! The rows of the demo: each prompt with its plain and its drafted answers.

use serde::Serialize;

use crate::bench::{self, Group, Measurements, Mode, Prompt, Sample};

/// The answers to one prompt.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Kind of prompt.
    pub kind: String,
    /// The prompt.
    pub prompt: String,
    /// The measurements.
    #[serde(flatten)]
    pub figures: Figures,
}

/// All rows and their total.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether all prompts were asked. `false` after Ctrl-C or a failure: the report covers the answers before.
    pub complete: bool,
    /// One row per prompt.
    pub rows: Vec<Row>,
    /// Total over all prompts.
    #[serde(flatten)]
    pub total: Figures,
}

/// Plain and drafted answers side by side.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Tokens of the plain answers.
    pub tokens: u64,
    /// Tokens per second of the target alone, from the first token to the last.
    pub plain_tokens_per_second: Option<f64>,
    /// The same with drafting.
    pub drafted_tokens_per_second: Option<f64>,
    /// Ratio of drafted to plain speed.
    pub ratio: Option<f64>,
    /// Whether nothing was drafted, so that the ratio is due to chance.
    pub undrafted: bool,
    /// Tokens per step of the target.
    pub tokens_per_step: Option<f64>,
    /// Whether all drafted texts equal the plain ones.
    pub equal: bool,
}

impl Row {
    /// The answers to one prompt.
    pub fn of(prompt: &Prompt, samples: &[Sample]) -> Self {
        Self {
            kind: prompt.kind.clone(),
            prompt: prompt.question().to_owned(),
            figures: Figures::of(samples),
        }
    }
}

impl Report {
    /// All answers.
    pub fn of(rows: Vec<Row>, measured: &Measurements, complete: bool) -> Self {
        Self {
            complete,
            rows,
            total: Figures::of(&measured.samples),
        }
    }
}

impl Figures {
    fn of(samples: &[Sample]) -> Self {
        let group = Group::of("", &samples.iter().collect::<Vec<_>>(), &[]);
        let (plain, drafted) = (group.mode(Mode::Plain), group.mode(Mode::Attached));
        Self {
            tokens: plain.map_or(0, |figures| figures.tokens),
            plain_tokens_per_second: plain.and_then(|figures| figures.tokens_per_second),
            drafted_tokens_per_second: drafted.and_then(|figures| figures.tokens_per_second),
            ratio: drafted.and_then(|figures| figures.speed_up),
            undrafted: drafted.is_some_and(bench::Figures::is_undrafted),
            tokens_per_step: drafted.and_then(|figures| figures.tokens_per_step),
            equal: group.equal(),
        }
    }
}
