//! Bounds of the request members that can make llama-server compute for minutes or overflow its stack: grammars, JSON
//! schemas, and lists that it goes through for every token.
//!
//! llama.cpp keeps a list of all places of a grammar where an answer may stand. Optional parts and alternatives multiply
//! that list, groups are parsed by recursion, and each repetition becomes as many rules. The figures were chosen by
//! measurement with llama-server b11434: what is let through takes it less than two seconds.

use std::fmt;

use serde::de::IgnoredAny;
use serde_json::Value;

use super::ambiguity::{self, Notation};

/// Longest grammar in bytes.
const GRAMMAR_BYTES: usize = 64 * 1024;
/// Longest member with schemas in bytes; fifty tools take about 100 KB.
const SCHEMA_BYTES: usize = 512 * 1024;
/// Groups inside of each other.
const GROUPS: usize = 64;
/// Alternatives of a grammar, or of the patterns of a schema, in all.
const ALTERNATIVES: usize = 1024;
/// Optional parts in one rule.
const OPTIONAL_IN_RULE: usize = 16;
/// Optional parts in all.
const OPTIONAL: usize = 256;
/// Sum of all bounds of repetitions.
const REPETITIONS: usize = 16 * 1024;
/// The most that one repetition counts for: llama.cpp takes larger bounds for none.
const REPETITION: usize = 2000;
/// Values in a schema, of any kind.
const VALUES: usize = 32 * 1024;
/// Properties of one object.
const PROPERTIES: usize = 256;
/// Values of an `enum`, schemas of an `anyOf`, tools.
const CHOICES: usize = 512;
/// Bytes of a property's name: llama.cpp makes a group of each of its characters, and matches names by recursion.
const NAME_BYTES: usize = 256;
/// Hops from one `$ref` to the next.
const REFERENCES: usize = 32;

/// A count of a request that exceeds its bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Excess {
    /// Name of the counted things, in the plural.
    what: &'static str,
    given: usize,
    most: usize,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, given, most } = self;
        write!(f, "has {given} {what}, and {most} is the most")
    }
}

/// `given`, if that is not too much.
fn at_most(what: &'static str, given: usize, most: usize) -> Result<(), Excess> {
    if given > most {
        return Err(Excess { what, given, most });
    }
    Ok(())
}

/// A member of a request whose value is bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bounded {
    /// A GBNF grammar.
    Grammar,
    /// JSON schemas, at any depth.
    Schemas,
    /// A list of at most so many entries.
    List(usize),
    /// A number of tokens to look back.
    Window(usize),
}

/// The bounded members: those that llama-server reads, on whichever path.
pub(crate) const MEMBERS: [(&str, Bounded); 14] = [
    ("grammar", Bounded::Grammar),
    ("json_schema", Bounded::Schemas),
    ("response_format", Bounded::Schemas),
    ("tools", Bounded::Schemas),
    ("functions", Bounded::Schemas),
    ("text", Bounded::Schemas),
    ("output_config", Bounded::Schemas),
    // Regular expressions, which the server makes itself where it needs any.
    ("grammar_triggers", Bounded::List(0)),
    ("dry_sequence_breakers", Bounded::List(32)),
    ("preserved_tokens", Bounded::List(1024)),
    ("samplers", Bounded::List(64)),
    ("stop", Bounded::List(1024)),
    ("repeat_last_n", Bounded::Window(1 << 20)),
    ("dry_penalty_last_n", Bounded::Window(1 << 20)),
];

impl Bounded {
    /// Checks the JSON text of a member's value. Values of a kind that llama-server does not read are let through.
    pub(crate) fn check(self, value: &str) -> Result<(), Excess> {
        match self {
            Self::Grammar => match serde_json::from_str::<String>(value) {
                Ok(grammar) => check_grammar(&grammar),
                Err(_) => Ok(()),
            },
            Self::Schemas if value.starts_with(['{', '[']) => check_schemas(value),
            Self::Schemas => Ok(()),
            Self::List(most) => match serde_json::from_str::<Vec<IgnoredAny>>(value) {
                Ok(entries) => at_most("entries", entries.len(), most),
                Err(_) => Ok(()),
            },
            // The cast saturates; -1 stands for the whole context.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            Self::Window(most) => at_most("tokens", value.parse::<f64>().map_or(0, |tokens| tokens as usize), most),
        }
    }
}

