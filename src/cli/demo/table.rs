//! The measurements side by side.

use super::bench::{Report, Row};
use crate::cli::exit::Failure;

/// Prints rows as they come; with `json` nothing until the end, and then everything as JSON.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    json: bool,
}

impl Table {
    /// An empty table.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// The names of the columns.
    pub fn head(self) {
        if !self.json {
            println!(
                "\n{:<10} {:<34} {:>6} {}",
                "kind",
                "prompt",
                "tokens",
                columns("plain", "drafted", "ratio", "per step", "equal")
            );
        }
    }

    /// One prompt.
    pub fn row(self, row: &Row) {
        if !self.json {
            let prompt: String = if row.prompt.chars().count() > 34 {
                row.prompt.chars().take(31).chain("...".chars()).collect()
            } else {
                row.prompt.to_owned()
            };
            let figures = figures(
                row.plain_tokens_per_second,
                row.drafted_tokens_per_second,
                row.ratio,
                row.tokens_per_step,
                row.equal,
            );
            println!("{:<10} {prompt:<34} {:>6} {figures}", row.kind, row.tokens);
        }
    }

    /// The sum.
    pub fn foot(self, report: &Report) -> Result<(), Failure> {
        if self.json {
            let json = serde_json::to_string_pretty(report).map_err(|error| Failure::other("write JSON", error))?;
            println!("{json}");
            return Ok(());
        }
        let figures = figures(
            report.plain_tokens_per_second,
            report.drafted_tokens_per_second,
            report.ratio,
            report.tokens_per_step,
            report.equal,
        );
        let tokens: u64 = report.rows.iter().map(|row| row.tokens).sum();
        println!("{:<10} {:<34} {tokens:>6} {figures}", "total", "");
        println!(
            "\nplain and drafted: tokens per second from the first token to the last; per step: tokens per pass of the \
             target; equal: whether both texts are the same"
        );
        Ok(())
    }
}

fn figures(plain: Option<f64>, drafted: Option<f64>, ratio: Option<f64>, per_step: Option<f64>, equal: bool) -> String {
    let number = |value: Option<f64>, unit: &str| value.map_or("-".to_owned(), |value| format!("{value:.1}{unit}"));
    columns(
        &number(plain, ""),
        &number(drafted, ""),
        &ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}x")),
        &number(per_step, ""),
        if equal { "yes" } else { "NO" },
    )
}

fn columns(plain: &str, drafted: &str, ratio: &str, per_step: &str, equal: &str) -> String {
    format!("{plain:>8} {drafted:>8} {ratio:>7} {per_step:>9} {equal:>6}")
}
