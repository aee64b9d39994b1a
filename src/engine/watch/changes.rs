//! Log lines about servers that came up, went down or changed.

use tracing::Level;

use super::super::ServerStatus;
use super::probe::{LOADING, NOT_UP_YET};
use super::{COMPARING, ClusterSnapshot};

/// Log lines for the changes between two snapshots. A running comparison of vocabularies is not worth a line.
pub(super) fn changes(old: &ClusterSnapshot, new: &ClusterSnapshot) -> Vec<(Level, String)> {
    let problem = |status: &ServerStatus| status.problem.clone().filter(|problem| problem != COMPARING);
    let drafts = new.drafts.iter().enumerate();
    let drafts = drafts.map(|(number, new)| ("draft", old.drafts.get(number).map(|old| &old.status), &new.status));
    let mut lines = Vec::new();
    for (role, old, new) in std::iter::once(("target", Some(&old.target), &new.target)).chain(drafts) {
        if old.is_some_and(|old| old.healthy == new.healthy && problem(old) == problem(new)) {
            continue;
        }
        let url = &new.url;
        match problem(new) {
            None if new.healthy => lines.push((Level::INFO, format!("{role} server {url} is up"))),
            Some(problem) => {
                let calm = problem == LOADING || problem.starts_with(NOT_UP_YET);
                let level = if calm { Level::INFO } else { Level::WARN };
                lines.push((level, format!("{role} server {url}: {problem}")));
            }
            None => {}
        }
    }
    if old.verification != new.verification || old.reason != new.reason {
        match &new.reason {
            Some(reason) if reason == COMPARING => {}
            Some(reason) => lines.push((Level::WARN, format!("drafting: {reason}"))),
            None => {
                let (how, n_max) = (new.verification.name(), new.n_max);
                let sentence = format!("verification: {how}, up to {n_max} draft tokens per step");
                lines.push((Level::INFO, sentence));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::verification::NOT_YET;
    use super::super::{ClusterSnapshot, DrafterSnapshot};
    use super::*;
    use crate::engine::Verification;

    /// A snapshot of one drafter and the target: whether each is healthy, and its problem.
    fn snapshot(draft: (bool, Option<&str>), target: (bool, Option<&str>)) -> ClusterSnapshot {
        let status = |name: &str, (healthy, problem): (bool, Option<&str>)| ServerStatus {
            url: format!("http://{name}"),
            healthy,
            problem: problem.map(str::to_owned),
            ..ServerStatus::default()
        };
        let waits = (!target.0).then(|| NOT_YET.to_owned());
        let compares = draft.1.filter(|problem| *problem == COMPARING).map(str::to_owned);
        ClusterSnapshot {
            target: status("t", target),
            drafts: vec![DrafterSnapshot {
                status: status("d", draft),
                protocol: None,
            }],
            verification: if target.0 {
                Verification::Attached
            } else {
                Verification::None
            },
            reason: waits.or(compares),
            n_max: 16,
            ..ClusterSnapshot::default()
        }
    }

    #[test]
    fn servers_that_start_after_the_proxy_are_logged_once() {
        let (up, gone) = ((true, None), (false, Some("it is unreachable")));
        let waits = (false, Some("it is not up yet: it is unreachable"));
        let snapshots = [
            snapshot(
                (false, Some("it was not asked yet")),
                (false, Some("it was not asked yet")),
            ),
            snapshot(waits, (false, Some("it was not asked yet"))),
            snapshot(waits, waits),
            snapshot(up, waits),
            snapshot(up, gone),
            snapshot(up, (false, Some(LOADING))),
            snapshot((true, Some(COMPARING)), up),
            snapshot(up, up),
            snapshot(up, gone),
        ];
        let logged: Vec<String> = (snapshots.windows(2))
            .flat_map(|pair| changes(&pair[0], &pair[1]))
            .map(|(level, sentence)| format!("{level} {sentence}"))
            .collect();
        assert_eq!(
            logged,
            [
                "INFO draft server http://d: it is not up yet: it is unreachable",
                "INFO target server http://t: it is not up yet: it is unreachable",
                "INFO draft server http://d is up",
                "WARN target server http://t: it is unreachable",
                "INFO target server http://t: it is loading its model",
                "INFO target server http://t is up",
                "INFO verification: attached, up to 16 draft tokens per step",
                "WARN target server http://t: it is unreachable",
                "WARN drafting: the target does not answer yet, so it is not known what it can verify",
            ]
        );
    }
}
