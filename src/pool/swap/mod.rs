//! The state machine of the coordinator: which model runs, which requests wait, what to do next. Free of I/O.
//!
//! Events go in, actions come out. The driver ([`super::coordinator`]) carries the actions out and reports each result as
//! the next event. Property tests check these invariants for any order of events:
//!
//! - A GPU has one owner: a server starts only with leases taken for it, and only after the previous server has ended and
//!   returned its leases.
//! - Every request gets one answer: it is admitted, or refused with a reason.
//! - A swap ends no running answer before the drain deadline.
//! - If a new model fails its check or its start, the previous model stays or comes back.
//!
//! Requests for the running model are admitted until a swap begins. Requests for other models are served in order of
//! arrival; all requests for one model are served together.
//!
//! | file | what it does |
//! | --- | --- |
//! | `event` | events and actions |
//! | `queue` | admits, queues and refuses requests |
//! | `server` | takes leases, starts and stops a server, returns leases |
//! | `recovery` | decides what follows a failure |
//! | `snapshot` | the state as the status shows it |

mod event;
mod queue;
mod recovery;
mod server;
mod snapshot;

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::supervise::restart::Restarts;
pub use event::{Action, Ended, Event, Failure, Id, Name, NotReady, Refused};
use queue::Waiter;
pub use snapshot::{FailedSwap, Snapshot, State};

/// Settings that stay the same while the machine runs.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The models of the config.
    pub models: BTreeSet<Name>,
    /// Whether a request for another model starts a swap; otherwise only a command does.
    pub swap_on_request: bool,
    /// How long running answers may continue after a swap begins.
    pub drain: Duration,
    /// How long a request waits before it is refused.
    pub wait: Duration,
    /// Most requests that wait at once.
    pub most_waiting: usize,
}

/// The phase of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Nothing runs. The next try is at `retry`; without one, only an event starts it. Requests are refused if `gave_up`.
    Down { retry: Option<Instant>, gave_up: bool },
    /// The driver takes leases. If `cancelled`, that step follows once it has stopped.
    Leasing { cancelled: Option<Next> },
    /// The server loads the model.
    Loading,
    /// The server answers.
    Ready { since: Instant },
    /// The server finishes its answers before `next` starts; without one, before the coordinator ends.
    Draining {
        since: Instant,
        deadline: Instant,
        next: Option<Name>,
    },
    /// The driver ends the server.
    Stopping { next: Next },
    /// The driver returns the leases.
    Freeing { next: Next },
    /// The machine has ended.
    Gone,
}

/// The step that follows once the memory is free.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    /// Start the model that is wanted by then.
    Start,
    /// Recover from a failure: retry the model, or return to the previous one. The duration is how long the server had been
    /// ready, if it ever was.
    Recover(Failure, Option<Duration>),
    /// Retry the same model once all workers are ready; the text says why they are not.
    Await(String),
}

/// A check of another model while a server runs.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Check {
    Asked(Name),
    Passed(Name),
}

/// The swap machine.
#[derive(Debug)]
pub struct Swap {
    rules: Rules,
    phase: Phase,
    epoch: u64,
    /// The running model, or the one that is to run.
    model: Name,
    /// The model to return to when `model` fails.
    before: Option<Name>,
    check: Option<Check>,
    waiting: VecDeque<Waiter>,
    running: BTreeSet<Id>,
    restarts: Restarts,
    /// Consecutive tries that failed because of workers.
    setbacks: u32,
    /// When workers were first not ready for `model`.
    not_ready_since: Option<Instant>,
    problem: Option<String>,
    last_failure: Option<FailedSwap>,
    shutdown: bool,
}

impl Swap {
    /// A machine that starts `model` first. `epoch` is higher than any epoch used before.
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
            not_ready_since: None,
            problem: None,
            last_failure: None,
            shutdown: false,
        }
    }

    /// Takes in an event and returns the actions to carry out, in order. `now` never goes back.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.absorb(now, event, &mut actions);
        self.expire(now, &mut actions);
        self.advance(now, &mut actions);
        actions
    }

    /// The latest time for the next [`Event::Tick`].
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
                        self.last_failure = Some(FailedSwap { model, why });
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
                // The server died before the driver ended it.
                None => self.stopped(actions),
            },
            Event::Broken(epoch, failure) if epoch == self.epoch => match self.alive(now) {
                Some(ready) => {
                    self.running.clear();
                    actions.push(Action::EndAnswers(Ended::Failed(failure.clone())));
                    self.stop(Next::Recover(failure, ready), true, actions);
                }
                // A leased worker is lost while others are still being leased.
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

    /// Advances until only another event can change the phase.
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
            self.check = None; // The request for it has left.
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
                    // No request waits for that model any more.
                    self.phase = Phase::Ready { since };
                    self.advance(now, actions);
                }
            }
            Phase::Loading | Phase::Leasing { cancelled: None } => {
                // A command interrupts a load; a request does not.
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
        // If several models were skipped, the first one is the one that ran.
        self.before.get_or_insert(left);
        if self.before.as_ref() == Some(&self.model) {
            self.before = None;
        }
        self.begin_anew();
        self.check = None;
    }

    /// Returns `other` once it has passed its check; starts the check otherwise.
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

    /// Stops the server once its answers are over or the drain deadline has passed.
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

    /// Ends everything after [`Event::Shutdown`].
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
