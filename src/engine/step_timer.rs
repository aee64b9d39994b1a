//! Times the steps of a completion that is there for nothing else.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::speculation::Token;
use crate::upstream::{DraftCall, DraftState, LlamaServer, UpstreamError};

/// How long a step may wait for its draft.
const HOLD_US: u64 = 200_000;

/// For how long steps are timed at most. A target that others keep busy may never take one that tells anything.
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
    /// The completion that was begun with this key.
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

    /// The next step that is seen, which is to verify `size` draft tokens: how many it did verify, and how long it took.
    /// `None`: the completion has ended, or it has taken too long.
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
            // The first step is the prompt's, and whose pass others share is no measure.
            if answer.n_steps == before + 1 && answer.n_steps > 1 && answer.step_batch == 1 + answer.step_n {
                return Ok(Some((answer.step_n, Duration::from_micros(answer.step_us))));
            }
        }
    }

    /// Times some plain steps after one that may have begun in other circumstances; false: no more steps are to be had.
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
