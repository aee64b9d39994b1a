use super::*;
use proptest::prelude::*;

const SURE: f64 = 0.995;
const UNSURE: f64 = 0.6;

fn us(us: f64) -> Duration {
    Duration::from_secs_f64(us / 1e6)
}

fn step(drafted: usize, accepted: usize, us: f64) -> StepSample {
    let duration = Duration::from_secs_f64(us / 1e6);
    StepSample {
        drafted,
        accepted,
        duration,
        since_last: duration,
        batch: 1 + drafted,
    }
}

/// A target whose steps cost `step_us(n)`, and a drafter whose confident tokens are right and whose unsure ones rarely are.
fn measured(step_us: impl Fn(usize) -> f64, first_us: f64, token_us: f64) -> AdaptivePolicy {
    let mut policy = AdaptivePolicy::default();
    policy.calibrate((0..=16).map(|n| (n, us(step_us(n)))));
    for i in 0..300_usize {
        let n = 4 * (i % 3);
        policy.record_step(&step(n, n, step_us(n)), &[]);
        for _ in 0..8 {
            policy.observe(TokenClass::of_probability(0, SURE), true);
        }
        policy.observe(TokenClass::of_probability(0, UNSURE), i % 10 == 0);
        policy.record_first_token(0, us(first_us), true);
        policy.record_tokens(0, 4, us(4.0 * token_us), true);
    }
    policy
}

fn linear(n: usize) -> f64 {
    40_000.0 * (1.0 + 0.1 * n as f64)
}

fn sure(n: usize) -> Vec<TokenClass> {
    vec![TokenClass::of_probability(0, SURE); n]
}

fn unsure(n: usize) -> Vec<TokenClass> {
    vec![TokenClass::of_probability(0, UNSURE); n]
}

fn choose(policy: &AdaptivePolicy, draft: &[TokenClass], pending: Option<PendingDraft>) -> StepPlan {
    let context = StepContext {
        n_max: 16,
        pending,
        ..StepContext::default()
    };
    policy.choose(draft, &context)
}

const FRESH: PendingDraft = PendingDraft {
    drafter: 0,
    started: false,
    silent_for: Duration::ZERO,
};

fn pays(policy: &AdaptivePolicy) -> bool {
    policy.pays(0, 16, ConcurrentLoad::default(), Duration::ZERO)
}

#[test]
fn confident_tokens_are_offered_and_unsure_ones_are_not() {
    let policy = measured(linear, 2_000.0, 200.0);
    assert_eq!(choose(&policy, &sure(8), None).n, 8);
    assert_eq!(choose(&policy, &unsure(8), None).n, 0);
    let mixed = [sure(5), unsure(5)].concat();
    assert_eq!(choose(&policy, &mixed, None).n, 5);
}

#[test]
fn sizes_that_cost_too_much_are_skipped() {
    // One to three tokens cost as much as two steps, as on some CPUs.
    let steep = |n: usize| {
        if n == 0 {
            35_000.0
        } else {
            90_000.0 + 5_000.0 * n as f64
        }
    };
    let policy = measured(steep, 2_000.0, 200.0);
    assert_eq!(choose(&policy, &sure(1), None).n, 0);
    assert_eq!(choose(&policy, &sure(12), None).n, 12);
}

#[test]
fn the_target_waits_for_a_fast_drafter_and_not_for_a_slow_or_silent_one() {
    let fast = measured(linear, 2_000.0, 200.0);
    let choice = choose(&fast, &[], Some(FRESH));
    assert!(choice.wait_us > 2_000 && choice.wait_us < 40_000, "{choice:?}");
    let silent_for = PendingDraft {
        silent_for: Duration::from_millis(500),
        ..FRESH
    };
    assert_eq!(choose(&fast, &[], Some(silent_for)).wait_us, 0);
    let slow = measured(linear, 90_000.0, 90_000.0);
    assert_eq!(choose(&slow, &[], Some(FRESH)).wait_us, 0);
}

#[test]
fn the_target_does_not_wait_for_a_draft_that_arrives_during_its_step() {
    let policy = measured(linear, 2_000.0, 200.0);
    let context = StepContext {
        n_max: 16,
        pending: Some(FRESH),
        busy_us: 30_000.0,
        ..StepContext::default()
    };
    assert_eq!(policy.choose(&[], &context).wait_us, 0);
}

#[test]
fn the_target_stops_waiting_once_enough_is_drafted() {
    let policy = measured(linear, 2_000.0, 200.0);
    let started = PendingDraft { started: true, ..FRESH };
    assert!(choose(&policy, &sure(2), Some(started)).wait_us > 0);
    assert_eq!(choose(&policy, &sure(16), Some(started)).wait_us, 0);
    let hopeless = [sure(3), unsure(2)].concat();
    let choice = choose(&policy, &hopeless, Some(started));
    assert_eq!((choice.n, choice.wait_us), (3, 0));
}

#[test]
fn the_target_holds_for_the_next_offer_only_if_the_round_trip_is_short() {
    let policy = measured(linear, 2_000.0, 200.0);
    let choice = |round_trip| {
        let context = StepContext {
            n_max: 16,
            pending: Some(FRESH),
            round_trip,
            ..StepContext::default()
        };
        policy.choose(&sure(4), &context)
    };
    assert_eq!(choice(Duration::from_millis(1)).hold_us, 2_500);
    assert_eq!(choice(Duration::from_secs(1)).hold_us, 0);
}

