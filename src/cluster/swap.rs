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

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::count::count;
use crate::supervise::restart::{self, Decision, Restarts};

/// Longest pause before workers are asked again that were not ready: nobody tells when one without an agent returns.
const UNREADY_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause before a start after a worker was lost: whoever returns should be used soon.
const LOST_PAUSE: Duration = Duration::from_secs(4);
/// Longest pause before a start after any other death.
const DEATH_PAUSE: Duration = Duration::from_secs(10);
/// Pause after what may go better some day and did not go better for several starts.
const GAVE_UP_PAUSE: Duration = Duration::from_secs(60);
/// How long a model whose workers are not ready is tried before the one before it comes back: the memory of that one may
/// be free only some seconds after its end.
const SWAP_PATIENCE: Duration = Duration::from_secs(30);
/// There is one coordinator, so that nobody could start in step with it.
const JITTER: f64 = 1.0;

/// A model's name in the config.
pub type Name = Arc<str>;

/// A request or a swap command, by a number that never comes again.
pub type Id = u64;

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

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// Somebody wants a model.
    Asked {
        /// Who.
        id: Id,
        /// Which; `None`: whatever runs.
        model: Option<Name>,
        /// A command of the user rather than a request for an answer.
        command: bool,
    },
    /// A request's answer is over, or nobody waits for it any more.
    Left(Id),
    /// What came of [`Action::Check`].
    Checked(Name, Result<(), String>),
    /// What came of [`Action::Lease`].
    Leased(u64, Result<(), Unready>),
    /// The server answers.
    Ready(u64),
    /// The server ended, and nobody had asked it to.
    Died(u64, Failure),
    /// A server that runs cannot go on: a worker is lost, or nothing moves any more.
    Broken(u64, Failure),
    /// What [`Action::Stop`] asked for has been done.
    Stopped(u64),
    /// What [`Action::Free`] asked for has been done.
    Freed(u64),
    /// A worker that was away is back.
    WorkerBack,
    /// Time has passed.
    Tick,
    /// The coordinator is to end.
    Shutdown,
}

/// Why workers could not be leased.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unready {
    /// They may be ready soon.
    Yet(String),
    /// Asking again would not help: the model file is missing, or does not fit.
    Ever(String),
}

/// Why a server ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// In a sentence.
    pub why: String,
    /// Whether the same start may go better next time.
    pub curable: bool,
    /// Whether a worker was the cause.
    pub worker: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Let the server that runs answer this request; to a command: its model runs.
    Admit(Id),
    /// Tell this one why not.
    Refuse(Id, Refused),
    /// See whether this model could be started: its file, and whether it fits. Answered by [`Event::Checked`].
    Check(Name),
    /// Take the workers that this model needs, for this epoch, which is higher than any before. All or nothing. Answered
    /// by [`Event::Leased`].
    Lease(u64, Name),
    /// Take them no further. Answered by [`Event::Leased`] all the same, with success if it came too late.
    CancelLease(u64),
    /// Start the server. Answered by [`Event::Ready`] or [`Event::Died`].
    Start(u64, Name),
    /// End the answers that still run.
    EndAnswers(Ended),
    /// End the server, at once if it is broken. Answered by [`Event::Stopped`].
    Stop {
        /// Which.
        epoch: u64,
        /// Whether it cannot be expected to end by itself.
        broken: bool,
    },
    /// Return the leases, whose memory is free after that. Answered by [`Event::Freed`].
    Free(u64),
    /// All is done after [`Event::Shutdown`].
    Exit,
}

