//! How much longer a pass of the target takes while a drafter is at work, as on a device that both share.
//!
//! It is measured side by side when both have come up, and later only by two passes in a row of which the drafter was at
//! work beside one. What else goes on on the machine, and how long the context is, is about the same for both.

/// The slowdown by one drafter.
#[derive(Debug, Clone, Copy)]
pub struct Slowdown {
    /// Logarithm of the factor, so that too much and too little weigh alike.
    log: f64,
    /// Comparisons that it rests on.
    seen: f64,
    /// Share of the last passes during which it was at work, fading.
    beside: f64,
    /// Passes since the last comparison, and after how many the next one is wanted.
    since: u32,
    patience: u32,
}

/// A pass of the target, beside drafters or not.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PassSample {
    /// Its time over that of a pass of its size as expected.
    pub deviation: f64,
    /// For what share of it each drafter was at work; nothing: not at all.
    pub beside: Vec<f64>,
}

/// A pass that is wanted to compare others with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReprobeKind {
    /// A plain one, the drafter at rest: what is gained is gained over these.
    Alone,
    /// One that the drafter is at work beside.
    Concurrent,
}

/// Beside less than this share of a pass a drafter does not count.
const ALONE: f64 = 0.1;
/// ... and beside less than this it is not to be told from none.
const CLEAN: f64 = 0.02;
/// Beside more than this share it tells something.
const BESIDE: f64 = 0.15;
/// Comparisons that a measurement at the start counts for, and the most that are remembered.
const MEASURED: f64 = 4.0;
const MEMORY: f64 = 10.0;
/// What of a new value goes into the share.
const NEW: f64 = 0.1;
/// The slowdown is not taken to be more.
const MOST: f64 = 16.0;
/// Less is noise: both then count as on devices of their own.
const SHARED: f64 = 1.05;
/// A comparison that is off by more is soon repeated.
const SURPRISE: f64 = 1.35;
/// Passes after which a slowdown is compared again although that costs something, at first and at most; it doubles.
const PATIENCE: (u32, u32) = (64, 1024);
/// For so many passes.
const TRIES: u32 = 6;

impl Default for Slowdown {
    fn default() -> Self {
        Self {
            log: 0.0,
            seen: 0.0,
            beside: 0.0,
            since: 0,
            patience: PATIENCE.0,
        }
    }
}

impl Slowdown {
    /// Passes beside the drafter were seen to take `factor` times as long as without.
    pub fn measured(&mut self, factor: f64) {
        *self = Self {
            log: factor.clamp(1.0 / MOST, MOST).ln(),
            seen: MEASURED,
            ..Self::default()
        };
    }

    /// Takes in a pass and the one before, `drafter` being the number of this one.
    pub fn record(&mut self, drafter: usize, before: Option<&PassSample>, pass: &PassSample) {
        let share = pass.beside(drafter);
        self.beside += NEW * (share - self.beside);
        self.since += 1;
        if self.since >= self.patience + TRIES {
            self.compared(true);
        }
        // The other way round the drafter may still have been at its last token.
        let Some(alone) = before.filter(|before| before.beside(drafter) < CLEAN) else {
            return;
        };
        let alike = |other| other == drafter || (alone.beside(other) - pass.beside(other)).abs() < ALONE;
        if share < BESIDE || !(0..alone.beside.len().max(pass.beside.len())).all(alike) {
            return;
        }
        let factor = 1.0 + (pass.deviation / alone.deviation - 1.0) / share;
        if factor.is_finite() {
            let off = factor.clamp(1.0 / MOST, MOST).ln() - self.log;
            // The shorter it was at work the less does the pass tell.
            self.log += share / (self.seen + 1.0) * off;
            self.seen = (self.seen + share).min(MEMORY);
            self.compared(off.abs() < SURPRISE.ln());
        }
    }

    fn compared(&mut self, as_expected: bool) {
        self.since = 0;
        self.patience = if as_expected {
            (2 * self.patience).min(PATIENCE.1)
        } else {
            PATIENCE.0
        };
    }

    /// A pass takes so many times longer while the drafter is at work.
    pub fn factor(self) -> f64 {
        let factor = self.log.exp();
        if factor < SHARED { 1.0 } else { factor }
    }

