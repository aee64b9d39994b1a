//! The lease of a worker: granted, renewed, expired. Free of I/O: the caller passes the time in, and ends the servers of a
//! lease that is over.
//!
//! Invariant: at most one lease exists at a time.

use std::time::{Duration, Instant};

use crate::pool::agent::{Holder, LeaseRequest};

/// The lease of the worker, if there is one.
#[derive(Debug)]
pub struct Leases {
    current: Option<Current>,
    expiry: Duration,
}

#[derive(Debug)]
struct Current {
    id: String,
    holder: Holder,
    /// Last renewal; `None` while its servers start, since its holder cannot renew it yet.
    until: Option<Instant>,
}

impl Leases {
    /// No lease. A lease expires after `expiry` without a renewal.
    pub fn new(expiry: Duration) -> Self {
        Self { current: None, expiry }
    }

    /// Requests a lease with the name `id`. Granted if there is none, or if the same holder has one with a lower epoch, which
    /// it replaces. Returns the present holder otherwise.
    pub fn ask(&mut self, now: Instant, request: &LeaseRequest, id: String) -> Result<(), Holder> {
        self.expire(now);
        if let Some(Current { holder, .. }) = &self.current
            && !(holder.holder == request.holder && request.epoch > holder.epoch)
        {
            return Err(holder.clone());
        }
        self.current = Some(Current {
            id,
            holder: Holder {
                holder: request.holder.clone(),
                epoch: request.epoch,
            },
            until: None,
        });
        Ok(())
    }

    /// The servers listen: from now on the lease must be renewed. False if it is over.
    pub fn begin(&mut self, now: Instant, id: &str) -> bool {
        self.extend(now, id, true)
    }

    /// Renews the lease. False if it is over.
    pub fn renew(&mut self, now: Instant, id: &str) -> bool {
        self.expire(now);
        self.extend(now, id, false)
    }

    fn extend(&mut self, now: Instant, id: &str, starting: bool) -> bool {
        match &mut self.current {
            Some(current) if current.id == id && current.until.is_none() == starting => {
                current.until = Some(now + self.expiry);
                true
            }
            _ => false,
        }
    }

    /// Ends the lease. False if it is over already.
    pub fn give_back(&mut self, id: &str) -> bool {
        self.current.take_if(|current| current.id == id).is_some()
    }

    /// Ends a lease that was not renewed in time, and returns its holder.
    pub fn expire(&mut self, now: Instant) -> Option<Holder> {
        let silent = self
            .current
            .take_if(|current| current.until.is_some_and(|until| until <= now));
        silent.map(|current| current.holder)
    }

    /// The present holder.
    pub fn holder(&self) -> Option<&Holder> {
        self.current.as_ref().map(|current| &current.holder)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXPIRY: Duration = Duration::from_secs(10);

    fn request(holder: &str, epoch: u64) -> LeaseRequest {
        LeaseRequest {
            holder: holder.to_owned(),
            epoch,
        }
    }

    #[test]
    fn another_holder_waits_however_high_its_epoch() {
        let (mut leases, now) = (Leases::new(EXPIRY), Instant::now());
        leases.ask(now, &request("a", 1), "1".into()).unwrap();
        let held = leases.ask(now, &request("b", 9), "2".into()).unwrap_err();
        assert_eq!((held.holder.as_str(), held.epoch), ("a", 1));
    }

    #[test]
    fn a_lease_that_still_starts_does_not_expire_and_cannot_be_renewed() {
        let (mut leases, now) = (Leases::new(EXPIRY), Instant::now());
        leases.ask(now, &request("a", 1), "1".into()).unwrap();
        let later = now + 10 * EXPIRY;
        assert_eq!(leases.expire(later), None);
        assert!(!leases.renew(later, "1"));
        assert!(leases.begin(later, "1"));
        assert!(leases.renew(later, "1"));
    }

    #[test]
    fn an_expired_lease_is_not_renewed_even_before_anybody_has_looked() {
        let (mut leases, now) = (Leases::new(EXPIRY), Instant::now());
        leases.ask(now, &request("a", 1), "1".into()).unwrap();
        leases.begin(now, "1");
        assert!(!leases.renew(now + EXPIRY, "1"));
        leases.ask(now + EXPIRY, &request("b", 1), "2".into()).unwrap();
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ask { holder: u8, epoch: u64 },
        Begin { lease: usize },
        Renew { lease: usize },
        GiveBack { lease: usize },
        Wait { seconds: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u8..3, 0_u64..4).prop_map(|(holder, epoch)| Step::Ask { holder, epoch }),
            (0_usize..6).prop_map(|lease| Step::Begin { lease }),
            (0_usize..6).prop_map(|lease| Step::Renew { lease }),
            (0_usize..6).prop_map(|lease| Step::GiveBack { lease }),
            (0_u64..12).prop_map(|seconds| Step::Wait { seconds }),
        ]
    }

