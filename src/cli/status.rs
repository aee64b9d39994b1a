//! The proxy's status, fetched and shown.

use std::fmt::Write;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;

use super::exit::{Exit, Failure};
use crate::config::Secret;
use crate::upstream::chat::{client, refused, unreachable};

/// How long the answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks a proxy for its status.
pub async fn fetch(url: &str, token: Option<&Secret>) -> Result<Value, Failure> {
    let mut request = client()?.get(format!("{url}/v1/tightwad/status")).timeout(PATIENCE);
    if let Some(token) = token {
        request = request.bearer_auth(token.expose());
    }
    let response = request.send().await.map_err(|error| {
        if error.is_connect() {
            let message = format!("no proxy runs at {url}; start one with `tightwad proxy start`");
            return Failure::new(Exit::NotRunning, message);
        }
        unreachable(url, &error).into()
    })?;
    let status = response.status();
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        return Err(refused(url, response).await.into());
    }
    let told: Option<Value> = response.json().await.ok();
    told.filter(|told| status.is_success() && told["verification"].is_string())
        .ok_or_else(|| {
            let message = format!(
                "{url} answers ({}), but is no proxy of Tightwad's; check `host` and `port` of the section `proxy`, and what \
                 else listens there",
                status.as_u16()
            );
            Failure::new(Exit::Unreachable, message)
        })
}

/// The counts of drafting so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    steps: u64,
    drafted: u64,
    accepted: u64,
    generated: u64,
}

impl Counts {
    /// The counts in a status.
    #[must_use]
    pub fn of(status: &Value) -> Self {
        let count = |name: &str| status["counts"][name].as_u64().unwrap_or_default();
        Self {
            steps: count("rounds"),
            drafted: count("drafted"),
            accepted: count("accepted"),
            generated: count("generated"),
        }
    }

    /// What was counted since an earlier look.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            steps: self.steps.saturating_sub(earlier.steps),
            drafted: self.drafted.saturating_sub(earlier.drafted),
            accepted: self.accepted.saturating_sub(earlier.accepted),
            generated: self.generated.saturating_sub(earlier.generated),
        }
    }

    /// In words; `None` when nothing was drafted.
    #[must_use]
    pub fn describe(self) -> Option<String> {
        (self.steps > 0 && self.drafted > 0).then(|| {
            format!(
                "{:.1} tokens per step, {:.0}% of {} drafted tokens accepted",
                self.generated as f64 / self.steps as f64,
                self.accepted as f64 * 100.0 / self.drafted as f64,
                self.drafted
            )
        })
    }
}

/// The status for people.
#[must_use]
pub fn table(url: &str, status: &Value) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<14}{value}");
    };
    line("proxy", url);
    line("target", &server(&status["target"]));
    let drafts = status["drafts"].as_array().map_or(&[][..], Vec::as_slice);
    for draft in drafts {
        line("draft", &server(draft));
        if draft["healthy"] == true
            && let Some(outlook) = outlook(&draft["outlook"])
        {
            line("", &outlook);
        }
    }
    if drafts.is_empty() {
        line("draft", "none");
    }
    let reason = status["reason"]
        .as_str()
        .map(|reason| format!(" ({reason})"))
        .unwrap_or_default();
    line(
        "verification",
        &format!("{}{reason}", status["verification"].as_str().unwrap_or("unknown")),
    );
    let counts = Counts::of(status);
    let nothing = if status["measuring"] == true {
        "nothing drafted yet; how fast the servers are is being measured"
    } else {
        "nothing drafted yet"
    };
    line("drafting", &counts.describe().unwrap_or_else(|| nothing.to_owned()));
    if let Some(agreement) = agreement(&status["agreement"]) {
        line("agreement", &agreement);
    }
    text
}

/// What a drafter is worth, in words; `None` before anything is known.
fn outlook(known: &Value) -> Option<String> {
    let milliseconds = |name: &str| known[name].as_f64().map_or("?".to_owned(), |ms| format!("{ms:.1}"));
    let pays = if known["pays"].as_bool()? {
        ""
    } else {
        "; it does not make the target faster now, so it is only tried now and then"
    };
    let turns = if known["drafter_rests"] == true {
        ", in turns with the target, whose device it shares"
    } else {
        ""
    };
    Some(format!(
        "{:.0}% of its tokens are the target's, {} ms to the first and {} ms per token: {:.2}x expected{turns}{pays}",
        100.0 * known["agreement"].as_f64()?,
        milliseconds("first_token_ms"),
        milliseconds("token_ms"),
        known["expected_speed_up"].as_f64()?
    ))
}

/// In words; `None` when it is not measured.
fn agreement(measured: &Value) -> Option<String> {
    let meaning = measured["meaning"].as_str()?;
    Some(match measured["share"].as_f64() {
        Some(share) => format!(
            "{:.0}% of {} characters in {} answers ({meaning})",
            100.0 * share,
            measured["characters"],
            measured["answers"]
        ),
        None => "nothing measured yet".to_owned(),
    })
}

fn server(server: &Value) -> String {
    let text = |name: &str| server[name].as_str();
    let mut words = text("url").unwrap_or("?").to_owned();
    if let Some(model) = text("model") {
        words = format!("{words}, {model}");
    }
    let health = match (server["healthy"].as_bool(), text("problem")) {
        (Some(true), None) => "healthy".to_owned(),
        (Some(true), Some(problem)) => format!("healthy, but {problem}"),
        (_, Some(problem)) => format!("down: {problem}"),
        (_, None) => "down".to_owned(),
    };
    format!("{words}: {health}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_what_the_proxy_tells() {
        let status = serde_json::json!({
            "target": { "url": "http://t:1", "model": "big", "healthy": true, "problem": null },
            "drafts": [],
            "verification": "none",
            "reason": "there is no drafter",
            "counts": { "rounds": 10, "drafted": 40, "accepted": 30, "generated": 40 },
            "agreement": { "answers": 2, "characters": 90, "share": 0.6, "meaning": "they agree" },
        });
        let table = table("http://p:2", &status);
        for part in [
            "http://t:1, big: healthy",
            "none (there is no drafter)",
            "4.0 tokens per step",
            "75% of 40",
            "60% of 90 characters in 2 answers (they agree)",
        ] {
            assert!(table.contains(part), "{part} is missing in\n{table}");
        }
    }

    #[test]
    fn what_a_draft_is_worth_is_shown_while_it_is_there() {
        let shown = |healthy: bool| {
            let outlook = serde_json::json!({
                "agreement": 0.9, "first_token_ms": 2.0, "token_ms": 1.0, "expected_speed_up": 1.7, "pays": true,
            });
            let draft = serde_json::json!({ "url": "http://d:1", "healthy": healthy, "outlook": outlook });
            table("http://p:2", &serde_json::json!({ "drafts": [draft] })).contains("1.70x expected")
        };
        assert!(shown(true) && !shown(false));
    }

    #[test]
    fn counts_since_a_restart_of_the_proxy_do_not_underflow() {
        let before = Counts {
            steps: 5,
            drafted: 5,
            accepted: 5,
            generated: 5,
        };
        assert_eq!(Counts::default().since(before), Counts::default());
    }
}
