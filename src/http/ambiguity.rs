//! Finds grammars that read one text in so many ways that llama-server never ends.
//!
//! llama-server follows each way to read a token that it rejects in the end. In `([a-z] | [a-y])*` the ways double with
//! each character, so a long token takes for ever, and with it all other requests. This goes through the same steps for runs
//! of one character, and counts the ways instead of following them.

use std::collections::{BTreeSet, HashMap, HashSet};

/// How a grammar is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notation {
    /// llama.cpp's grammars.
    Gbnf,
    /// A regular expression, which llama.cpp turns into a grammar.
    Regex,
}

/// Characters of a run after which its ways are counted, first and last.
const RUN: (i32, i32) = (12, 24);
/// Ways to read the shorter run from which on it is too long to wait for.
const MOST_WAYS: f64 = (1 << 20) as f64;
/// Stacks at once, beside those of the beginning, from which on a run takes too long.
const MOST_STACKS: usize = 2000;
/// Growth of the ways from the shorter to the longer run if they double with each character, with room for rounding.
const DOUBLED: f64 = 4000.0;
/// Copies that stand for a bounded repetition; a longer one counts as unbounded.
const COPIES: usize = 8;
/// Deepest stack that is followed.
const DEEPEST: usize = 64;
/// Characters that are tried at the beginning of one rule.
const TRIED: usize = 64;

/// Steps that remain for all grammars of a request. Without any left, a grammar counts as unambiguous.
#[derive(Debug)]
pub(super) struct Budget(usize);

impl Default for Budget {
    fn default() -> Self {
        Self(100_000)
    }
}

/// The ways to read each further character of a run, if they multiply; else 1. A grammar that cannot be read has one.
pub(super) fn ways(text: &str, notation: Notation, budget: &mut Budget) -> usize {
    let mut reader = Reader {
        text: text.chars().collect(),
        notation,
        ..Reader::default()
    };
    reader.read();
    let mut machine = Machine::of(reader.rules, budget);
    (0..machine.starts.len())
        .map(|rule| machine.ways(rule))
        .find(|ways| *ways > 1)
        .unwrap_or(1)
}

/// Ranges of characters.
type Set = Vec<(u32, u32)>;

#[derive(Debug, Clone)]
enum Element {
    Set(Set),
    Rule(usize),
}

type Alternatives = Vec<Vec<Element>>;

/// Reads a grammar into rules, with a rule for each group and repetition, as llama.cpp does.
#[derive(Debug)]
struct Reader {
    text: Vec<char>,
    at: usize,
    notation: Notation,
    rules: Vec<Alternatives>,
    names: HashMap<String, usize>,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            text: Vec::new(),
            at: 0,
            notation: Notation::Gbnf,
            rules: Vec::new(),
            names: HashMap::new(),
        }
    }
}

impl Reader {
    fn read(&mut self) {
        if self.notation == Notation::Regex {
            let alternatives = self.alternatives(0);
            self.rules.push(alternatives);
            return;
        }
        while self.at < self.text.len() {
            match self.definition() {
                Some(rule) => self.rules[rule] = self.alternatives(0),
                None => self.at += 1,
            }
        }
    }

    fn add(&mut self, alternatives: Alternatives) -> Element {
        self.rules.push(alternatives);
        Element::Rule(self.rules.len() - 1)
    }

    fn next(&mut self) -> Option<char> {
        let next = self.text.get(self.at).copied();
        self.at += 1;
        next
    }

    fn eat(&mut self, expected: char) -> bool {
        let is_there = self.text.get(self.at) == Some(&expected);
        self.at += usize::from(is_there);
        is_there
    }

    fn name(&mut self) -> Option<usize> {
        let is_part = |char: &&char| char.is_ascii_alphanumeric() || matches!(char, '-' | '_');
        let name: String = self.text.get(self.at..)?.iter().take_while(is_part).collect();
        if name.is_empty() {
            return None;
        }
        self.at += name.len();
        let rules = &mut self.rules;
        Some(*self.names.entry(name).or_insert_with(|| {
            rules.push(Vec::new());
            rules.len() - 1
        }))
    }

