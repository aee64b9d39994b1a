//! Calibration: measures the servers as soon as they are up.
//!
//! It measures the duration of a step of the target by its number of draft tokens, the latency of each drafter while the target
//! is idle, and the slowdown of the target while a drafter is busy. On some machines a batch of two costs as much as two steps
//! and one of eight less than one of seven, so the costs cannot be inferred from a few sizes. A drafter is never calibrated
//! while a completion runs. The results go to [`AdaptivePolicy`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};

use super::draft_server::DraftServer;
use super::step_timer::StepTimer;
use super::watch::{ClusterSnapshot, ConfiguredServer, DraftProtocol};
use super::{EngineState, Verification};
use crate::speculation::AdaptivePolicy;
use crate::upstream::{DraftCall, DraftPiece, LlamaServer, Props, UpstreamError};

/// Draft lengths to measure, the most informative first; a slow target gets through only some.
const SIZES: [usize; 14] = [0, 8, 1, 16, 4, 2, 12, 6, 3, 10, 5, 7, 14, 9];
/// Rounds over all sizes; the fastest step of each size counts, so that a disturbance of one round does not.
const ROUNDS: usize = 3;
/// A model is slow right after loading: take plain steps until one is no longer faster than this share of the one before.
const SETTLED: f64 = 0.95;
/// No step starts after this time.
const BOUND: Duration = Duration::from_secs(5);
/// Calls that measure the round trip to the target, and their time limit.
const CALLS: usize = 3;
const CALLS_BOUND: Duration = Duration::from_secs(2);

/// Text that a drafter continues, and by how many tokens.
const TEXT: (&str, usize) = ("Once upon a time there was a small", 8);
/// Number of drafts; the first one includes the prefill and does not count.
const DRAFTS: usize = 3;
/// Time limit of these drafts; a slower drafter is measured during completions.
const DRAFT_BOUND: Duration = Duration::from_secs(2);

/// Turns of steps without and with the drafter, and steps per turn.
const TURNS: usize = 4;
const STEPS: usize = 2;
/// Most tokens that the drafter makes meanwhile.
const BESIDE: usize = 64;
/// A stream that ends sooner is not a measurement.
const SHORT: Duration = Duration::from_millis(5);
/// Interval at which to check whether a completion still runs, during which drafters are not measured.
const BUSY: Duration = Duration::from_millis(100);

/// The servers that were measured, as they were then.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct MeasuredServers {
    /// The target, if it was up.
    target: Option<MeasuredTarget>,
    /// The protocol of each drafter that could be used.
    drafters: Vec<Option<DraftProtocol>>,
}

/// Properties of a target; `None` if it reports none.
#[derive(Debug, Clone, PartialEq)]
struct MeasuredTarget(Option<Props>);

impl MeasuredServers {
    /// All servers that can be measured now.
    pub(super) fn all(snapshot: &ClusterSnapshot) -> Self {
        if snapshot.verification != Verification::Attached {
            return Self::default();
        }
        Self {
            target: Some(MeasuredTarget(snapshot.model.clone())),
            drafters: snapshot.drafts.iter().map(|draft| draft.protocol.clone()).collect(),
        }
    }
}

/// Measures the target whenever it comes up or its model changes, and each drafter that can be used.
pub(super) async fn run(shared: Arc<EngineState>, target: LlamaServer, drafts: Vec<ConfiguredServer>) {
    let mut snapshot = shared.snapshot.subscribe();
    let mut model = None;
    loop {
        let measured = shared.measured().clone();
        let seen = snapshot.wait_for(|seen| MeasuredServers::all(seen) != measured).await;
        let Ok((all, n_max)) = seen.map(|seen| (MeasuredServers::all(&seen), shared.cap.min(seen.n_max))) else {
            return;
        };
        if all.target != measured.target {
            if all.target.is_some() {
                if model.as_ref().is_some_and(|before| *before != all.target) {
                    // Acceptance rates belong to the old model too.
                    *shared.policy() = AdaptivePolicy::default();
                }
                model = Some(all.target.clone());
                if let Err(error) = measure(&shared, &target, n_max).await {
                    tracing::debug!("the target could not be measured: {error}");
                }
            }
            *shared.measured() = MeasuredServers {
                target: all.target,
                drafters: vec![None; all.drafters.len()],
            };
            continue;
        }
        let new = |(number, protocol): &(usize, Option<DraftProtocol>)| measured.drafters[*number] != *protocol;
        let Some((number, protocol)) = all.drafters.into_iter().enumerate().find(new) else {
            continue;
        };
        if let Some(protocol) = &protocol {
            if !shared.batch_load.is_empty() {
                sleep(BUSY).await;
                continue;
            }
            let drafter = DraftServer::new(&drafts[number], protocol, &target);
            if let Err(error) = measure_drafter(&shared, &target, number, &drafter).await {
                let url = &drafts[number].config.url;
                tracing::debug!("the drafter {url} could not be measured: {error}");
            }
        }
        shared.measured().drafters[number] = protocol;
    }
}

