//! Completions that run at the same time, and the tokens that each brings into a batch of the target.
//!
//! A completion counts from its first step until it is dropped. The policy reads the load of the others.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::speculation::ConcurrentLoad;

/// All running completions of one target.
#[derive(Debug, Clone, Default)]
pub struct BatchLoad(Arc<Mutex<ConcurrentLoad>>);

/// One of them; dropping it takes it out.
#[derive(Debug)]
pub struct ActiveCompletion {
    batch_load: BatchLoad,
    /// Tokens of its last step, its draft included; `None` before its first.
    tokens: Option<usize>,
}

impl BatchLoad {
    /// Adds a completion, which counts from its first step.
    #[must_use]
    pub fn join(&self) -> ActiveCompletion {
        ActiveCompletion {
            batch_load: self.clone(),
            tokens: None,
        }
    }

    /// Whether no completion runs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.lock().completions == 0
    }
}

impl ActiveCompletion {
    /// Records a step of this completion over `tokens` tokens.
    pub fn steps(&mut self, tokens: usize) {
        let mut all = self.batch_load.0.lock();
        all.completions += usize::from(self.tokens.is_none());
        all.tokens = all.tokens + tokens - self.tokens.unwrap_or_default();
        self.tokens = Some(tokens);
    }

    /// The load of the other completions.
    #[must_use]
    pub fn others(&self) -> ConcurrentLoad {
        let all = *self.batch_load.0.lock();
        ConcurrentLoad {
            completions: all.completions - usize::from(self.tokens.is_some()),
            tokens: all.tokens - self.tokens.unwrap_or_default(),
        }
    }
}

impl Drop for ActiveCompletion {
    fn drop(&mut self) {
        if let Some(tokens) = self.tokens {
            let mut all = self.batch_load.0.lock();
            all.completions -= 1;
            all.tokens -= tokens;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_sees_the_others_and_nobody_who_left() {
        let batch_load = BatchLoad::default();
        let (mut one, mut two, three) = (batch_load.join(), batch_load.join(), batch_load.join());
        one.steps(5);
        two.steps(1);
        two.steps(3);
        assert_eq!(
            one.others(),
            ConcurrentLoad {
                completions: 1,
                tokens: 3
            }
        );
        assert_eq!(
            three.others(),
            ConcurrentLoad {
                completions: 2,
                tokens: 8
            }
        );
        drop(two);
        assert_eq!(one.others(), ConcurrentLoad::default());
        assert!(!batch_load.is_empty());
        drop(one);
        assert!(batch_load.is_empty());
    }
}
