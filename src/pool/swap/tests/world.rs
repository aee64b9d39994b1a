//! A simulated coordinator: it carries out actions and checks each against the invariants.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::pool::swap::{Action, Event, Failure, Id, Name, NotReady, Refused, Rules, State, Swap};

pub(super) const DRAIN: Duration = Duration::from_secs(30);
pub(super) const WAIT: Duration = Duration::from_secs(120);

/// The driver and the workers of a simulated pool; an action that breaks an invariant fails the test.
pub(super) struct World {
    pub(super) swap: Swap,
    pub(super) now: Instant,
    pub(super) next_id: Id,
    /// Asked and not answered.
    pub(super) open: BTreeMap<Id, bool>,
    pub(super) admitted: Vec<Id>,
    pub(super) refused: Vec<(Id, Refused)>,
    pub(super) running: BTreeSet<Id>,
    /// Of leases that are taken.
    pub(super) leased: Option<u64>,
    /// Of leases that are no longer wanted, or of which one was lost.
    pub(super) spoilt: Option<u64>,
    pub(super) server: Option<(u64, Name, bool)>,
    pub(super) draining_since: Option<Instant>,
    pub(super) highest_epoch: u64,
    /// What is being done, with its answer if that goes well.
    pub(super) pending: VecDeque<Action>,
    pub(super) exited: bool,
}

impl World {
    pub(super) fn new(swap_on_request: bool) -> Self {
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

    pub(super) fn tell(&mut self, event: Event) {
        let actions = self.swap.handle(self.now, event);
        for action in actions {
            self.act(action);
        }
        let draining = self.swap.snapshot().state == State::Draining;
        self.draining_since = draining.then(|| self.draining_since.unwrap_or(self.now));
        assert_eq!(self.running.len(), self.swap.snapshot().running);
    }

    pub(super) fn act(&mut self, action: Action) {
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

    pub(super) fn ask(&mut self, model: Option<&str>, command: bool) -> Id {
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
    pub(super) fn complete(&mut self, which: usize, well: bool) {
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
                let not_ready = if which.is_multiple_of(2) {
                    NotReady::Retryable(no())
                } else {
                    NotReady::Permanent(no())
                };
                self.tell(Event::Leased(epoch, if well { Ok(()) } else { Err(not_ready) }));
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

    pub(super) fn die(&mut self) {
        if let Some((epoch, ..)) = self.server {
            self.die_of(epoch % 3 != 0, epoch % 2 == 0);
        }
    }

    pub(super) fn die_of(&mut self, curable: bool, worker: bool) {
        let Some((epoch, ..)) = self.server.take() else { return };
        let why = "died".into();
        self.tell(Event::Died(epoch, Failure { why, curable, worker }));
    }

    /// A worker is lost, of those that are taken or are being taken.
    pub(super) fn break_down(&mut self) {
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

    pub(super) fn is_pending(&self, wanted: impl Fn(&Action) -> bool) -> bool {
        self.pending.iter().any(wanted)
    }

    /// Goes on until workers are to be leased, which fails.
    pub(super) fn fail_to_lease(&mut self, not_ready: NotReady) {
        while !matches!(self.pending.front(), Some(Action::Lease(..))) {
            if self.pending.is_empty() {
                self.pass(Duration::from_secs(1));
            } else {
                self.complete(0, true);
            }
        }
        self.pending.pop_front();
        self.tell(Event::Leased(self.highest_epoch, Err(not_ready)));
    }

    pub(super) fn end_answer(&mut self, which: usize) {
        if let Some(id) = self.running.iter().nth(which % self.running.len().max(1)).copied() {
            self.running.remove(&id);
            self.tell(Event::Left(id));
        }
    }

    pub(super) fn leave(&mut self, which: usize) {
        if let Some(id) = self.open.keys().nth(which % self.open.len().max(1)).copied() {
            self.open.remove(&id);
            self.tell(Event::Left(id));
        }
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.tell(Event::Tick);
    }

    /// All goes well until nothing is left to do.
    pub(super) fn settle(&mut self) {
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

    pub(super) fn state(&self) -> State {
        self.swap.snapshot().state
    }
}
