//! What the demo shows: every prompt, plain and drafted.

use serde::Serialize;

use crate::bench::{self, Group, Measurements, Mode, Prompt, Sample};

/// One prompt, both ways.
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

/// All rows and their sum.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether everything was asked; else this is of the answers until Ctrl-C or a failure.
    pub complete: bool,
    /// Each prompt.
    pub rows: Vec<Row>,
    /// Over all of them.
    #[serde(flatten)]
    pub total: Figures,
}

/// Plain and drafted side by side.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Tokens of the plain answers.
    pub tokens: u64,
    /// Tokens per second of the target alone, from the first token to the last.
    pub plain_tokens_per_second: Option<f64>,
    /// The same with the drafter.
    pub drafted_tokens_per_second: Option<f64>,
    /// Drafted over plain.
    pub ratio: Option<f64>,
    /// Whether nothing was drafted, so that the ratio is one of chance.
    pub undrafted: bool,
    /// Tokens that one pass of the target yielded.
    pub tokens_per_step: Option<f64>,
    /// Whether all texts are the same both ways.
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
    /// All answers that there are.
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
