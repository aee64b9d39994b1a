//! Converts YAML text into a tree of values with the line of every key.
//!
//! Reads the parser's events itself, because the tree of a YAML library does not keep lines, accepts duplicate keys, and leaves no place to
//! replace `${VAR}` while the line is known.

use std::collections::BTreeMap;

use figment::value::{Dict, Empty, Tag, Value};
use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, StrInput};

use super::expand::expand;
use super::origin::{Finding, KeyPath};

/// Limit of the nesting, deeper than any key needs.
const MAX_DEPTH: usize = 32;

/// Content of a text.
#[derive(Debug)]
pub(super) struct Tree {
    pub value: Value,
    pub lines: BTreeMap<KeyPath, usize>,
    pub findings: Vec<Finding>,
}

/// The error for a text that is not YAML.
#[derive(Debug)]
pub(super) struct SyntaxError {
    pub line: usize,
    pub message: String,
}

impl SyntaxError {
    fn new(line: usize, message: &str) -> Self {
        Self {
            line,
            message: message.to_owned(),
        }
    }
}

impl From<ScanError> for SyntaxError {
    fn from(error: ScanError) -> Self {
        Self::new(error.marker().line(), &format!("not valid YAML: {}", error.info()))
    }
}

/// Reads one document. `lookup` returns the value of an environment variable. An empty text is an empty value.
pub(super) fn read(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Tree, SyntaxError> {
    document(text, lookup).map_err(|error| tab_in_indentation(text, error.line).unwrap_or(error))
}

/// The likely cause of a syntax error in `line`: a tab in the indentation of that line or of the line before. The parser reports some tabs
/// one line late, and never names them.
fn tab_in_indentation(text: &str, line: usize) -> Option<SyntaxError> {
    let indented_with_tab = |line: &&str| {
        let content = line.trim_start();
        !content.is_empty() && line[..line.len() - content.len()].contains('\t')
    };
    let lines = text.lines().enumerate().skip(line.saturating_sub(2)).take(2);
    let (index, _) = lines.into_iter().find(|(_, text)| indented_with_tab(text))?;
    Some(SyntaxError::new(
        index + 1,
        "a tab in the indentation; YAML wants spaces there",
    ))
}

fn document(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Tree, SyntaxError> {
    let mut reader = Reader {
        parser: Parser::new_from_str(text),
        lookup,
        anchors: BTreeMap::new(),
        inside_anchors: 0,
        tree: Tree {
            value: Value::from(Empty::Unit),
            lines: BTreeMap::new(),
            findings: Vec::new(),
        },
    };
    let mut documents = 0;
    loop {
        let (event, line) = reader.next()?;
        match event {
            Event::StreamEnd => return Ok(reader.tree),
            Event::DocumentStart(_) if documents == 1 => {
                return Err(SyntaxError::new(
                    line,
                    "a second YAML document; the cluster file is one",
                ));
            }
            Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
            event => {
                documents = 1;
                reader.tree.value = reader.node(event, line, &mut Vec::new())?;
            }
        }
    }
}

struct Reader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    lookup: &'a dyn Fn(&str) -> Option<String>,
    anchors: BTreeMap<usize, Value>,
    /// Depth of nested values with an anchor.
    inside_anchors: usize,
    tree: Tree,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<(Event<'a>, usize), SyntaxError> {
        match self.parser.next_event() {
            Some(event) => event
                .map(|(event, span)| (event, span.start.line()))
                .map_err(SyntaxError::from),
            None => Ok((Event::StreamEnd, 0)),
        }
    }

    fn node(&mut self, event: Event<'a>, line: usize, path: &mut KeyPath) -> Result<Value, SyntaxError> {
        if path.len() > MAX_DEPTH {
            return Err(SyntaxError::new(line, "nested too deeply"));
        }
        self.tree.lines.entry(path.clone()).or_insert(line);
        let anchor = match &event {
            Event::Scalar(_, _, anchor, _) | Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                *anchor
            }
            _ => 0,
        };
        self.inside_anchors += usize::from(anchor > 0);
        let value = match event {
            Event::Scalar(text, style, _, tag) => {
                let plain = style == ScalarStyle::Plain && tag.is_none();
                self.scalar(&text, plain, path)
            }
            Event::SequenceStart(..) => self.sequence(path)?,
            Event::MappingStart(..) => self.mapping(path)?,
            // Nested aliases would make a few lines grow without limit.
            Event::Alias(_) if self.inside_anchors > 0 => {
                return Err(SyntaxError::new(
                    line,
                    "an alias inside of a value with an anchor; write it out",
                ));
            }
            Event::Alias(anchor) => self
                .anchors
                .get(&anchor)
                .cloned()
                .ok_or_else(|| SyntaxError::new(line, "not valid YAML: an alias without its anchor"))?,
            _ => return Err(SyntaxError::new(line, "not valid YAML: a value is missing")),
        };
        if anchor > 0 {
            self.inside_anchors -= 1;
            self.anchors.insert(anchor, value.clone());
        }
        Ok(value)
    }

    fn sequence(&mut self, path: &mut KeyPath) -> Result<Value, SyntaxError> {
        let mut items = Vec::new();
        loop {
            let (event, line) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(Value::from(items));
            }
            path.push(items.len().to_string());
            items.push(self.node(event, line, path)?);
            path.pop();
        }
    }

    fn mapping(&mut self, path: &mut KeyPath) -> Result<Value, SyntaxError> {
        let mut entries = Dict::new();
        loop {
            let (event, line) = self.next()?;
            let key = match event {
                Event::MappingEnd => return Ok(Value::from(entries)),
                Event::Scalar(key, ..) => key.into_owned(),
                _ => return Err(SyntaxError::new(line, "a key must be a word")),
            };
            path.push(key.clone());
            let first = self.tree.lines.get(path).copied();
            if let Some(first) = first {
                let message = format!("given twice (before in line {first})");
                self.tree.findings.push(Finding::new(path.clone(), message));
                self.tree.lines.retain(|key, _| !key.starts_with(path));
            }
            self.tree.lines.insert(path.clone(), line);
            let (event, line) = self.next()?;
            let value = self.node(event, line, path)?;
            entries.insert(key, value);
            path.pop();
        }
    }

    fn scalar(&mut self, text: &str, plain: bool, path: &KeyPath) -> Value {
        match expand(text, self.lookup) {
            Ok(expanded) if plain && expanded == text => plain_scalar(text),
            Ok(expanded) => Value::from(expanded),
            Err(message) => {
                self.tree.findings.push(Finding::new(path.clone(), message));
                Value::from(text)
            }
        }
    }
}

/// An unquoted word by the rules of YAML 1.2's core schema.
fn plain_scalar(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Empty(Tag::Default, Empty::None),
        "true" | "True" | "TRUE" => return Value::from(true),
        "false" | "False" | "FALSE" => return Value::from(false),
        _ => {}
    }
    let number = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    let based = |prefix, radix| {
        text.strip_prefix(prefix)
            .and_then(|digits| u64::from_str_radix(digits, radix).ok())
    };
    if let Some(n) = based("0x", 16).or_else(|| based("0o", 8)) {
        Value::from(n)
    } else if let Some(n) = text.parse::<u64>().ok().filter(|_| number) {
        Value::from(n)
    } else if let Some(n) = text.parse::<i64>().ok().filter(|_| number) {
        Value::from(n)
    } else if let Some(n) = text.parse::<f64>().ok().filter(|n| number && n.is_finite()) {
        Value::from(n)
    } else {
        Value::from(text)
    }
}