/// Measures the latency of a drafter while the target is idle, then how much it slows the target down.
async fn measure_drafter(
    shared: &EngineState,
    target: &LlamaServer,
    number: usize,
    drafter: &DraftServer,
) -> Result<(), UpstreamError> {
    let prefix = target.tokenize_prompt(TEXT.0).await?;
    let Some(lease) = shared.slots[number].lease(&prefix) else {
        return Ok(());
    };
    let draft = |n| drafter.draft(prefix.clone(), n, lease.index(), false);
    let undisturbed = async {
        for round in 0..DRAFTS {
            let mut pieces = draft(TEXT.1);
            let began = Instant::now();
            let mut last = None;
            while let Some(piece) = pieces.next().await {
                let DraftPiece::Tokens(tokens) = piece? else { break };
                let now = Instant::now();
                let mut policy = shared.policy();
                match last.replace(now) {
                    _ if round == 0 => {}
                    None => policy.record_first_token(number, now - began, true),
                    Some(last) => policy.record_tokens(number, tokens.len(), now - last, true),
                }
            }
        }
        Ok(())
    };
    match timeout(DRAFT_BOUND, undisturbed).await {
        Ok(measured) => measured?,
        // Too slow to measure its effect on the target either.
        Err(_) => return Ok(()),
    }
    let drafting = || async {
        loop {
            let (mut pieces, began) = (draft(BESIDE), Instant::now());
            while let Some(DraftPiece::Tokens(_)) = pieces.next().await.transpose()? {}
            if began.elapsed() < SHORT {
                // So short a draft slows nothing down, and asking again at once would flood the drafter.
                return Ok(());
            }
        }
    };
    let key = super::new_key();
    let slowdown = slowdown(StepTimer::new(target, &key), drafting);
    if let Some(factor) = beside_completion(target, &key, TURNS * STEPS, slowdown).await? {
        tracing::debug!("steps of the target take {factor:.2} times as long beside the drafter");
        shared.policy().calibrate_slowdown(number, factor);
    }
    Ok(())
}

async fn measure(shared: &EngineState, target: &LlamaServer, n_max: usize) -> Result<(), UpstreamError> {
    // The call needs no work; a target that takes longer is busy with something else.
    timeout(CALLS_BOUND, measure_way(shared, target))
        .await
        .unwrap_or(Ok(()))?;
    let key = super::new_key();
    let costs = step_costs(StepTimer::new(target, &key), n_max);
    let costs = beside_completion(target, &key, ROUNDS * SIZES.len(), costs).await?;
    if costs.contains_key(&0) {
        let shown: Vec<String> = costs
            .iter()
            .map(|(n, cost)| format!("{n}: {:.1}", cost.as_secs_f64() * 1e3))
            .collect();
        tracing::debug!("milliseconds per step by draft tokens: {}", shown.join(", "));
        shared.policy().calibrate(costs);
    }
    Ok(())
}

/// Runs `measuring` beside a completion of up to `steps` steps, and ends the completion with it. The target may never start
/// the completion.
async fn beside_completion<T>(
    target: &LlamaServer,
    key: &str,
    steps: usize,
    measuring: impl Future<Output = Result<T, UpstreamError>>,
) -> Result<T, UpstreamError> {
    // The draft tokens are arbitrary; a few may be accepted.
    let completion = async {
        match target.begin_endless(key, 16 * steps).await {
            Ok(_answer) => std::future::pending().await,
            Err(error) => error,
        }
    };
    tokio::select! {
        measured = measuring => measured,
        error = completion => Err(error),
    }
}

/// Measures the round trip of a call that needs no work.
async fn measure_way(shared: &EngineState, target: &LlamaServer) -> Result<(), UpstreamError> {
    let key = super::new_key();
    let call = DraftCall {
        key: &key,
        pos: 0,
        tokens: &[],
        n_min: 0,
        hold_us: 0,
        wait: false,
    };
    for _ in 0..CALLS {
        let asked = Instant::now();
        target.offer(&call).await?;
        shared.policy().record_round_trip(asked.elapsed());
    }
    Ok(())
}

async fn step_costs(mut step_timer: StepTimer<'_>, n_max: usize) -> Result<BTreeMap<usize, Duration>, UpstreamError> {
    let began = Instant::now();
    let mut costs = BTreeMap::<usize, Duration>::new();
    let mut sizes = (0..ROUNDS).flat_map(|_| SIZES).filter(|size| *size <= n_max);
    let mut settled = false;
    while began.elapsed() < BOUND {
        let Some(size) = (if settled { sizes.next() } else { Some(0) }) else {
            break;
        };
        let Some((n, cost)) = step_timer.step(size).await? else {
            break;
        };
        let known = costs.entry(n).or_insert(Duration::MAX);
        settled |= *known < Duration::MAX && cost.as_secs_f64() > SETTLED * known.as_secs_f64();
        *known = cost.min(*known);
    }
    Ok(costs)
}

/// Factor by which a step takes longer beside a drafter; `None` if it could not be measured.
async fn slowdown<D>(mut step_timer: StepTimer<'_>, drafting: impl Fn() -> D) -> Result<Option<f64>, UpstreamError>
where
    D: Future<Output = Result<(), UpstreamError>>,
{
    let began = Instant::now();
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    while alone.len() < TURNS * STEPS && began.elapsed() < BOUND {
        if !step_timer.plain(STEPS, &mut alone).await? {
            break;
        }
        tokio::select! {
            ended = drafting() => return ended.map(|()| None),
            more = step_timer.plain(STEPS, &mut beside) => if !more? { break },
        }
    }
    Ok(median(&mut beside)
        .zip(median(&mut alone))
        .map(|(beside, alone)| beside.as_secs_f64() / alone.as_secs_f64()))
}

fn median(times: &mut [Duration]) -> Option<Duration> {
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}
