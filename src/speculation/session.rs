//! The state of one drafted completion.
//!
//! There are two texts: the *committed* tokens, which the target has chosen, and the *draft*, which a stream of the
//! drafter appends to. As long as the draft repeats what the target commits it stays; what reaches beyond the committed
//! tokens is offered. When the two differ, the draft is dropped and a new stream starts from the committed tokens.

use super::{Plan, Token};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The target answered: it has committed `tokens`, the first of which stands at `pos`. With `followed`, this
    /// answers [`Action::Follow`].
    Committed {
        /// Position of the first token, counted from the start of the prompt.
        pos: usize,
        /// Committed tokens from there on.
        tokens: Vec<Token>,
        /// Whether the outstanding follow was answered by this.
        followed: bool,
    },
    /// The target ended the completion, or will not take drafts for it.
    Ended,
    /// A stream of the drafter produced tokens.
    Drafted {
        /// As in [`Action::Draft`].
        stream: u64,
        /// The next tokens of this stream.
        tokens: Vec<Token>,
    },
    /// A stream of the drafter is over.
    DraftEnded {
        /// As in [`Action::Draft`].
        stream: u64,
        /// The drafter thinks that the text ends here, so it has nothing to add.
        end_of_text: bool,
    },
    /// The drafter became usable, or ceased to be.
    Available(bool),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Offer `tokens` at `pos` and ask to be told when something is committed beyond `pos`.
    Follow(Draft),
    /// Offer `tokens` at `pos`; replaces an earlier offer that was not sent yet.
    Offer(Draft),
    /// Start a stream of the drafter that continues `prefix` by at most `n` tokens. Ends any earlier stream.
    Draft {
        /// Names the stream in the events.
        stream: u64,
        /// All tokens before the stream's first.
        prefix: Vec<Token>,
        /// Most tokens to produce.
        n: usize,
    },
    /// End the running stream of the drafter.
    StopDraft,
    /// Nothing is left to do.
    Finish,
}

/// Tokens that may follow the committed ones.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Draft {
    /// Position of the first token: the number of committed tokens.
    pub pos: usize,
    /// The tokens.
    pub tokens: Vec<Token>,
    /// The target's next step may wait for this many tokens.
    pub n_min: usize,
    /// The longest time that it may wait, in microseconds.
    pub hold_us: u64,
}

/// The state machine of one completion.
#[derive(Debug, Default)]
pub struct Session {
    committed: Vec<Token>,
    /// What the drafter says follows `committed[..base]`.
    draft: Vec<Token>,
    base: usize,
    /// End of what the target was last offered.
    offered_end: usize,
    /// The running stream.
    running: Option<u64>,
    /// Streams started so far.
    streams: u64,
    /// The draft ends with the end of the text.
    complete: bool,
    available: bool,
    ended: bool,
}

impl Session {
    /// A completion of which nothing is known yet, and a drafter that is not usable yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The tokens that the target has committed, prompt included.
    #[must_use]
    pub fn committed(&self) -> &[Token] {
        &self.committed
    }

    /// The first thing to do: learn the prompt.
    #[must_use]
    pub fn begin(&self) -> Action {
        Action::Follow(Draft::default())
    }

