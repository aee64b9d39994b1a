//! Single sequences of events and their results.

use std::time::Duration;

use super::world::World;
use crate::pool::swap::recovery::{DEATH_PAUSE, LOST_PAUSE, NOT_READY_PAUSE, SWAP_TIMEOUT};
use crate::pool::swap::{Action, Event, NotReady, Refused, State};

fn ready() -> World {
    let mut world = World::new(true);
    world.settle();
    assert_eq!(world.state(), State::Ready);
    world
}

#[test]
fn two_requests_for_the_same_cold_model_share_one_load() {
    let mut world = ready();
    let epoch = world.highest_epoch;
    let ids = [world.ask(Some("b"), false), world.ask(Some("b"), false)];
    world.settle();
    assert!(ids.iter().all(|id| world.admitted.contains(id)));
    assert_eq!(world.highest_epoch, epoch + 1);
}

#[test]
fn the_old_model_serves_until_the_new_one_is_checked_and_its_answers_are_over() {
    let mut world = ready();
    world.ask(Some("a"), false);
    world.ask(Some("b"), false);
    let late = world.ask(Some("a"), false);
    assert!(world.admitted.contains(&late), "the check has not been answered yet");
    world.complete(0, true);
    assert_eq!(world.state(), State::Draining);
    let later = world.ask(Some("a"), false);
    assert!(!world.admitted.contains(&later), "it waits for the next turn");
    world.end_answer(0);
    assert_eq!(world.state(), State::Draining);
    world.end_answer(0);
    assert_eq!(world.state(), State::Stopping);
    world.settle();
    assert!(world.admitted.contains(&later));
}

#[test]
fn answers_that_take_longer_than_the_drain_bound_are_ended() {
    let mut world = ready();
    world.ask(Some("a"), false);
    world.ask(Some("b"), false);
    world.complete(0, true);
    world.pass(Duration::from_millis(29_999));
    assert_eq!((world.state(), world.running.len()), (State::Draining, 1));
    world.pass(Duration::from_millis(1));
    assert_eq!((world.state(), world.running.len()), (State::Stopping, 0));
}

#[test]
fn a_model_that_fails_its_check_never_disturbs_the_one_that_runs() {
    let mut world = ready();
    let id = world.ask(Some("b"), true);
    world.complete(0, false);
    assert_eq!(world.state(), State::Ready);
    assert!(matches!(&world.refused[..], [(refused, Refused::Failed { .. })] if *refused == id));
}

#[test]
fn a_model_that_dies_while_it_loads_gives_way_to_the_one_before() {
    let mut world = ready();
    let id = world.ask(Some("b"), true);
    while world.server.as_ref().is_none_or(|(_, model, _)| &**model != "b") {
        world.complete(0, true);
    }
    world.die();
    world.settle();
    assert_eq!((world.state(), &*world.swap.snapshot().model), (State::Ready, "a"));
    assert_eq!(world.refused[0].0, id);
    assert_eq!(&*world.swap.snapshot().last_failure.unwrap().model, "b");
}

#[test]
fn without_leave_to_swap_a_request_for_another_model_is_told_which_one_runs() {
    let mut world = World::new(false);
    world.settle();
    world.ask(Some("b"), false);
    let [(_, why)] = &world.refused[..] else {
        panic!("{:?}", world.refused)
    };
    assert!(
        why.to_string().contains("`a` is") && why.to_string().contains("tightwad swap b"),
        "{why}"
    );
    world.ask(Some("b"), true);
    world.settle();
    assert_eq!(&*world.swap.snapshot().model, "b");
}

#[test]
fn a_model_that_crashes_keeps_those_who_wait_for_it() {
    let mut world = ready();
    world.die();
    let id = world.ask(Some("a"), false);
    world.settle();
    assert!(world.admitted.contains(&id));
}

#[test]
fn a_model_that_never_comes_up_is_given_up_until_a_worker_returns_or_somebody_commands() {
    for revive in [
        Event::WorkerBack,
        Event::Asked {
            id: 77,
            model: Some("a".into()),
            command: true,
        },
    ] {
        let mut world = World::new(false);
        world.open.insert(77, true);
        while world.state() != State::GaveUp {
            if world.pending.is_empty() {
                world.pass(Duration::from_secs(60));
            }
            let well = !matches!(world.pending.front(), Some(Action::Start(..)));
            world.complete(0, well);
        }
        world.ask(None, false);
        assert!(matches!(&world.refused[..], [(_, Refused::Failed { .. })]));
        world.tell(revive);
        world.settle();
        assert_eq!(world.state(), State::Ready);
    }
}

