//! The measurements of the demo as a table or as JSON.

use super::rows::{Figures, Report, Row};
use crate::cli::exit::Failure;
use crate::cli::output::{print_line, print_report};

/// Prints rows as they arrive; with `json` prints everything at the end.
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
    pub fn head(self) -> Result<(), Failure> {
        if self.json {
            return Ok(());
        }
        print_line(format_args!(
            "\n{:<10} {:<34} {:>6} {}",
            "kind",
            "prompt",
            "tokens",
            columns("plain", "drafted", "ratio", "per step", "equal")
        ))
    }

    /// One prompt.
    pub fn row(self, row: &Row) -> Result<(), Failure> {
        if self.json {
            return Ok(());
        }
        let prompt: String = if row.prompt.chars().count() > 34 {
            row.prompt.chars().take(31).chain("...".chars()).collect()
        } else {
            row.prompt.clone()
        };
        print_line(format_args!(
            "{:<10} {prompt:<34} {:>6} {}",
            row.kind,
            row.figures.tokens,
            figures(&row.figures)
        ))
    }

    /// The total.
    pub fn foot(self, report: &Report) -> Result<(), Failure> {
        print_report(report, self.json, foot)
    }
}

fn foot(report: &Report) -> String {
    let no_draft = if report.rows.iter().any(|row| row.figures.undrafted) {
        "no draft: nothing was drafted, so that the speeds differ by chance only\n"
    } else {
        ""
    };
    format!(
        "{:<10} {:<34} {:>6} {}\n\n\
         plain and drafted: tokens per second from the first token to the last; per step: tokens per step of the target; \
         equal: whether both texts are the same\n{no_draft}",
        "total",
        if report.complete { "" } else { "(ended early)" },
        report.total.tokens,
        figures(&report.total)
    )
}

fn figures(figures: &Figures) -> String {
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    let ratio = if figures.undrafted {
        "no draft".to_owned()
    } else {
        figures.ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}x"))
    };
    columns(
        &number(figures.plain_tokens_per_second),
        &number(figures.drafted_tokens_per_second),
        &ratio,
        &number(figures.tokens_per_step),
        if figures.equal { "yes" } else { "NO" },
    )
}

fn columns(plain: &str, drafted: &str, ratio: &str, per_step: &str, equal: &str) -> String {
    format!("{plain:>8} {drafted:>8} {ratio:>8} {per_step:>9} {equal:>6}")
}
