use super::super::{AdaptivePolicy, ConcurrentLoad};
use super::*;
use proptest::prelude::*;

const CONTEXT: SessionContext<'_> = SessionContext {
    n_max: 4,
    pending: &[],
    now: Duration::ZERO,
    round_trip: Duration::from_micros(100),
    load: ConcurrentLoad {
        completions: 0,
        tokens: 0,
    },
};

/// A session whose costs were not measured.
struct UnmeasuredSession {
    session: Session,
    policy: AdaptivePolicy,
}

impl UnmeasuredSession {
    fn handle(&mut self, event: SessionEvent) -> Vec<SessionAction> {
        self.session.handle(event, &mut self.policy, &CONTEXT)
    }
}

fn committed(pos: usize, tokens: &[Token]) -> SessionEvent {
    SessionEvent::Committed {
        pos,
        tokens: tokens.to_vec(),
        followed: true,
    }
}

fn drafted(stream: u64, tokens: &[Token]) -> SessionEvent {
    SessionEvent::Drafted {
        stream,
        tokens: tokens.iter().map(|token| (*token, TokenClass::of_drafter(0))).collect(),
    }
}

fn available(available: bool) -> SessionEvent {
    SessionEvent::Available { drafter: 0, available }
}

fn started(actions: &[SessionAction]) -> Option<(u64, Vec<Token>, usize)> {
    actions.iter().find_map(|action| match action {
        SessionAction::Draft { stream, prefix, n, .. } => Some((*stream, prefix.clone(), *n)),
        _ => None,
    })
}

fn sent(actions: &[SessionAction]) -> Option<Offer> {
    actions.iter().rev().find_map(|action| match action {
        SessionAction::Follow(offer) | SessionAction::Offer(offer) => Some(offer.clone()),
        _ => None,
    })
}

/// A session that knows the prompt 1 2 3 and has drafted 4 5 6.
fn drafting() -> UnmeasuredSession {
    let mut unmeasured = UnmeasuredSession {
        session: Session::new(&[], 1),
        policy: AdaptivePolicy::default(),
    };
    unmeasured.handle(available(true));
    let actions = unmeasured.handle(committed(0, &[1, 2, 3]));
    assert_eq!(started(&actions), Some((1, vec![1, 2, 3], 9)));
    let actions = unmeasured.handle(drafted(1, &[4, 5, 6]));
    let offer = sent(&actions).unwrap();
    assert_eq!((offer.pos, &offer.tokens[..]), (3, &[4, 5, 6][..]));
    unmeasured
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
fn a_contradicted_draft_is_dropped_and_restarted() {
    let mut session = drafting();
    let actions = session.handle(committed(3, &[4, 9]));
    assert!(actions.contains(&SessionAction::StopDraft { drafter: 0 }));
    assert_eq!(sent(&actions).map(|draft| (draft.pos, draft.tokens)), Some((5, vec![])));
    assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 9], 9)));
    let late = session.handle(drafted(1, &[7]));
    assert_eq!(late, vec![], "tokens of an ended stream are ignored");
}

#[test]
fn a_stream_that_ended_is_continued() {
    let mut session = drafting();
    let actions = session.handle(SessionEvent::DraftEnded {
        stream: 1,
        end_of_text: false,
    });
    assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6], 6)));
}

#[test]
fn a_drafter_that_ends_the_text_is_asked_again_only_when_the_target_goes_on() {
    let mut session = drafting();
    let actions = session.handle(SessionEvent::DraftEnded {
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
    assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 4, 5, 6, 7], 9)));
}

#[test]
fn the_arrival_of_an_offer_causes_no_other_offer() {
    let mut session = drafting();
    for _ in 0..3 {
        let arrived = SessionEvent::Committed {
            pos: 3,
            tokens: vec![],
            followed: false,
        };
        assert_eq!(session.handle(arrived), vec![]);
    }
}

#[test]
fn the_target_never_waits_for_an_unavailable_drafter() {
    let mut session = drafting();
    session.handle(available(false));
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
    let actions = session.handle(available(true));
    assert_eq!(started(&actions), Some((2, vec![1, 2, 3, 9], 9)));
}

#[test]
fn repeated_text_is_offered_without_a_drafter() {
    let mut unmeasured = UnmeasuredSession {
        session: Session::new(&[], 1),
        policy: AdaptivePolicy::default(),
    };
    unmeasured.policy.calibrate([(0, Duration::from_millis(40))]);
    let text: Vec<Token> = (1..20).chain(1..12).collect();
    let actions = unmeasured.handle(committed(0, &text));
    assert_eq!(sent(&actions).map(|offer| offer.tokens), Some(vec![12, 13, 14, 15, 16]));
    let actions = unmeasured.handle(committed(text.len(), &[12, 13]));
    assert_eq!(sent(&actions).map(|offer| offer.tokens), Some(vec![14, 15, 16, 17]));
}

