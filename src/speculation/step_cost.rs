//! Duration of a forward pass of the target by the number of tokens in its batch.
//!
//! The estimate is a scale, which follows the machine's load and the growing context, times a shape, which belongs to the
//! hardware. So a size that was not seen for a while does not keep the cost of another load. [`super::AdaptivePolicy`]
//! records each step here and reads the costs for the cost model.

use super::Tuning;

/// Cost of passes by the number of tokens beyond the first.
#[derive(Debug, Clone, Default)]
pub(super) struct StepCost {
    /// Microseconds per unit of `shape`.
    scale_us: f64,
    /// Relative cost by size; `None` where it was not measured, and interpolated there.
    shape: Vec<Option<f64>>,
    /// Number of passes recorded.
    passes: u32,
    /// The pass at which each size was recorded last.
    last_seen: Vec<u32>,
}

impl StepCost {
    /// Records that a pass over `n` tokens beyond the first took `us` microseconds.
    pub(super) fn record(&mut self, n: usize, us: f64, tuning: &Tuning) {
        let Some(overrun) = self.record_scale(n, us, tuning) else {
            return;
        };
        if let Some(Some(shape)) = self.shape.get_mut(n) {
            let last_seen = std::mem::replace(&mut self.last_seen[n], self.passes);
            let age = f64::from(self.passes.wrapping_sub(last_seen));
            let weight = 1.0 - (1.0 - tuning.shape_weight).powf(age);
            *shape *= overrun.powf(weight.min(tuning.max_shape_weight));
        }
    }

    /// As [`Self::record`], of a pass that shows how fast the machine is now but not how sizes compare. Returns the duration
    /// over the expected one; `None` when the size is new.
    pub(super) fn record_scale(&mut self, n: usize, us: f64, tuning: &Tuning) -> Option<f64> {
        if us <= 0.0 {
            return None;
        }
        if self.scale_us == 0.0 {
            self.scale_us = us;
        }
        if self.shape.len() <= n {
            self.shape.resize(n + 1, None);
            self.last_seen.resize(n + 1, 0);
        }
        self.passes = self.passes.wrapping_add(1);
        let Some(shape) = self.shape[n] else {
            (self.shape[n], self.last_seen[n]) = (Some(us / self.scale_us), self.passes);
            return None;
        };
        let overrun = (us / (self.scale_us * shape)).min(tuning.max_overrun);
        self.scale_us *= overrun.powf(tuning.scale_weight);
        Some(overrun)
    }

    /// Microseconds of a pass over `n` tokens beyond the first, interpolated between measured sizes; `None` before any pass.
    pub(super) fn us(&self, n: usize, tuning: &Tuning) -> Option<f64> {
        let slope_guess = tuning.assumed_slope;
        let at = |i: usize| self.shape.get(i).copied().flatten();
        let below = (0..=n.min(self.shape.len())).rev().find_map(|i| Some((i, at(i)?)));
        let above = (n..self.shape.len()).find_map(|i| Some((i, at(i)?)));
        let shape = match (below, above) {
            (Some((i, shape)), _) if i == n => shape,
            (Some((i, low)), Some((j, high))) => low + (high - low) * (n - i) as f64 / (j - i) as f64,
            (Some((i, low)), None) => {
                let first = (0..i).find_map(|j| Some((j, at(j)?)));
                let slope = first.map_or(slope_guess * low, |(j, first)| (low - first) / (i - j) as f64);
                low + slope.max(tuning.min_slope * low) * (n - i) as f64
            }
            (None, Some((j, high))) => high / (1.0 + slope_guess * (j - n) as f64),
            (None, None) => return None,
        };
        Some(self.scale_us * shape)
    }

    /// As [`Self::us`], for measured sizes only.
    pub(super) fn measured_us(&self, n: usize) -> Option<f64> {
        Some((*self.shape.get(n)?)? * self.scale_us)
    }

    /// The measured sizes and their microseconds.
    pub(super) fn measured(&self) -> impl Iterator<Item = (usize, f64)> {
        (0..self.shape.len()).filter_map(|n| Some((n, self.measured_us(n)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TUNING: &Tuning = &Tuning::DEFAULT;

    #[test]
    fn a_slower_machine_raises_the_cost_of_all_sizes() {
        let linear = |n: usize| 40_000.0 * (1.0 + 0.1 * n as f64);
        let mut cost = StepCost::default();
        for n in [0, 4, 8] {
            cost.record(n, linear(n), TUNING);
        }
        for _ in 0..40 {
            cost.record(0, 2.0 * linear(0), TUNING);
        }
        let slower = cost.us(8, TUNING).unwrap() / linear(8);
        assert!((1.4..=2.1).contains(&slower), "{slower}");
    }
}
