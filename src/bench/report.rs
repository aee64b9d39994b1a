//! The figures of each mode, by kind of prompt and in total. A figure that cannot be computed is `null`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use super::contender::{DraftCounts, Mode};
use super::measure::{Block, Measurements, Sample};
use super::prompts::Prompt;
use super::statistics::{median, percentile, ratio};

/// All modes side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// By kind of the prompts that were asked.
    pub kinds: Vec<Group>,
    /// Over all prompts.
    pub total: Group,
    /// [`Group::equal`] over all prompts.
    pub equal: bool,
}

/// The modes over some prompts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// Kind of the prompts; `total` for all.
    pub kind: String,
    /// Each mode, the plain one first.
    pub modes: Vec<Figures>,
}

/// The figures of one mode over some prompts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// The mode.
    pub mode: Mode,
    /// Number of answers.
    pub requests: usize,
    /// Tokens of all answers.
    pub tokens: u64,
    /// All tokens over the total time, where an answer counts from its first token to its last.
    pub tokens_per_second: Option<f64>,
    /// Median over the answers.
    pub tokens_per_second_median: Option<f64>,
    /// 95th percentile over the answers.
    pub tokens_per_second_p95: Option<f64>,
    /// 5th percentile over the answers.
    pub tokens_per_second_p5: Option<f64>,
    /// Median time from sending a request to its first token, in milliseconds.
    pub ttft_ms_median: Option<f64>,
    /// Steps of the target.
    pub steps: Option<u64>,
    /// Generated tokens per step.
    pub tokens_per_step: Option<f64>,
    /// Acceptance of the drafts.
    pub acceptance: Option<Acceptance>,
    /// Ratio of tokens per second to the plain mode.
    pub speed_up: Option<f64>,
    /// Number of answers whose text differs from the plain one; `None` for the plain mode.
    pub differing: Option<usize>,
    /// All tokens of all clients over the elapsed time, prefill included.
    pub throughput_tokens_per_second: Option<f64>,
    /// Ratio of the throughput to the plain mode.
    pub throughput_gain: Option<f64>,
    /// Tokens of the slowest client over its waiting time, prefill included.
    pub slowest_client_tokens_per_second: Option<f64>,
}

/// Acceptance of drafts by the target.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Acceptance {
    /// Draft tokens that the target verified.
    pub drafted: u64,
    /// Draft tokens that the target kept.
    pub accepted: u64,
    /// Draft tokens that the target dropped.
    pub wasted: u64,
    /// Accepted over drafted.
    pub ratio: Option<f64>,
    /// Number of drafts, each verified in one step; `None` if the server has no metrics.
    pub drafts: Option<u64>,
    /// For each position, the share of all drafts whose token at that position was kept.
    pub by_position: Vec<f64>,
}

impl Comparison {
    /// Compares all modes, by kind and in total.
    #[must_use]
    pub fn of(measured: &Measurements, prompts: &[Prompt]) -> Self {
        let kinds = Prompt::kinds(prompts)
            .into_iter()
            .map(|kind| {
                let of_kind = |sample: &&Sample| prompts[sample.prompt].kind == kind;
                let samples: Vec<&Sample> = measured.samples.iter().filter(of_kind).collect();
                // A block of several kinds belongs to no kind.
                let apart = measured.blocks.iter().all(|block| block.kind.is_some());
                let is_of_kind = |block: &&Block| apart && block.kind.as_deref() == Some(kind);
                let blocks: Vec<&Block> = measured.blocks.iter().filter(is_of_kind).collect();
                Group::of(kind, &samples, &blocks)
            })
            .filter(|group| !group.modes.is_empty())
            .collect();
        let samples: Vec<&Sample> = measured.samples.iter().collect();
        let blocks: Vec<&Block> = measured.blocks.iter().collect();
        let total = Group::of("total", &samples, &blocks);
        Self {
            kinds,
            equal: total.equal(),
            total,
        }
    }
}

impl Group {
    /// Compares the modes over these answers.
    #[must_use]
    pub fn of(kind: &str, samples: &[&Sample], blocks: &[&Block]) -> Self {
        let modes: BTreeSet<Mode> = samples.iter().map(|sample| sample.mode).collect();
        let mut modes: Vec<Figures> = modes
            .into_iter()
            .map(|mode| {
                let samples: Vec<&Sample> = samples.iter().copied().filter(|sample| sample.mode == mode).collect();
                let blocks: Vec<&Block> = blocks.iter().copied().filter(|block| block.mode == mode).collect();
                Figures::of(mode, &samples, &blocks)
            })
            .collect();
        let plain = modes.iter().find(|figures| figures.mode == Mode::Plain).cloned();
        if let Some(plain) = plain {
            for figures in &mut modes {
                let over =
                    |one: Option<f64>, other: Option<f64>| one.zip(other).and_then(|(one, other)| ratio(one, other));
                figures.speed_up = over(figures.tokens_per_second, plain.tokens_per_second);
                figures.throughput_gain =
                    over(figures.throughput_tokens_per_second, plain.throughput_tokens_per_second);
                if figures.mode != Mode::Plain {
                    figures.differing = Some(differing(figures.mode, samples));
                }
            }
        }
        Self {
            kind: kind.to_owned(),
            modes,
        }
    }

