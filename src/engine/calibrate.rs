//! Measures, as soon as they are up, what a step of the target costs by the number of draft tokens that it verifies, how fast
//! drafters are while the target does nothing, and how much longer its steps take while they are at work.
//!
//! On some machines a batch of two costs as much as two steps and one of eight less than one of seven, so nothing can be
//! inferred from a few sizes seen in passing. Nor from a drafter that works beside a target on the same device what it would
//! do undisturbed. The tokens are of no use here; only the time counts.

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

/// Numbers of draft tokens, the most telling first; a slow target is not asked for all.
const SIZES: [usize; 14] = [0, 8, 1, 16, 4, 2, 12, 6, 3, 10, 5, 7, 14, 9];
/// How often all sizes are tried; the fastest step of each counts, and what disturbs one round may spare the next.
const ROUNDS: usize = 3;
/// A model that was just loaded is slow at first: plain steps until one is not faster than the one before by this factor.
const SETTLED: f64 = 0.95;
/// No new step begins after this time.
const BOUND: Duration = Duration::from_secs(5);
/// Calls by which the way to the target is measured, and how long they may take.
const CALLS: usize = 3;
const CALLS_BOUND: Duration = Duration::from_secs(2);

/// What a drafter is to continue, and by how many tokens.
const TEXT: (&str, usize) = ("Once upon a time there was a small", 8);
/// How often; the first time its prompt has to be read.
const DRAFTS: usize = 3;
/// A drafter that takes longer is left to show in passing what it can do.
const DRAFT_BOUND: Duration = Duration::from_secs(2);

/// How often the target takes steps without the drafter and beside it, and how many each time.
const TURNS: usize = 4;
const STEPS: usize = 2;
/// Tokens that the drafter makes meanwhile, at most.
const BESIDE: usize = 64;
/// A stream that is over sooner is none to measure by.
const SHORT: Duration = Duration::from_millis(5);
/// While a completion runs a drafter is not measured. This is how often it is looked whether one does.
const BUSY: Duration = Duration::from_millis(100);

/// What was measured, as it was seen then.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct MeasuredServers {
    /// Of a target that is there, what it tells of itself.
    target: Option<MeasuredTarget>,
    /// Of each drafter that can be used how it is talked to.
    drafters: Vec<Option<DraftProtocol>>,
}

/// A target; it may tell nothing of itself.
#[derive(Debug, Clone, PartialEq)]
struct MeasuredTarget(Option<Props>);

impl MeasuredServers {
    /// All that there is to measure.
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

/// Measures the target whenever it comes up, and whenever its model is another one, and each drafter that can be used.
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
                    // How well drafters guess it was another model's matter too.
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

/// How fast a drafter is while the target does nothing, and then what it costs the target.
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
        // It would hardly show beside the target either.
        Err(_) => return Ok(()),
    }
    let drafting = || async {
        loop {
            let (mut pieces, began) = (draft(BESIDE), Instant::now());
            while let Some(DraftPiece::Tokens(_)) = pieces.next().await.transpose()? {}
            if began.elapsed() < SHORT {
                // Who has so little to say slows nobody down, and is not to be asked as fast as it answers.
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
    // A target that has nothing to do for a call and takes longer is busy with something else.
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

/// What comes of `measuring` a completion of so many steps, which ends with it. The target may never begin it.
async fn beside_completion<T>(
    target: &LlamaServer,
    key: &str,
    steps: usize,
    measuring: impl Future<Output = Result<T, UpstreamError>>,
) -> Result<T, UpstreamError> {
    // Useless tokens are seldom accepted, but may be.
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

/// How long the target takes to answer a call that it has nothing to do for.
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

/// How many times as long a step takes beside a drafter as without; `None` where that was not to be seen.
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
