//! Remembers logged problems, so that a problem of many requests is logged as one warning.

use std::collections::VecDeque;

use parking_lot::Mutex;

/// Largest number of remembered problems.
const CAPACITY: usize = 16;

/// The problems since the last success.
#[derive(Debug, Default)]
pub struct Problems(Mutex<VecDeque<String>>);

impl Problems {
    /// Whether this problem is new since the last success. Remembers it.
    pub fn is_new(&self, problem: &str) -> bool {
        let mut met = self.0.lock();
        if met.iter().any(|it| it == problem) {
            return false;
        }
        if met.len() == CAPACITY {
            met.pop_front();
        }
        met.push_back(problem.to_owned());
        true
    }

    /// Forgets all problems after a success.
    pub fn clear(&self) {
        self.0.lock().clear();
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
        for number in 0..CAPACITY {
            assert!(problems.is_new(&number.to_string()));
        }
        assert!(problems.is_new("a"), "it was forgotten after as many others");
    }
}
