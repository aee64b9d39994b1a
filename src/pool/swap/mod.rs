//! Which model runs, who waits for it, and what happens next: the coordinator's decisions, free of I/O.
//!
//! Events go in, actions come out. The driver ([`super::coordinator`]) does what the actions say and tells what came of
//! it. What must hold, whatever happens in whatever order, and is tested so:
//!
//! - A server is started only with leases that were taken for it, and only after the one before it has ended and its
//!   leases are back: a GPU has one owner.
//! - Every request is answered once: admitted, or refused with a reason.
//! - A model is not stopped for another one while it answers, until the drain bound.
//! - A model that was checked or started in vain leaves the one before it running, or brings it back.
//!
//! Requests for the model that runs are admitted until a swap begins. Those for other models are served in the order in
//! which they came, all that want the same model together.
//!
//! | file | what it does |
//! | --- | --- |
//! | `event` | the events that go in, the actions that come out |
//! | `queue` | who waits, who is admitted, who is refused |
//! | `server` | one server: leased, started, stopped, its leases returned |
//! | `recovery` | what follows a failure |
//! | `snapshot` | what the status tells |

mod event;
mod queue;
mod recovery;
mod server;
mod snapshot;

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::supervise::restart::Restarts;
pub use event::{Action, Ended, Event, Failure, Id, Name, Refused, Unready};
use queue::Waiter;
pub use snapshot::{Failed, Snapshot, State};

/// What does not change.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The models that there are.
    pub models: BTreeSet<Name>,
    /// Whether a request may bring its model in.
    pub swap_on_request: bool,
    /// How long running answers may go on when another model is to come.
    pub drain: Duration,
    /// How long a request waits.
    pub wait: Duration,
    /// How many requests may wait.
    pub most_waiting: usize,
}

/// Where the machine stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Nothing runs. The next try is then; `None`: there will be none by itself. Nobody waits for one that was given up.
    Down { retry: Option<Instant>, gave_up: bool },
    /// Workers are being leased; or no longer, and this comes after that.
    Leasing { cancelled: Option<Next> },
    /// The server loads the model.
    Loading,
    /// It answers.
    Ready { since: Instant },
    /// It finishes its answers before the next model comes; `None`: before the coordinator ends.
    Draining {
        since: Instant,
        deadline: Instant,
        next: Option<Name>,
    },
    /// It is being ended.
    Stopping { next: Next },
    /// The leases are being returned.
    Freeing { next: Next },
    /// The end.
    Gone,
}

/// What comes after the memory is free.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    /// The model that is wanted by then.
    Start,
    /// The failed one again, or the one before it. How long it had been ready, if ever.
    Recover(Failure, Option<Duration>),
    /// The same once all workers are ready, and why they are not.
    Await(String),
}

/// A check beside the server that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Check {
    Asked(Name),
    Passed(Name),
}

/// The machine.
#[derive(Debug)]
pub struct Swap {
    rules: Rules,
    phase: Phase,
    epoch: u64,
    /// The model that runs, or should.
    model: Name,
    /// The model to go back to when `model` fails.
    before: Option<Name>,
    check: Option<Check>,
    waiting: VecDeque<Waiter>,
    running: BTreeSet<Id>,
    restarts: Restarts,
    /// Tries in a row that workers brought to nothing.
    setbacks: u32,
    /// Since when workers are not ready for `model`.
    unready_since: Option<Instant>,
    problem: Option<String>,
    last_failure: Option<Failed>,
    shutdown: bool,
}

impl Swap {
    /// Nothing runs so far; `model` will. `epoch` is higher than any that was used before.
    #[must_use]
    pub fn new(rules: Rules, model: Name, epoch: u64, now: Instant) -> Self {
        Self {
            rules,
            phase: Phase::Down {
                retry: Some(now),
                gave_up: false,
            },
            epoch,
            model,
            before: None,
            check: None,
            waiting: VecDeque::new(),
            running: BTreeSet::new(),
            restarts: Restarts::default(),
            setbacks: 0,
            unready_since: None,
            problem: None,
            last_failure: None,
            shutdown: false,
        }
    }