    /// Whether every answer of the proxy equals the plain one. Ignores llama-server's own drafting.
    #[must_use]
    pub fn equal(&self) -> bool {
        let attached = self.mode(Mode::Attached);
        attached.is_none_or(|figures| figures.differing.unwrap_or(0) == 0)
    }

    /// The figures of a mode.
    #[must_use]
    pub fn mode(&self, mode: Mode) -> Option<&Figures> {
        self.modes.iter().find(|figures| figures.mode == mode)
    }
}

/// Number of answers of `mode` that differ from the plain answer to the same question.
fn differing(mode: Mode, samples: &[&Sample]) -> usize {
    let plain: BTreeMap<usize, &Sample> = samples
        .iter()
        .filter(|sample| sample.mode == Mode::Plain)
        .map(|sample| (sample.question, *sample))
        .collect();
    samples
        .iter()
        .filter(|sample| sample.mode == mode)
        .filter(|sample| {
            plain.get(&sample.question).is_some_and(|plain| {
                (&plain.answer.text, &plain.answer.reasoning) != (&sample.answer.text, &sample.answer.reasoning)
            })
        })
        .count()
}

impl Figures {
    /// Whether the target verified no draft token, so that the speed-up is not due to drafting.
    #[must_use]
    pub fn is_undrafted(&self) -> bool {
        self.acceptance
            .as_ref()
            .is_some_and(|acceptance| acceptance.drafted == 0)
    }

    fn of(mode: Mode, samples: &[&Sample], blocks: &[&Block]) -> Self {
        let tokens: u64 = samples.iter().map(|sample| sample.answer.tokens).sum();
        // The time of an answer starts at its first token, so that token does not count.
        let timed: u64 = samples
            .iter()
            .filter(|sample| sample.answer.first_token.is_some())
            .map(|sample| sample.answer.tokens.saturating_sub(1))
            .sum();
        let time: Duration = samples.iter().map(|sample| sample.answer.duration).sum();
        let speeds: Vec<f64> = samples
            .iter()
            .filter_map(|sample| sample.answer.tokens_per_second())
            .collect();
        let first_tokens: Vec<f64> = samples
            .iter()
            .filter_map(|sample| sample.answer.first_token)
            .map(|time| time.as_secs_f64() * 1000.0)
            .collect();
        let drafting: Option<Vec<_>> = samples.iter().map(|sample| sample.answer.drafting).collect();
        // A step yields the accepted draft tokens and one more.
        let steps: Option<u64> = drafting.as_ref().map(|drafting| {
            let of_one = |generated: u64, accepted: u64| generated.saturating_sub(accepted);
            drafting.iter().map(|one| of_one(one.generated, one.accepted)).sum()
        });
        let generated: u64 = drafting.iter().flatten().map(|one| one.generated).sum();
        let wall: Duration = blocks.iter().map(|block| block.wall).sum();
        Self {
            mode,
            requests: samples.len(),
            tokens,
            tokens_per_second: ratio(timed as f64, time.as_secs_f64()),
            tokens_per_second_median: median(&speeds),
            tokens_per_second_p95: percentile(&speeds, 95.0),
            tokens_per_second_p5: percentile(&speeds, 5.0),
            ttft_ms_median: median(&first_tokens),
            steps,
            tokens_per_step: steps.and_then(|steps| ratio(generated as f64, steps as f64)),
            acceptance: drafting.filter(|_| mode != Mode::Plain).map(|drafting| {
                let drafted = drafting.iter().map(|one| one.drafted).sum();
                let accepted = drafting.iter().map(|one| one.accepted).sum();
                Acceptance::of(drafted, accepted, blocks)
            }),
            speed_up: None,
            differing: None,
            throughput_tokens_per_second: ratio(tokens as f64, wall.as_secs_f64()),
            throughput_gain: None,
            slowest_client_tokens_per_second: slowest_client(samples),
        }
    }
}

impl Acceptance {
    fn of(drafted: u64, accepted: u64, blocks: &[&Block]) -> Self {
        let counts: Option<Vec<&DraftCounts>> = blocks.iter().map(|block| block.counts.as_ref()).collect();
        let counts = counts.filter(|counts| !counts.is_empty()).map(|counts| {
            let mut sum = DraftCounts::default();
            for one in counts {
                sum.add(one);
            }
            sum
        });
        let by_position = counts.as_ref().map_or(Vec::new(), |counts| {
            counts
                .accepted
                .values()
                .map_while(|accepted| ratio(*accepted as f64, counts.drafts as f64))
                .collect()
        });
        Self {
            drafted,
            accepted,
            wasted: drafted.saturating_sub(accepted),
            ratio: ratio(accepted as f64, drafted as f64),
            drafts: counts.map(|counts| counts.drafts),
            by_position,
        }
    }
}

