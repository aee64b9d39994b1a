//! Fetches the proxy's status and shows it to people. `tightwad status`, `proxy status` and `chat` use it.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Serialize;
use serde_json::Value;

use super::exit::{Exit, Failure};
use super::received::Received;
use crate::config::Secret;
use crate::engine::ServerStatus;
use crate::http;
use crate::proxy::status::{Measured, Status, Sums};
use crate::speculation::DrafterOutlook;
use crate::upstream::chat::{client, refused, unreachable};

/// Width of the first column of a status.
pub const INDENT: usize = 14;
/// Time limit for the status.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest status in bytes. That of a proxy holds its last 50 requests.
pub const MAX_BYTES: usize = 4 << 20;

/// Interval between the two statuses that give the speed of running requests.
const SPEED_INTERVAL: Duration = Duration::from_millis(300);

/// A proxy's status, and the speed that two of them show.
#[derive(Debug, Serialize)]
pub struct ProxyReport {
    /// The last status.
    #[serde(flatten)]
    pub status: Received<Status>,
    /// Tokens per second of all drafted answers; `None` while nothing runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
}

/// Asks a proxy for its status. While requests run, it asks twice and adds the speed of all drafted answers since the first
/// status.
pub async fn fetch_with_speed(url: &str, token: Option<&Secret>) -> Result<ProxyReport, Failure> {
    let before = fetch(url, token).await?;
    if before.in_flight == 0 {
        return Ok(before.into());
    }
    tokio::time::sleep(SPEED_INTERVAL).await;
    let after = fetch(url, token).await?;
    Ok(ProxyReport {
        tokens_per_second: speed(&before, &after),
        status: after,
    })
}

impl From<Received<Status>> for ProxyReport {
    fn from(status: Received<Status>) -> Self {
        Self {
            status,
            tokens_per_second: None,
        }
    }
}

/// Tokens per second between two statuses of one proxy.
fn speed(before: &Status, after: &Status) -> Option<f64> {
    let seconds = after.uptime_seconds? - before.uptime_seconds?;
    let generated = Counts::of(&after.counts).since(Counts::of(&before.counts)).generated;
    (seconds > 0.0 && generated > 0).then(|| generated as f64 / seconds)
}

/// Asks a proxy for its status.
pub async fn fetch(url: &str, token: Option<&Secret>) -> Result<Received<Status>, Failure> {
    let mut request = client()?
        .get(format!("{url}/v1/tightwad/status"))
        .timeout(STATUS_TIMEOUT);
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
    let answer: Option<Value> = http::client::json(response, MAX_BYTES).await.ok();
    let report = answer.filter(|_| status.is_success()).and_then(Received::read);
    report.ok_or_else(|| {
        let message = format!(
            "{url} answers ({}), but is no proxy of Tightwad's; check `host` and `port` of the section `proxy`, and what \
             else listens there",
            status.as_u16()
        );
        Failure::new(Exit::Unreachable, message)
    })
}

/// Counts of drafting.
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
    pub fn of(sums: &Sums) -> Self {
        Self {
            steps: sums.steps,
            drafted: sums.drafted,
            accepted: sums.accepted,
            generated: sums.generated,
        }
    }

    /// The counts since an earlier status.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            steps: self.steps.saturating_sub(earlier.steps),
            drafted: self.drafted.saturating_sub(earlier.drafted),
            accepted: self.accepted.saturating_sub(earlier.accepted),
            generated: self.generated.saturating_sub(earlier.generated),
        }
    }

    /// The counts in words; `None` if nothing was drafted.
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

/// Fails if the target is down, else if a drafter is down.
pub fn verdict(status: &Status) -> Result<(), Failure> {
    if !status.target.healthy {
        let message =
            "the proxy has no target that answers, so it cannot answer either; start the target, or check where it is";
        return Err(Failure::new(Exit::Unreachable, message));
    }
    let down = drafts_down(status);
    if down.is_empty() {
        return Ok(());
    }
    let message = format!(
        "no draft answers at {}, so answers come without it; start it with `tightwad run draft` on its host, or check its `url`",
        down.join(", ")
    );
    Err(Failure::new(Exit::DraftDown, message))
}