    /// As [`Self::factor`], of a pass during which it is at work for the share `beside`.
    pub fn of(self, beside: f64) -> f64 {
        1.0 + beside * (self.factor() - 1.0)
    }

    /// As [`Self::of`], with the drafter at work as much as lately.
    pub fn now(self) -> f64 {
        self.of(self.beside)
    }

    /// What the next pass should be like although that costs something, since it has been otherwise for long.
    pub fn reprobe(self) -> Option<ReprobeKind> {
        let tries = self.since.checked_sub(self.patience)?;
        if self.factor() <= 1.0 && self.beside < BESIDE {
            return None;
        }
        Some(if tries < TRIES / 2 {
            ReprobeKind::Alone
        } else {
            ReprobeKind::Concurrent
        })
    }
}

impl PassSample {
    /// The share of it during which that drafter was at work.
    pub fn beside(&self, drafter: usize) -> f64 {
        self.beside.get(drafter).copied().unwrap_or_default()
    }

    /// Whether no drafter was.
    pub fn is_alone(&self) -> bool {
        self.beside.iter().all(|share| *share < ALONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(deviation: f64, beside: f64) -> PassSample {
        PassSample {
            deviation,
            beside: vec![beside],
        }
    }

    fn after(passes: impl IntoIterator<Item = PassSample>) -> Slowdown {
        let mut slowdown = Slowdown::default();
        let mut before = None;
        for pass in passes {
            slowdown.record(0, before.as_ref(), &pass);
            before = Some(pass);
        }
        slowdown
    }

    #[test]
    fn passes_in_a_row_tell_what_a_drafter_costs_whatever_else_slows_them_down() {
        // The machine gets three times slower meanwhile.
        let load = |i: u32| 1.0 + f64::from(i) / 100.0;
        let shared = after((0..200).map(|i| pass(load(i) * if i % 2 == 0 { 1.0 } else { 1.9 }, f64::from(i % 2))));
        assert!((1.8..2.0).contains(&shared.factor()), "{shared:?}");
        let own = after((0..200).map(|i| pass(load(i), f64::from(i % 2))));
        assert!(own.factor() < 1.01, "{own:?}");
    }

    #[test]
    fn half_a_pass_beside_a_drafter_tells_what_a_whole_one_would_cost() {
        let slowdown = after((0..300).map(|i| if i % 2 == 0 { pass(1.0, 0.0) } else { pass(1.45, 0.5) }));
        assert!((1.8..2.0).contains(&slowdown.factor()), "{slowdown:?}");
    }

    #[test]
    fn a_slowdown_that_is_no_more_is_forgotten() {
        let mut slowdown = Slowdown::default();
        slowdown.measured(3.0);
        for i in 0..60 {
            slowdown.record(
                0,
                Some(&pass(1.0, f64::from(i % 2))),
                &pass(1.0, f64::from((i + 1) % 2)),
            );
        }
        assert!(slowdown.factor() < 1.01, "{slowdown:?}");
    }

    #[test]
    fn what_another_drafter_costs_is_not_this_ones() {
        let both = |deviation, beside: [f64; 2]| PassSample {
            deviation,
            beside: beside.to_vec(),
        };
        let mut one = Slowdown::default();
        for _ in 0..100 {
            one.record(0, Some(&both(1.0, [0.0, 0.0])), &both(2.0, [1.0, 1.0]));
        }
        assert!(one.factor() < 1.01, "{one:?}");
    }

    #[test]
    fn it_is_doubted_now_and_then_and_less_and_less_often() {
        let mut slowdown = Slowdown::default();
        slowdown.measured(2.0);
        let mut doubts = Vec::new();
        for i in 0..2000 {
            slowdown.record(0, Some(&pass(1.0, 0.0)), &pass(1.0, 0.0));
            doubts.extend(slowdown.reprobe().map(|doubt| (i, doubt)));
        }
        let of = |it| doubts.iter().filter(|(_, doubt)| *doubt == it).count();
        let (alone, beside) = (of(ReprobeKind::Alone), of(ReprobeKind::Concurrent));
        assert!(alone >= beside && beside > 6, "{doubts:?}");
        let doubts: Vec<i32> = doubts.iter().map(|(i, _)| *i).collect();
        assert!(
            doubts.len() < 30 && doubts[0] < 100 && doubts[doubts.len() - 1] > 800,
            "{doubts:?}"
        );
    }
}
