//! Times single steps of a completion that exists only for measuring.
//!
//! Only steps that no other request shares count. Calibration runs one such completion at startup.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::speculation::Token;
use crate::upstream::{DraftCall, DraftState, LlamaServer, UpstreamError};

/// Longest wait of a step for its draft, in microseconds.
const HOLD_US: u64 = 200_000;

/// Limit for all steps of one timer. A target that other requests keep busy may never take a step that counts.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// A completion whose steps are timed one by one.
pub(super) struct StepTimer<'a> {
    target: &'a LlamaServer,
    key: &'a str,
    pos: usize,
    n_steps: u64,
    last: Token,
    until: Instant,
}

impl<'a> StepTimer<'a> {
    /// Times the completion that was started with this key.
    pub(super) fn new(target: &'a LlamaServer, key: &'a str) -> Self {
        Self {
            target,
            key,
            pos: 0,
            n_steps: 0,
            last: 0,
            until: Instant::now() + STEP_TIMEOUT,
        }
    }

    /// Offers `size` draft tokens and returns the number of tokens that the next step verified and its duration. `None` when
    /// the completion ended or the time is up.
    pub(super) async fn step(&mut self, size: usize) -> Result<Option<(usize, Duration)>, UpstreamError> {
        loop {
            let tokens = vec![self.last; if self.n_steps > 0 { size } else { 0 }];
            let call = DraftCall {
                key: self.key,
                pos: self.pos,
                tokens: &tokens,
                n_min: tokens.len(),
                hold_us: HOLD_US,
                wait: true,
            };
            let Ok(answer) = timeout_at(self.until, self.target.offer(&call)).await else {
                return Ok(None);
            };
            let answer = answer?;
            self.pos += answer.tokens.len();
            self.last = answer.tokens.last().copied().unwrap_or(self.last);
            match answer.state {
                DraftState::Unknown | DraftState::Waiting => continue,
                DraftState::Done | DraftState::Refused => return Ok(None),
                DraftState::Running => {}
            }
            let before = std::mem::replace(&mut self.n_steps, answer.n_steps);
            // The first step is the prefill, and a step shared with other requests is not comparable.
            if answer.n_steps == before + 1
                && answer.n_steps > 1
                && answer.batch_without_own_draft() == 1 + answer.step_n
            {
                return Ok(Some((answer.step_n, Duration::from_micros(answer.step_us))));
            }
        }
    }

    /// Times plain steps, after one that may have started under other conditions. Returns false when there are no more steps.
    pub(super) async fn plain(&mut self, steps: usize, times: &mut Vec<Duration>) -> Result<bool, UpstreamError> {
        for i in 0..=steps {
            let Some((_, time)) = self.step(0).await? else {
                return Ok(false);
            };
            if i > 0 {
                times.push(time);
            }
        }
        Ok(true)
    }
}
