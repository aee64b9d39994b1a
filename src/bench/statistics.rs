//! Medians, percentiles and ratios. Pure.

/// The value that half of the values do not exceed; `None` for no values.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    percentile(values, 50.0)
}

/// The value that `percent` (0 to 100) of the values do not exceed, interpolated between its neighbours; `None` for no values.
#[must_use]
pub fn percentile(values: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let place = last as f64 * percent.clamp(0.0, 100.0) / 100.0;
    let (below, above) = (sorted[index(place.floor(), last)], sorted[index(place.ceil(), last)]);
    Some(below + (above - below) * place.fract())
}

/// `part` over `whole`; `None` if `whole` is not positive.
#[must_use]
pub fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

/// Converts a whole number from 0 to `last` to an index.
fn index(place: f64, last: usize) -> usize {
    (0..=last).rev().find(|index| *index as f64 <= place).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_percentile_lies_between_its_neighbours_in_proportion() {
        let values: Vec<f64> = (1..=21).map(f64::from).collect();
        assert_eq!(percentile(&values, 95.0), Some(20.0));
        assert_eq!(percentile(&values, 0.0), Some(1.0));
        assert_eq!(percentile(&values, 100.0), Some(21.0));
        assert_eq!(percentile(&[10.0, 20.0], 95.0), Some(19.5));
    }

    #[test]
    fn nothing_is_divided_by_nothing() {
        assert_eq!(ratio(1.0, 0.0), None);
        assert_eq!(ratio(1.0, 4.0), Some(0.25));
    }

    proptest! {
        #[test]
        fn a_percentile_is_within_the_values_and_grows(
            values in prop::collection::vec(-1e6_f64..1e6, 1..40), low in 0.0_f64..100.0, more in 0.0_f64..100.0,
        ) {
            let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(*value), most.max(*value)));
            let (one, other) = (percentile(&values, low).unwrap(), percentile(&values, (low + more).min(100.0)).unwrap());
            prop_assert!(least - 1e-6 <= one && one <= other + 1e-6 && other <= most + 1e-6);
        }
    }
}
