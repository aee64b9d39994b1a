//! Asks all contenders the same questions, in turns.

use std::iter;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::contender::{Contender, DraftCounts, Mode};
use super::prompts::Prompt;
use crate::upstream::ChatError;
use crate::upstream::chat::{Answer, Wishes};

/// Requests per client in a block: enough that the clients work in parallel for most of the time.
const REQUESTS_PER_CLIENT: usize = 4;

/// Settings of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Number of times that each prompt is asked in each mode.
    pub rounds: usize,
    /// Requests at once.
    pub clients: usize,
    /// Parameters of every request.
    pub wishes: Wishes,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Mode that gave the answer.
    pub mode: Mode,
    /// Index of its prompt.
    pub prompt: usize,
    /// Number of the question. The answers of all modes to one question should be equal.
    pub question: usize,
    /// Number of the client.
    pub client: usize,
    /// The answer.
    pub answer: Answer,
    /// Time from sending the request to the end of the answer.
    pub took: Duration,
}

/// The requests in one turn of one mode.
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// The mode.
    pub mode: Mode,
    /// Kind of the prompts, if they all have the same.
    pub kind: Option<String>,
    /// Time from the first request to the end of the last.
    pub wall: Duration,
    /// The server's counts of drafting in this time.
    pub(super) counts: Option<DraftCounts>,
    /// The speed-up that the proxy predicted at its end.
    pub(super) expected_speed_up: Option<f64>,
}

/// All measurements.
#[derive(Debug, Clone, Default)]
pub struct Measurements {
    /// Every answer.
    pub samples: Vec<Sample>,
    /// Every block.
    pub blocks: Vec<Block>,
}

impl Measurements {
    /// Mean over the blocks of the speed-up that the proxy predicted.
    #[must_use]
    pub fn expected_speed_up(&self) -> Option<f64> {
        let expected: Vec<f64> = self.blocks.iter().filter_map(|block| block.expected_speed_up).collect();
        let count = u32::try_from(expected.len()).ok().filter(|count| *count > 0)?;
        Some(expected.iter().sum::<f64>() / f64::from(count))
    }
}

/// Progress of a measurement.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// Requests are about to be sent, or one of them was answered.
    Asking {
        /// The mode.
        mode: Mode,
        /// Whether these are warm-up requests, which do not count.
        warming_up: bool,
        /// Requests that have been answered.
        done: usize,
        /// Total number of requests.
        all: usize,
    },
    /// All modes have answered the same questions.
    Answered(&'a [Sample]),
}

