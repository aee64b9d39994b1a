//! Problems that were logged, so that a problem that many requests meet is one warning.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Most problems that are remembered.
const MOST: usize = 16;

/// The problems since all was well.
#[derive(Debug, Default)]
pub struct Problems(Mutex<VecDeque<String>>);

impl Problems {
    /// Whether this problem was not met since all was well; from now on it was.
    pub fn is_new(&self, problem: &str) -> bool {
        let mut met = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if met.iter().any(|it| it == problem) {
            return false;
        }
        if met.len() == MOST {
            met.pop_front();
        }
        met.push_back(problem.to_owned());
        true
    }

    /// All is well.
    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_new_once_until_all_was_well() {
        let problems = Problems::default();
        assert!(problems.is_new("a") && problems.is_new("b"));
        assert!(!problems.is_new("a") && !problems.is_new("b"));
        problems.clear();
        assert!(problems.is_new("a"));
        for number in 0..MOST {
            assert!(problems.is_new(&number.to_string()));
        }
        assert!(problems.is_new("a"), "as many as are remembered came since");
    }
}