/// Why an answer is not finished.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The server failed.
    #[error("{}; send the request again", .0.why)]
    Failed(Failure),
    /// Another model is to come.
    #[error("the model `{0}` was asked for, and this answer took longer than `drain_seconds`")]
    Swapped(Name),
    /// The coordinator ends.
    #[error("the coordinator is being stopped")]
    Shutdown,
}

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no such model.
    #[error("there is no model `{asked}` in the config, but {models}")]
    Unknown {
        /// The model asked for.
        asked: Name,
        /// Those that there are.
        models: String,
    },
    /// Another one runs, and requests may not change that.
    #[error(
        "the model `{asked}` is not loaded, `{running}` is: ask for that, or load yours with `tightwad swap {asked}`"
    )]
    OtherRuns {
        /// The model asked for.
        asked: Name,
        /// The one that runs.
        running: Name,
    },
    /// It waited for as long as it may.
    #[error("the model `{model}` is not ready yet{}: send the request again later", because(.why.as_deref()))]
    NotReady {
        /// The model waited for.
        model: Name,
        /// What is in the way, if anything is.
        why: Option<String>,
    },
    /// Too many wait already.
    #[error("{} already: send the request again later", count(*.0 as u64, "request waits", "requests wait"))]
    Full(usize),
    /// The model could not be started.
    #[error("the model `{model}` could not be started: {why}")]
    Failed {
        /// The model.
        model: Name,
        /// Why.
        why: String,
    },
    /// A later command wants another model.
    #[error("a later command asked for `{0}`")]
    Superseded(Name),
    /// The coordinator ends.
    #[error("the coordinator is being stopped")]
    Shutdown,
}

impl Refused {
    /// There is no such model; these there are.
    pub fn unknown<'a>(asked: Name, models: impl IntoIterator<Item = &'a Name>) -> Self {
        let models: Vec<String> = models.into_iter().map(|model| format!("`{model}`")).collect();
        let models = models.join(", ");
        Self::Unknown { asked, models }
    }
}

fn because(why: Option<&str>) -> String {
    why.map_or_else(String::new, |why| format!(" ({why})"))
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

/// What the phase is called in the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Nothing runs; it will be tried again.
    Down,
    /// Nothing runs, and a worker's return or a command changes that; a later try perhaps.
    GaveUp,
    /// Workers are being leased.
    Leasing,
    /// The model is being loaded.
    Loading,
    /// It answers.
    Ready,
    /// It finishes its answers before another model comes.
    Draining,
    /// The server is being ended.
    Stopping,
    /// Leases are returned, memory becomes free.
    Freeing,
    /// The end.
    Stopped,
    /// A state that only another version of the coordinator knows. This one reads it and never takes it.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Down => "down",
            Self::GaveUp => "gave-up",
            Self::Leasing => "leasing",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Freeing => "freeing",
            Self::Stopped => "stopped",
            Self::Unknown => "unknown",
        })
    }
}

/// What is told about the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Where it stands.
    pub state: State,
    /// The model that runs, or is on its way.
    pub model: Name,
    /// The model that is to come after it.
    pub next: Option<Name>,
    /// The model that is being checked beside it.
    pub checking: Option<Name>,
    /// Answers that run.
    #[serde(default)]
    pub running: usize,
    /// Requests that wait.
    #[serde(default)]
    pub waiting: usize,
    /// Why nothing runs.
    pub problem: Option<String>,
    /// The last swap that failed.
    pub last_failure: Option<Failed>,
    /// Starts so far, as a number that only grows.
    #[serde(default)]
    pub epoch: u64,
}

/// A model that another one was to give way to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Which.
    pub model: Name,
    /// Why it could not be started.
    pub why: String,
}

/// Someone who waits.
#[derive(Debug, Clone)]
struct Waiter {
    id: Id,
    model: Option<Name>,
    since: Instant,
    command: bool,
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