fn check_grammar(grammar: &str) -> Result<(), Excess> {
    at_most("bytes", grammar.len(), GRAMMAR_BYTES)?;
    let mut shape = Shape::default();
    shape.add(grammar, Notation::Gbnf)
}

fn check_schemas(text: &str) -> Result<(), Excess> {
    at_most("bytes", text.len(), SCHEMA_BYTES)?;
    let Ok(root) = serde_json::from_str::<Value>(text) else {
        // Its parser allows one level less than the scan of the whole request.
        return at_most("nested levels", super::nesting::DEEPEST, super::nesting::DEEPEST - 1);
    };
    let mut schemas = Schemas::default();
    schemas.visit(&root)
}

/// Counts of a member with JSON schemas.
#[derive(Debug, Default)]
struct Schemas<'a> {
    values: usize,
    /// Of its patterns.
    shape: Shape,
    /// The values around the one that is visited, any of which may be the root that a `$ref` counts from.
    around: Vec<&'a Value>,
}

impl<'a> Schemas<'a> {
    /// Recursion ends with the nesting that a request may have.
    fn visit(&mut self, value: &'a Value) -> Result<(), Excess> {
        self.values += 1;
        at_most("values", self.values, VALUES)?;
        self.around.push(value);
        match value {
            Value::Array(items) => {
                at_most("entries in one list", items.len(), CHOICES)?;
                items.iter().try_for_each(|item| self.visit(item))?;
            }
            Value::Object(members) => {
                for (name, member) in members {
                    at_most("bytes in one name", name.len(), NAME_BYTES)?;
                    match (name.as_str(), member) {
                        ("properties", Value::Object(properties)) => {
                            at_most("properties in one object", properties.len(), PROPERTIES)?;
                        }
                        ("pattern", Value::String(pattern)) => self.shape.add(pattern, Notation::Regex)?,
                        ("minLength" | "maxLength" | "minItems" | "maxItems", Value::Number(times)) => {
                            self.shape.repeats(times.as_u64())?;
                        }
                        ("$ref", Value::String(path)) => self.around.iter().try_for_each(|root| follow(root, path))?,
                        _ => {}
                    }
                    self.visit(member)?;
                }
            }
            _ => {}
        }
        self.around.pop();
        Ok(())
    }
}

/// Follows a `$ref` as long as it leads to another one: llama.cpp follows a circle until its stack overflows.
fn follow(root: &Value, path: &str) -> Result<(), Excess> {
    let mut path = path;
    for _ in 0..REFERENCES {
        let next = referred(root, path).and_then(|target| target.get("$ref")?.as_str());
        let Some(next) = next else {
            return Ok(());
        };
        path = next;
    }
    at_most("references in a row", REFERENCES + 1, REFERENCES)
}

/// What a path such as `#/$defs/name` leads to, read as llama.cpp does: without the escapes of JSON pointers.
fn referred<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    let mut steps = path.strip_prefix('#')?.split('/').skip(1);
    steps.try_fold(root, |value, step| match value {
        Value::Array(items) => items.get(step.parse::<usize>().ok()?),
        value => value.get(step),
    })
}

/// Counts of a grammar so far.
#[derive(Debug, Default)]
struct Shape {
    alternatives: usize,
    optional: usize,
    repetitions: usize,
    ambiguity: ambiguity::Budget,
}