    proptest! {
        /// Against the rules, written down a second time: who has it, and since when it was not renewed.
        #[test]
        fn there_is_one_holder_at_a_time_and_only_its_own_higher_epoch_or_its_end_changes_that(
            steps in prop::collection::vec(step(), 1..60)
        ) {
            let mut leases = Leases::new(EXPIRY);
            let mut now = Instant::now();
            let mut granted: Vec<String> = Vec::new();
            let mut owner: Option<(String, String, u64, Option<Instant>)> = None;
            for step in steps {
                if owner.as_ref().is_some_and(|(.., heard)| heard.is_some_and(|heard| now >= heard + EXPIRY)) {
                    owner = None;
                }
                // The newest leases are the interesting ones.
                let name = |back: usize| granted.iter().rev().nth(back).cloned().unwrap_or_default();
                match step {
                    Step::Ask { holder, epoch } => {
                        let (holder, id) = (format!("h{holder}"), granted.len().to_string());
                        let free = owner.as_ref().is_none_or(|(_, of, at, _)| *of == holder && epoch > *at);
                        let answer = leases.ask(now, &request(&holder, epoch), id.clone());
                        prop_assert_eq!(answer.is_ok(), free);
                        if free {
                            granted.push(id.clone());
                            owner = Some((id, holder, epoch, None));
                        } else {
                            let held = answer.unwrap_err();
                            let (_, of, at, _) = owner.as_ref().unwrap();
                            prop_assert_eq!((&held.holder, held.epoch), (of, *at));
                        }
                    }
                    Step::Begin { lease } => {
                        let id = name(lease);
                        let starts = owner.as_ref().is_some_and(|(of, .., heard)| *of == id && heard.is_none());
                        prop_assert_eq!(leases.begin(now, &id), starts);
                        if starts {
                            owner.as_mut().unwrap().3 = Some(now);
                        }
                    }
                    Step::Renew { lease } => {
                        let id = name(lease);
                        let lives = owner.as_ref().is_some_and(|(of, .., heard)| *of == id && heard.is_some());
                        prop_assert_eq!(leases.renew(now, &id), lives);
                        if lives {
                            owner.as_mut().unwrap().3 = Some(now);
                        }
                    }
                    Step::GiveBack { lease } => {
                        let id = name(lease);
                        leases.expire(now);
                        let lives = owner.as_ref().is_some_and(|(of, ..)| *of == id);
                        prop_assert_eq!(leases.give_back(&id), lives);
                        if lives {
                            owner = None;
                        }
                    }
                    Step::Wait { seconds } => {
                        now += Duration::from_secs(seconds);
                        let silent = owner.as_ref().is_some_and(|(.., heard)| {
                            heard.is_some_and(|heard| now >= heard + EXPIRY)
                        });
                        prop_assert_eq!(leases.expire(now).is_some(), silent);
                        if silent {
                            owner = None;
                        }
                    }
                }
                let holder = leases.holder().map(|holder| (holder.holder.clone(), holder.epoch));
                prop_assert_eq!(holder, owner.as_ref().map(|(_, of, at, _)| (of.clone(), *at)));
            }
        }
    }
}