    /// The rule that is defined here, if one is; then goes on behind `::=`.
    fn definition(&mut self) -> Option<usize> {
        let before = self.at;
        let rule = self.name();
        while matches!(self.text.get(self.at), Some(' ' | '\t')) {
            self.at += 1;
        }
        let defines = rule.is_some() && self.eat(':') && self.eat(':') && self.eat('=');
        if !defines {
            self.at = before;
        }
        rule.filter(|_| defines)
    }

    /// Up to the end of the group, or of the rule outside of groups.
    fn alternatives(&mut self, depth: usize) -> Alternatives {
        let mut done = Vec::new();
        let mut sequence: Vec<Element> = Vec::new();
        // Where the symbol begins that a repetition repeats.
        let mut symbol = 0;
        let gbnf = self.notation == Notation::Gbnf;
        while let Some(&char) = self.text.get(self.at) {
            let begins = sequence.len();
            if gbnf && (char.is_ascii_alphanumeric() || matches!(char, '-' | '_')) {
                let before = self.at;
                if depth == 0 && self.definition().is_some() {
                    self.at = before;
                    break;
                }
                if let Some(rule) = self.name() {
                    sequence.push(Element::Rule(rule));
                }
                symbol = begins;
                continue;
            }
            self.at += 1;
            match char {
                ')' if depth > 0 => break,
                '|' => {
                    done.push(std::mem::take(&mut sequence));
                    symbol = 0;
                    continue;
                }
                '(' => {
                    if !gbnf && self.eat('?') {
                        self.at += 1;
                    }
                    let group = self.alternatives(depth + 1);
                    let group = self.add(group);
                    sequence.push(group);
                }
                '*' => self.repeat(&mut sequence, symbol, 0, None),
                '+' => self.repeat(&mut sequence, symbol, 1, None),
                '?' => self.repeat(&mut sequence, symbol, 0, Some(1)),
                '{' => {
                    let (least, most) = self.times();
                    self.repeat(&mut sequence, symbol, least, most);
                }
                '[' => sequence.push(Element::Set(self.class())),
                '.' => sequence.push(Element::Set(vec![(0, u32::MAX)])),
                '"' if gbnf => self.literal(&mut sequence),
                '<' if gbnf => {
                    while self.next().is_some_and(|char| char != '>') {}
                    sequence.push(Element::Set(Vec::new()));
                }
                '#' if gbnf => while self.next().is_some_and(|char| char != '\n') {},
                '\\' if !gbnf => sequence.push(Element::Set(self.escaped())),
                '^' | '$' | ')' => {}
                _ if gbnf => {}
                char => sequence.push(Element::Set(vec![(char.into(), char.into())])),
            }
            if !(matches!(char, '*' | '+' | '?' | '{') || gbnf && char.is_whitespace()) {
                symbol = begins;
            }
        }
        done.push(sequence);
        done
    }

    /// Repeats the elements from `symbol` on.
    fn repeat(&mut self, sequence: &mut Vec<Element>, symbol: usize, least: usize, most: Option<usize>) {
        let repeated = sequence.split_off(symbol.min(sequence.len()));
        let element = match <[Element; 1]>::try_from(repeated) {
            Ok([element]) => element,
            Err(elements) if elements.is_empty() => return,
            Err(elements) => self.add(vec![elements]),
        };
        sequence.extend(std::iter::repeat_n(element.clone(), least.min(COPIES)));
        match most.map(|most| most.saturating_sub(least)) {
            Some(0) if least <= COPIES => {}
            Some(more) if more <= COPIES && least <= COPIES => {
                let mut rest: Option<Element> = None;
                for _ in 0..more {
                    let one = std::iter::once(element.clone()).chain(rest).collect();
                    rest = Some(self.add(vec![one, Vec::new()]));
                }
                sequence.extend(rest);
            }
            _ => {
                let rule = self.rules.len();
                let again = self.add(vec![vec![element, Element::Rule(rule)], Vec::new()]);
                sequence.push(again);
            }
        }
    }

