//! What to ask the target next, and what its answers mean.
//!
//! One round is a draft (found in the text itself by [`Lookup`], else made by the drafter) and the target's verdict on it.
//! Where nothing is drafted, the target generates some tokens by itself: that costs it no more than if it did so in an
//! ordinary answer. Whatever is drafted, only what the target chose is said.

use crate::engine::{Verdict, VerifyContext};
use crate::speculation::{ConcurrentLoad, Lookup, Policy, StepContext, Token, TokenClass};

/// Tokens that the target generates in a round without a draft.
const PLAIN: usize = 8;

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt is known.
    Begin,
    /// The drafter's answer to [`Action::Draft`], perhaps nothing.
    Drafted(Vec<(Token, TokenClass)>),
    /// The target's answer to [`Action::Verify`].
    Verified(Verdict),
    /// The target will not take this draft.
    Refused,
}

/// What to do.
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

/// The state machine of one answer.
#[derive(Debug)]
pub struct Rounds {
    /// The prompt and the answer so far.
    context: Vec<Token>,
    n_prompt: usize,
    /// Most tokens of the answer.
    limit: usize,
    /// What the target is verifying: the first of `draft`.
    asked: usize,
    /// What the target may have computed behind the text without a verdict. A server that finds it in its cache does not
    /// score it again, so the text goes on without drafts until it is past that or something else.
    computed: Vec<Token>,
    /// What may follow the text, and what is known of each token of it.
    draft: Vec<Token>,
    classes: Vec<TokenClass>,
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
            asked: 0,
            computed: Vec::new(),
            draft: Vec::new(),
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
    pub fn classes(&self, n: usize) -> &[TokenClass] {
        &self.classes[..n.min(self.classes.len())]
    }

    /// Takes in what happened and tells what to do, in this order.
    pub fn handle(&mut self, event: Event, policy: &mut impl Policy, context: &VerifyContext) -> Vec<Action> {
        if self.finished {
            return Vec::new();
        }
        match event {
            Event::Begin => vec![self.next(policy, context)],
            Event::Drafted(tokens) => vec![self.verify(&tokens, policy, context)],
            // Perhaps it is the draft's fault.
            Event::Refused => vec![self.ask(Vec::new(), Vec::new(), 0, 1)],
            Event::Verified(verdict) => self.verified(verdict, policy, context),
        }
    }

    fn verified(&mut self, verdict: Verdict, policy: &mut impl Policy, context: &VerifyContext) -> Vec<Action> {
        // What ends the text is a token of its own.
        let ended = verdict.ended && !verdict.next.is_empty();
        if verdict.next.is_empty() {
            self.computed.extend_from_slice(&self.draft[..self.asked]);
        }
        let mut tokens = self.draft[..verdict.accepted.min(self.asked)].to_vec();
        tokens.extend(verdict.next);
        // The part of the draft that was not worth verifying is compared as well: it tells what the next may be worth.
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
        // Where none is worth it, the drafter may be surer one token further on.
        self.ask(tokens, classes, n, 1)
    }

    fn plain(&mut self) -> Action {
        self.ask(Vec::new(), Vec::new(), 0, PLAIN.min(self.limit - self.generated))
    }

    /// Asks the target about the first `asked` tokens of a draft or, if there are none, to generate `n`.
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

/// How many tokens of a draft are worth verifying.
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
                        let drafted = right.chain(&how.drafted).take(n).map(|token| (*token, TokenClass::untold(0)));
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
                    Action::Say(tokens) => {
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
