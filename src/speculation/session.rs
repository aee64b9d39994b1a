//! The state of one drafted completion.
//!
//! There are two texts: the *committed* tokens, which the target has chosen, and the *draft*, which may follow them: found
//! in the text itself by [`Lookup`], or appended by a stream of the drafter. As long as the draft repeats what the target
//! commits it stays; of what reaches beyond the committed tokens [`Pace`] chooses how much is offered. When the two differ,
//! the draft is dropped and a new one starts from the committed tokens.

use std::time::Duration;

use super::pace::{Class, Growing};
use super::{Lookup, Pace, Token};

/// What happened.
#[derive(Debug, Clone, PartialEq)]
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
        /// The next tokens of this stream, with how sure the drafter was of each.
        tokens: Vec<(Token, Class)>,
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
    Follow(Offer),
    /// Offer `tokens` at `pos`; replaces an earlier offer that was not sent yet.
    Offer(Offer),
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
pub struct Offer {
    /// Position of the first token: the number of committed tokens.
    pub pos: usize,
    /// The tokens.
    pub tokens: Vec<Token>,
    /// The target's next step may wait for this many tokens.
    pub n_min: usize,
    /// The longest time after its last step that it may wait, in microseconds.
    pub hold_us: u64,
}

/// What a session has to know of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moment {
    /// Most draft tokens that the target can verify in one step.
    pub n_max: usize,
    /// The running stream, if there is one.
    pub growing: Option<Growing>,
    /// Time since the target's last step.
    pub since_step: Duration,
    /// From asking the target to its answer.
    pub round_trip: Duration,
}

/// The state machine of one completion.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
pub struct Session {
    committed: Vec<Token>,
    /// What may follow `committed[..base]`, and what is known of each token of it.
    draft: Vec<Token>,
    classes: Vec<Class>,
    base: usize,
    /// What the target was told last.
    told: Offer,
    /// The running stream.
    running: Option<u64>,
    /// Streams started so far.
    streams: u64,
    /// The draft ends with the end of the text.
    complete: bool,
    lookup: Lookup,
    /// All of the draft was found in the text itself.
    found: bool,
    available: bool,
    ended: bool,
}

/// A draft of which the drafter's next token would be accepted with less chance is not continued.
const HOPELESS: f64 = 0.05;

impl Session {
    /// A completion of which nothing is known yet but the client's prediction (perhaps empty), and a drafter that is not
    /// usable yet.
    #[must_use]
    pub fn new(prediction: &[Token]) -> Self {
        Self {
            lookup: Lookup::new(prediction),
            ..Self::default()
        }
    }

    /// The tokens that the target has committed, prompt included.
    #[must_use]
    pub fn committed(&self) -> &[Token] {
        &self.committed
    }

    /// What was known of the draft's first `n` tokens beyond the committed ones.
    #[must_use]
    pub fn classes(&self, n: usize) -> &[Class] {
        let beyond = &self.classes[self.classes.len() - self.beyond()..];
        &beyond[..n.min(beyond.len())]
    }

    /// The first thing to do: learn the prompt.
    #[must_use]
    pub fn begin(&self) -> Action {
        Action::Follow(Offer::default())
    }

