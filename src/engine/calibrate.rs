//! Measures what a step of the target costs by the number of draft tokens that it verifies, as soon as it is up.
//!
//! On some machines a batch of two costs as much as two steps and one of eight less than one of seven, so nothing can be
//! inferred from a few sizes seen in passing. The tokens offered here are of no use; only the time counts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::watch::Sight;
use super::{Shared, Verification};
use crate::speculation::{Pace, Token};
use crate::upstream::{DraftCall, DraftState, LlamaServer, UpstreamError};

/// Numbers of draft tokens, the most telling first; a slow target is not asked for all.
const SIZES: [usize; 14] = [0, 8, 1, 16, 4, 2, 12, 6, 3, 10, 5, 7, 14, 9];
/// How often all sizes are tried; the fastest step of each counts, and what disturbs one round may spare the next.
const ROUNDS: usize = 3;
/// A model that was just loaded is slow at first: plain steps until one is not faster than the one before by this factor.
const SETTLED: f64 = 0.95;
/// No new step begins after this time.
const BOUND: Duration = Duration::from_secs(5);
/// Calls by which the way to the target is measured.
const CALLS: usize = 3;
/// How long a step may wait for its draft.
const HOLD_US: u64 = 200_000;

/// Measures the target whenever it comes up, and whenever its model is another one.
pub(super) async fn run(shared: Arc<Shared>, target: LlamaServer) {
    let mut sight = shared.sight.subscribe();
    let attached = |sight: &Sight| sight.verification == Verification::Attached;
    let mut before = None;
    loop {
        let Ok(seen) = sight.wait_for(attached).await.map(|sight| sight.clone()) else {
            return;
        };
        if before.as_ref().is_some_and(|before| *before != seen.model) {
            // How well drafters guess it was another model's matter too.
            *shared.pace() = Pace::default();
        }
        if let Err(error) = measure(&shared, &target, shared.cap.min(seen.n_max)).await {
            tracing::debug!("the target could not be measured: {error}");
        }
        let changed = |sight: &Sight| !attached(sight) || sight.model != seen.model;
        if sight.wait_for(changed).await.is_err() {
            return;
        }
        before = Some(seen.model);
    }
}

async fn measure(shared: &Shared, target: &LlamaServer, n_max: usize) -> Result<(), UpstreamError> {
    measure_way(shared, target).await?;
    let key = super::new_key();
    // The completion is dropped, and so ended, when the measuring is over. Useless tokens are seldom accepted, but may be.
    let completion = target.begin_endless(&key, 16 * ROUNDS * SIZES.len());
    let (completion, costs) = tokio::join!(completion, step_costs(target, &key, n_max));
    completion.map(drop)?;
    let costs = costs?;
    if costs.contains_key(&0) {
        let shown: Vec<String> = costs
            .iter()
            .map(|(n, cost)| format!("{n}: {:.1}", cost.as_secs_f64() * 1e3))
            .collect();
        tracing::debug!("milliseconds per step by draft tokens: {}", shown.join(", "));
        shared.pace().calibrate(costs);
    }
    Ok(())
}

/// How long the target takes to answer a call that it has nothing to do for.
async fn measure_way(shared: &Shared, target: &LlamaServer) -> Result<(), UpstreamError> {
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
        shared.pace().record_round_trip(asked.elapsed());
    }
    Ok(())
}

async fn step_costs(target: &LlamaServer, key: &str, n_max: usize) -> Result<BTreeMap<usize, Duration>, UpstreamError> {
    let began = Instant::now();
    let mut costs = BTreeMap::<usize, Duration>::new();
    let mut sizes = (0..ROUNDS).flat_map(|_| SIZES).filter(|size| *size <= n_max);
    let mut settled = false;
    let (mut pos, mut n_steps, mut last): (usize, u64, Token) = (0, 0, 0);
    while began.elapsed() < BOUND {
        let Some(size) = (if settled { sizes.next() } else { Some(0) }) else {
            break;
        };
        let tokens = vec![last; if n_steps > 0 { size } else { 0 }];
        let call = DraftCall {
            key,
            pos,
            tokens: &tokens,
            n_min: tokens.len(),
            hold_us: HOLD_US,
            wait: true,
        };
        let answer = target.offer(&call).await?;
        pos += answer.tokens.len();
        last = answer.tokens.last().copied().unwrap_or(last);
        match answer.state {
            DraftState::Unknown | DraftState::Waiting => continue,
            DraftState::Done | DraftState::Refused => break,
            DraftState::Running => {}
        }
        // The first step is the prompt's.
        if answer.n_steps == n_steps + 1 && answer.n_steps > 1 {
            let cost = Duration::from_micros(answer.step_us);
            let known = costs.entry(answer.step_n).or_insert(Duration::MAX);
            settled |= *known < Duration::MAX && cost.as_secs_f64() > SETTLED * known.as_secs_f64();
            *known = cost.min(*known);
        }
        n_steps = answer.n_steps;
    }
    Ok(costs)
}