    /// Takes in what happened and tells what to do, in this order.
    pub fn handle(&mut self, event: Event, plan: &Plan) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.ended {
            return actions;
        }
        let mut follow = false;
        match event {
            Event::Committed { pos, tokens, followed } => {
                follow = followed;
                let known = self.committed.len().saturating_sub(pos);
                if pos <= self.committed.len() && known < tokens.len() {
                    self.committed.extend_from_slice(&tokens[known..]);
                }
            }
            Event::Ended => {
                self.ended = true;
                self.running = None;
                return vec![Action::StopDraft, Action::Finish];
            }
            Event::Drafted { stream, tokens } => {
                if self.running == Some(stream) {
                    self.draft.extend(tokens);
                }
            }
            Event::DraftEnded { stream, end_of_text } => {
                if self.running == Some(stream) {
                    self.running = None;
                    self.complete = end_of_text;
                }
            }
            Event::Available(available) => {
                self.available = available;
                if !available && self.running.take().is_some() {
                    actions.push(Action::StopDraft);
                }
            }
        }
        self.reconcile(&mut actions);
        self.offer(follow, plan, &mut actions);
        self.extend_draft(plan, &mut actions);
        actions
    }

    /// Number of draft tokens beyond the committed ones.
    fn beyond(&self) -> usize {
        (self.base + self.draft.len()).saturating_sub(self.committed.len())
    }

    /// Forgets the part of the draft that is confirmed, and all of it when it was contradicted or overtaken.
    fn reconcile(&mut self, actions: &mut Vec<Action>) {
        let unseen = &self.committed[self.base..];
        let common = unseen.len().min(self.draft.len());
        let contradicted = unseen[..common] != self.draft[..common];
        let behind = unseen.len() - common;
        // A stream that is behind by a token or two may catch up: a new one would have to read these as well.
        let overtaken = behind > if self.running.is_some() { 2 } else { 0 };
        if contradicted || overtaken {
            if self.running.take().is_some() {
                actions.push(Action::StopDraft);
            }
            self.draft.clear();
            self.base = self.committed.len();
            self.complete = false;
        } else {
            self.draft.drain(..common);
            self.base += common;
        }
    }

    /// Offers what is beyond the committed tokens, with a new follow or when there is more than was offered.
    fn offer(&mut self, follow: bool, plan: &Plan, actions: &mut Vec<Action>) {
        let pos = self.committed.len();
        let n = self.beyond().min(plan.n_offer);
        if !follow && pos + n <= self.offered_end {
            return;
        }
        let start = self.draft.len() - self.beyond();
        let can_deliver = n > 0 || (self.available && !self.complete);
        let draft = Draft {
            pos,
            tokens: self.draft[start..start + n].to_vec(),
            n_min: if can_deliver && !self.complete { plan.n_min } else { 0 },
            hold_us: if can_deliver && !self.complete { plan.hold_us } else { 0 },
        };
        self.offered_end = pos + n;
        actions.push(if follow {
            Action::Follow(draft)
        } else {
            Action::Offer(draft)
        });
    }

    /// Starts a stream when too little is drafted ahead and none is running.
    fn extend_draft(&mut self, plan: &Plan, actions: &mut Vec<Action>) {
        let beyond = self.beyond();
        if self.running.is_some()
            || self.complete
            || !self.available
            || self.committed.is_empty()
            || plan.n_ahead == 0
            || beyond * 2 > plan.n_ahead
        {
            return;
        }
        self.streams += 1;
        self.running = Some(self.streams);
        let start = self.draft.len() - beyond;
        let prefix = [&self.committed[..], &self.draft[start..]].concat();
        actions.push(Action::Draft {
            stream: self.streams,
            prefix,
            n: plan.n_ahead - beyond,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAN: Plan = Plan {
        n_offer: 4,
        n_min: 2,
        hold_us: 1000,
        n_ahead: 9,
    };

    fn committed(pos: usize, tokens: &[Token]) -> Event {
        Event::Committed {
            pos,
            tokens: tokens.to_vec(),
            followed: true,
        }
    }

    fn started(actions: &[Action]) -> Option<(u64, Vec<Token>, usize)> {
        actions.iter().find_map(|action| match action {
            Action::Draft { stream, prefix, n } => Some((*stream, prefix.clone(), *n)),
            _ => None,
        })
    }

    fn sent(actions: &[Action]) -> Option<Draft> {
        actions.iter().rev().find_map(|action| match action {
            Action::Follow(draft) | Action::Offer(draft) => Some(draft.clone()),
            _ => None,
        })
    }

    /// A session that knows the prompt 1 2 3 and has drafted 4 5 6.
    fn drafting() -> Session {
        let mut session = Session::new();
        session.handle(Event::Available(true), &PLAN);
        let actions = session.handle(committed(0, &[1, 2, 3]), &PLAN);
        assert_eq!(started(&actions), Some((1, vec![1, 2, 3], 9)));
        let actions = session.handle(
            Event::Drafted {
                stream: 1,
                tokens: vec![4, 5, 6],
            },
            &PLAN,
        );
        assert_eq!(
            sent(&actions),
            Some(Draft {
                pos: 3,
                tokens: vec![4, 5, 6],
                n_min: 2,
                hold_us: 1000
            })
        );
        session
    }

    #[test]
    fn a_draft_that_agrees_is_kept_and_offered_again() {
        let mut session = drafting();
        let actions = session.handle(committed(3, &[4, 5]), &PLAN);
        assert_eq!(
            sent(&actions).map(|draft| (draft.pos, draft.tokens)),
            Some((5, vec![6]))
        );
        assert_eq!(started(&actions), None);
    }

    #[test]
    fn a_draft_that_was_contradicted_is_dropped_and_begun_again() {
        let mut session = drafting();
        let actions = session.handle(committed(3, &[4, 9]), &PLAN);
        assert!(actions.contains(&Action::StopDraft));
        assert_eq!(sent(&actions).map(|draft| (draft.pos, draft.tokens)), Some((5, vec![])));
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 9], 9)));
        let late = session.handle(
            Event::Drafted {
                stream: 1,
                tokens: vec![7],
            },
            &PLAN,
        );
        assert_eq!(late, vec![], "tokens of an ended stream count for nothing");
    }

    #[test]
    fn a_stream_at_its_end_is_continued() {
        let mut session = drafting();
        let actions = session.handle(
            Event::DraftEnded {
                stream: 1,
                end_of_text: false,
            },
            &PLAN,
        );
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6], 6)));
    }

    #[test]
    fn a_drafter_that_sees_the_end_of_the_text_is_asked_again_only_when_the_target_goes_on() {
        let mut session = drafting();
        let actions = session.handle(
            Event::DraftEnded {
                stream: 1,
                end_of_text: true,
            },
            &PLAN,
        );
        assert_eq!(started(&actions), None);
        let actions = session.handle(committed(3, &[4, 5, 6]), &PLAN);
        assert_eq!(started(&actions), None);
        assert_eq!(
            sent(&actions),
            Some(Draft {
                pos: 6,
                tokens: vec![],
                n_min: 0,
                hold_us: 0
            })
        );
        let actions = session.handle(committed(6, &[7]), &PLAN);
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6, 7], 9)));
    }

    #[test]
    fn the_target_never_waits_for_a_drafter_that_is_gone() {
        let mut session = drafting();
        session.handle(Event::Available(false), &PLAN);
        let actions = session.handle(committed(3, &[9]), &PLAN);
        assert_eq!(
            sent(&actions),
            Some(Draft {
                pos: 4,
                tokens: vec![],
                n_min: 0,
                hold_us: 0
            })
        );
        assert_eq!(started(&actions), None);
        let actions = session.handle(Event::Available(true), &PLAN);
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 9], 9)));
    }

    #[test]
    fn after_the_end_nothing_is_done() {
        let mut session = drafting();
        assert_eq!(
            session.handle(Event::Ended, &PLAN),
            vec![Action::StopDraft, Action::Finish]
        );
        assert_eq!(session.handle(committed(3, &[4]), &PLAN), vec![]);
    }

    /// One thing that may happen to a session, as the model below turns it into an event.
    #[derive(Debug, Clone)]
    enum Move {
        /// The target commits so many tokens of its text.
        Commit(usize),
        /// The answer repeats so many tokens that are known already.
        Repeat(usize),
        /// The drafter produces tokens, each right with the chance given by the flags.
        Draft(Vec<bool>),
        EndStream(bool),
        Available(bool),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        prop::collection::vec(
            prop_oneof![
                4 => (1_usize..6).prop_map(Move::Commit),
                1 => (0_usize..6).prop_map(Move::Repeat),
                6 => prop::collection::vec(prop::bool::weighted(0.8), 1..6).prop_map(Move::Draft),
                2 => any::<bool>().prop_map(Move::EndStream),
                1 => any::<bool>().prop_map(Move::Available),
            ],
            1..120,
        )
    }

    proptest! {
        /// The target's text is 0 1 2 3 …; a wrong draft token is negative.
        #[test]
        fn whatever_happens_the_session_follows_the_target(moves in moves(), n_offer in 0_usize..6) {
            let plan = Plan { n_offer, n_min: n_offer.min(2), hold_us: 5, n_ahead: 2 * n_offer };
            let text = |from: usize, to: usize| (from..to).map(|i| Token::try_from(i).unwrap()).collect::<Vec<_>>();
            let mut session = Session::new();
            let mut known = 0;
            let mut stream: Option<(u64, usize)> = None;
            let mut streams = 0;
            for step in moves {
                let event = match step {
                    Move::Commit(n) => {
                        known += n;
                        Event::Committed { pos: known - n, tokens: text(known - n, known), followed: true }
                    }
                    Move::Repeat(n) => {
                        let pos = known.saturating_sub(n);
                        Event::Committed { pos, tokens: text(pos, known), followed: false }
                    }
                    Move::Draft(right) => {
                        let Some((id, end)) = &mut stream else { continue };
                        let tokens = right
                            .iter()
                            .enumerate()
                            .map(|(i, right)| Token::try_from(*end + i).unwrap() * if *right { 1 } else { -1 } - Token::from(!right))
                            .collect::<Vec<_>>();
                        *end += tokens.len();
                        Event::Drafted { stream: *id, tokens }
                    }
                    Move::EndStream(end_of_text) => {
                        let Some((id, _)) = stream.take() else { continue };
                        Event::DraftEnded { stream: id, end_of_text }
                    }
                    Move::Available(available) => Event::Available(available),
                };
                let followed = matches!(event, Event::Committed { followed: true, .. });
                let actions = session.handle(event, &plan);
                let follows = actions.iter().filter(|action| matches!(action, Action::Follow(_))).count();
                prop_assert_eq!(follows, usize::from(followed), "one follow is always outstanding");
                for action in actions {
                    match action {
                        Action::Follow(draft) | Action::Offer(draft) => {
                            prop_assert_eq!(draft.pos, known, "offers begin where the committed tokens end");
                            prop_assert!(draft.tokens.len() <= plan.n_offer);
                        }
                        Action::Draft { stream: id, prefix, n } => {
                            prop_assert!(stream.is_none(), "one stream at a time");
                            prop_assert!(id > streams && n > 0);
                            prop_assert_eq!(&prefix[..known], &text(0, known)[..]);
                            streams = id;
                            stream = Some((id, prefix.len()));
                        }
                        Action::StopDraft => stream = None,
                        Action::Finish => prop_assert!(false, "it was not ended"),
                    }
                }
                prop_assert_eq!(session.committed(), &text(0, known)[..]);
                prop_assert!(session.draft.len() == session.beyond(), "confirmed draft tokens are forgotten");
            }
        }
    }
}