impl Shape {
    /// Counts what `text` has.
    fn add(&mut self, text: &str, notation: Notation) -> Result<(), Excess> {
        let mut rest = text.as_bytes();
        let (mut groups, mut optional) = (0_usize, 0_usize);
        while let Some((byte, after)) = rest.split_first() {
            rest = after;
            match (byte, notation) {
                (b'"', Notation::Gbnf) => rest = after_quoted(rest, b'"'),
                (b'<', Notation::Gbnf) => rest = after_byte(rest, b'>'),
                (b'#', Notation::Gbnf) => rest = after_byte(rest, b'\n'),
                (b'[', _) => rest = after_quoted(rest, b']'),
                (b'\\', Notation::Regex) => rest = rest.get(1..).unwrap_or_default(),
                // A new rule.
                (b':', Notation::Gbnf) => optional = 0,
                (b'(', _) => {
                    groups += 1;
                    at_most("groups inside of each other", groups, GROUPS)?;
                }
                (b')', _) => groups = groups.saturating_sub(1),
                (b'|', _) => {
                    self.alternatives += 1;
                    at_most("alternatives", self.alternatives, ALTERNATIVES)?;
                }
                (b'?' | b'*', _) => {
                    optional += 1;
                    self.optional += 1;
                }
                (b'{', _) => {
                    let end = rest.iter().position(|byte| *byte == b'}').unwrap_or(rest.len());
                    let (bounds, after) = rest.split_at(end);
                    rest = after;
                    let bounds = String::from_utf8_lossy(bounds);
                    let mut bounds = bounds.split(',').map(|bound| bound.trim().parse::<u64>());
                    let least = bounds.next().and_then(Result::ok);
                    let most = bounds.next();
                    if least.is_none_or(|least| least == 0) {
                        optional += 1;
                        self.optional += 1;
                    }
                    self.repeats(most.map_or(least, Result::ok).max(least))?;
                }
                _ => {}
            }
            at_most("optional parts in one rule", optional, OPTIONAL_IN_RULE)?;
            at_most("optional parts", self.optional, OPTIONAL)?;
        }
        let ways = ambiguity::ways(text, notation, &mut self.ambiguity);
        at_most("ways to read each character of a repetition", ways, 1)
    }

    /// Counts a repetition; one without a number is a large one.
    fn repeats(&mut self, times: Option<u64>) -> Result<(), Excess> {
        let times = times.and_then(|times| usize::try_from(times).ok());
        self.repetitions += times.unwrap_or(REPETITION).min(REPETITION);
        at_most("repetitions", self.repetitions, REPETITIONS)
    }
}

/// The text after the closing `quote`. A byte after `\` is not the closing quote.
fn after_quoted(text: &[u8], quote: u8) -> &[u8] {
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte == quote {
            break;
        }
        if *byte == b'\\' {
            rest = rest.get(1..).unwrap_or_default();
        }
    }
    rest
}