#[test]
fn a_later_command_wins_over_a_load_that_is_under_way() {
    let mut world = ready();
    let first = world.ask(Some("b"), true);
    while world.state() != State::Loading {
        world.complete(0, true);
    }
    let second = world.ask(Some("c"), true);
    assert_eq!(world.refused, [(first, Refused::Superseded("c".into()))]);
    world.settle();
    assert!(world.admitted.contains(&second));
    assert_eq!(&*world.swap.snapshot().model, "c");
}

#[test]
fn a_server_that_dies_while_it_is_to_be_stopped_holds_nothing_up() {
    let mut world = ready();
    world.ask(Some("b"), true);
    world.complete(0, true);
    assert_eq!(world.state(), State::Stopping);
    world.die_of(true, true);
    assert_eq!(world.state(), State::Freeing);
    world.settle();
    assert_eq!((world.state(), &*world.swap.snapshot().model), (State::Ready, "b"));
}

#[test]
fn however_often_workers_are_lost_the_pool_is_not_given_up_and_tries_again_soon() {
    let mut world = World::new(false);
    for _ in 0..20 {
        while world.state() != State::Loading {
            world.complete(0, true);
        }
        world.die_of(true, true);
        world.complete(0, true);
        world.complete(0, true);
        assert_eq!(world.state(), State::Down);
        world.pass(LOST_PAUSE);
        assert_eq!(world.state(), State::Leasing);
    }
}

#[test]
fn what_may_go_better_some_day_is_tried_again_after_it_was_given_up() {
    let mut world = World::new(false);
    while world.state() != State::GaveUp {
        match world.state() {
            State::Loading => world.die_of(true, false),
            State::Down => world.pass(DEATH_PAUSE),
            _ => world.complete(0, true),
        }
    }
    world.pass(Duration::from_secs(59));
    assert_eq!(world.state(), State::GaveUp);
    world.ask(None, false);
    assert!(matches!(&world.refused[..], [(_, Refused::Failed { .. })]));
    world.pass(Duration::from_secs(1));
    world.pending.retain(|action| matches!(action, Action::Lease(..)));
    world.settle();
    assert_eq!(world.state(), State::Ready);
}

#[test]
fn memory_that_is_not_free_at_once_does_not_fail_a_swap() {
    let mut world = ready();
    let id = world.ask(Some("b"), true);
    for _ in 0..4 {
        world.fail_to_lease(NotReady::Retryable("3 GiB are missing".into()));
    }
    assert_eq!(world.swap.snapshot().problem.as_deref(), Some("3 GiB are missing"));
    world.settle();
    assert!(world.admitted.contains(&id));
    assert_eq!(&*world.swap.snapshot().model, "b");
}

#[test]
fn a_swap_whose_workers_do_not_become_ready_gives_way_to_the_model_before() {
    let mut world = ready();
    let id = world.ask(Some("b"), true);
    world.fail_to_lease(NotReady::Retryable("no".into()));
    let begun = world.now;
    while world.refused.is_empty() {
        world.fail_to_lease(NotReady::Retryable("no".into()));
    }
    assert!(world.now - begun >= SWAP_TIMEOUT && world.now - begun < 2 * SWAP_TIMEOUT);
    assert_eq!(world.refused[0].0, id);
    world.settle();
    assert_eq!((world.state(), &*world.swap.snapshot().model), (State::Ready, "a"));
}

#[test]
fn a_worker_lost_while_others_are_being_leased_starts_no_server() {
    let mut world = World::new(false);
    assert!(world.is_pending(|action| matches!(action, Action::Lease(..))));
    world.break_down();
    // They were all taken before that was known.
    world.complete(0, true);
    assert_eq!((world.state(), world.server.clone()), (State::Freeing, None));
    world.complete(0, true);
    assert_eq!(world.swap.snapshot().problem.as_deref(), Some("stalled"));
    world.pass(NOT_READY_PAUSE);
    world.settle();
    assert_eq!(world.state(), State::Ready);
}

#[test]
fn neither_a_command_nor_the_end_waits_for_workers_to_be_leased() {
    let mut world = World::new(false);
    let first = world.highest_epoch;
    let id = world.ask(Some("b"), true);
    world.complete(1, true);
    assert_eq!(world.spoilt, Some(first));
    world.settle();
    assert!(world.admitted.contains(&id));

    let mut world = World::new(false);
    world.tell(Event::Shutdown);
    assert_eq!(world.spoilt, Some(world.highest_epoch));
    world.settle();
    assert!(world.exited);
}

#[test]
fn who_names_a_model_that_is_not_there_is_told_which_are() {
    let mut world = ready();
    world.ask(Some("x"), false);
    let why = world.refused[0].1.to_string();
    assert!(why.contains("`x`") && why.contains("`a`, `b`, `c`"), "{why}");
}

#[test]
fn more_than_may_wait_are_refused_at_once() {
    let mut world = World::new(true);
    for _ in 0..6 {
        world.ask(None, false);
    }
    assert_eq!(world.refused, [(6, Refused::Full(5))]);
}