#[test]
fn an_ended_session_does_nothing() {
    let mut session = drafting();
    assert_eq!(
        session.handle(SessionEvent::Ended),
        vec![SessionAction::StopDraft { drafter: 0 }, SessionAction::Finish]
    );
    assert_eq!(session.handle(committed(3, &[4])), vec![]);
}

/// A step of the random test below, which turns it into an event.
#[derive(Debug, Clone)]
enum Move {
    /// The target commits this many tokens of its text.
    Commit(usize),
    /// The answer repeats this many known tokens.
    Repeat(usize),
    /// The drafter produces tokens; a flag says whether each is right.
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
    fn the_session_follows_the_target_through_any_events(moves in moves(), n_max in 0_usize..6, measured: bool) {
        let mut policy = AdaptivePolicy::default();
        if measured {
            policy.calibrate([(0, Duration::from_millis(40))]);
            policy.record_first_token(0, Duration::from_millis(2), true);
            policy.record_tokens(0, 1, Duration::from_micros(300), true);
        }
        let text = |from: usize, to: usize| (from..to).map(|i| Token::try_from(i).unwrap()).collect::<Vec<_>>();
        let mut session = Session::new(&[], 1);
        let mut known = 0;
        let mut stream: Option<(u64, usize)> = None;
        let mut streams = 0;
        for step in moves {
            let event = match step {
                Move::Commit(n) => {
                    known += n;
                    SessionEvent::Committed { pos: known - n, tokens: text(known - n, known), followed: true }
                }
                Move::Repeat(n) => {
                    let pos = known.saturating_sub(n);
                    SessionEvent::Committed { pos, tokens: text(pos, known), followed: false }
                }
                Move::Draft(right) => {
                    let Some((id, end)) = &mut stream else { continue };
                    let tokens = right
                        .iter()
                        .enumerate()
                        .map(|(i, right)| Token::try_from(*end + i).unwrap() * if *right { 1 } else { -1 } - Token::from(!right))
                        .map(|token| (token, TokenClass::of_drafter(0)))
                        .collect::<Vec<_>>();
                    *end += tokens.len();
                    SessionEvent::Drafted { stream: *id, tokens }
                }
                Move::EndStream(end_of_text) => {
                    let Some((id, _)) = stream.take() else { continue };
                    SessionEvent::DraftEnded { stream: id, end_of_text }
                }
                Move::Available(it) => available(it),
            };
            let followed = matches!(event, SessionEvent::Committed { followed: true, .. });
            let pending = stream.map(|_| PendingDraft { drafter: 0, started: true, silent_for: Duration::ZERO });
            let context = SessionContext { n_max, pending: pending.as_slice(), ..CONTEXT };
            let actions = session.handle(event, &mut policy, &context);
            let follows = actions.iter().filter(|action| matches!(action, SessionAction::Follow(_))).count();
            prop_assert_eq!(follows, usize::from(followed), "one follow is always outstanding");
            for action in actions {
                match action {
                    SessionAction::Follow(draft) | SessionAction::Offer(draft) => {
                        prop_assert_eq!(draft.pos, known, "offers begin where the committed tokens end");
                        prop_assert!((draft.n_min == 0) == (draft.hold_us == 0));
                    }
                    SessionAction::Draft { stream: id, prefix, n, .. } => {
                        prop_assert!(stream.is_none(), "one stream at a time");
                        prop_assert!(id > streams && n > 0);
                        prop_assert_eq!(&prefix[..known], &text(0, known)[..]);
                        streams = id;
                        stream = Some((id, prefix.len()));
                    }
                    SessionAction::StopDraft { .. } => stream = None,
                    SessionAction::Finish => prop_assert!(false, "it was not ended"),
                }
            }
            prop_assert_eq!(session.committed(), &text(0, known)[..]);
            for draft in [&session.copied, &session.drafters[0].draft] {
                prop_assert!(draft.tokens.len() == draft.beyond(known), "confirmed draft tokens are forgotten");
                prop_assert!(draft.tokens.len() == draft.classes.len());
            }
        }
    }

    /// Few different tokens, so that the text repeats itself.
    #[test]
    fn text_that_is_found_is_offered_at_its_position(
        prediction in prop::collection::vec(0..3, 0..20),
        commits in prop::collection::vec(prop::collection::vec(0..3, 1..5), 1..60),
    ) {
        let mut policy = AdaptivePolicy::default();
        policy.calibrate([(0, Duration::from_millis(40))]);
        let mut session = Session::new(&prediction, 0);
        let mut text = Vec::new();
        for tokens in commits {
            let pos = text.len();
            text.extend_from_slice(&tokens);
            let event = SessionEvent::Committed { pos, tokens, followed: true };
            for action in session.handle(event, &mut policy, &CONTEXT) {
                match action {
                    SessionAction::Follow(offer) => {
                        prop_assert_eq!(offer.pos, text.len());
                        prop_assert!(offer.tokens.len() <= max_lookahead(CONTEXT.n_max));
                    }
                    other => prop_assert!(false, "{other:?} without a drafter"),
                }
            }
            prop_assert_eq!(session.committed(), &text[..]);
        }
    }
}
