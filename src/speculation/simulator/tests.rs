//! Compares the adaptive policy with the best fixed one over grids of worlds.

use super::*;

/// Draft lengths of the fixed policies.
const SIZES: [usize; 7] = [0, 1, 2, 3, 5, 8, 16];

/// Bound by memory bandwidth, as on a GPU.
fn flat(n: usize) -> f64 {
    1.0 + 0.02 * n as f64
}

/// Bound by arithmetic, as on a small CPU.
fn steep(n: usize) -> f64 {
    1.0 + 0.3 * n as f64
}

/// Two tokens cost as much as two steps, further ones little (measured on a CPU with AVX-512).
fn stair(n: usize) -> f64 {
    if n == 0 { 1.0 } else { 1.9 + 0.18 * (n - 1) as f64 }
}

/// Fails if the adaptive policy is more than 5 % slower than the best fixed one in any of these worlds; prints all of them.
fn assert_near_best(
    (step_cost, slowdown, answer): (fn(usize) -> f64, f64, usize),
    acceptances: &[f64],
    costs: &[f64],
    round_trips: &[f64],
    sizes: &[usize],
) {
    let mut found = Vec::new();
    for (acceptance, draft_cost, round_trip) in acceptances.iter().flat_map(|a| {
        costs
            .iter()
            .flat_map(move |c| round_trips.iter().map(move |r| (*a, *c, *r)))
    }) {
        let world = World {
            acceptance,
            draft_cost,
            round_trip,
            step_cost,
            slowdown,
            answer,
        };
        let (best, fixed) = world.best_fixed(sizes);
        let speed = world.adaptive(&Tuning::default());
        found.push((speed / best, speed, best, fixed, (acceptance, draft_cost, round_trip)));
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (ratio, speed, best, fixed, world) in &found {
        let (acceptance, cost, round_trip) = world;
        println!(
            "{ratio:.2}: {speed:.2} tokens per plain step against {best:.2} of {fixed:?}; acceptance {acceptance}, cost of \
             a draft token {cost}, round trip {round_trip}"
        );
    }
    let (worst, ..) = found[0];
    assert!(worst >= 0.95, "the first line");
}

/// The corners and the middle of the grid.
fn assert_near_best_on_coarse_grid(step_cost: fn(usize) -> f64) {
    let (acceptances, costs, round_trips) = ([0.3, 0.6, 0.8, 0.95], [0.01, 0.1, 0.5], [0.0, 0.1, 0.5, 2.0]);
    assert_near_best(
        (step_cost, 1.0, ANSWER),
        &acceptances,
        &costs,
        &round_trips,
        &[0, 1, 2, 5, 16],
    );
}

#[test]
fn near_the_best_when_bound_by_memory() {
    assert_near_best_on_coarse_grid(flat);
}

#[test]
fn near_the_best_when_bound_by_arithmetic() {
    assert_near_best_on_coarse_grid(steep);
}

#[test]
fn near_the_best_when_two_tokens_cost_two_steps() {
    assert_near_best_on_coarse_grid(stair);
}

/// A drafter on the target's device takes its time from the target.
#[test]
fn near_the_best_on_one_device() {
    let (acceptances, costs) = ([0.3, 0.6, 0.8, 0.95], [0.01, 0.1, 0.3]);
    for step_cost in [flat, steep, stair] {
        assert_near_best((step_cost, 2.0, ANSWER), &acceptances, &costs, &[0.0, 0.05], &SIZES);
    }
}

/// Another load disturbed the calibration: the second answer is nearer to the best than the first.
#[test]
fn a_wrongly_measured_slowdown_is_corrected() {
    for (acceptance, draft_cost) in [(0.6, 0.01), (0.8, 0.1), (0.9, 0.5)] {
        for (slowdown, measured) in [(1.0, 2.0), (1.0, 4.0), (2.0, 1.0), (4.0, 1.0)] {
            for step_cost in [flat, stair] {
                let world = World::near(acceptance, draft_cost, step_cost, slowdown);
                let (best, _) = world.best_fixed(&SIZES);
                let mut policy = world.calibrated(measured, Tuning::default());
                let (first, second) = (world.speed(&mut policy) / best, world.speed(&mut policy) / best);
                println!("{world:?} measured as {measured}: {first:.3}, then {second:.3} of {best:.3}");
                assert!(
                    first >= 0.6 && second >= 0.8,
                    "{world:?} measured as {measured}: {first}, then {second} of {best}"
                );
            }
        }
    }
}

/// The text grew since the calibration, and with it the time of a draft token.
#[test]
fn a_drafter_that_became_slower_is_measured_again() {
    for (acceptance, draft_cost) in [(0.6, 0.1), (0.8, 0.2), (0.8, 0.5), (0.95, 0.5), (0.95, 1.0)] {
        for step_cost in [flat, steep, stair] {
            for slowdown in [1.0, 2.0] {
                let world = World::near(acceptance, draft_cost, step_cost, slowdown);
                let (best, _) = world.best_fixed(&SIZES);
                let fast = World {
                    draft_cost: draft_cost / 8.0,
                    ..world
                };
                let speed = world.speed(&mut fast.calibrated(slowdown, Tuning::default()));
                println!("{world:?}: {:.3} of {best:.3}", speed / best);
                assert!(speed / best >= 0.95, "{world:?}: {speed} of {best}");
            }
        }
    }
}

/// A finer grid and longer answers.
fn assert_near_best_on_fine_grid(step_cost: fn(usize) -> f64) {
    let acceptances = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95];
    let (costs, round_trips) = ([0.01, 0.05, 0.1, 0.2, 0.5], [0.0, 0.01, 0.1, 0.5, 1.0, 2.0]);
    let sizes = [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16];
    assert_near_best(
        (step_cost, 1.0, LONG_ANSWER),
        &acceptances,
        &costs,
        &round_trips,
        &sizes,
    );
}

