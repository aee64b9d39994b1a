//! The invariants, for any order of events.

mod stories;
mod world;

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use world::{DRAIN, WAIT, World};

#[derive(Debug, Clone)]
enum Step {
    Ask(Option<&'static str>, bool),
    Complete(usize, bool),
    Die,
    Break,
    EndAnswer(usize),
    Leave(usize),
    Pass(u64),
    WorkerBack,
    Shutdown,
}

fn step() -> impl Strategy<Value = Step> {
    let model = prop_oneof![
        Just(None),
        Just(Some("a")),
        Just(Some("b")),
        Just(Some("c")),
        Just(Some("?"))
    ];
    prop_oneof![
        6 => (model, prop::bool::weighted(0.2)).prop_map(|(model, command)| Step::Ask(model, command)),
        10 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(which, well)| Step::Complete(which, well)),
        1 => Just(Step::Die),
        1 => Just(Step::Break),
        3 => any::<usize>().prop_map(Step::EndAnswer),
        1 => any::<usize>().prop_map(Step::Leave),
        3 => (0_u64..40_000).prop_map(Step::Pass),
        1 => Just(Step::WorkerBack),
    ]
}

fn run(world: &mut World, steps: Vec<Step>) {
    for step in steps {
        match step {
            Step::Ask(model, command) => {
                world.ask(model, command && model.is_some());
            }
            Step::Complete(which, well) => world.complete(which, well),
            Step::Die => world.die(),
            Step::Break => world.break_down(),
            Step::EndAnswer(which) => world.end_answer(which),
            Step::Leave(which) => world.leave(which),
            Step::Pass(milliseconds) => world.pass(Duration::from_millis(milliseconds)),
            Step::WorkerBack => world.tell(Event::WorkerBack),
            Step::Shutdown => world.tell(Event::Shutdown),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn whatever_happens_gpus_have_one_owner_and_everybody_is_answered_once(
        swap_on_request: bool,
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let mut world = World::new(swap_on_request);
        run(&mut world, steps);
        // `act` has checked every action so far. Whoever is left is answered when their time is over.
        world.pass(WAIT);
        prop_assert!(world.open.values().all(|command| *command), "{:?}", world.swap);
    }

    #[test]
    fn whatever_happened_it_serves_again_once_all_goes_well(
        swap_on_request: bool,
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let mut world = World::new(swap_on_request);
        run(&mut world, steps);
        world.settle();
        world.tell(Event::WorkerBack);
        world.settle();
        let id = world.ask(None, false);
        world.settle();
        prop_assert!(world.admitted.contains(&id), "{:?}", world.swap);
    }

    #[test]
    fn whatever_happened_it_ends_when_asked_to_and_nobody_is_left_behind(
        swap_on_request: bool,
        before in prop::collection::vec(step(), 0..80),
        after in prop::collection::vec(step(), 0..20),
    ) {
        let mut world = World::new(swap_on_request);
        run(&mut world, before);
        run(&mut world, vec![Step::Shutdown]);
        if !world.exited {
            run(&mut world, after.into_iter().filter(|step| !matches!(step, Step::Ask(..))).collect());
        }
        while !world.exited && !world.pending.is_empty() {
            world.complete(0, true);
            if world.pending.is_empty() && !world.exited {
                world.pass(DRAIN);
            }
        }
        if !world.exited {
            world.pass(DRAIN);
            while !world.pending.is_empty() {
                world.complete(0, true);
            }
        }
        prop_assert!(world.exited && world.open.is_empty(), "{:?}", world.swap);
    }

    #[test]
    fn where_nothing_fails_every_request_is_admitted(
        asks in prop::collection::vec((prop_oneof![Just("a"), Just("b"), Just("c")], any::<bool>()), 1..40),
    ) {
        let mut world = World::new(true);
        for (model, settle) in asks {
            world.ask(Some(model), false);
            if settle || world.open.len() >= 5 {
                world.settle();
            }
        }
        world.settle();
        prop_assert!(world.refused.is_empty(), "{:?}", world.refused);
        prop_assert_eq!(world.admitted.len() as u64, world.next_id);
    }
}