/// The text after the next `byte`.
fn after_byte(text: &[u8], byte: u8) -> &[u8] {
    let end = text.iter().position(|it| *it == byte);
    end.map_or(&[], |end| &text[end + 1..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn member(name: &str) -> Bounded {
        MEMBERS.into_iter().find(|(it, _)| *it == name).unwrap().1
    }

    fn refused(name: &str, value: &Value) -> Option<&'static str> {
        member(name).check(&value.to_string()).err().map(|excess| excess.what)
    }

    fn grammar(text: &str) -> Option<&'static str> {
        refused("grammar", &json!(text))
    }

    fn schema(value: &Value) -> Option<&'static str> {
        let wrapped = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": value } });
        let tools = json!([{ "type": "function", "function": { "name": "x", "parameters": value } }]);
        let refusals = [
            refused("json_schema", value),
            refused("response_format", &wrapped),
            refused("tools", &tools),
        ];
        assert_eq!(refusals[0], refusals[1], "{value}");
        assert_eq!(refusals[0], refusals[2], "{value}");
        refusals[0]
    }

    #[test]
    fn grammars_that_stop_the_target_are_refused() {
        for (text, what) in [
            (
                format!("root ::= {}", "\"a\"? ".repeat(300)),
                "optional parts in one rule",
            ),
            (
                format!("root ::= {}", "\"a\"{0,1} ".repeat(300)),
                "optional parts in one rule",
            ),
            (
                format!("root ::= {}", "\"a\"{ 0 , 1 } ".repeat(300)),
                "optional parts in one rule",
            ),
            (format!("root ::= {}", "| \"a\" ".repeat(2000)), "alternatives"),
            (format!("root ::= {}", "|".repeat(200_000)), "bytes"),
            (format!("root ::= {}", "(".repeat(1000)), "groups inside of each other"),
            (format!("root ::= {}", "\"a\"{1,2000} ".repeat(9)), "repetitions"),
            (
                format!("rule ::= {}\n", "[a-z]? ".repeat(15)).repeat(20),
                "optional parts",
            ),
            (
                format!("root ::= ({})*", ["[a-y]"; 8].join(" | ")),
                "ways to read each character of a repetition",
            ),
        ] {
            assert_eq!(grammar(&text), Some(what), "{text:.40}");
        }
    }

    #[test]
    fn what_stands_in_quotes_classes_tokens_and_comments_is_no_part_of_a_grammar() {
        let busy = "|?*(){0,9}".repeat(300);
        for text in [
            format!("root ::= \"{busy}\\\"{busy}\""),
            format!("root ::= [{busy}\\]{busy}]"),
            format!("root ::= <{busy}> # {busy}\n  \"a\""),
        ] {
            assert_eq!(grammar(&text), None, "{text}");
        }
    }

    /// llama.cpp's own `grammars/json.gbnf`, and an arithmetic one.
    #[test]
    fn grammars_that_people_use_are_let_through() {
        for text in [
            r#"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"#,
            r#"root ::= (expr "=" term "\n")+
expr ::= term ([-+*/] term)*
term ::= num | "(" expr ")"
num ::= [0-9]+"#,
        ] {
            assert_eq!(grammar(text), None);
        }
    }

    #[test]
    fn schemas_that_stop_the_target_are_refused() {
        let properties = |count: usize| -> Value {
            (0..count)
                .map(|number| (format!("p{number}"), json!({ "type": "string" })))
                .collect()
        };
        for (value, what) in [
            (
                json!({ "type": "object", "properties": properties(257) }),
                "properties in one object",
            ),
            (json!({ "enum": (0..600).collect::<Vec<_>>() }), "entries in one list"),
            (
                json!({ "properties": { "%".repeat(100_000): { "type": "string" } } }),
                "bytes in one name",
            ),
            (
                json!({ "pattern": format!("^{}$", "[a-y]?".repeat(40)) }),
                "optional parts in one rule",
            ),
            (json!({ "pattern": "(".repeat(65) }), "groups inside of each other"),
            (
                json!({ "pattern": "^(([a-y]+)+)+$" }),
                "ways to read each character of a repetition",
            ),
            (json!({ "description": "x".repeat(600_000) }), "bytes"),
            (
                json!({
                    "allOf": [{ "$ref": "#/$defs/a" }],
                    "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } },
                }),
                "references in a row",
            ),
            (json!({ "allOf": [{ "$ref": "#/allOf/0" }] }), "references in a row"),
        ] {
            assert_eq!(schema(&value), Some(what), "{:.80}", value.to_string());
        }
    }

    #[test]
    fn schemas_and_tools_that_people_use_are_let_through() {
        let person = json!({
            "type": "object",
            "properties": {
                "name": { "type": "string", "minLength": 1, "maxLength": 200 },
                "born": { "type": "string", "pattern": "^[0-9]{4}-[0-9]{2}(-[0-9]{2})?$" },
                "friends": { "type": "array", "items": { "$ref": "#/$defs/friend" }, "maxItems": 100 },
                "country": { "enum": (0..250).map(|n| format!("country {n}")).collect::<Vec<_>>() },
            },
            "required": ["name"],
            "$defs": {
                "friend": { "anyOf": [{ "$ref": "#/$defs/person" }, { "type": "null" }] },
                "person": { "type": "object", "properties": { "friend": { "$ref": "#/$defs/friend" } } },
            },
        });
        assert_eq!(schema(&person), None);
        let properties: Value = (0..20)
            .map(|n| {
                (
                    format!("field_{n}"),
                    json!({ "type": "string", "description": "What it is for. ".repeat(10) }),
                )
            })
            .collect();
        let tools: Vec<Value> = (0..100)
            .map(|n| {
                json!({ "type": "function", "function": {
                    "name": format!("tool_{n}"),
                    "description": "Does something. ".repeat(20),
                    "parameters": { "type": "object", "properties": properties, "required": ["field_0"] },
                } })
            })
            .collect();
        assert_eq!(refused("tools", &json!(tools)), None);
    }

    #[test]
    fn lists_and_windows_are_bounded() {
        assert_eq!(refused("dry_sequence_breakers", &json!(vec!["a"; 33])), Some("entries"));
        assert_eq!(refused("dry_sequence_breakers", &json!(["\n", ":", "\"", "*"])), None);
        assert_eq!(refused("stop", &json!("a")), None);
        assert_eq!(refused("dry_penalty_last_n", &json!(1_048_577)), Some("tokens"));
        assert_eq!(refused("dry_penalty_last_n", &json!(-1)), None);
    }

    proptest! {
        #[test]
        fn any_text_is_measured_without_a_panic(text in "[a|?*(){0,9}\"\\\\\\[\\]<>#:\n ]{0,80}") {
            let _ = Shape::default().add(&text, Notation::Gbnf);
            let _ = Shape::default().add(&text, Notation::Regex);
        }
    }
}