/// The URLs of the drafts that do not answer.
pub fn drafts_down(status: &Status) -> Vec<&str> {
    let drafts = status.drafts.iter().map(|draft| &draft.server);
    drafts
        .filter(|draft| !draft.healthy)
        .map(|draft| draft.url.as_str())
        .collect()
}

/// A line of a status: the name of a server and a value. A line without a name continues the line before.
#[must_use]
pub fn line(name: &str, value: &str) -> String {
    format!("{name:<INDENT$}{value}\n")
}

/// The status as a table.
#[must_use]
pub fn table(url: &str, report: &ProxyReport) -> String {
    let status = &report.status;
    let mut text = line("proxy", &format!("{url}{}", activity(status, report.tokens_per_second)));
    let mut add = |name: &str, value: &str| text.push_str(&line(name, value));
    add("target", &server(&status.target));
    for draft in &status.drafts {
        add("draft", &server(&draft.server));
        if let Some(outlook) = draft.outlook.as_ref().filter(|_| draft.server.healthy)
            && let Some(outlook) = worth(outlook)
        {
            add("", &outlook);
        }
    }
    if status.drafts.is_empty() {
        add("draft", "none");
    }
    add("verification", &verification(status));
    add("drafting", &drafting(status));
    if let Some(agreement) = &status.agreement {
        add("agreement", &agreed(agreement));
    }
    text
}

/// The kind of verification, with the reason if there is one.
#[must_use]
pub fn verification(status: &Status) -> String {
    let how = status.verification.name();
    match &status.reason {
        Some(reason) => format!("{how} ({reason})"),
        None => how.to_owned(),
    }
}

fn drafting(status: &Status) -> String {
    let nothing = if status.measuring {
        "nothing drafted yet; the proxy still measures how fast its servers are"
    } else {
        "nothing drafted yet"
    };
    Counts::of(&status.counts)
        .describe()
        .unwrap_or_else(|| nothing.to_owned())
}

/// Uptime, running requests and speed of the proxy: `: up 3 min, 2 requests running, 61 tok/s`.
#[must_use]
pub fn activity(status: &Status, tokens_per_second: Option<f64>) -> String {
    let Some(uptime) = status.uptime_seconds else {
        return String::new();
    };
    let mut words = vec![format!("up {}", duration(uptime))];
    words.extend(match status.in_flight {
        0 => None,
        1 => Some("1 request running".to_owned()),
        n => Some(format!("{n} requests running")),
    });
    words.extend(tokens_per_second.map(|speed| format!("{speed:.1} tok/s")));
    format!(": {}", words.join(", "))
}

