//! A server to measure, and its counts of drafting before and after.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::proxy::status::Status;
use crate::upstream::ChatServer;
use crate::upstream::chat::Drafting;

/// Time limit for the counts of a server.
const COUNTS_TIMEOUT: Duration = Duration::from_secs(5);

/// A way to get the target's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The target, asked directly.
    Plain,
    /// The proxy, which attaches its drafter to the target's completion.
    Attached,
    /// A llama-server that holds the target and the draft and drafts in its own process.
    #[serde(rename = "own-draft")]
    NativeDraft,
}

impl Mode {
    /// Name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Attached => "attached",
            Self::NativeDraft => "own-draft",
        }
    }
}

/// A mode and the server to ask for it.
#[derive(Debug, Clone)]
pub struct Contender {
    /// The mode.
    pub mode: Mode,
    /// The server to ask.
    pub server: ChatServer,
    /// The llama-server that verifies the drafts and counts them; `None` where nothing is drafted.
    pub verifier: Option<ChatServer>,
}

/// Counts of drafting in a llama-server since its start (`/metrics`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DraftCounts {
    /// Steps that verified a draft.
    pub drafts: u64,
    /// Steps that kept the draft's token at a position, from the first position on.
    pub accepted: BTreeMap<usize, u64>,
}

impl Contender {
    /// The counts up to now; `None` if the server has no metrics.
    pub(super) async fn draft_counts(&self) -> Option<DraftCounts> {
        let text = self.verifier.as_ref()?.get("/metrics", COUNTS_TIMEOUT).await.ok()?;
        DraftCounts::parse(&text)
    }

    /// The counts of a Tightwad proxy; `None` for any other server.
    pub(super) async fn proxy_status(&self) -> Option<ProxyStatus> {
        if self.mode != Mode::Attached {
            return None;
        }
        let status = self.server.get("/v1/tightwad/status", COUNTS_TIMEOUT).await.ok()?;
        let status = serde_json::from_str(&status).ok()?;
        Some(ProxyStatus::of(&status))
    }
}

/// The drafting of a proxy: its `/v1/tightwad/status`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ProxyStatus {
    /// Counts since it was started.
    counts: Drafting,
    /// The largest speed-up that its cost model predicts for a drafter now.
    pub(super) expected_speed_up: Option<f64>,
}

impl ProxyStatus {
    fn of(status: &Status) -> Self {
        let outlooks = status.drafts.iter().filter_map(|draft| draft.outlook);
        Self {
            counts: Drafting {
                generated: status.counts.generated,
                drafted: status.counts.drafted,
                accepted: status.counts.accepted,
            },
            expected_speed_up: outlooks
                .filter_map(|outlook| outlook.expected_speed_up)
                .max_by(f64::total_cmp),
        }
    }

    /// The counts since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Drafting {
        let (now, then) = (self.counts, earlier.counts);
        Drafting {
            generated: now.generated.saturating_sub(then.generated),
            drafted: now.drafted.saturating_sub(then.drafted),
            accepted: now.accepted.saturating_sub(then.accepted),
        }
    }
}

impl DraftCounts {
    /// Reads llama-server's metrics; `None` for those of another server.
    fn parse(metrics: &str) -> Option<Self> {
        const DRAFTS: &str = "llamacpp:spec_decode_num_drafts_total";
        const POSITION: &str = "llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position=\"";
        let mut drafts = None;
        let mut accepted = BTreeMap::new();
        for line in metrics.lines() {
            let Some((name, value)) = line.rsplit_once(' ') else {
                continue;
            };
            if name == DRAFTS {
                drafts = count(value);
            } else if let Some(position) = name.strip_prefix(POSITION)
                && let Ok(position) = position.trim_end_matches("\"}").parse()
                && let Some(value) = count(value)
            {
                accepted.insert(position, value);
            }
        }
        drafts.map(|drafts| Self { drafts, accepted })
    }

    /// The counts since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        let accepted = self.accepted.iter().map(|(position, count)| {
            let before = earlier.accepted.get(position).copied().unwrap_or_default();
            (*position, count.saturating_sub(before))
        });
        Self {
            drafts: self.drafts.saturating_sub(earlier.drafts),
            accepted: accepted.collect(),
        }
    }

    /// Adds `more`.
    pub(super) fn add(&mut self, more: &Self) {
        self.drafts += more.drafts;
        for (position, count) in &more.accepted {
            *self.accepted.entry(*position).or_default() += count;
        }
    }
}

/// Reads a count. llama-server writes large counts in scientific notation with six digits.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn count(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().or_else(|| {
        let number = text.parse::<f64>().ok()?;
        (number >= 0.0).then_some(number as u64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = "\
# HELP llamacpp:spec_decode_num_drafts_total Speculative: Total speculative decoding verification steps
# TYPE llamacpp:spec_decode_num_drafts_total counter
llamacpp:spec_decode_num_drafts_total 1.5e+06
llamacpp:n_tokens_max 90
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position=\"0\"} 9
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position=\"1\"} 7
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position=\"10\"} 2
";

    #[test]
    fn the_metrics_of_llama_server_are_read() {
        let counts = DraftCounts::parse(METRICS).unwrap();
        assert_eq!(counts.drafts, 1_500_000);
        assert_eq!(counts.accepted, BTreeMap::from([(0, 9), (1, 7), (10, 2)]));
        assert_eq!(DraftCounts::parse("http_requests_total 7\n"), None);
    }

    #[test]
    fn counts_are_subtracted_and_added_by_position() {
        let early = DraftCounts {
            drafts: 3,
            accepted: BTreeMap::from([(0, 2)]),
        };
        let late = DraftCounts {
            drafts: 5,
            accepted: BTreeMap::from([(0, 3), (1, 1)]),
        };
        let mut between = late.since(&early);
        assert_eq!(between.accepted, BTreeMap::from([(0, 1), (1, 1)]));
        between.add(&early);
        assert_eq!(between, late);
        // A server that was started again counts from 0.
        assert_eq!(early.since(&late).drafts, 0);
    }
}
