//! The parts of drafting that run at every step of every completion, free of I/O.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput};
use tightwad::speculation::{
    AdaptivePolicy, ConcurrentLoad, Lookup, PendingDraft, Policy, Retokeniser, Spelled, StepContext, Token, TokenClass,
};

/// Most draft tokens of a step.
const N_MAX: usize = 16;
/// Tokens of a long prompt.
const PROMPT: Token = 16_000;
/// The prompt repeats itself after this many tokens.
const PERIOD: Token = 2_000;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    policy(&mut criterion);
    lookup(&mut criterion);
    retokenise(&mut criterion);
    criterion.final_summary();
}

/// A policy that has measured a target with a step of 40 ms and a drafter that slows it down by `slowdown`.
fn measured(slowdown: f64) -> AdaptivePolicy {
    let mut policy = AdaptivePolicy::default();
    policy.calibrate((0..=N_MAX).map(|n| (n, Duration::from_micros(40_000 + 1_000 * n as u64))));
    policy.record_first_token(0, Duration::from_millis(5), true);
    policy.record_tokens(0, N_MAX, Duration::from_millis(4 * N_MAX as u64), true);
    policy.calibrate_slowdown(0, slowdown);
    policy
}

fn policy(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("policy");
    let round_trip = Duration::from_millis(1);
    let load = ConcurrentLoad::default();
    let draft = [TokenClass::of_probability(0, 0.9); N_MAX];
    let context = StepContext {
        n_max: N_MAX,
        pending: Some(PendingDraft {
            drafter: 0,
            started: true,
            silent_for: Duration::from_millis(2),
        }),
        round_trip,
        load,
        ..StepContext::default()
    };
    for (device, slowdown) in [("own_device", 1.0), ("shared_device", 2.0)] {
        let mut policy = measured(slowdown);
        group.bench_function(format!("choose/{device}"), |bencher| {
            bencher.iter(|| policy.choose(black_box(&draft), black_box(&context)));
        });
        group.bench_function(format!("draft_limit/{device}"), |bencher| {
            bencher.iter(|| policy.draft_limit(0, true, black_box(N_MAX), load, round_trip));
        });
    }
}

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    let prompt: Vec<Token> = (0..PROMPT).map(|at| at % PERIOD).collect();
    let index = || {
        let mut lookup = Lookup::new(&[]);
        lookup.extend(&prompt);
        lookup
    };
    group.bench_function("propose", |bencher| {
        let lookup = index();
        bencher.iter(|| lookup.propose(black_box(&[]), N_MAX));
    });
    group.bench_function("extend", |bencher| {
        let (mut lookup, mut at) = (index(), PROMPT);
        bencher.iter(|| {
            lookup.extend(black_box(&[at % PERIOD]));
            at += 1;
        });
    });
    group.throughput(Throughput::Elements(prompt.len() as u64));
    group.bench_function("prompt", |bencher| bencher.iter(index));
}

fn retokenise(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("retokenise");
    let before = "The policy chooses how many draft tokens the target verifies next, and whether it waits.";
    let words: Vec<String> = "A drafter with another vocabulary sends its text word by word as it writes it now"
        .split(' ')
        .map(|word| format!(" {word}"))
        .collect();
    let new = || Retokeniser::new(before, Vec::new());
    // The answers of the target's tokenizer are prepared, because they are not part of what is measured.
    let mut answers = Vec::new();
    retokenised(new(), &words, |text| {
        let spelled: Vec<Spelled> = (0..).zip(text.split_inclusive(' ')).map(spelled).collect();
        answers.push(spelled.clone());
        spelled
    });
    group.throughput(Throughput::Elements(words.len() as u64));
    group.bench_function("draft", |bencher| {
        let prepared = || (new(), answers.clone().into_iter());
        bencher.iter_batched(
            prepared,
            |(retokeniser, mut answers)| retokenised(retokeniser, &words, |_| answers.next().unwrap_or_default()),
            BatchSize::SmallInput,
        );
    });
}

fn spelled((token, word): (Token, &str)) -> Spelled {
    Spelled {
        token,
        bytes: word.as_bytes().to_vec(),
    }
}

/// The tokens of a draft that comes in these pieces of text.
fn retokenised(
    mut retokeniser: Retokeniser,
    pieces: &[String],
    mut tokenizer: impl FnMut(String) -> Vec<Spelled>,
) -> Vec<Token> {
    let mut tokens = Vec::new();
    for piece in pieces {
        retokeniser.push(piece);
        while let Some(question) = retokeniser.question() {
            tokens.extend(retokeniser.answer(&tokenizer(question)));
        }
    }
    tokens
}