    /// The bounds of `{…}`.
    fn times(&mut self) -> (usize, Option<usize>) {
        let mut text = String::new();
        while let Some(char) = self.next().filter(|char| *char != '}') {
            text.push(char);
        }
        let mut bounds = text.split(',').map(|bound| bound.trim().parse::<usize>().ok());
        let least = bounds.next().flatten().unwrap_or(0);
        (least, bounds.next().unwrap_or(Some(least)))
    }

    fn literal(&mut self, sequence: &mut Vec<Element>) {
        while let Some(char) = self.next().filter(|char| *char != '"') {
            let set = if char == '\\' {
                self.escaped()
            } else {
                vec![(char.into(), char.into())]
            };
            sequence.push(Element::Set(set));
        }
    }

    /// What stands for itself, or for a set, after a `\`.
    fn escaped(&mut self) -> Set {
        let Some(char) = self.next() else { return Vec::new() };
        let digits = match (char, self.notation) {
            ('x', _) => 2,
            ('u', _) => 4,
            ('U', _) => 8,
            _ => 0,
        };
        if digits > 0 {
            let number: String = self.text.iter().skip(self.at).take(digits).collect();
            self.at += digits;
            let number = u32::from_str_radix(&number, 16).unwrap_or_default();
            return vec![(number, number)];
        }
        let regex = self.notation == Notation::Regex;
        let one = |char: char| vec![(u32::from(char), u32::from(char))];
        match char {
            'n' => one('\n'),
            'r' => one('\r'),
            't' => one('\t'),
            'd' if regex => vec![(0x30, 0x39)],
            'w' if regex => vec![(0x30, 0x39), (0x41, 0x5a), (0x5f, 0x5f), (0x61, 0x7a)],
            's' if regex => vec![(0x09, 0x0d), (0x20, 0x20)],
            'D' | 'W' | 'S' if regex => vec![(0, u32::MAX)],
            char => one(char),
        }
    }

    /// The set of `[…]`.
    fn class(&mut self) -> Set {
        let negated = self.eat('^');
        let mut set = Set::new();
        while let Some(char) = self.next().filter(|char| *char != ']') {
            let mut one = |char| {
                if char == '\\' {
                    self.escaped()
                } else {
                    vec![(u32::from(char), u32::from(char))]
                }
            };
            let mut first = one(char);
            let is_range = self.text.get(self.at) == Some(&'-') && self.text.get(self.at + 1) != Some(&']');
            if let (true, [(low, high)]) = (is_range, first.as_mut_slice())
                && low == high
            {
                self.at += 1;
                let last = match self.next() {
                    Some('\\') => self.escaped().last().map(|range| range.1),
                    last => last.map(u32::from),
                };
                *high = last.unwrap_or(*low);
            }
            set.extend(first);
        }
        if negated { complement(set) } else { set }
    }
}

fn complement(mut set: Set) -> Set {
    set.sort_unstable();
    let mut others = Set::new();
    let mut next = 0;
    for (low, high) in set {
        if low > next {
            others.push((next, low - 1));
        }
        next = next.max(high.saturating_add(1));
    }
    others.push((next, u32::MAX));
    others
}

/// Positions of elements that are still to be read, the next one last.
type Stack = Vec<usize>;

/// The rules one behind the other. `None` ends an alternative.
#[derive(Debug)]
struct Machine<'a> {
    elements: Vec<Option<Element>>,
    /// Of the alternatives of each rule.
    starts: Vec<Vec<usize>>,
    budget: &'a mut Budget,
}

impl<'a> Machine<'a> {
    fn of(rules: Vec<Alternatives>, budget: &'a mut Budget) -> Self {
        let mut elements = Vec::new();
        let mut starts = Vec::with_capacity(rules.len());
        for alternatives in rules {
            let mut begun = Vec::with_capacity(alternatives.len());
            for alternative in alternatives {
                begun.push(elements.len());
                elements.extend(alternative.into_iter().map(Some));
                elements.push(None);
            }
            starts.push(begun);
        }
        Self {
            elements,
            starts,
            budget,
        }
    }