// After a change of the policy, run the tests below (about ten minutes):
// `cargo test --release -p tightwad-speculation -- --ignored --nocapture`

#[test]
#[ignore = "minutes"]
fn near_the_best_on_a_fine_grid_when_bound_by_memory() {
    assert_near_best_on_fine_grid(flat);
}

#[test]
#[ignore = "minutes"]
fn near_the_best_on_a_fine_grid_when_bound_by_arithmetic() {
    assert_near_best_on_fine_grid(steep);
}

#[test]
#[ignore = "minutes"]
fn near_the_best_on_a_fine_grid_when_two_tokens_cost_two_steps() {
    assert_near_best_on_fine_grid(stair);
}

/// A world in which the policy waits, a value of each group of constants at a time.
#[test]
fn a_swept_constant_changes_the_speed() {
    let world = World::near(0.8, 0.1, flat, 2.0);
    let speed = |tuning: &Tuning| world.adaptive(tuning);
    let default = Tuning::default();
    let as_shipped = speed(&default);
    let sweep = [
        (
            "undrafted_prior",
            Tuning {
                undrafted_prior: 0.05,
                prior_weight: 1e6,
                ..default.clone()
            },
        ),
        (
            "slack_us",
            Tuning {
                slack_us: 20_000.0,
                ..default.clone()
            },
        ),
        (
            "min_prefix_acceptance",
            Tuning {
                min_prefix_acceptance: 2.0,
                ..default.clone()
            },
        ),
        (
            "max_slowdown",
            Tuning {
                max_slowdown: 1.0,
                ..default.clone()
            },
        ),
        (
            "scale_weight",
            Tuning {
                scale_weight: 5.0,
                ..default.clone()
            },
        ),
    ];
    for (name, tuning) in &sweep {
        let swept = speed(tuning);
        println!("{name}: {swept:.3} instead of {as_shipped:.3} tokens per plain step");
        assert!((swept - as_shipped).abs() > 1e-6, "{name} has no effect");
    }
    assert!(
        (speed(&Tuning::DEFAULT) - as_shipped).abs() < 1e-12,
        "a run is reproducible"
    );
}