fn slowest_client(samples: &[&Sample]) -> Option<f64> {
    let mut clients: BTreeMap<usize, (u64, Duration)> = BTreeMap::new();
    for sample in samples {
        let (tokens, time) = clients.entry(sample.client).or_default();
        *tokens += sample.answer.tokens;
        *time += sample.took;
    }
    clients
        .into_values()
        .filter_map(|(tokens, time)| ratio(tokens as f64, time.as_secs_f64()))
        .min_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::chat::{Answer, Drafting};

    fn sample(mode: Mode, question: usize, text: &str, tokens: u64, seconds: u64, drafting: [u64; 2]) -> Sample {
        Sample {
            mode,
            prompt: question,
            question,
            client: question,
            answer: Answer {
                text: text.into(),
                tokens,
                first_token: Some(Duration::from_millis(100 * (question as u64 + 1))),
                duration: Duration::from_secs(seconds),
                drafting: Some(Drafting {
                    generated: tokens,
                    drafted: drafting[0],
                    accepted: drafting[1],
                }),
                ..Answer::default()
            },
            took: Duration::from_secs(2 * seconds),
        }
    }

    fn block(mode: Mode, seconds: u64, counts: Option<DraftCounts>) -> Block {
        Block {
            mode,
            kind: Some("chat".into()),
            wall: Duration::from_secs(seconds),
            counts,
            expected_speed_up: None,
        }
    }

    fn prompts() -> Vec<Prompt> {
        ["code", "chat"]
            .map(|kind| Prompt {
                kind: kind.into(),
                messages: Vec::new(),
                prediction: None,
            })
            .to_vec()
    }

    fn measured() -> Measurements {
        let counts = DraftCounts {
            drafts: 10,
            accepted: BTreeMap::from([(0, 8), (1, 4)]),
        };
        Measurements {
            samples: vec![
                sample(Mode::Plain, 0, "a", 11, 2, [0, 0]),
                sample(Mode::Plain, 1, "b", 31, 3, [0, 0]),
                sample(Mode::Attached, 0, "a", 11, 1, [12, 6]),
                sample(Mode::Attached, 1, "c", 31, 1, [20, 16]),
            ],
            blocks: vec![
                block(Mode::Plain, 6, None),
                block(Mode::Attached, 2, Some(counts.clone())),
                block(Mode::Attached, 1, Some(counts)),
            ],
        }
    }

    fn near(one: Option<f64>, other: f64) {
        assert!(
            one.is_some_and(|one| (one - other).abs() < 1e-9),
            "{one:?}, not {other}"
        );
    }

    #[test]
    fn speeds_are_tokens_after_the_first_over_time() {
        let total = Comparison::of(&measured(), &prompts()).total;
        let [plain, attached] = &total.modes[..] else {
            unreachable!()
        };
        near(plain.tokens_per_second, 40.0 / 5.0);
        near(plain.tokens_per_second_median, 7.5);
        near(attached.tokens_per_second, 20.0);
        near(attached.speed_up, 2.5);
        near(attached.ttft_ms_median, 150.0);
        near(plain.throughput_tokens_per_second, 7.0);
        near(attached.throughput_tokens_per_second, 14.0);
        near(attached.throughput_gain, 2.0);
        near(plain.slowest_client_tokens_per_second, 11.0 / 4.0);
    }

    #[test]
    fn a_step_yields_what_it_accepts_and_one_token_more() {
        let total = Comparison::of(&measured(), &prompts()).total;
        assert_eq!(total.mode(Mode::Plain).unwrap().steps, Some(42));
        let attached = total.mode(Mode::Attached).unwrap();
        assert_eq!(attached.steps, Some(20));
        near(attached.tokens_per_step, 42.0 / 20.0);
        let acceptance = attached.acceptance.as_ref().unwrap();
        assert_eq!(
            (acceptance.drafted, acceptance.accepted, acceptance.wasted),
            (32, 22, 10)
        );
        near(acceptance.ratio, 22.0 / 32.0);
        assert_eq!(acceptance.drafts, Some(20));
        assert_eq!(acceptance.by_position, [0.8, 0.4]);
    }

    #[test]
    fn a_text_that_differs_is_counted_where_it_belongs() {
        let comparison = Comparison::of(&measured(), &prompts());
        assert!(!comparison.equal);
        let differing: Vec<_> = comparison.kinds.iter().map(|group| group.modes[1].differing).collect();
        assert_eq!(differing, [Some(0), Some(1)]);
        assert!(comparison.kinds[0].equal());
        assert_eq!(comparison.total.modes[0].differing, None);
    }

    #[test]
    fn a_server_that_tells_nothing_of_its_drafting_leaves_gaps_and_no_zeros() {
        let mut measured = measured();
        for sample in &mut measured.samples {
            sample.answer.drafting = None;
        }
        let total = Comparison::of(&measured, &prompts()).total;
        let attached = total.mode(Mode::Attached).unwrap();
        assert_eq!((attached.steps, attached.tokens_per_step), (None, None));
        assert_eq!(attached.acceptance, None);
    }
}
