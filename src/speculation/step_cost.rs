//! How long a pass of the target takes, by the tokens in it, and how much longer beside a drafter on the same device.

/// Time of a pass by the number of tokens beyond the first: a scale, in microseconds, that follows the machine's load and
/// the growing context, times a shape that belongs to the hardware. So sizes that are not used do not keep the costs of
/// another time.
///
/// Two servers that share a device share its time: each takes longer while the other is at work. What that adds is kept
/// apart, as one factor. It is learnt from passes beside a drafter that come soon after one without, for then nothing else
/// has changed; later the scale follows.
#[derive(Debug, Clone)]
pub struct StepCost {
    scale_us: f64,
    /// Where it was measured; straight lines between.
    shape: Vec<Option<f64>>,
    /// A pass that a drafter is at work beside takes so many times longer.
    slowdown: f64,
    /// Passes since one that no drafter was at work beside.
    since_alone: u32,
    /// Share of the last passes that drafters were at work beside, fading.
    beside: f64,
}

impl Default for StepCost {
    fn default() -> Self {
        Self {
            scale_us: 0.0,
            shape: Vec::new(),
            slowdown: 1.0,
            since_alone: 0,
            beside: 0.0,
        }
    }
}

/// Share of a step that a further token is taken to cost until steps of different sizes were seen.
const SLOPE_GUESS: f64 = 0.05;
/// A step that takes so many times longer than expected (another request's prompt went along) counts as this.
const OUTLIER: f64 = 2.0;
/// What of a deviation goes into the scale, and what into the shape (as exponents).
const TO_SCALE: f64 = 0.2;
const TO_SHAPE: f64 = 0.1;
/// What of a new value goes into the slowdown and into the share.
const TO_SLOWDOWN: f64 = 0.15;
/// Beside less than this share of a pass a drafter does not count.
const ALONE: f64 = 0.1;
/// For so many passes after one without a drafter a change is the drafter's.
const FRESH: u32 = 64;
/// The slowdown is not taken to be more.
const MOST: f64 = 8.0;

impl StepCost {
    /// Takes in that a pass over `n` tokens and one took `us` microseconds; for the share `beside` of that time, 0 to 1,
    /// drafters were at work.
    pub fn record(&mut self, n: usize, us: f64, beside: f64) {
        if us <= 0.0 {
            return;
        }
        self.beside += TO_SLOWDOWN * (beside - self.beside);
        if beside < ALONE {
            self.since_alone = 0;
            self.record_alone(n, us);
            return;
        }
        self.since_alone = self.since_alone.saturating_add(1);
        let slowed = us / self.slowed(beside);
        let (Some(alone_us), Some(Some(_))) = (self.alone(n), self.shape.get(n)) else {
            self.record_alone(n, slowed);
            return;
        };
        if us < alone_us {
            // Nothing gets faster by company.
            self.record_alone(n, us);
        }
        if self.since_alone > FRESH {
            self.record_alone(n, slowed);
        } else {
            let slowdown = 1.0 + (us / alone_us - 1.0) / beside;
            // The shorter they were at work the less does the pass tell.
            self.slowdown += TO_SLOWDOWN * beside * (slowdown.clamp(1.0, MOST) - self.slowdown);
        }
    }

    fn record_alone(&mut self, n: usize, us: f64) {
        if self.scale_us == 0.0 {
            self.scale_us = us;
        }
        if self.shape.len() <= n {
            self.shape.resize(n + 1, None);
        }
        match &mut self.shape[n] {
            Some(shape) => {
                let deviation = (us / (self.scale_us * *shape)).min(OUTLIER);
                self.scale_us *= deviation.powf(TO_SCALE);
                *shape *= deviation.powf(TO_SHAPE);
            }
            unseen => *unseen = Some(us / self.scale_us),
        }
    }

    /// What company of the share `beside` makes of a pass.
    fn slowed(&self, beside: f64) -> f64 {
        1.0 + beside * (self.slowdown - 1.0)
    }

    /// How many times longer a pass takes beside a drafter that is at work all the time.
    pub fn slowdown(&self) -> f64 {
        self.slowdown
    }

    /// Microseconds of a pass over `n` tokens and one as things are now, with drafters at work beside it as much as lately.
    pub fn now(&self, n: usize) -> Option<f64> {
        Some(self.alone(n)? * self.slowed(self.beside))
    }

    /// Microseconds of a pass over `n` tokens and one without a drafter beside it; `None` before any was seen.
    pub fn alone(&self, n: usize) -> Option<f64> {
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

    /// The sizes that were measured and their microseconds.
    pub fn measured(&self) -> impl Iterator<Item = (usize, f64)> {
        let shapes = self.shape.iter().enumerate();
        shapes.filter_map(|(n, shape)| Some((n, (*shape)? * self.scale_us)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(n: usize) -> f64 {
        40_000.0 * (1.0 + 0.1 * n as f64)
    }

    fn measured() -> StepCost {
        let mut cost = StepCost::default();
        for n in [0, 4, 8] {
            cost.record(n, linear(n), 0.0);
        }
        cost
    }

    fn near(value: f64, wanted: f64) -> bool {
        (0.93..=1.07).contains(&(value / wanted))
    }

    #[test]
    fn a_machine_that_slows_down_slows_all_sizes() {
        let mut cost = measured();
        for _ in 0..40 {
            cost.record(0, 2.0 * linear(0), 0.0);
        }
        let slower = cost.alone(8).unwrap() / linear(8);
        assert!((1.4..=2.1).contains(&slower), "{slower}");
    }

    #[test]
    fn what_a_drafter_on_the_same_device_costs_is_told_apart() {
        let mut cost = measured();
        for _ in 0..40 {
            cost.record(4, 1.9 * linear(4), 1.0);
        }
        assert!(near(cost.slowdown(), 1.9), "{cost:?}");
        assert!(near(cost.alone(4).unwrap(), linear(4)), "{cost:?}");
        assert!(near(cost.now(8).unwrap(), 1.9 * linear(8)), "{cost:?}");
        for _ in 0..40 {
            cost.record(4, linear(4), 0.0);
        }
        assert!(near(cost.now(8).unwrap(), linear(8)), "{cost:?}");
    }

    #[test]
    fn half_a_pass_beside_a_drafter_tells_what_a_whole_one_would_cost() {
        let mut cost = measured();
        for _ in 0..60 {
            cost.record(4, 1.45 * linear(4), 0.5);
        }
        assert!(near(cost.slowdown(), 1.9), "{cost:?}");
    }

    #[test]
    fn a_context_that_grows_is_no_drafter_for_ever() {
        let mut cost = measured();
        for i in 0..1000 {
            cost.record(4, linear(4) * (1.0 + 0.001 * f64::from(i)), 1.0);
        }
        assert!(cost.slowdown() < 1.1, "{cost:?}");
        assert!(near(cost.alone(4).unwrap(), 2.0 * linear(4)), "{cost:?}");
    }

    #[test]
    fn a_drafter_on_another_machine_costs_nothing() {
        let mut cost = measured();
        for i in 0..500 {
            cost.record(i % 8, linear(i % 8), if i % 50 == 0 { 0.0 } else { 1.0 });
        }
        assert!(cost.slowdown() < 1.02, "{cost:?}");
    }
}