/// A duration in seconds, minutes or hours.
#[must_use]
pub fn duration(seconds: f64) -> String {
    match seconds {
        ..120.0 => format!("{seconds:.0} s"),
        ..7200.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

/// The worth of a drafter in words; `None` before it is measured.
fn worth(outlook: &DrafterOutlook) -> Option<String> {
    let milliseconds = |ms: Option<f64>| ms.map_or("?".to_owned(), |ms| format!("{ms:.1}"));
    let pays = if outlook.pays {
        ""
    } else {
        "; it does not make the target faster now, so it is tried only sometimes"
    };
    let turns = if outlook.drafter_rests {
        ", in turns with the target, whose device it shares"
    } else {
        ""
    };
    Some(format!(
        "{:.0}% of its tokens are the target's, {} ms to the first and {} ms per token: {:.2}x expected{turns}{pays}",
        100.0 * outlook.agreement?,
        milliseconds(outlook.first_token_ms),
        milliseconds(outlook.token_ms),
        outlook.expected_speed_up?
    ))
}

/// The measured agreement in words.
fn agreed(measured: &Measured) -> String {
    match measured.share {
        Some(share) => format!(
            "{:.0}% of {} characters in {} answers ({})",
            100.0 * share,
            measured.characters,
            measured.answers,
            measured.meaning
        ),
        None => "nothing measured yet".to_owned(),
    }
}

fn server(server: &ServerStatus) -> String {
    let mut words = server.url.clone();
    if let Some(model) = &server.model {
        words = format!("{words}, {model}");
    }
    let health = match (server.healthy, &server.problem) {
        (true, None) => "healthy".to_owned(),
        (true, Some(problem)) => format!("healthy, but {problem}"),
        (false, Some(problem)) => format!("down: {problem}"),
        (false, None) => "down".to_owned(),
    };
    format!("{words}: {health}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::Verification;

    /// The report of a proxy with these fields.
    fn report(mut status: Value) -> ProxyReport {
        if status["verification"].is_null() {
            status["verification"] = "attached".into();
        }
        Received::<Status>::read(status).unwrap().into()
    }

    #[test]
    fn fields_of_another_version_are_kept_and_missing_ones_do_no_harm() {
        let newer = report(json!({ "verification": "by-magic", "colour": "red" }));
        assert_eq!(newer.status.verification, Verification::Unknown);
        assert_eq!(json!(newer), json!({ "verification": "by-magic", "colour": "red" }));
        assert!(Received::<Status>::read(json!({ "colour": "red" })).is_none());
    }

    #[test]
    fn the_table_shows_what_the_proxy_tells() {
        let status = serde_json::json!({
            "target": { "url": "http://t:1", "model": "big", "healthy": true, "problem": null },
            "drafts": [],
            "verification": "none",
            "reason": "there is no drafter",
            "counts": { "steps": 10, "drafted": 40, "accepted": 30, "generated": 40 },
            "agreement": { "answers": 2, "characters": 90, "share": 0.6, "meaning": "they agree" },
        });
        let table = table("http://p:2", &report(status));
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
    fn the_table_shows_how_long_the_proxy_is_up_and_what_runs() {
        let at = |seconds: f64, generated: u64, running: u64| {
            let counts = json!({ "generated": generated });
            report(json!({ "uptime_seconds": seconds, "in_flight": running, "counts": counts })).status
        };
        assert_eq!(activity(&at(90.0, 0, 0), None), ": up 90 s");
        assert_eq!(activity(&at(600.0, 0, 1), None), ": up 10 min, 1 request running");
        let status = at(10_000.5, 130, 2);
        let speed_now = speed(&at(10_000.0, 100, 2), &status);
        assert_eq!(
            activity(&status, speed_now),
            ": up 2.8 h, 2 requests running, 60.0 tok/s"
        );
        assert_eq!(speed(&at(5.0, 9, 1), &at(5.0, 9, 1)), None);
    }

    #[test]
    fn a_proxy_without_a_drafter_is_well_and_one_with_a_drafter_that_is_down_is_not() {
        let exit = |target: bool, drafts: &[bool]| {
            let drafts: Vec<Value> = drafts.iter().map(|healthy| json!({ "healthy": healthy })).collect();
            let report = report(json!({ "target": { "healthy": target }, "drafts": drafts }));
            verdict(&report.status).err().map(|failure| failure.exit)
        };
        assert_eq!(exit(true, &[]), None);
        assert_eq!(exit(true, &[true, true]), None);
        assert_eq!(exit(true, &[true, false]), Some(Exit::DraftDown));
        assert_eq!(exit(false, &[false]), Some(Exit::Unreachable));
    }

    #[test]
    fn what_a_draft_is_worth_is_shown_while_it_is_there() {
        let shown = |healthy: bool| {
            let outlook = serde_json::json!({
                "agreement": 0.9, "first_token_ms": 2.0, "token_ms": 1.0, "expected_speed_up": 1.7, "pays": true,
            });
            let draft = serde_json::json!({ "url": "http://d:1", "healthy": healthy, "outlook": outlook });
            table("http://p:2", &report(json!({ "drafts": [draft] }))).contains("1.70x expected")
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
