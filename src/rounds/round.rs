//! What to ask the target next, and what its answers mean.
//!
//! One round is a draft (found in the text itself by [`Lookup`], else made by the drafter) and the target's verdict on it.
//! Where nothing is drafted, the target generates some tokens by itself: that costs it no more than if it did so in an
//! ordinary answer. Whatever is drafted, only what the target chose is said.

use crate::speculation::{Class, Lookup, Pace, Token};

use super::Verdict;

/// Tokens that the target generates in a round without a draft.
const PLAIN: usize = 8;

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt is known.
    Begin,
    /// The drafter's answer to [`Action::Draft`], perhaps nothing.
    Drafted(Vec<(Token, Class)>),
    /// The target's answer to [`Action::Verify`].
    Verified(Verdict),
    /// The target will not take this draft.
    Refused,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Draft at most `n` tokens after the text so far.
    Draft {
        /// Most tokens.
        n: usize,
    },
    /// Let the target verify `draft` or, if that is empty, generate at most `n` tokens.
    Verify {
        /// What may follow the text so far.
        draft: Vec<Token>,
        /// Most tokens to generate without a draft.
        n: usize,
    },
    /// These tokens of the answer are certain.
    Say(Vec<Token>),
    /// The answer is complete.
    Finish(Finish),
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The text has ended, by itself or by a stop string.
    Stop,
    /// There may be no more tokens.
    Length,
}

impl Finish {
    /// OpenAI's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What has to be known of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moment {
    /// Most draft tokens that the target can verify at once.
    pub n_max: usize,
    /// Whether there is a drafter that can be asked.
    pub can_draft: bool,
}

/// The state machine of one answer.
#[derive(Debug)]
pub struct Rounds {
    /// The prompt and the answer so far.
    context: Vec<Token>,
    n_prompt: usize,
    /// Most tokens of the answer.
    limit: usize,
    /// What the target is verifying.
    asked: Vec<Token>,
    /// What is known of each token of it.
    classes: Vec<Class>,
    lookup: Lookup,
    /// Tokens of the answer, the one that ends it included.
    generated: usize,
    finished: bool,
}

impl Rounds {
    /// An answer of at most `limit` tokens to `prompt`, of which the client expects `prediction` (perhaps nothing).
    #[must_use]
    pub fn new(prompt: Vec<Token>, prediction: &[Token], limit: usize) -> Self {
        let mut lookup = Lookup::new(prediction);
        lookup.extend(&prompt);
        Self {
            n_prompt: prompt.len(),
            context: prompt,
            limit,
            asked: Vec::new(),
            classes: Vec::new(),
            lookup,
            generated: 0,
            finished: false,
        }
    }