    /// Takes an event in. Times never go back.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.absorb(now, event, &mut actions);
        self.expire(now, &mut actions);
        self.advance(now, &mut actions);
        actions
    }

    /// When [`Event::Tick`] is due at the latest.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Down { retry, .. } => retry,
            Phase::Draining { deadline, .. } => Some(deadline),
            _ => None,
        };
        let waiter = self
            .waiting
            .iter()
            .filter(|it| !it.command)
            .map(|it| it.since + self.rules.wait);
        waiter.chain(phase).min()
    }

    fn absorb(&mut self, now: Instant, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Asked { id, model, command } => self.asked(
                now,
                Waiter {
                    id,
                    model,
                    since: now,
                    command,
                },
                actions,
            ),
            Event::Left(id) => {
                self.waiting.retain(|waiter| waiter.id != id);
                self.running.remove(&id);
            }
            Event::Checked(model, result) => {
                if self.check != Some(Check::Asked(model.clone())) {
                    return;
                }
                self.check = match result {
                    Ok(()) => Some(Check::Passed(model)),
                    Err(why) => {
                        self.refuse_all(actions, &why, |waiter| waiter.model.as_ref() == Some(&model), &model);
                        self.last_failure = Some(Failed { model, why });
                        None
                    }
                };
            }
            Event::Leased(epoch, result) if epoch == self.epoch => {
                if let Phase::Leasing { cancelled } = &self.phase {
                    let cancelled = cancelled.clone();
                    self.leased(now, result, cancelled, actions);
                }
            }
            Event::Ready(epoch) if epoch == self.epoch && self.phase == Phase::Loading => {
                self.phase = Phase::Ready { since: now };
                self.before = None;
                self.problem = None;
                self.setbacks = 0;
            }
            Event::Died(epoch, failure) if epoch == self.epoch => match self.alive(now) {
                Some(ready) => {
                    self.running.clear();
                    actions.push(Action::EndAnswers(Ended::Failed(failure.clone())));
                    self.free(Next::Recover(failure, ready), actions);
                }
                // It died before it could be ended.
                None => self.stopped(actions),
            },
            Event::Broken(epoch, failure) if epoch == self.epoch => match self.alive(now) {
                Some(ready) => {
                    self.running.clear();
                    actions.push(Action::EndAnswers(Ended::Failed(failure.clone())));
                    self.stop(Next::Recover(failure, ready), true, actions);
                }
                // A worker that was taken is lost before the others are taken.
                None => self.cancel_lease(Next::Await(failure.why), actions),
            },
            Event::Stopped(epoch) if epoch == self.epoch => self.stopped(actions),
            Event::Freed(epoch) if epoch == self.epoch => {
                if let Phase::Freeing { next } = &self.phase {
                    let next = next.clone();
                    self.go_on(now, next, actions);
                }
            }
            Event::WorkerBack => self.try_now(now),
            Event::Shutdown => {
                self.shutdown = true;
                self.refuse(actions, |_| Some(Refused::Shutdown));
            }
            _ => {}
        }
    }

    /// Goes as far as it can go without further news.
    fn advance(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.shutdown {
            return self.wind_up(now, actions);
        }
        if matches!(self.phase, Phase::Ready { .. }) {
            self.admit(actions);
        }
        let other = self.other_model();
        if let Some(Check::Passed(passed)) = &self.check
            && other.as_ref() != Some(passed)
        {
            self.check = None; // Who wanted it has left.
        }
        match self.phase.clone() {
            Phase::Ready { since } => {
                if let Some(next) = self.checked(other, actions) {
                    let deadline = now + self.rules.drain;
                    self.phase = Phase::Draining {
                        since,
                        deadline,
                        next: Some(next),
                    };
                    self.check = None;
                    self.finish_drain(now, actions);
                }
            }
            Phase::Draining { since, next, .. } => {
                if other == next {
                    self.finish_drain(now, actions);
                } else {
                    // Nobody waits for that any more.
                    self.phase = Phase::Ready { since };
                    self.advance(now, actions);
                }
            }
            Phase::Loading | Phase::Leasing { cancelled: None } => {
                // A load is given up for a command, not for a request.
                let command = self.waiting.front().filter(|waiter| waiter.command);
                let other = command.and(other);
                if let Some(next) = self.checked(other, actions) {
                    self.turn_to(next);
                    if self.phase == Phase::Loading {
                        self.stop(Next::Start, true, actions);
                    } else {
                        self.cancel_lease(Next::Start, actions);
                    }
                }
            }
            Phase::Down { retry, .. } => {
                if let Some(next) = self.checked(other.clone(), actions) {
                    self.turn_to(next);
                    self.lease(actions);
                } else if other.is_none() && retry.is_some_and(|retry| now >= retry) {
                    self.lease(actions);
                }
            }
            Phase::Leasing { .. } | Phase::Stopping { .. } | Phase::Freeing { .. } | Phase::Gone => {}
        }
    }

    fn turn_to(&mut self, next: Name) {
        let left = std::mem::replace(&mut self.model, next);
        // Of several that were left on the way, the first is the one that ran.
        self.before.get_or_insert(left);
        if self.before.as_ref() == Some(&self.model) {
            self.before = None;
        }
        self.begin_anew();
        self.check = None;
    }

    /// `other`, once it has passed its check.
    fn checked(&mut self, other: Option<Name>, actions: &mut Vec<Action>) -> Option<Name> {
        let other = other?;
        match &self.check {
            Some(Check::Passed(passed)) if *passed == other => Some(other),
            Some(Check::Asked(_)) => None,
            _ => {
                self.check = Some(Check::Asked(other.clone()));
                actions.push(Action::Check(other));
                None
            }
        }
    }

    /// Stops the server once its answers are over, or the time is.
    fn finish_drain(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Phase::Draining { deadline, next, .. } = self.phase.clone() else {
            return;
        };
        if !self.running.is_empty() && now < deadline {
            return;
        }
        if !self.running.is_empty() {
            self.running.clear();
            let why = next.clone().map_or(Ended::Shutdown, Ended::Swapped);
            actions.push(Action::EndAnswers(why));
        }
        if let Some(next) = next {
            self.turn_to(next);
        }
        self.stop(Next::Start, false, actions);
    }

    /// Brings everything to its end.
    fn wind_up(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match self.phase.clone() {
            Phase::Ready { since }
            | Phase::Draining {
                since, next: Some(_), ..
            } => {
                let deadline = now + self.rules.drain;
                self.phase = Phase::Draining {
                    since,
                    deadline,
                    next: None,
                };
                self.finish_drain(now, actions);
            }
            Phase::Draining { next: None, .. } => self.finish_drain(now, actions),
            Phase::Loading => self.stop(Next::Start, true, actions),
            Phase::Down { .. } => {
                self.phase = Phase::Gone;
                actions.push(Action::Exit);
            }
            Phase::Leasing { .. } => self.cancel_lease(Next::Start, actions),
            Phase::Stopping { .. } | Phase::Freeing { .. } | Phase::Gone => {}
        }
    }
}

#[cfg(test)]
mod tests;