#[test]
fn a_useless_drafter_is_not_offered_and_is_retried_at_growing_intervals() {
    let mut policy = AdaptivePolicy::default();
    let class = TokenClass::of_drafter(0);
    policy.calibrate((0..=16).map(|n| (n, us(linear(n)))));
    for _ in 0..60 {
        policy.observe(class, false);
    }
    assert_eq!(choose(&policy, &[class; 4], None).n, 0);
    assert!(!pays(&policy));
    let mut asked = Vec::new();
    for i in 0..2000_usize {
        policy.record_step(&step(0, 0, linear(0)), &[]);
        if policy.draft_limit(0, false, 16, ConcurrentLoad::default(), Duration::ZERO) > 0 {
            asked.push(i);
        }
    }
    assert!(asked.len() > 4 && asked.len() < 10, "{asked:?}");
    for _ in 0..200 {
        policy.observe(class, true);
    }
    assert!(pays(&policy) && choose(&policy, &[class; 4], None).n > 0);
}

#[test]
fn a_step_is_expected_to_overrun_as_the_two_before_it_did() {
    let mut policy = AdaptivePolicy::default();
    policy.calibrate((0..=16).map(|n| (n, us(linear(n)))));
    let expected =
        |policy: &AdaptivePolicy| policy.step_us(0, ConcurrentLoad::default()).unwrap_or_default() / linear(0);
    policy.record_step(&step(4, 4, 8.0 * linear(4)), &[]);
    assert!(expected(&policy) < 1.3, "one late step may be a coincidence");
    policy.record_step(&step(9, 9, 8.0 * linear(9)), &[]);
    assert!((6.0..10.0).contains(&expected(&policy)), "{}", expected(&policy));
    policy.record_step(&step(9, 9, linear(9)), &[]);
    assert!(expected(&policy) < 1.7, "{}", expected(&policy));
}

#[test]
fn other_completions_in_the_batch_shorten_the_draft() {
    // Memory decides up to eight tokens, arithmetic from there on.
    let bent = |n: usize| 40_000.0 * (1.0 + 0.01 * n as f64 + 0.4 * n.saturating_sub(8) as f64);
    let mut policy = AdaptivePolicy::default();
    policy.calibrate((0..=16).map(|n| (n, us(bent(n)))));
    let draft = vec![TokenClass::of_probability(0, 0.85); 8];
    let chosen = |load| {
        let context = StepContext {
            n_max: 16,
            load,
            ..StepContext::default()
        };
        policy.choose(&draft, &context).n
    };
    let alone = chosen(ConcurrentLoad::default());
    let shared = chosen(ConcurrentLoad {
        completions: 3,
        tokens: 12,
    });
    assert!(
        alone >= 6 && shared < alone,
        "{alone} alone, {shared} with three others"
    );
}

fn classes(n: usize) -> impl Strategy<Value = Vec<TokenClass>> {
    let class = prop_oneof![
        (0.0..1.0).prop_map(|p| TokenClass::of_probability(0, p)),
        (0.0..1.0).prop_map(|p| TokenClass::of_probability(1, p)),
        Just(TokenClass::of_drafter(0)),
        (0_usize..40).prop_map(TokenClass::of_match),
        (0_usize..40).prop_map(TokenClass::of_prediction),
    ];
    prop::collection::vec(class, 0..n)
}

proptest! {
    #[test]
    fn every_state_gives_a_valid_plan(
        steps in prop::collection::vec((0_usize..20, 0_usize..20, 1_u64..10_000_000), 0..100),
        tokens in prop::collection::vec((0_usize..3, 0_u64..10_000_000, 0_usize..9, 0_u64..10_000_000), 0..50),
        seen in classes(100),
        draft in classes(40),
        n_max in 0_usize..32,
        pending in prop::option::of((0_usize..4, any::<bool>(), 0_u64..100_000_000)),
        busy_us in 0.0..1e7,
        round_trip in 0_u64..10_000_000,
        (others, load) in (0_usize..9, 0_usize..99),
    ) {
        let mut policy = AdaptivePolicy::default();
        for (drafted, accepted, us) in steps {
            let duration = Duration::from_micros(us);
            let accepted = accepted.min(drafted);
            policy.record_step(&StepSample { drafted, accepted, duration, since_last: 2 * duration, batch: 1 + drafted }, &[(drafted % 3) as f64 / 2.0, (us % 7) as f64 / 6.0]);
        }
        for (drafter, first, n, us) in tokens {
            policy.record_first_token(drafter, Duration::from_micros(first), n % 2 == 0);
            policy.record_tokens(drafter, n, Duration::from_micros(us), n % 2 == 0);
        }
        for (i, class) in seen.into_iter().enumerate() {
            policy.observe(class, i % 3 == 0);
        }
        let context = StepContext {
            n_max,
            pending: pending.map(|(drafter, started, silent_for)| PendingDraft { drafter, started, silent_for: Duration::from_micros(silent_for) }),
            idle_drafter: Some(others),
            busy_us,
            round_trip: Duration::from_micros(round_trip),
            load: ConcurrentLoad { completions: others, tokens: load },
        };
        let plan = policy.choose(&draft, &context);
        prop_assert!(plan.n <= n_max.min(draft.len()));
        prop_assert!(plan.value.is_finite());
        prop_assert!(pending.is_some() || plan.wait_us == 0);
    }
}