/// Asks every contender every prompt. Adds a block to `measured` when all contenders have answered it, so that the results survive if
/// the future is dropped.
///
/// The contenders take turns after every prompt, or after some prompts per client, and the order rotates. So a machine that slows down
/// slows all of them.
pub async fn measure(
    plan: &Plan,
    prompts: &[Prompt],
    contenders: &[Contender],
    measured: &mut Measurements,
    mut on_progress: impl FnMut(Progress<'_>),
) -> Result<(), ChatError> {
    let warm_up = Prompt::first_of_each_kind(prompts, 1);
    let blocks = blocks(prompts.len(), plan.clients);
    let per_round: usize = blocks.iter().map(Vec::len).sum();
    let all = (warm_up.len() + per_round * plan.rounds) * contenders.len();
    let mut done = 0;
    // The first answers are slower because memory is touched for the first time, and the proxy learns from them.
    for prompt in &warm_up {
        for contender in contenders {
            on_progress(Progress::Asking {
                mode: contender.mode,
                warming_up: true,
                done,
                all,
            });
            contender.ask(prompt, plan.wishes).await?;
            done += 1;
        }
    }
    let (mut turn, mut question) = (0, 0);
    for _ in 0..plan.rounds {
        for block in &blocks {
            let mut answered = Measurements::default();
            for place in 0..contenders.len() {
                let contender = &contenders[(turn + place) % contenders.len()];
                let questions: Vec<(usize, usize)> = block.iter().copied().zip(question..).collect();
                let on_answer = |answered| {
                    on_progress(Progress::Asking {
                        mode: contender.mode,
                        warming_up: false,
                        done: done + answered,
                        all,
                    });
                };
                let (block, samples) = run_block(plan, prompts, contender, &questions, on_answer).await?;
                done += samples.len();
                answered.blocks.push(block);
                answered.samples.extend(samples);
            }
            on_progress(Progress::Answered(&answered.samples));
            measured.blocks.extend(answered.blocks);
            measured.samples.extend(answered.samples);
            turn += 1;
            question += block.len();
        }
    }
    Ok(())
}

impl Contender {
    pub(super) async fn ask(&self, prompt: &Prompt, wishes: Wishes) -> Result<Answer, ChatError> {
        let prediction = prompt.prediction.as_deref();
        self.server.chat(&prompt.messages, prediction, wishes, |_| Ok(())).await
    }
}

/// Asks one contender the questions, each an index of a prompt and a number. Calls `on_answer` with the number of answers so far,
/// starting at 0.
async fn run_block(
    plan: &Plan,
    prompts: &[Prompt],
    contender: &Contender,
    questions: &[(usize, usize)],
    mut on_answer: impl FnMut(usize),
) -> Result<(Block, Vec<Sample>), ChatError> {
    let (before, proxy_before) = (contender.draft_counts().await, contender.proxy_status().await);
    let next = AtomicUsize::new(0);
    let began = Instant::now();
    let clients = (0..plan.clients.max(1)).map(|client| {
        let own = iter::from_fn(|| questions.get(next.fetch_add(1, Ordering::Relaxed)));
        let ask = move |&(prompt, question): &(usize, usize)| async move {
            let sent = Instant::now();
            let answer = contender.ask(&prompts[prompt], plan.wishes).await?;
            Ok::<_, ChatError>(Sample {
                mode: contender.mode,
                prompt,
                question,
                client,
                answer,
                took: sent.elapsed(),
            })
        };
        stream::iter(own).then(ask).boxed_local()
    });
    let mut answers = stream::select_all(clients);
    let mut samples = Vec::new();
    on_answer(0);
    while let Some(sample) = answers.try_next().await? {
        samples.push(sample);
        on_answer(samples.len());
    }
    let wall = began.elapsed();
    let (after, proxy) = (contender.draft_counts().await, contender.proxy_status().await);
    // The proxy writes an answer in rounds itself, without the target's timings.
    if let [sample] = &mut samples[..]
        && let Some((before, after)) = proxy_before.zip(proxy)
    {
        sample.answer.drafting.get_or_insert(after.since(&before));
    }
    let kind = |(prompt, _): &(usize, usize)| &prompts[*prompt].kind;
    let block = Block {
        mode: contender.mode,
        kind: questions
            .first()
            .map(kind)
            .filter(|first| questions.iter().all(|question| kind(question) == *first))
            .cloned(),
        wall,
        counts: before.zip(after).map(|(before, after)| after.since(&before)),
        expected_speed_up: proxy.and_then(|proxy| proxy.expected_speed_up),
    };
    Ok((block, samples))
}

/// Indices of the prompts of one round, in blocks of about equal size. With several clients, a set that is too small is repeated.
fn blocks(prompts: usize, clients: usize) -> Vec<Vec<usize>> {
    if prompts == 0 {
        return Vec::new();
    }
    let size = if clients > 1 { clients * REQUESTS_PER_CLIENT } else { 1 };
    let all: Vec<usize> = (0..prompts).cycle().take(prompts.max(size)).collect();
    let count = (all.len() / size).max(1);
    let mut rest = all.as_slice();
    (0..count)
        .map(|done| {
            let (block, after) = rest.split_at(rest.len() / (count - done));
            rest = after;
            block.to_vec()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_changes_the_mode_after_each_prompt() {
        assert_eq!(blocks(3, 1), [[0], [1], [2]]);
        assert!(blocks(0, 1).is_empty());
    }

    #[test]
    fn several_clients_get_blocks_that_keep_them_busy() {
        let sizes = |prompts, clients| blocks(prompts, clients).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(sizes(36, 2), [9, 9, 9, 9]);
        assert_eq!(sizes(36, 4), [18, 18]);
        assert_eq!(sizes(5, 2), [8]);
        assert_eq!(blocks(5, 2), [[0, 1, 2, 3, 4, 0, 1, 2]]);
    }
}