    /// The prompt and what has been said.
    #[must_use]
    pub fn context(&self) -> &[Token] {
        &self.context
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn n_prompt(&self) -> usize {
        self.n_prompt
    }

    /// Tokens of the answer so far, the one that ends it included.
    #[must_use]
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// What is known of the first `n` draft tokens that the target was asked about last.
    #[must_use]
    pub fn classes(&self, n: usize) -> &[Class] {
        &self.classes[..n.min(self.classes.len())]
    }

    /// Takes in what happened and tells what to do, in this order.
    pub fn handle(&mut self, event: Event, pace: &Pace, moment: &Moment) -> Vec<Action> {
        if self.finished {
            return Vec::new();
        }
        match event {
            Event::Begin => vec![self.next(pace, moment)],
            Event::Drafted(tokens) => vec![self.verify(&tokens, pace, moment)],
            // Perhaps it is the draft's fault.
            Event::Refused => vec![self.ask(Vec::new(), Vec::new(), 1)],
            Event::Verified(verdict) => self.verified(verdict, pace, moment),
        }
    }

    fn verified(&mut self, verdict: Verdict, pace: &Pace, moment: &Moment) -> Vec<Action> {
        let accepted = verdict.accepted.min(self.asked.len());
        let mut tokens = self.asked[..accepted].to_vec();
        tokens.extend(verdict.next);
        let room = self.limit - self.generated;
        let ended = verdict.ended && tokens.len() <= room;
        tokens.truncate(room);
        self.generated += tokens.len();
        if ended {
            tokens.pop();
        }
        self.context.extend_from_slice(&tokens);
        self.lookup.extend(&tokens);
        let stalled = tokens.is_empty() && !ended;
        let mut actions = Vec::new();
        if !tokens.is_empty() {
            actions.push(Action::Say(tokens));
        }
        let finish = if ended {
            Some(Finish::Stop)
        } else {
            (self.generated >= self.limit).then_some(Finish::Length)
        };
        actions.push(match finish {
            Some(finish) => {
                self.finished = true;
                Action::Finish(finish)
            }
            // It does not tell what comes next but by generating it.
            None if stalled => self.ask(Vec::new(), Vec::new(), 1),
            None => self.next(pace, moment),
        });
        actions
    }

    /// Most draft tokens: the target adds one.
    fn most(&self, moment: &Moment) -> usize {
        let room = self.limit - self.generated;
        moment.n_max.min(room.saturating_sub(1))
    }

    fn next(&mut self, pace: &Pace, moment: &Moment) -> Action {
        let most = self.most(moment);
        let found = self.lookup.propose(&[], most).map(|proposal| {
            let class = Class::of_match(proposal.matched);
            let classes = vec![class; proposal.tokens.len()];
            (proposal.tokens, classes)
        });
        if let Some((mut tokens, mut classes)) = found {
            let n = pace.choose(&classes, most, None).n;
            if n > 0 {
                tokens.truncate(n);
                classes.truncate(n);
                return self.ask(tokens, classes, 1);
            }
        }
        if most > 0 && moment.can_draft && pace.pays(most) {
            return Action::Draft { n: most };
        }
        self.plain()
    }

    fn verify(&mut self, drafted: &[(Token, Class)], pace: &Pace, moment: &Moment) -> Action {
        if drafted.is_empty() {
            return self.plain();
        }
        let classes: Vec<Class> = drafted.iter().map(|(_, class)| *class).collect();
        let n = pace.choose(&classes, self.most(moment), None).n;
        let tokens = drafted[..n].iter().map(|(token, _)| *token).collect();
        // One token further on the drafter may be surer.
        self.ask(tokens, classes[..n].to_vec(), 1)
    }

    fn plain(&mut self) -> Action {
        self.ask(Vec::new(), Vec::new(), PLAIN.min(self.limit - self.generated))
    }

    fn ask(&mut self, draft: Vec<Token>, classes: Vec<Class>, n: usize) -> Action {
        self.asked.clone_from(&draft);
        self.classes = classes;
        Action::Verify { draft, n }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const END: Token = 9;

    /// The target's greedy choice: any function of the text will do.
    fn choice(context: &[Token]) -> Token {
        let sum = context
            .iter()
            .rev()
            .take(3)
            .fold(7_i32, |sum, token| sum.wrapping_mul(31).wrapping_add(*token));
        sum.rem_euclid(10)
    }

    fn greedy(prompt: &[Token], limit: usize) -> (Vec<Token>, Finish, usize) {
        let mut context = prompt.to_vec();
        for generated in 1..=limit {
            let token = choice(&context);
            if token == END {
                return (context[prompt.len()..].to_vec(), Finish::Stop, generated);
            }
            context.push(token);
        }
        (context[prompt.len()..].to_vec(), Finish::Length, limit)
    }

    /// How the target and the drafter behave in one round.
    #[derive(Debug, Clone)]
    struct Behaviour {
        drafted: Vec<Token>,
        right: usize,
        judges: usize,
        tells_next: bool,
        refuses: bool,
    }

    fn behaviour() -> impl Strategy<Value = Behaviour> {
        (
            prop::collection::vec(0..12, 0..8),
            0_usize..8,
            0_usize..8,
            any::<bool>(),
            prop::bool::weighted(0.1),
        )
            .prop_map(|(drafted, right, judges, tells_next, refuses)| Behaviour {
                drafted,
                right,
                judges,
                tells_next,
                refuses,
            })
    }

    fn verdict(context: &[Token], draft: &[Token], n: usize, how: &Behaviour) -> Verdict {
        let mut text = context.to_vec();
        if draft.is_empty() {
            let mut next = Vec::new();
            while next.len() < n && next.last() != Some(&END) {
                next.push(choice(&text));
                text.extend(next.last());
            }
            let ended = next.last() == Some(&END);
            return Verdict {
                judged: 0,
                accepted: 0,
                next,
                ended,
            };
        }
        let judged = how.judges.min(draft.len());
        let mut accepted = 0;
        while accepted < judged && choice(&text) == draft[accepted] && draft[accepted] != END {
            text.push(draft[accepted]);
            accepted += 1;
        }
        let next: Vec<Token> = how.tells_next.then(|| choice(&text)).into_iter().collect();
        Verdict {
            judged,
            accepted,
            ended: next == [END],
            next,
        }
    }

    proptest! {
        #[test]
        fn whatever_is_drafted_the_text_is_the_targets_own(
            prompt in prop::collection::vec(0..9, 1..30),
            prediction in prop::collection::vec(0..9, 0..30),
            limit in 1_usize..60,
            n_max in 0_usize..9,
            can_draft in any::<bool>(),
            rounds in prop::collection::vec(behaviour(), 1..20),
        ) {
            let (expected, finish, generated) = greedy(&prompt, limit);
            let moment = Moment { n_max, can_draft };
            let pace = Pace::default();
            let mut machine = Rounds::new(prompt.clone(), &prediction, limit);
            let mut behaviours = rounds.iter().cycle();
            let mut actions: std::collections::VecDeque<Action> = machine.handle(Event::Begin, &pace, &moment).into();
            let (mut said, mut end, mut passes) = (Vec::new(), None, 0);
            while let Some(action) = actions.pop_front() {
                let event = match action {
                    Action::Draft { n } => {
                        let how = behaviours.next().unwrap();
                        let mut text = machine.context().to_vec();
                        for _ in 0..how.right {
                            text.push(choice(&text));
                        }
                        let right = text[machine.context().len()..].iter();
                        let drafted = right.chain(&how.drafted).take(n).map(|token| (*token, Class::UNKNOWN));
                        Event::Drafted(drafted.collect())
                    }
                    Action::Verify { draft, n } => {
                        passes += 1;
                        prop_assert!(passes < 200, "it goes on for ever");
                        prop_assert!(draft.len() <= n_max && draft.len() < limit - machine.generated());
                        prop_assert!(n > 0 && n <= limit - machine.generated());
                        let how = behaviours.next().unwrap();
                        if how.refuses && !draft.is_empty() {
                            Event::Refused
                        } else {
                            Event::Verified(verdict(machine.context(), &draft, n, how))
                        }
                    }
                    Action::Say(tokens) => {
                        said.extend(tokens);
                        continue;
                    }
                    Action::Finish(finish) => {
                        prop_assert!(end.replace(finish).is_none());
                        continue;
                    }
                };
                actions.extend(machine.handle(event, &pace, &moment));
            }
            prop_assert_eq!(&said, &expected);
            prop_assert_eq!(end, Some(finish));
            prop_assert_eq!(machine.generated(), generated);
            prop_assert_eq!(machine.context(), [prompt, expected].concat());
        }
    }
}
