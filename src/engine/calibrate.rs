//! Measures what a step of the target costs by the number of draft tokens that it verifies, as soon as it is up.
//!
//! On some machines a batch of two costs as much as two steps and one of eight less than one of seven, so nothing can be
//! inferred from a few sizes seen in passing. The tokens offered here are of no use; only the time counts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Shared, Verification};
use crate::speculation::Token;
use crate::upstream::{DraftCall, DraftState, LlamaServer, UpstreamError};

/// Numbers of draft tokens, the most telling first; a slow target is not asked for all.
const SIZES: [usize; 14] = [0, 8, 1, 16, 4, 2, 12, 6, 3, 0, 10, 5, 7, 14];
/// Steps per size.
const REPEAT: usize = 2;
/// No new step begins after this time.
const BOUND: Duration = Duration::from_secs(3);
/// How long a step may wait for its draft.
const HOLD: Duration = Duration::from_millis(200);

/// Measures the target whenever it comes up.
pub(super) async fn run(shared: Arc<Shared>, target: LlamaServer) {
    let mut sight = shared.sight.subscribe();
    loop {
        if sight
            .wait_for(|sight| sight.verification == Verification::Attached)
            .await
            .is_err()
        {
            return;
        }
        let n_max = shared.cap.min(sight.borrow().n_max);
        if let Err(error) = measure(&shared, &target, n_max).await {
            tracing::debug!("the target could not be measured: {error}");
        }
        if sight
            .wait_for(|sight| sight.verification != Verification::Attached)
            .await
            .is_err()
        {
            return;
        }
    }
}

async fn measure(shared: &Shared, target: &LlamaServer, n_max: usize) -> Result<(), UpstreamError> {
    let began = Instant::now();
    let key = super::new_key();
    let sizes = SIZES
        .iter()
        .filter(|size| **size <= n_max)
        .flat_map(|size| [*size; REPEAT]);
    // Useless tokens are hardly ever accepted, but may be.
    let n_predict = SIZES.len() * REPEAT * 4;
    let completion = target.begin_endless(&key, n_predict);
    let measuring = async {
        let hold_us = u64::try_from(HOLD.as_micros()).unwrap_or(u64::MAX);
        let (mut pos, mut n_steps, mut last): (usize, u64, Token) = (0, 0, 0);
        for size in sizes {
            if began.elapsed() > BOUND {
                break;
            }
            let tokens = vec![last; size];
            let call = DraftCall {
                key: &key,
                pos,
                tokens: &tokens,
                n_min: size,
                hold_us,
                wait: true,
            };
            let mut answer = target.offer(&call).await?;
            // The first answers bring the prompt and the token after it.
            while matches!(answer.state, DraftState::Unknown | DraftState::Waiting) && began.elapsed() < BOUND {
                pos += answer.tokens.len();
                answer = target
                    .offer(&DraftCall {
                        pos,
                        tokens: &[],
                        n_min: 1,
                        ..call
                    })
                    .await?;
            }
            if answer.state != DraftState::Running {
                break;
            }
            pos += answer.tokens.len();
            last = answer.tokens.last().copied().unwrap_or(last);
            if answer.n_steps == n_steps + 1 && answer.n_steps > 1 {
                shared
                    .pace()
                    .record_cost(answer.step_n, Duration::from_micros(answer.step_us));
            }
            n_steps = answer.n_steps;
        }
        Ok(())
    };
    // The completion is dropped, and so ended, when the measuring is over.
    let (completion, measured) = tokio::join!(completion, measuring);
    completion.map(drop)?;
    measured?;
    let pace = shared.pace();
    let steps: Vec<String> = SIZES
        .iter()
        .filter_map(|size| Some(format!("{size}: {:.1}", pace.step_us(*size)? / 1e3)))
        .collect();
    tracing::debug!("milliseconds per step by draft tokens: {}", steps.join(", "));
    Ok(())
}
