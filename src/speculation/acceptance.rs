//! Classes of draft tokens, and how often the target accepts each class.
//!
//! A class says what is known about a draft token before the target sees it: the drafter's probability for it, or the length
//! of the match that it was copied from. A class never depends on what the target chose. [`super::AdaptivePolicy`] keeps an
//! [`AcceptanceRate`] per class and predicts from it how much of a draft the target will accept.

use super::Tuning;

/// Knowledge about a draft token before the target verifies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenClass {
    pub(super) source: TokenSource,
    /// Index into the source's buckets.
    pub(super) bucket: usize,
}

/// Origin of a draft token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenSource {
    /// The drafter of this number.
    Drafter(usize),
    /// The text of the completion itself.
    Copy,
    /// The client's prediction of the answer.
    Prediction,
}

/// Upper bounds of `1 - p`, where `p` is the drafter's probability for its token, per bucket.
pub(super) const CONFIDENCE_BUCKETS: [f64; 10] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 1.1];
/// The bucket after [`CONFIDENCE_BUCKETS`], of tokens without a reported probability.
const UNKNOWN_CONFIDENCE: usize = CONFIDENCE_BUCKETS.len();
/// Number of buckets of a drafter.
pub(super) const DRAFTER_BUCKETS: usize = CONFIDENCE_BUCKETS.len() + 1;
/// Fewest matching tokens before a copied token, per bucket.
pub(super) const MATCH_BUCKETS: [usize; 6] = [0, 1, 3, 5, 9, 17];

impl TokenClass {
    /// A token that the drafter of this number reports with the probability `p`.
    #[must_use]
    pub fn of_probability(drafter: usize, p: f64) -> Self {
        let bucket = CONFIDENCE_BUCKETS.iter().position(|bound| 1.0 - p < *bound);
        Self {
            source: TokenSource::Drafter(drafter),
            bucket: bucket.unwrap_or(CONFIDENCE_BUCKETS.len() - 1),
        }
    }

    /// A token of the drafter of this number without a reported probability.
    #[must_use]
    pub fn of_drafter(drafter: usize) -> Self {
        Self {
            source: TokenSource::Drafter(drafter),
            bucket: UNKNOWN_CONFIDENCE,
        }
    }

    /// A token copied from a place in the text where the `matched` tokens before it are the same.
    #[must_use]
    pub fn of_match(matched: usize) -> Self {
        let bucket = MATCH_BUCKETS.iter().rposition(|fewest| *fewest <= matched);
        Self {
            source: TokenSource::Copy,
            bucket: bucket.unwrap_or_default(),
        }
    }

    /// A token copied from the client's prediction of the answer; `matched` as in [`Self::of_match`].
    #[must_use]
    pub fn of_prediction(matched: usize) -> Self {
        Self {
            source: TokenSource::Prediction,
            ..Self::of_match(matched)
        }
    }

    /// Whether the token comes from the client's prediction.
    #[must_use]
    pub fn is_predicted(self) -> bool {
        self.source == TokenSource::Prediction
    }

    /// The acceptance rate that the class starts with.
    pub(super) fn prior(self, tuning: &Tuning) -> f64 {
        match self.source {
            TokenSource::Copy | TokenSource::Prediction => tuning.match_priors[self.bucket],
            TokenSource::Drafter(_) => {
                let prior = tuning.confidence_priors.get(self.bucket);
                prior.copied().unwrap_or(tuning.unknown_confidence_prior)
            }
        }
    }
}

/// Share of tokens that the target accepted; old observations fade.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AcceptanceRate {
    observed: f64,
    accepted: f64,
}

impl AcceptanceRate {
    /// Counts a token of which the target's choice is known.
    pub(super) fn record(&mut self, accepted: bool, tuning: &Tuning) {
        self.observed = self.observed * tuning.acceptance_decay + 1.0;
        self.accepted = self.accepted * tuning.acceptance_decay + f64::from(u8::from(accepted));
    }

    /// The estimated rate, which starts at `prior`.
    pub(super) fn estimate(self, prior: f64, tuning: &Tuning) -> f64 {
        (self.accepted + tuning.prior_weight * prior) / (self.observed + tuning.prior_weight)
    }
}
