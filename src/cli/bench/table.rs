//! The measurements as a table.

use std::fmt::Write;

use super::Report;
use crate::bench::{Figures, Group, Mode};

/// The whole report.
pub fn table(report: &Report) -> String {
    let settings = &report.settings;
    let mut text = format!(
        "prompts {}, rounds {}, max tokens {}, temperature {}, seed {}, clients {}",
        settings.prompts, settings.rounds, settings.max_tokens, settings.temperature, settings.seed, settings.clients
    );
    if settings.prediction {
        text.push_str(", with predictions");
    }
    if let Some(tokens) = settings.context {
        push(&mut text, format_args!(", context {tokens}"));
    }
    if let Some(delay) = settings.delay_ms {
        push(&mut text, format_args!(", {delay} ms more per round trip"));
    }
    if !report.complete {
        text.push_str(", ended before all was asked");
    }
    push(&mut text, format_args!("\n\n{}", columns(HEAD)));
    for group in report.comparison.kinds.iter().chain([&report.comparison.total]) {
        rows(&mut text, group);
    }
    text.push('\n');
    let total = &report.comparison.total;
    for figures in &total.modes {
        positions(&mut text, figures);
    }
    let attached = total.mode(Mode::Attached).filter(|figures| !figures.is_undrafted());
    let measured = attached.and_then(|figures| figures.speed_up);
    if let Some((predicted, measured)) = report.predicted_speed_up.zip(measured) {
        push(
            &mut text,
            format_args!(
                "attached: {predicted:.2}x predicted from the agreement and the costs that the proxy measured, \
                 {measured:.2}x measured ({:.0}%)\n",
                100.0 * measured / predicted
            ),
        );
    }
    if settings.clients > 1 {
        for figures in &total.modes {
            push(
                &mut text,
                format_args!(
                    "{}: all clients together {} tok/s ({}), the slowest {} tok/s, prompts included\n",
                    figures.mode.name(),
                    number(figures.throughput_tokens_per_second, 1, ""),
                    over_plain(figures, figures.throughput_gain, " of plain"),
                    number(figures.slowest_client_tokens_per_second, 1, ""),
                ),
            );
        }
    }
    if let Some(own) = &report.own_draft {
        let tried: Vec<String> = own
            .tried
            .iter()
            .map(|tried| format!("{}: {} tok/s", tried.n_max, number(tried.tokens_per_second, 1, "")))
            .collect();
        push(
            &mut text,
            format_args!("own-draft: --spec-draft-n-max {} ({})\n", own.n_max, tried.join(", ")),
        );
    }
    text.push_str(LEGEND);
    let undrafted = |group: &Group| group.modes.iter().any(Figures::is_undrafted);
    if report.comparison.kinds.iter().any(undrafted) {
        text.push_str(NO_DRAFT);
    }
    text
}

const HEAD: [&str; 11] = [
    "kind", "mode", "tok/s", "median", "p95", "speed-up", "TTFT ms", "tok/step", "accepted", "wasted", "equal",
];

const LEGEND: &str = "\
tok/s: all tokens over all time, each answer from its first token to its last; median, p95: of the single answers;
tok/step: tokens per step of the target; accepted: of the drafted tokens, the others are wasted; equal: texts equal to the plain ones
";
const NO_DRAFT: &str = "no draft: nothing was drafted, so that the speed differs from the plain one by chance only\n";

fn rows(text: &mut String, group: &Group) {
    for (index, figures) in group.modes.iter().enumerate() {
        let kind = if index == 0 { group.kind.as_str() } else { "" };
        let acceptance = figures.acceptance.as_ref();
        let equal = match figures.differing {
            None => "-".to_owned(),
            Some(0) => "yes".to_owned(),
            Some(differing) => format!("{differing} of {} NOT", figures.requests),
        };
        let accepted = acceptance.and_then(|acceptance| acceptance.ratio);
        push(
            text,
            format_args!(
                "{}",
                columns([
                    kind,
                    figures.mode.name(),
                    &number(figures.tokens_per_second, 1, ""),
                    &number(figures.tokens_per_second_median, 1, ""),
                    &number(figures.tokens_per_second_p95, 1, ""),
                    &over_plain(figures, figures.speed_up, ""),
                    &number(figures.ttft_ms_median, 0, ""),
                    &number(figures.tokens_per_step, 2, ""),
                    &number(accepted.map(|ratio| ratio * 100.0), 0, "%"),
                    &acceptance.map_or("-".to_owned(), |acceptance| acceptance.wasted.to_string()),
                    &equal,
                ])
            ),
        );
    }
}

fn positions(text: &mut String, figures: &Figures) {
    let Some(acceptance) = figures.acceptance.as_ref().filter(|all| !all.by_position.is_empty()) else {
        return;
    };
    let shares: Vec<String> = acceptance
        .by_position
        .iter()
        .map(|share| format!("{:.0}%", share * 100.0))
        .collect();
    push(
        text,
        format_args!(
            "{}: of all drafts, the share whose token was accepted at each position: {}\n",
            figures.mode.name(),
            shares.join(" ")
        ),
    );
}

fn over_plain(figures: &Figures, gain: Option<f64>, words: &str) -> String {
    if figures.is_undrafted() {
        "no draft".to_owned()
    } else {
        number(gain, 2, "x") + words
    }
}

fn number(value: Option<f64>, digits: usize, unit: &str) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}{unit}"))
}

fn columns(cells: [&str; 11]) -> String {
    let [kind, mode, rest @ ..] = cells;
    let mut row = format!("{kind:<10} {mode:<9}");
    for cell in rest {
        push(&mut row, format_args!(" {cell:>8}"));
    }
    row.push('\n');
    row
}

fn push(text: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = text.write_fmt(what);
}
