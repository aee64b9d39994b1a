//! The state machine of an answer in rounds. Free of I/O: events go in, actions come out.
//!
//! A round is a draft and the target's verdict on it. [`Lookup`] finds the draft in the text itself, or a drafter makes it.
//! Without a draft the target generates some tokens, which costs no more than in an ordinary answer. Invariant: every emitted
//! token is the target's own choice, whatever the draft.

use crate::engine::{Verdict, VerifyContext};
use crate::speculation::{ConcurrentLoad, Lookup, Policy, StepContext, Token, TokenClass};

/// Tokens that the target generates in a round without a draft.
const PLAIN: usize = 8;

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt is known.
    Begin,
    /// The drafter's answer to [`Action::Draft`]; may be empty.
    Drafted(Vec<(Token, TokenClass)>),
    /// The target's answer to [`Action::Verify`].
    Verified(Verdict),
    /// The target refused the draft.
    Refused,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Let this drafter draft at most `n` tokens after the text so far.
    Draft {
        /// Its number.
        drafter: usize,
        /// Most tokens.
        n: usize,
    },
    /// Let the target verify `draft` or, if that is empty, generate at most `n` tokens.
    Verify {
        /// The draft.
        draft: Vec<Token>,
        /// Most tokens to generate without a draft.
        n: usize,
    },
    /// Send these tokens of the answer.
    Emit(Vec<Token>),
    /// The answer is complete.
    Finish(Finish),
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The text has ended, by itself or by a stop string.
    Stop,
    /// The token limit is reached.
    Length,
}

impl Finish {
    /// The value of OpenAI's `finish_reason`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// The state machine of one answer.
#[derive(Debug)]
pub struct Rounds {
    /// The prompt and the answer so far.
    context: Vec<Token>,
    n_prompt: usize,
    /// Most tokens of the answer.
    limit: usize,
    /// Number of tokens of `draft` that the target verifies.
    asked: usize,
    /// Tokens after the text that the target may have computed without a verdict. A server does not score cached tokens again,
    /// so the answer continues without drafts until it has passed or left them.
    computed: Vec<Token>,
    /// The draft, and the class of each of its tokens.
    draft: Vec<Token>,
    classes: Vec<TokenClass>,
    lookup: Lookup,
    /// Tokens of the answer, including the one that ends it.
    generated: usize,
    finished: bool,
}

impl Rounds {
    /// An answer of at most `limit` tokens to `prompt`. `prediction` is what the client expects; it may be empty.
    #[must_use]
    pub fn new(prompt: Vec<Token>, prediction: &[Token], limit: usize) -> Self {
        let mut lookup = Lookup::new(prediction);
        lookup.extend(&prompt);
        Self {
            n_prompt: prompt.len(),
            context: prompt,
            limit,
            asked: 0,
            computed: Vec::new(),
            draft: Vec::new(),
            classes: Vec::new(),
            lookup,
            generated: 0,
            finished: false,
        }
    }

    /// The prompt and the answer so far.
    #[must_use]
    pub fn context(&self) -> &[Token] {
        &self.context
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn n_prompt(&self) -> usize {
        self.n_prompt
    }

    /// Tokens of the answer so far, including the one that ends it.
    #[must_use]
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// The classes of the first `n` tokens of the last draft.
    #[must_use]
    pub fn classes(&self, n: usize) -> &[TokenClass] {
        &self.classes[..n.min(self.classes.len())]
    }

    /// Takes in an event and returns the actions to carry out, in order.
    pub fn handle(&mut self, event: Event, policy: &mut impl Policy, context: &VerifyContext) -> Vec<Action> {
        if self.finished {
            return Vec::new();
        }
        match event {
            Event::Begin => vec![self.next(policy, context)],
            Event::Drafted(tokens) => vec![self.verify(&tokens, policy, context)],
            // The draft may be the cause, so the next round has none.
            Event::Refused => vec![self.ask(Vec::new(), Vec::new(), 0, 1)],
            Event::Verified(verdict) => self.verified(verdict, policy, context),
        }
    }

    fn verified(&mut self, verdict: Verdict, policy: &mut impl Policy, context: &VerifyContext) -> Vec<Action> {
        // The end of the text is a token of its own.
        let ended = verdict.ended && !verdict.next.is_empty();
        if verdict.next.is_empty() {
            self.computed.extend_from_slice(&self.draft[..self.asked]);
        }
        let mut tokens = self.draft[..verdict.accepted.min(self.asked)].to_vec();
        tokens.extend(verdict.next);
        // Compare the part of the draft that was not verified as well, to learn from it.
        for (i, token) in tokens.iter().enumerate().take(self.draft.len()) {
            let agrees = self.draft[i] == *token;
            policy.observe(self.classes[i], agrees);
            if !agrees {
                break;
            }
        }
        let room = self.limit - self.generated;
        let ended = ended && tokens.len() <= room;
        tokens.truncate(room);
        self.generated += tokens.len();
        if ended {
            tokens.pop();
        }
        self.context.extend_from_slice(&tokens);
        self.lookup.extend(&tokens);
        self.computed = self.computed.strip_prefix(&tokens[..]).unwrap_or_default().to_vec();
        let mut actions = Vec::new();
        if !tokens.is_empty() {
            actions.push(Action::Emit(tokens));
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
            None if self.computed.is_empty() => self.next(policy, context),
            None => self.ask(Vec::new(), Vec::new(), 0, 1),
        });
        actions
    }

