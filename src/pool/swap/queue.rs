//! The queue of requests: admits, queues and refuses them.

use std::collections::VecDeque;
use std::time::Instant;

use super::event::{Action, Id, Name, Refused};
use super::{Phase, Swap};

/// A request or command that waits.
#[derive(Debug, Clone)]
pub(super) struct Waiter {
    pub(super) id: Id,
    pub(super) model: Option<Name>,
    pub(super) since: Instant,
    pub(super) command: bool,
}

impl Swap {
    pub(super) fn asked(&mut self, now: Instant, waiter: Waiter, actions: &mut Vec<Action>) {
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

    /// Returns the reason if a request cannot even wait.
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

    /// Refuses every request for which `why` returns a reason.
    pub(super) fn refuse(&mut self, actions: &mut Vec<Action>, why: impl Fn(&Waiter) -> Option<Refused>) {
        self.waiting.retain(|waiter| match why(waiter) {
            None => true,
            Some(refused) => {
                actions.push(Action::Refuse(waiter.id, refused));
                false
            }
        });
    }

    pub(super) fn refuse_all(
        &mut self,
        actions: &mut Vec<Action>,
        why: &str,
        whom: impl Fn(&Waiter) -> bool,
        model: &Name,
    ) {
        self.refuse(actions, |waiter| {
            whom(waiter).then(|| Refused::Failed {
                model: model.clone(),
                why: why.to_owned(),
            })
        });
    }

    pub(super) fn expire(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let (model, wait, problem) = (self.model.clone(), self.rules.wait, self.problem.clone());
        self.refuse(actions, |waiter| {
            (!waiter.command && now >= waiter.since + wait).then(|| Refused::NotReady {
                model: waiter.model.clone().unwrap_or_else(|| model.clone()),
                why: problem.clone(),
            })
        });
    }

    /// Admits all requests for the running model.
    pub(super) fn admit(&mut self, actions: &mut Vec<Action>) {
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
                // It came while another model was being started.
                let running = model.clone();
                actions.push(Action::Refuse(waiter.id, Refused::OtherRuns { asked, running }));
            } else {
                kept.push_back(waiter);
            }
        }
        self.waiting = kept;
    }

    /// The model that the first request in the queue wants, unless it runs already.
    pub(super) fn other_model(&self) -> Option<Name> {
        let wanted = self.waiting.iter().find_map(|waiter| match &waiter.model {
            // Such requests do not start a swap.
            Some(_) if !waiter.command && !self.rules.swap_on_request => None,
            model => model.clone(),
        });
        wanted.filter(|wanted| *wanted != self.model)
    }
}