    fn push(&self, stack: &mut Stack, position: usize) {
        if self.elements[position].is_some() {
            stack.push(position);
        }
    }

    /// The stacks with a set on top that follow from these.
    fn advanced(&mut self, mut todo: Vec<Stack>) -> Vec<Stack> {
        let mut seen = HashSet::new();
        let mut advanced = Vec::new();
        while let Some(stack) = todo.pop() {
            self.budget.0 = self.budget.0.saturating_sub(1);
            if self.budget.0 == 0 {
                return Vec::new();
            }
            let Some(&top) = stack.last().filter(|_| stack.len() <= DEEPEST) else {
                continue;
            };
            if !seen.insert(stack.clone()) {
                continue;
            }
            match self.elements[top] {
                Some(Element::Rule(rule)) => {
                    for start in &self.starts[rule] {
                        let mut next = stack[..stack.len() - 1].to_vec();
                        self.push(&mut next, top + 1);
                        self.push(&mut next, *start);
                        todo.push(next);
                    }
                }
                Some(Element::Set(_)) => advanced.push(stack),
                None => {}
            }
        }
        advanced
    }

    fn set_of(&self, stack: &Stack) -> &[(u32, u32)] {
        match stack.last().map(|top| &self.elements[*top]) {
            Some(Some(Element::Set(set))) => set,
            _ => &[],
        }
    }

    /// The ways to read each further character of a run with which the rule begins, if they multiply; else 1.
    fn ways(&mut self, rule: usize) -> usize {
        let first = |start: &usize| {
            let mut stack = Stack::new();
            self.push(&mut stack, *start);
            stack
        };
        let firsts = self.starts[rule].iter().map(first).collect();
        let begun = self.advanced(firsts);
        // If sets overlap, the first character of one of them is in all.
        let sets = begun.iter().flat_map(|stack| self.set_of(stack));
        let characters: BTreeSet<u32> = sets.map(|range| range.0).collect();
        let ways = |character| self.ways_of_run(&begun, character);
        let most = characters.into_iter().take(TRIED).map(ways).fold(1.0, f64::max);
        // The cast saturates.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let ways = most.round() as usize;
        ways
    }