    /// Takes in what happened and tells what to do, in this order.
    pub fn handle(&mut self, event: Event, pace: &Pace, moment: &Moment) -> Vec<Action> {
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
                    self.lookup.extend(&tokens[known..]);
                }
            }
            Event::Ended => {
                self.ended = true;
                self.running = None;
                return vec![Action::StopDraft, Action::Finish];
            }
            Event::Drafted { stream, tokens } => {
                if self.running == Some(stream) {
                    for (token, class) in tokens {
                        self.draft.push(token);
                        self.classes.push(class);
                    }
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
                if !available {
                    self.stop_stream(&mut actions);
                }
            }
        }
        self.reconcile(&mut actions);
        self.look_up(pace, moment, &mut actions);
        let begins = self.extend_draft(pace, moment, &mut actions);
        let growing = if begins {
            Some(Growing::default())
        } else {
            moment.growing.filter(|_| self.running.is_some())
        };
        self.offer(follow, pace, &Moment { growing, ..*moment }, &mut actions);
        actions
    }

    /// Number of draft tokens beyond the committed ones.
    fn beyond(&self) -> usize {
        (self.base + self.draft.len()).saturating_sub(self.committed.len())
    }

    fn stop_stream(&mut self, actions: &mut Vec<Action>) {
        if self.running.take().is_some() {
            actions.push(Action::StopDraft);
        }
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
            self.stop_stream(actions);
            self.drop_draft();
        } else {
            self.draft.drain(..common);
            self.classes.drain(..common);
            self.base += common;
        }
    }

    fn drop_draft(&mut self) {
        self.draft.clear();
        self.classes.clear();
        self.base = self.committed.len();
        self.complete = false;
        self.found = false;
    }

    /// Drafts from the text itself where nothing is drafted, or goes on doing so, if that promises something.
    fn look_up(&mut self, pace: &Pace, moment: &Moment, actions: &mut Vec<Action>) {
        let beyond = self.beyond();
        if self.committed.is_empty() || (beyond > 0 && !self.found) || beyond >= moment.n_max {
            return;
        }
        let drafted = &self.draft[self.draft.len() - beyond..];
        let Some(proposal) = self.lookup.propose(drafted, moment.n_max - beyond) else {
            return;
        };
        let class = proposal.class();
        if beyond == 0 {
            let stream = self.available.then(Growing::default);
            let classes = vec![class; proposal.tokens.len()];
            if pace.worth(&classes, moment.n_max, None) <= pace.worth(&[], moment.n_max, stream) {
                return;
            }
            self.stop_stream(actions);
            self.drop_draft();
            self.found = true;
        }
        self.classes.extend(proposal.tokens.iter().map(|_| class));
        self.draft.extend(proposal.tokens);
    }

    /// Starts a stream when too little is drafted ahead and none is running; says whether it did.
    fn extend_draft(&mut self, pace: &Pace, moment: &Moment, actions: &mut Vec<Action>) -> bool {
        let beyond = self.beyond();
        if self.running.is_some()
            || self.complete
            || !self.available
            || self.committed.is_empty()
            || beyond > moment.n_max
            || (beyond > 0 && self.found)
            || moment.n_max == 0
            || !pace.pays(moment.n_max)
            || pace.chance(self.classes(beyond)) < HOPELESS
        {
            return false;
        }
        self.streams += 1;
        self.running = Some(self.streams);
        self.found = false;
        let start = self.draft.len() - beyond;
        let prefix = [&self.committed[..], &self.draft[start..]].concat();
        // Enough for a step, for the token that the target adds, and for the next step.
        let n = (2 * moment.n_max + 1 - beyond).min(moment.n_max + 1);
        actions.push(Action::Draft {
            stream: self.streams,
            prefix,
            n,
        });
        true
    }

    /// Offers the part of the draft that is worth it, with a new follow or when the target was told something else.
    fn offer(&mut self, follow: bool, pace: &Pace, moment: &Moment, actions: &mut Vec<Action>) {
        let beyond = self.beyond();
        let choice = pace.choose(self.classes(beyond), moment.n_max, moment.growing);
        let start = self.draft.len() - beyond;
        let tokens = self.draft[start..start + choice.n].to_vec();
        let (n_min, hold_us) = if choice.wait_us > 0 {
            // Until we say that it is enough.
            (moment.n_max, choice.wait_us + micros(moment.since_step))
        } else {
            // These are enough. After the step that takes them the target waits until it has heard what comes next.
            (
                choice.n,
                if choice.n > 0 {
                    2 * micros(moment.round_trip) + 500
                } else {
                    0
                },
            )
        };
        let offer = Offer {
            pos: self.committed.len(),
            tokens,
            n_min,
            hold_us,
        };
        let news =
            (offer.pos, offer.tokens.len(), offer.n_min) != (self.told.pos, self.told.tokens.len(), self.told.n_min);
        if follow || (news && !self.committed.is_empty()) {
            self.told = offer.clone();
            actions.push(if follow {
                Action::Follow(offer)
            } else {
                Action::Offer(offer)
            });
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MOMENT: Moment = Moment {
        n_max: 4,
        growing: None,
        since_step: Duration::ZERO,
        round_trip: Duration::from_micros(100),
    };

    /// A session with costs of which nothing is known.
    struct Tried {
        session: Session,
        pace: Pace,
    }

    impl Tried {
        fn handle(&mut self, event: Event) -> Vec<Action> {
            self.session.handle(event, &self.pace, &MOMENT)
        }
    }

    fn committed(pos: usize, tokens: &[Token]) -> Event {
        Event::Committed {
            pos,
            tokens: tokens.to_vec(),
            followed: true,
        }
    }

    fn drafted(stream: u64, tokens: &[Token]) -> Event {
        Event::Drafted {
            stream,
            tokens: tokens.iter().map(|token| (*token, Class::UNKNOWN)).collect(),
        }
    }

    fn started(actions: &[Action]) -> Option<(u64, Vec<Token>, usize)> {
        actions.iter().find_map(|action| match action {
            Action::Draft { stream, prefix, n } => Some((*stream, prefix.clone(), *n)),
            _ => None,
        })
    }

    fn sent(actions: &[Action]) -> Option<Offer> {
        actions.iter().rev().find_map(|action| match action {
            Action::Follow(offer) | Action::Offer(offer) => Some(offer.clone()),
            _ => None,
        })
    }

    /// A session that knows the prompt 1 2 3 and has drafted 4 5 6.
    fn drafting() -> Tried {
        let mut tried = Tried {
            session: Session::new(&[]),
            pace: Pace::default(),
        };
        tried.handle(Event::Available(true));
        let actions = tried.handle(committed(0, &[1, 2, 3]));
        assert_eq!(started(&actions), Some((1, vec![1, 2, 3], 5)));
        let actions = tried.handle(drafted(1, &[4, 5, 6]));
        assert_eq!(
            sent(&actions),
            Some(Offer {
                pos: 3,
                tokens: vec![4, 5, 6],
                n_min: 3,
                hold_us: 700
            })
        );
        tried
    }

    #[test]
    fn a_draft_that_agrees_is_kept_and_offered_again() {
        let mut session = drafting();
        let actions = session.handle(committed(3, &[4, 5]));
        assert_eq!(
            sent(&actions).map(|draft| (draft.pos, draft.tokens)),
            Some((5, vec![6]))
        );
        assert_eq!(started(&actions), None);
    }

    #[test]
    fn a_draft_that_was_contradicted_is_dropped_and_begun_again() {
        let mut session = drafting();
        let actions = session.handle(committed(3, &[4, 9]));
        assert!(actions.contains(&Action::StopDraft));
        assert_eq!(sent(&actions).map(|draft| (draft.pos, draft.tokens)), Some((5, vec![])));
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 9], 5)));
        let late = session.handle(drafted(1, &[7]));
        assert_eq!(late, vec![], "tokens of an ended stream count for nothing");
    }

    #[test]
    fn a_stream_at_its_end_is_continued() {
        let mut session = drafting();
        let actions = session.handle(Event::DraftEnded {
            stream: 1,
            end_of_text: false,
        });
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6], 5)));
    }

    #[test]
    fn a_drafter_that_sees_the_end_of_the_text_is_asked_again_only_when_the_target_goes_on() {
        let mut session = drafting();
        let actions = session.handle(Event::DraftEnded {
            stream: 1,
            end_of_text: true,
        });
        assert_eq!(started(&actions), None);
        let actions = session.handle(committed(3, &[4, 5, 6]));
        assert_eq!(started(&actions), None);
        assert_eq!(
            sent(&actions),
            Some(Offer {
                pos: 6,
                tokens: vec![],
                n_min: 0,
                hold_us: 0
            })
        );
        let actions = session.handle(committed(6, &[7]));
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6, 7], 5)));
    }

    #[test]
    fn the_target_never_waits_for_a_drafter_that_is_gone() {
        let mut session = drafting();
        session.handle(Event::Available(false));
        let actions = session.handle(committed(3, &[9]));
        assert_eq!(
            sent(&actions),
            Some(Offer {
                pos: 4,
                tokens: vec![],
                n_min: 0,
                hold_us: 0
            })
        );
        assert_eq!(started(&actions), None);
        let actions = session.handle(Event::Available(true));
        assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 9], 5)));
    }

    #[test]
    fn text_that_comes_again_is_offered_without_a_drafter() {
        let mut tried = Tried {
            session: Session::new(&[]),
            pace: Pace::default(),
        };
        tried.pace.calibrate([(0, Duration::from_millis(40))]);
        let text: Vec<Token> = (1..20).chain(1..12).collect();
        let actions = tried.handle(committed(0, &text));
        assert_eq!(sent(&actions).map(|offer| offer.tokens), Some(vec![12, 13, 14, 15]));
        let actions = tried.handle(committed(text.len(), &[12, 13]));
        assert_eq!(sent(&actions).map(|offer| offer.tokens), Some(vec![14, 15, 16, 17]));
    }

    #[test]
    fn after_the_end_nothing_is_done() {
        let mut session = drafting();
        assert_eq!(session.handle(Event::Ended), vec![Action::StopDraft, Action::Finish]);
        assert_eq!(session.handle(committed(3, &[4])), vec![]);
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
        fn whatever_happens_the_session_follows_the_target(moves in moves(), n_max in 0_usize..6, measured: bool) {
            let mut pace = Pace::default();
            if measured {
                pace.calibrate([(0, Duration::from_millis(40))]);
                pace.record_first_token(Duration::from_millis(2));
                pace.record_tokens(1, Duration::from_micros(300));
            }
            let text = |from: usize, to: usize| (from..to).map(|i| Token::try_from(i).unwrap()).collect::<Vec<_>>();
            let mut session = Session::new(&[]);
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
                            .map(|token| (token, Class::UNKNOWN))
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
                let growing = stream.map(|_| Growing { begun: true, silent: Duration::ZERO });
                let actions = session.handle(event, &pace, &Moment { n_max, growing, ..MOMENT });
                let follows = actions.iter().filter(|action| matches!(action, Action::Follow(_))).count();
                prop_assert_eq!(follows, usize::from(followed), "one follow is always outstanding");
                for action in actions {
                    match action {
                        Action::Follow(draft) | Action::Offer(draft) => {
                            prop_assert_eq!(draft.pos, known, "offers begin where the committed tokens end");
                            prop_assert!(draft.tokens.len() <= n_max);
                            prop_assert!((draft.n_min == 0) == (draft.hold_us == 0));
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
                prop_assert!(session.draft.len() == session.classes.len());
            }
        }

        /// Few different tokens, so that the text repeats itself.
        #[test]
        fn what_is_looked_up_is_offered_where_it_belongs(
            prediction in prop::collection::vec(0..3, 0..20),
            commits in prop::collection::vec(prop::collection::vec(0..3, 1..5), 1..60),
        ) {
            let mut pace = Pace::default();
            pace.calibrate([(0, Duration::from_millis(40))]);
            let mut session = Session::new(&prediction);
            let mut text = Vec::new();
            for tokens in commits {
                let pos = text.len();
                text.extend_from_slice(&tokens);
                let event = Event::Committed { pos, tokens, followed: true };
                for action in session.handle(event, &pace, &MOMENT) {
                    match action {
                        Action::Follow(offer) => {
                            prop_assert_eq!(offer.pos, text.len());
                            prop_assert!(offer.tokens.len() <= MOMENT.n_max);
                        }
                        other => prop_assert!(false, "{other:?} without a drafter"),
                    }
                }
                prop_assert_eq!(session.committed(), &text[..]);
            }
        }
    }
}
