//! Factor by which a pass of the target takes longer while a drafter is busy, as on a device that both share.
//!
//! The factor comes from pairs of adjacent passes only, one without and one with the drafter. The rest of the machine's load
//! and the length of the context are about the same for both. [`super::AdaptivePolicy`] keeps one [`Slowdown`] per drafter,
//! calibrates it at startup and updates it with each step.

use super::Tuning;

/// The slowdown of the target by one drafter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slowdown {
    /// Logarithm of the factor, so that errors in both directions weigh the same.
    log: f64,
    /// Comparisons that it rests on.
    weight: f64,
    /// Average share of the last passes during which the drafter was busy.
    busy_share: f64,
    passes_since_comparison: u32,
    /// Passes after which a comparison is due.
    reprobe_interval: u32,
}

/// A pass of the target with or without drafters at work.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct PassSample {
    /// Its duration over the expected one of a pass of its size.
    pub(super) overrun: f64,
    /// Share of it, 0 to 1, during which each drafter was busy; missing entries are 0.
    pub(super) busy_shares: Vec<f64>,
}

/// The kind of pass that is needed to measure the slowdown again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReprobeKind {
    /// One without the drafter.
    Alone,
    /// One with the drafter at work.
    Concurrent,
}

impl Slowdown {
    /// No slowdown, not measured.
    pub(super) fn new(tuning: &Tuning) -> Self {
        Self {
            log: 0.0,
            weight: 0.0,
            busy_share: 0.0,
            passes_since_comparison: 0,
            reprobe_interval: tuning.min_reprobe_interval,
        }
    }

    /// Sets the factor that was measured at startup.
    pub(super) fn calibrate(&mut self, factor: f64, tuning: &Tuning) {
        *self = Self {
            log: bounded_log(factor, tuning),
            weight: tuning.calibration_weight,
            ..Self::new(tuning)
        };
    }

    /// Records a pass after the pass `before`; `drafter` is the number of this drafter.
    pub(super) fn record(&mut self, drafter: usize, before: Option<&PassSample>, pass: &PassSample, tuning: &Tuning) {
        let share = pass.busy_share(drafter);
        self.busy_share += tuning.busy_share_weight * (share - self.busy_share);
        self.passes_since_comparison += 1;
        if self.passes_since_comparison >= self.reprobe_interval + tuning.reprobe_steps {
            self.restart_interval(true, tuning);
        }
        // Only this order counts: after a pass with the drafter, it may still finish its last token.
        let Some(alone) = before.filter(|before| before.busy_share(drafter) < tuning.undisturbed_share) else {
            return;
        };
        let others_alike = |other| {
            other == drafter || (alone.busy_share(other) - pass.busy_share(other)).abs() < tuning.min_busy_share
        };
        let n_drafters = alone.busy_shares.len().max(pass.busy_shares.len());
        if share < tuning.disturbed_share || !(0..n_drafters).all(others_alike) {
            return;
        }
        let factor = 1.0 + (pass.overrun / alone.overrun - 1.0) / share;
        if factor.is_finite() {
            let error = bounded_log(factor, tuning) - self.log;
            // A pass weighs as much as the drafter was busy during it.
            self.log += share / (self.weight + 1.0) * error;
            self.weight = (self.weight + share).min(tuning.slowdown_memory);
            self.restart_interval(error.abs() < tuning.slowdown_surprise.ln(), tuning);
        }
    }

    fn restart_interval(&mut self, as_expected: bool, tuning: &Tuning) {
        self.passes_since_comparison = 0;
        self.reprobe_interval = if as_expected {
            (2 * self.reprobe_interval).min(tuning.max_reprobe_interval)
        } else {
            tuning.min_reprobe_interval
        };
    }

    /// Factor of a pass during which the drafter is always busy; 1 where the difference is noise.
    pub(super) fn factor(self, tuning: &Tuning) -> f64 {
        let factor = self.log.exp();
        if factor < tuning.min_slowdown { 1.0 } else { factor }
    }

    /// Factor of a pass during which the drafter is busy for a share.
    pub(super) fn at_share(self, busy_share: f64, tuning: &Tuning) -> f64 {
        1.0 + busy_share * (self.factor(tuning) - 1.0)
    }

    /// Factor of a pass during which the drafter is as busy as lately.
    pub(super) fn current(self, tuning: &Tuning) -> f64 {
        self.at_share(self.busy_share, tuning)
    }