    fn ways_of_run(&mut self, begun: &[Stack], character: u32) -> f64 {
        let mut stacks: HashMap<Stack, f64> = begun.iter().map(|stack| (stack.clone(), 1.0)).collect();
        let mut shorter = 0.0;
        for length in 1..=RUN.1 {
            let mut next: HashMap<Stack, f64> = HashMap::new();
            for (mut stack, ways) in stacks {
                if !self
                    .set_of(&stack)
                    .iter()
                    .any(|(low, high)| (*low..=*high).contains(&character))
                {
                    continue;
                }
                if let Some(top) = stack.pop() {
                    self.push(&mut stack, top + 1);
                }
                for stack in self.advanced(vec![stack]) {
                    *next.entry(stack).or_default() += ways;
                }
            }
            if next.is_empty() {
                return 1.0;
            }
            stacks = next;
            let ways: f64 = stacks.values().sum();
            if stacks.len() > begun.len() + MOST_STACKS {
                return ways.powf(1.0 / f64::from(length)).max(2.0);
            }
            if length == RUN.0 {
                shorter = ways;
                if ways > MOST_WAYS {
                    return ways.powf(1.0 / f64::from(length));
                }
            }
            if length == RUN.1 && ways >= shorter * DOUBLED {
                return (ways / shorter).powf(1.0 / f64::from(RUN.1 - RUN.0));
            }
        }
        1.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gbnf(text: &str) -> usize {
        ways(text, Notation::Gbnf, &mut Budget::default())
    }

    fn regex(text: &str) -> usize {
        ways(text, Notation::Regex, &mut Budget::default())
    }

    #[test]
    fn repetitions_that_read_a_run_in_many_ways_are_found() {
        for (text, ways) in [
            ("root ::= ([a-y] | [b-z])*", 2),
            ("root ::= ([a-y] | [b-z] | \"c\" | .)+", 4),
            ("root ::= \"x\" ([a-z]+)* \"y\"", 2),
            ("root ::= (([a-z]+)+)+", 3),
            ("root ::= ([a-z]+ \" \"?){1,}", 2),
            ("root ::= word*\nword ::= letters | \"a\"\nletters ::= [a-z]+", 3),
            ("root ::= [a-z] root | [a-y] root | \"\"", 2),
            ("root ::= \"(\" root \")\" | \"(\" root \"]\" | \"x\"", 2),
        ] {
            assert_eq!(gbnf(text), ways, "{text}");
        }
        for (text, ways) in [("^(\\w+\\s?)+$", 2), ("^(?:[a-z]|\\w)*$", 2), ("^((a+)+)+$", 2)] {
            assert_eq!(regex(text), ways, "{text}");
        }
    }

    #[test]
    fn grammars_in_the_style_of_those_that_people_use_have_one_way() {
        for text in [
            "root ::= statement*\nstatement ::= (type name \"=\" sum \";\") | (name \"=\" sum \";\") | (name \"(\" sum? \")\" \";\")\
             | note | (\"if\" \"(\" sum \")\" \"{\" statement* \"}\" (\"else\" \"{\" statement* \"}\")?)\n\
             type ::= \"int\" ws | \"float\" ws\nname ::= [a-zA-Z_] [a-zA-Z_0-9]*\nsum ::= term ((\"+\" | \"-\") term)*\n\
             term ::= name | [0-9]+ | \"-\" term | name \"(\" sum? \")\" | \"(\" ws sum ws \")\"\n\
             note ::= \"//\" [^\\n]* \"\\n\" | \"/*\" ([^*] | (\"*\" [^/]))* \"*/\"\nws ::= ([ \\t\\n]+)",
            "root ::= letter+ ([ \\t\\n] letter+)*\nletter ::= [a-zA-Z] | [0-9] | [!\"#$%&'()*+,./:;<=>?@[\\\\\\]^_`{|}~-]",
            "root ::= kana+ ([ \\t\\n] kana+)*\nkana ::= [ぁ-ゟ] | [ァ-ヿ] | [、-〾] | [一-鿿]",
            "root ::= item+\nitem ::= \"- \" [^\\r\\n\\x0b\\u2028]+ \"\\n\"",
            "root ::= (\"1. \" move \" \" move \"\\n\")+\nmove ::= ([NBKQR] [a-h]? [1-8]? \"x\"? [a-h] [1-8] | \"O-O\" \"-O\"?) [+#]?",
            "root ::= \"[\" ws (value (\",\" ws value)*)? \"]\"\nvalue ::= root | \"\\\"\" ([^\"] | \"\\\\\" [^x])* \"\\\"\" ws | number\n\
             number ::= (\"-\"? ([0-9] | [1-9] [0-9]{0,15})) (\".\" [0-9]+)? ws\nws ::= | \" \" | \"\\n\" [ \\t]{0,20}",
            "root ::= ([0-9]{1,3} \".\"?){4} ([0-9]{8})* [a-z]* [a-z]* [a-z]*",
        ] {
            assert_eq!(gbnf(text), 1, "{text}");
        }
        for text in [
            "^[0-9]{4}-[0-9]{2}(-[0-9]{2})?$",
            "^[\\w.+-]+@[\\w-]+(\\.[\\w-]+)+$",
            "^#(?:[0-9a-f]{3}){1,2}$",
        ] {
            assert_eq!(regex(text), 1, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_within_the_budget(text in "(root ::= |[a\\-y]|[a|?*+(){0,9}\"\\\\\\[\\]<>#:\n ^$.-]){0,60}") {
            let _ = gbnf(&text);
            let _ = regex(&text);
        }
    }
}