    /// What is told about it.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            state: match self.phase {
                Phase::Down { gave_up: false, .. } => State::Down,
                Phase::Down { gave_up: true, .. } => State::GaveUp,
                Phase::Leasing { .. } => State::Leasing,
                Phase::Loading => State::Loading,
                Phase::Ready { .. } => State::Ready,
                Phase::Draining { .. } => State::Draining,
                Phase::Stopping { .. } => State::Stopping,
                Phase::Freeing { .. } => State::Freeing,
                Phase::Gone => State::Stopped,
            },
            model: self.model.clone(),
            next: match &self.phase {
                Phase::Draining { next, .. } => next.clone(),
                _ => None,
            },
            checking: match &self.check {
                Some(Check::Asked(model)) => Some(model.clone()),
                _ => None,
            },
            running: self.running.len(),
            waiting: self.waiting.iter().filter(|it| !it.command).count(),
            problem: self.problem.clone(),
            last_failure: self.last_failure.clone(),
            epoch: self.epoch,
        }
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

    fn asked(&mut self, now: Instant, waiter: Waiter, actions: &mut Vec<Action>) {
        let id = waiter.id;
        if self.shutdown {
            return actions.push(Action::Refuse(id, Refused::Shutdown));
        }
        if let Some(model) = waiter
            .model
            .as_ref()
            .filter(|model| !self.rules.models.contains(*model))
        {
            let refused = Refused::unknown(model.clone(), &self.rules.models);
            return actions.push(Action::Refuse(id, refused));
        }
        if waiter.command {
            if let Some(model) = waiter.model.clone() {
                self.refuse(actions, |other| {
                    (other.command && other.model.as_ref() != Some(&model)).then(|| Refused::Superseded(model.clone()))
                });
            }
            self.try_now(now);
            return self.waiting.push_front(waiter);
        }
        if let Some(refused) = self.refuses(&waiter) {
            return actions.push(Action::Refuse(id, refused));
        }
        self.waiting.push_back(waiter);
    }

    /// Why a request need not even wait.
    fn refuses(&self, waiter: &Waiter) -> Option<Refused> {
        let coming = match &self.phase {
            Phase::Draining { next: Some(next), .. } => next,
            _ => &self.model,
        };
        let asked = waiter.model.as_ref().unwrap_or(coming);
        if asked != coming && !self.rules.swap_on_request {
            return Some(Refused::OtherRuns {
                asked: asked.clone(),
                running: coming.clone(),
            });
        }
        if asked == coming && matches!(self.phase, Phase::Down { gave_up: true, .. }) {
            let why = self.problem.clone().unwrap_or_default();
            return Some(Refused::Failed {
                model: asked.clone(),
                why,
            });
        }
        let waiting = self.waiting.iter().filter(|it| !it.command).count();
        let admitted_now = matches!(self.phase, Phase::Ready { .. }) && *asked == self.model;
        (waiting >= self.rules.most_waiting && !admitted_now).then_some(Refused::Full(waiting))
    }

    /// Refuses those for whom `why` has a reason.
    fn refuse(&mut self, actions: &mut Vec<Action>, why: impl Fn(&Waiter) -> Option<Refused>) {
        self.waiting.retain(|waiter| match why(waiter) {
            None => true,
            Some(refused) => {
                actions.push(Action::Refuse(waiter.id, refused));
                false
            }
        });
    }

    fn refuse_all(&mut self, actions: &mut Vec<Action>, why: &str, whom: impl Fn(&Waiter) -> bool, model: &Name) {
        self.refuse(actions, |waiter| {
            whom(waiter).then(|| Refused::Failed {
                model: model.clone(),
                why: why.to_owned(),
            })
        });
    }

    fn expire(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let (model, wait, problem) = (self.model.clone(), self.rules.wait, self.problem.clone());
        self.refuse(actions, |waiter| {
            (!waiter.command && now >= waiter.since + wait).then(|| Refused::NotReady {
                model: waiter.model.clone().unwrap_or_else(|| model.clone()),
                why: problem.clone(),
            })
        });
    }

    /// Whether there is a server, and how long it has been ready (`None` within: it loads).
    #[expect(clippy::option_option, reason = "no server, one that loads, one that answers")]
    fn alive(&self, now: Instant) -> Option<Option<Duration>> {
        match self.phase {
            Phase::Loading => Some(None),
            Phase::Ready { since } | Phase::Draining { since, .. } => Some(Some(now.duration_since(since))),
            _ => None,
        }
    }

    fn stop(&mut self, next: Next, broken: bool, actions: &mut Vec<Action>) {
        self.phase = Phase::Stopping { next };
        self.check = None;
        actions.push(Action::Stop {
            epoch: self.epoch,
            broken,
        });
    }

    fn free(&mut self, next: Next, actions: &mut Vec<Action>) {
        self.phase = Phase::Freeing { next };
        self.check = None;
        actions.push(Action::Free(self.epoch));
    }

    /// Takes workers no further.
    fn cancel_lease(&mut self, next: Next, actions: &mut Vec<Action>) {
        if let Phase::Leasing { cancelled } = &mut self.phase
            && cancelled.is_none()
        {
            *cancelled = Some(next);
            actions.push(Action::CancelLease(self.epoch));
        }
    }

    fn leased(
        &mut self,
        now: Instant,
        result: Result<(), Unready>,
        cancelled: Option<Next>,
        actions: &mut Vec<Action>,
    ) {
        match (result, cancelled) {
            (Ok(()), None) => {
                self.unready_since = None;
                self.phase = Phase::Loading;
                actions.push(Action::Start(self.epoch, self.model.clone()));
            }
            (Ok(()), Some(next)) => self.free(next, actions),
            (Err(_), Some(next)) => self.go_on(now, next, actions),
            (Err(unready), None) => self.unready(now, unready, actions),
        }
    }

    fn stopped(&mut self, actions: &mut Vec<Action>) {
        if let Phase::Stopping { next } = &self.phase {
            let next = next.clone();
            self.free(next, actions);
        }
    }

    /// Nothing runs and nothing is leased.
    fn go_on(&mut self, now: Instant, next: Next, actions: &mut Vec<Action>) {
        match next {
            Next::Start => self.down(Some(now), false),
            Next::Recover(failure, ready) => self.recover(now, failure, ready, actions),
            Next::Await(why) => self.unready(now, Unready::Yet(why), actions),
        }
    }

    fn down(&mut self, retry: Option<Instant>, gave_up: bool) {
        self.phase = Phase::Down { retry, gave_up };
    }

    /// What was in the way may be so no longer.
    fn try_now(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Down { .. }) {
            self.down(Some(now), false);
            self.restarts = Restarts::default();
            self.setbacks = 0;
        }
    }

    /// Pause after another try that workers brought to nothing.
    fn set_back(&mut self, longest: Duration) -> Duration {
        self.setbacks = self.setbacks.saturating_add(1);
        restart::pause(self.setbacks, JITTER).min(longest)
    }

    fn unready(&mut self, now: Instant, unready: Unready, actions: &mut Vec<Action>) {
        match unready {
            Unready::Yet(why) => {
                let retry = Some(now + self.set_back(UNREADY_PAUSE));
                let since = *self.unready_since.get_or_insert(now);
                if self.before.is_some() && now < since + SWAP_PATIENCE {
                    self.problem = Some(why);
                    self.down(retry, false);
                } else {
                    self.fall(now, why, retry, false, actions);
                }
            }
            Unready::Ever(why) => self.fall(now, why, None, true, actions),
        }
    }

    fn recover(&mut self, now: Instant, failure: Failure, ready: Option<Duration>, actions: &mut Vec<Action>) {
        // However often workers are lost, the model is none the worse for it.
        let (retry, gave_up) = if failure.worker {
            (Some(now + self.set_back(LOST_PAUSE)), false)
        } else {
            match self.restarts.died(ready, failure.curable.into(), JITTER) {
                Decision::Again(pause) => (Some(now + pause.min(DEATH_PAUSE)), false),
                Decision::GiveUp if failure.curable => (Some(now + GAVE_UP_PAUSE), true),
                Decision::GiveUp => (None, true),
            }
        };
        self.fall(now, failure.why, retry, gave_up, actions);
    }

    /// `model` failed: the one before it comes back, or the next try is at `retry`.
    fn fall(&mut self, now: Instant, why: String, retry: Option<Instant>, gave_up: bool, actions: &mut Vec<Action>) {
        let failed = self.model.clone();
        let wants = |waiter: &Waiter| waiter.model.as_ref() == Some(&failed);
        if let Some(before) = self.before.take() {
            self.refuse_all(actions, &why, wants, &failed);
            self.last_failure = Some(Failed { model: failed, why });
            self.model = before;
            self.begin_anew();
            return self.down(Some(now), false);
        }
        if gave_up {
            self.refuse_all(actions, &why, |waiter| waiter.model.is_none() || wants(waiter), &failed);
        }
        self.problem = Some(why);
        self.down(retry, gave_up);
    }

    /// Nothing is held against another model.
    fn begin_anew(&mut self) {
        self.restarts = Restarts::default();
        self.setbacks = 0;
        self.unready_since = None;
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

    fn lease(&mut self, actions: &mut Vec<Action>) {
        self.epoch += 1;
        self.phase = Phase::Leasing { cancelled: None };
        actions.push(Action::Lease(self.epoch, self.model.clone()));
    }

    /// Lets in all who want the model that runs.
    fn admit(&mut self, actions: &mut Vec<Action>) {
        let model = self.model.clone();
        let mut kept = VecDeque::new();
        for waiter in std::mem::take(&mut self.waiting) {
            if waiter.model.as_ref().is_none_or(|wanted| *wanted == model) {
                if !waiter.command {
                    self.running.insert(waiter.id);
                }
                actions.push(Action::Admit(waiter.id));
            } else if let Some(asked) = waiter
                .model
                .clone()
                .filter(|_| !waiter.command && !self.rules.swap_on_request)
            {
                // It came while another model was on its way.
                let running = model.clone();
                actions.push(Action::Refuse(waiter.id, Refused::OtherRuns { asked, running }));
            } else {
                kept.push_back(waiter);
            }
        }
        self.waiting = kept;
    }

    /// The model that the first in the queue wants, if it is another one.
    fn other_model(&self) -> Option<Name> {
        let wanted = self.waiting.iter().find_map(|waiter| match &waiter.model {
            // Requests that would not be refused if they came later.
            Some(_) if !waiter.command && !self.rules.swap_on_request => None,
            model => model.clone(),
        });
        wanted.filter(|wanted| *wanted != self.model)
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
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const DRAIN: Duration = Duration::from_secs(30);
    const WAIT: Duration = Duration::from_secs(120);

    /// The driver and the workers, as far as they matter: does what it is told, and fails the test over what must not be.
    struct World {
        swap: Swap,
        now: Instant,
        next_id: Id,
        /// Asked and not answered.
        open: BTreeMap<Id, bool>,
        admitted: Vec<Id>,
        refused: Vec<(Id, Refused)>,
        running: BTreeSet<Id>,
        /// Of leases that are taken.
        leased: Option<u64>,
        /// Of leases that are no longer wanted, or of which one was lost.
        spoilt: Option<u64>,
        server: Option<(u64, Name, bool)>,
        draining_since: Option<Instant>,
        highest_epoch: u64,
        /// What is being done, with its answer if that goes well.
        pending: VecDeque<Action>,
        exited: bool,
    }

    impl World {
        fn new(swap_on_request: bool) -> Self {
            let now = Instant::now();
            let rules = Rules {
                models: ["a", "b", "c"].map(Name::from).into(),
                swap_on_request,
                drain: DRAIN,
                wait: WAIT,
                most_waiting: 5,
            };
            let mut world = Self {
                swap: Swap::new(rules, "a".into(), 100, now),
                now,
                next_id: 0,
                open: BTreeMap::new(),
                admitted: Vec::new(),
                refused: Vec::new(),
                running: BTreeSet::new(),
                leased: None,
                spoilt: None,
                server: None,
                draining_since: None,
                highest_epoch: 100,
                pending: VecDeque::new(),
                exited: false,
            };
            world.tell(Event::Tick);
            world
        }

        fn tell(&mut self, event: Event) {
            let actions = self.swap.handle(self.now, event);
            for action in actions {
                self.act(action);
            }
            let draining = self.swap.snapshot().state == State::Draining;
            self.draining_since = draining.then(|| self.draining_since.unwrap_or(self.now));
            assert_eq!(self.running.len(), self.swap.snapshot().running);
        }

        fn act(&mut self, action: Action) {
            assert!(!self.exited, "{action:?} after the end");
            match action.clone() {
                Action::Admit(id) => {
                    let command = self.open.remove(&id).expect("it is answered once");
                    let (_, _, ready) = self.server.as_ref().expect("a server");
                    assert!(ready, "admitted before the server is ready");
                    self.admitted.push(id);
                    if !command {
                        self.running.insert(id);
                    }
                }
                Action::Refuse(id, why) => {
                    self.open.remove(&id).expect("it is answered once");
                    self.refused.push((id, why));
                }
                Action::EndAnswers(_) => self.running.clear(),
                Action::Lease(epoch, _) => {
                    assert!(epoch > self.highest_epoch, "epochs grow");
                    self.highest_epoch = epoch;
                    assert_eq!(self.leased, None, "leases before the old ones are back");
                    assert_eq!(self.server, None, "leases beside a server");
                    self.pending.push_back(action);
                }
                Action::CancelLease(epoch) => {
                    let asked = |action: &Action| matches!(action, Action::Lease(of, _) if *of == epoch);
                    assert!(self.pending.iter().any(asked), "nothing is being leased");
                    self.spoilt = Some(epoch);
                }
                Action::Start(epoch, model) => {
                    assert_eq!(self.leased, Some(epoch), "a start without fresh leases");
                    assert_ne!(self.spoilt, Some(epoch), "a start with leases that are lost");
                    assert_eq!(self.server, None, "two servers");
                    self.server = Some((epoch, model, false));
                    self.pending.push_back(action);
                }
                Action::Stop { epoch, broken } => {
                    let (running, _, _) = self.server.as_ref().expect("a server");
                    assert_eq!(*running, epoch);
                    if !broken && !self.running.is_empty() {
                        let since = self.draining_since.expect("a drain");
                        assert!(self.now >= since + DRAIN, "evicted while busy");
                    }
                    self.pending.push_back(action);
                }
                Action::Free(epoch) => {
                    assert_eq!(self.leased, Some(epoch));
                    assert_eq!(self.server, None, "leases returned under a server");
                    self.pending.push_back(action);
                }
                Action::Check(_) => self.pending.push_back(action),
                Action::Exit => {
                    assert!(self.leased.is_none() && self.server.is_none());
                    self.exited = true;
                }
            }
        }

        fn ask(&mut self, model: Option<&str>, command: bool) -> Id {
            self.next_id += 1;
            self.open.insert(self.next_id, command);
            self.tell(Event::Asked {
                id: self.next_id,
                model: model.map(Name::from),
                command,
            });
            self.next_id
        }

        /// Something that was begun comes to its end.
        fn complete(&mut self, which: usize, well: bool) {
            let Some(action) = (!self.pending.is_empty())
                .then(|| self.pending.remove(which % self.pending.len()))
                .flatten()
            else {
                return;
            };
            let no = || "no".to_owned();
            match action {
                Action::Check(model) => self.tell(Event::Checked(model, if well { Ok(()) } else { Err(no()) })),
                Action::Lease(epoch, _) => {
                    if well {
                        self.leased = Some(epoch);
                    }
                    let unready = if which.is_multiple_of(2) {
                        Unready::Yet(no())
                    } else {
                        Unready::Ever(no())
                    };
                    self.tell(Event::Leased(epoch, if well { Ok(()) } else { Err(unready) }));
                }
                Action::Start(epoch, model) => {
                    if self.server.as_ref().map(|server| server.0) != Some(epoch) {
                        return; // It was stopped meanwhile.
                    }
                    if well {
                        self.server = Some((epoch, model, true));
                        self.tell(Event::Ready(epoch));
                    } else {
                        self.die();
                    }
                }
                Action::Stop { epoch, .. } => {
                    self.server.take_if(|server| server.0 == epoch);
                    self.tell(Event::Stopped(epoch));
                }
                Action::Free(epoch) => {
                    self.leased = None;
                    self.tell(Event::Freed(epoch));
                }
                _ => {}
            }
        }

        fn die(&mut self) {
            if let Some((epoch, ..)) = self.server {
                self.die_of(epoch % 3 != 0, epoch % 2 == 0);
            }
        }

        fn die_of(&mut self, curable: bool, worker: bool) {
            let Some((epoch, ..)) = self.server.take() else { return };
            let why = "died".into();
            self.tell(Event::Died(epoch, Failure { why, curable, worker }));
        }

        /// A worker is lost, of those that are taken or are being taken.
        fn break_down(&mut self) {
            let is_being_leased = self.pending.iter().any(|action| matches!(action, Action::Lease(..)));
            if self.leased.is_none() && !is_being_leased {
                return;
            }
            let epoch = self.highest_epoch;
            if self.server.is_none() {
                self.spoilt = Some(epoch);
            }
            self.tell(Event::Broken(
                epoch,
                Failure {
                    why: "stalled".into(),
                    curable: true,
                    worker: true,
                },
            ));
        }

        fn is_pending(&self, wanted: impl Fn(&Action) -> bool) -> bool {
            self.pending.iter().any(wanted)
        }

        /// Goes on until workers are to be leased, which fails.
        fn fail_to_lease(&mut self, unready: Unready) {
            while !matches!(self.pending.front(), Some(Action::Lease(..))) {
                if self.pending.is_empty() {
                    self.pass(Duration::from_secs(1));
                } else {
                    self.complete(0, true);
                }
            }
            self.pending.pop_front();
            self.tell(Event::Leased(self.highest_epoch, Err(unready)));
        }

        fn end_answer(&mut self, which: usize) {
            if let Some(id) = self.running.iter().nth(which % self.running.len().max(1)).copied() {
                self.running.remove(&id);
                self.tell(Event::Left(id));
            }
        }

        fn leave(&mut self, which: usize) {
            if let Some(id) = self.open.keys().nth(which % self.open.len().max(1)).copied() {
                self.open.remove(&id);
                self.tell(Event::Left(id));
            }
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
            self.tell(Event::Tick);
        }

        /// All goes well until nothing is left to do.
        fn settle(&mut self) {
            for _ in 0..1000 {
                if !self.pending.is_empty() {
                    self.complete(0, true);
                } else if !self.running.is_empty() {
                    self.end_answer(0);
                } else if !self.open.is_empty() && self.swap.snapshot().state == State::Down {
                    self.pass(Duration::from_secs(1));
                } else {
                    return;
                }
            }
            panic!("it never comes to rest: {:?}", self.swap);
        }

        fn state(&self) -> State {
            self.swap.snapshot().state
        }
    }

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
            world.fail_to_lease(Unready::Yet("3 GiB are missing".into()));
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
        world.fail_to_lease(Unready::Yet("no".into()));
        let begun = world.now;
        while world.refused.is_empty() {
            world.fail_to_lease(Unready::Yet("no".into()));
        }
        assert!(world.now - begun >= SWAP_PATIENCE && world.now - begun < 2 * SWAP_PATIENCE);
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
        world.pass(UNREADY_PAUSE);
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
}