    /// Most draft tokens: the target adds one.
    fn most(&self, context: &VerifyContext) -> usize {
        let room = self.limit - self.generated;
        context.n_max.min(room.saturating_sub(1))
    }

    fn next(&mut self, policy: &mut impl Policy, context: &VerifyContext) -> Action {
        let most = self.most(context);
        let found = self.lookup.propose(&[], most).map(|proposal| {
            let classes: Vec<_> = proposal.classes().collect();
            (proposal.tokens, classes)
        });
        if let Some((tokens, classes)) = found {
            let n = choose(policy, &classes, most);
            if n > 0 {
                return self.ask(tokens, classes, n, 1);
            }
        }
        let asked = |drafter: &&usize| {
            most > 0
                && policy.draft_limit(
                    **drafter,
                    true,
                    most,
                    ConcurrentLoad::default(),
                    std::time::Duration::ZERO,
                ) > 0
        };
        if let Some(drafter) = context.drafters.iter().find(asked) {
            return Action::Draft {
                drafter: *drafter,
                n: most,
            };
        }
        self.plain()
    }

    fn verify(&mut self, drafted: &[(Token, TokenClass)], policy: &mut impl Policy, context: &VerifyContext) -> Action {
        if drafted.is_empty() {
            return self.plain();
        }
        let (tokens, classes): (Vec<Token>, Vec<TokenClass>) = drafted.iter().copied().unzip();
        let n = choose(policy, &classes, self.most(context));
        // If no token is worth verifying, the drafter may be surer one token later.
        self.ask(tokens, classes, n, 1)
    }

    fn plain(&mut self) -> Action {
        self.ask(Vec::new(), Vec::new(), 0, PLAIN.min(self.limit - self.generated))
    }

    /// Asks the target to verify the first `asked` tokens of a draft; without any, to generate `n`.
    fn ask(&mut self, draft: Vec<Token>, classes: Vec<TokenClass>, asked: usize, n: usize) -> Action {
        self.draft = draft;
        self.classes = classes;
        self.asked = asked;
        Action::Verify {
            draft: self.draft[..asked].to_vec(),
            n,
        }
    }
}

/// Number of draft tokens that are worth verifying.
fn choose(policy: &impl Policy, draft: &[TokenClass], n_max: usize) -> usize {
    let context = StepContext {
        n_max,
        ..StepContext::default()
    };
    policy.choose(draft, &context).n.min(draft.len()).min(n_max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculation::AdaptivePolicy;
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
            let context = VerifyContext { n_max, drafters: (0..usize::from(can_draft)).collect() };
            let mut policy = AdaptivePolicy::default();
            let mut machine = Rounds::new(prompt.clone(), &prediction, limit);
            let mut behaviours = rounds.iter().cycle();
            let mut actions: std::collections::VecDeque<Action> = machine.handle(Event::Begin, &mut policy, &context).into();
            let (mut said, mut end, mut passes) = (Vec::new(), None, 0);
            let mut computed: Vec<Vec<Token>> = Vec::new();
            while let Some(action) = actions.pop_front() {
                let event = match action {
                    Action::Draft { n, .. } => {
                        let how = behaviours.next().unwrap();
                        let mut text = machine.context().to_vec();
                        for _ in 0..how.right {
                            text.push(choice(&text));
                        }
                        let right = text[machine.context().len()..].iter();
                        let drafted = right.chain(&how.drafted).take(n).map(|token| (*token, TokenClass::of_drafter(0)));
                        Event::Drafted(drafted.collect())
                    }
                    Action::Verify { draft, n } => {
                        passes += 1;
                        prop_assert!(passes < 200, "it goes on for ever");
                        prop_assert!(draft.len() <= n_max && draft.len() < limit - machine.generated());
                        prop_assert!(n > 0 && n <= limit - machine.generated());
                        if let Some(first) = draft.first() {
                            let read = [machine.context(), &[*first]].concat();
                            prop_assert!(!computed.iter().any(|text| text.starts_with(&read)), "it is scored again");
                        }
                        let how = behaviours.next().unwrap();
                        // What it does not look at it may have computed, unless it tells what comes instead.
                        let n_computed = if how.tells_next { how.judges.min(draft.len()) } else { draft.len() };
                        computed.push([machine.context(), &draft[..n_computed]].concat());
                        if how.refuses && !draft.is_empty() {
                            // From now on it is asked under another name.
                            computed.clear();
                            Event::Refused
                        } else {
                            Event::Verified(verdict(machine.context(), &draft, n, how))
                        }
                    }
                    Action::Emit(tokens) => {
                        said.extend(tokens);
                        continue;
                    }
                    Action::Finish(finish) => {
                        prop_assert!(end.replace(finish).is_none());
                        continue;
                    }
                };
                actions.extend(machine.handle(event, &mut policy, &context));
            }
            prop_assert_eq!(&said, &expected);
            prop_assert_eq!(end, Some(finish));
            prop_assert_eq!(machine.generated(), generated);
            prop_assert_eq!(machine.context(), [prompt, expected].concat());
        }
    }
}
