//! The completions that run at the same time, and what each brings into a pass of the target.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::speculation::Load;

/// All running completions of one target.
#[derive(Debug, Clone, Default)]
pub struct Crowd(Arc<Mutex<Load>>);

/// One of them; dropping it takes it out.
#[derive(Debug)]
pub struct Member {
    crowd: Crowd,
    /// Tokens of its last step, its draft included; `None` before its first.
    tokens: Option<usize>,
}

impl Crowd {
    /// A completion that has not begun.
    #[must_use]
    pub fn join(&self) -> Member {
        Member {
            crowd: self.clone(),
            tokens: None,
        }
    }

    /// Whether no completion runs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().others == 0
    }

    fn lock(&self) -> MutexGuard<'_, Load> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    /// It took a step over so many tokens.
    pub fn steps(&mut self, tokens: usize) {
        let mut all = self.crowd.lock();
        all.others += usize::from(self.tokens.is_none());
        all.tokens = all.tokens + tokens - self.tokens.unwrap_or_default();
        self.tokens = Some(tokens);
    }

    /// What the others bring.
    #[must_use]
    pub fn others(&self) -> Load {
        let all = *self.crowd.lock();
        Load {
            others: all.others - usize::from(self.tokens.is_some()),
            tokens: all.tokens - self.tokens.unwrap_or_default(),
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(tokens) = self.tokens {
            let mut all = self.crowd.lock();
            all.others -= 1;
            all.tokens -= tokens;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_sees_the_others_and_nobody_who_left() {
        let crowd = Crowd::default();
        let (mut one, mut two, three) = (crowd.join(), crowd.join(), crowd.join());
        one.steps(5);
        two.steps(1);
        two.steps(3);
        assert_eq!(one.others(), Load { others: 1, tokens: 3 });
        assert_eq!(three.others(), Load { others: 2, tokens: 8 });
        drop(two);
        assert_eq!(one.others(), Load::default());
        assert!(!crowd.is_empty());
        drop(one);
        assert!(crowd.is_empty());
    }
}
