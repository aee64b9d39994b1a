//! Sets one member of a JSON object in its text and leaves every other byte as it is.
//!
//! The proxy adds counts to the usage of an answer this way, the coordinator a reason to the answer of `GET /props`. Neither
//! may re-serialise what a server wrote.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// A JSON object as it is written. Of members with the same name, the last one counts, as in llama-server.
pub(crate) struct Members<'a> {
    text: &'a str,
    members: Vec<(String, &'a str)>,
}

impl<'a> Members<'a> {
    /// Reads the members of `text`; `None` if that is no JSON object.
    pub(crate) fn of(text: &'a str) -> Option<Self> {
        let Listed(members) = serde_json::from_str(text).ok()?;
        Some(Self { text, members })
    }

    /// The text of the value of the member `name`.
    pub(crate) fn get(&self, name: &str) -> Option<&'a str> {
        let member = self.members.iter().rfind(|(it, _)| it == name)?;
        Some(member.1)
    }

    /// The text of the object with `name` set to the JSON text `value`: replaced where it stands, or appended.
    pub(crate) fn with(&self, name: &str, value: &str) -> String {
        // The values are slices of the text.
        let start = |part: &str| part.as_ptr().addr() - self.text.as_ptr().addr();
        let (from, to, new) = if let Some(old) = self.get(name) {
            (start(old), start(old) + old.len(), value.to_owned())
        } else if let Some((_, last)) = self.members.last() {
            let end = start(last) + last.len();
            (end, end, format!(",\"{name}\":{value}"))
        } else {
            let inside = self.text.find('{').map_or(0, |brace| brace + 1);
            (inside, inside, format!("\"{name}\":{value}"))
        };
        [&self.text[..from], &new, &self.text[to..]].concat()
    }
}

/// Names, and the texts of their values.
struct Listed<'a>(Vec<(String, &'a str)>);

impl<'de> Deserialize<'de> for Listed<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Listed<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Listed<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    members.push((name, value.get()));
                }
                Ok(Listed(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}