    /// The kind of pass that should come next to measure the slowdown again, although it costs something; `None` while none
    /// is due.
    pub(super) fn reprobe(self, tuning: &Tuning) -> Option<ReprobeKind> {
        let tries = self.passes_since_comparison.checked_sub(self.reprobe_interval)?;
        if self.factor(tuning) <= 1.0 && self.busy_share < tuning.disturbed_share {
            return None;
        }
        Some(if tries < tuning.reprobe_steps / 2 {
            ReprobeKind::Alone
        } else {
            ReprobeKind::Concurrent
        })
    }
}

fn bounded_log(factor: f64, tuning: &Tuning) -> f64 {
    factor.clamp(1.0 / tuning.max_slowdown, tuning.max_slowdown).ln()
}

impl PassSample {
    /// Share of the pass during which this drafter was busy.
    pub(super) fn busy_share(&self, drafter: usize) -> f64 {
        self.busy_shares.get(drafter).copied().unwrap_or_default()
    }

    /// Whether no drafter was busy for long enough to count.
    pub(super) fn is_undisturbed(&self, tuning: &Tuning) -> bool {
        self.busy_shares.iter().all(|share| *share < tuning.min_busy_share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TUNING: &Tuning = &Tuning::DEFAULT;

    fn pass(overrun: f64, busy_share: f64) -> PassSample {
        PassSample {
            overrun,
            busy_shares: vec![busy_share],
        }
    }

    fn after(passes: impl IntoIterator<Item = PassSample>) -> Slowdown {
        let mut slowdown = Slowdown::new(TUNING);
        let mut before = None;
        for pass in passes {
            slowdown.record(0, before.as_ref(), &pass, TUNING);
            before = Some(pass);
        }
        slowdown
    }

    #[test]
    fn adjacent_passes_show_the_slowdown_whatever_else_slows_them_down() {
        // The machine gets three times slower meanwhile.
        let load = |i: u32| 1.0 + f64::from(i) / 100.0;
        let shared = after((0..200).map(|i| pass(load(i) * if i % 2 == 0 { 1.0 } else { 1.9 }, f64::from(i % 2))));
        assert!((1.8..2.0).contains(&shared.factor(TUNING)), "{shared:?}");
        let own = after((0..200).map(|i| pass(load(i), f64::from(i % 2))));
        assert!(own.factor(TUNING) < 1.01, "{own:?}");
    }

    #[test]
    fn half_a_pass_beside_a_drafter_predicts_a_whole_one() {
        let slowdown = after((0..300).map(|i| if i % 2 == 0 { pass(1.0, 0.0) } else { pass(1.45, 0.5) }));
        assert!((1.8..2.0).contains(&slowdown.factor(TUNING)), "{slowdown:?}");
    }

    #[test]
    fn a_slowdown_that_ended_is_forgotten() {
        let mut slowdown = Slowdown::new(TUNING);
        slowdown.calibrate(3.0, TUNING);
        for i in 0..60 {
            slowdown.record(
                0,
                Some(&pass(1.0, f64::from(i % 2))),
                &pass(1.0, f64::from((i + 1) % 2)),
                TUNING,
            );
        }
        assert!(slowdown.factor(TUNING) < 1.01, "{slowdown:?}");
    }

    #[test]
    fn the_slowdown_by_another_drafter_is_not_counted() {
        let both = |overrun, busy_shares: [f64; 2]| PassSample {
            overrun,
            busy_shares: busy_shares.to_vec(),
        };
        let mut one = Slowdown::new(TUNING);
        for _ in 0..100 {
            one.record(0, Some(&both(1.0, [0.0, 0.0])), &both(2.0, [1.0, 1.0]), TUNING);
        }
        assert!(one.factor(TUNING) < 1.01, "{one:?}");
    }

    #[test]
    fn it_is_measured_again_at_growing_intervals() {
        let mut slowdown = Slowdown::new(TUNING);
        slowdown.calibrate(2.0, TUNING);
        let mut reprobes = Vec::new();
        for i in 0..2000 {
            slowdown.record(0, Some(&pass(1.0, 0.0)), &pass(1.0, 0.0), TUNING);
            reprobes.extend(slowdown.reprobe(TUNING).map(|kind| (i, kind)));
        }
        let of = |it| reprobes.iter().filter(|(_, doubt)| *doubt == it).count();
        let (alone, concurrent) = (of(ReprobeKind::Alone), of(ReprobeKind::Concurrent));
        assert!(alone >= concurrent && concurrent > 6, "{reprobes:?}");
        let reprobes: Vec<i32> = reprobes.iter().map(|(i, _)| *i).collect();
        assert!(
            reprobes.len() < 30 && reprobes[0] < 100 && reprobes[reprobes.len() - 1] > 800,
            "{reprobes:?}"
        );
    }
}
