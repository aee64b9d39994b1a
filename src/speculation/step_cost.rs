//! How long a pass of the target takes, by the tokens in it.

/// Time of a pass by the number of tokens beyond the first: a scale, in microseconds, that follows the machine's load and
/// the growing context, times a shape that belongs to the hardware. So sizes that are not used do not keep the costs of
/// another time.
#[derive(Debug, Clone, Default)]
pub struct StepCost {
    scale_us: f64,
    /// Where it was measured; straight lines between.
    shape: Vec<Option<f64>>,
    /// Passes so far, and at which of them each size was seen last.
    passes: u32,
    seen: Vec<u32>,
}

/// Share of a step that a further token is taken to cost until steps of different sizes were seen.
const SLOPE_GUESS: f64 = 0.05;
/// A step that takes so many times longer than expected (another request's prompt went along) counts as this.
const OUTLIER: f64 = 2.0;
/// What of a deviation goes into the scale, and what into the shape (as exponents).
const TO_SCALE: f64 = 0.2;
const TO_SHAPE: f64 = 0.1;
/// ... at most, of a size that was not seen for long: that compares with the others otherwise by now.
const TO_OLD_SHAPE: f64 = 0.5;

impl StepCost {
    /// Takes in that a pass over `n` tokens and one took `us` microseconds.
    pub fn record(&mut self, n: usize, us: f64) {
        let Some(deviation) = self.record_scale(n, us) else {
            return;
        };
        if let Some(Some(shape)) = self.shape.get_mut(n) {
            let age = f64::from(
                self.passes
                    .wrapping_sub(std::mem::replace(&mut self.seen[n], self.passes)),
            );
            *shape *= deviation.powf((1.0 - (1.0 - TO_SHAPE).powf(age)).min(TO_OLD_SHAPE));
        }
    }

    /// As [`Self::record`], of a pass that tells how fast the machine is now, but not well how one size compares to others.
    /// Returns what it took over what was expected; `None` where nothing was.
    pub fn record_scale(&mut self, n: usize, us: f64) -> Option<f64> {
        if us <= 0.0 {
            return None;
        }
        if self.scale_us == 0.0 {
            self.scale_us = us;
        }
        if self.shape.len() <= n {
            self.shape.resize(n + 1, None);
            self.seen.resize(n + 1, 0);
        }
        self.passes = self.passes.wrapping_add(1);
        let Some(shape) = self.shape[n] else {
            (self.shape[n], self.seen[n]) = (Some(us / self.scale_us), self.passes);
            return None;
        };
        let deviation = (us / (self.scale_us * shape)).min(OUTLIER);
        self.scale_us *= deviation.powf(TO_SCALE);
        Some(deviation)
    }

    /// Microseconds of a pass over `n` tokens and one; `None` before any was seen.
    pub fn us(&self, n: usize) -> Option<f64> {
        let at = |i: usize| self.shape.get(i).copied().flatten();
        let below = (0..=n.min(self.shape.len())).rev().find_map(|i| Some((i, at(i)?)));
        let above = (n..self.shape.len()).find_map(|i| Some((i, at(i)?)));
        let shape = match (below, above) {
            (Some((i, shape)), _) if i == n => shape,
            (Some((i, low)), Some((j, high))) => low + (high - low) * (n - i) as f64 / (j - i) as f64,
            (Some((i, low)), None) => {
                let before = (0..i).find_map(|j| Some((j, at(j)?)));
                let slope = before.map_or(SLOPE_GUESS * low, |(j, first)| (low - first) / (i - j) as f64);
                low + slope.max(0.01 * low) * (n - i) as f64
            }
            (None, Some((j, high))) => high / (1.0 + SLOPE_GUESS * (j - n) as f64),
            (None, None) => return None,
        };
        Some(self.scale_us * shape)
    }

    /// As [`Self::us`], only of sizes that were measured.
    pub fn measured_us(&self, n: usize) -> Option<f64> {
        Some((*self.shape.get(n)?)? * self.scale_us)
    }

    /// The sizes that were measured and their microseconds.
    pub fn measured(&self) -> impl Iterator<Item = (usize, f64)> {
        (0..self.shape.len()).filter_map(|n| Some((n, self.measured_us(n)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_slows_down_slows_all_sizes() {
        let linear = |n: usize| 40_000.0 * (1.0 + 0.1 * n as f64);
        let mut cost = StepCost::default();
        for n in [0, 4, 8] {
            cost.record(n, linear(n));
        }
        for _ in 0..40 {
            cost.record(0, 2.0 * linear(0));
        }
        let slower = cost.us(8).unwrap() / linear(8);
        assert!((1.4..=2.1).contains(&slower), "{slower}");
    }
}
