//! Finds stop strings, whose parts may come in different rounds.

/// Holds back text that may become a stop string, and finds the first complete one.
#[derive(Debug, Clone, Default)]
pub(super) struct Stops {
    stops: Vec<String>,
    held: String,
}

/// Text that can be sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) text: String,
    /// Whether a stop string follows it.
    pub(super) stopped: bool,
}

impl Stops {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes in more text.
    pub(super) fn push(&mut self, text: &str) -> Said {
        self.held.push_str(text);
        // The stop string that is complete first ends the text, as it would token by token.
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop)?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = found.min() {
            self.held.truncate(start);
            return Said {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let begun = |start: &usize| {
            let rest = &self.held[*start..];
            self.stops.iter().any(|stop| stop.starts_with(rest))
        };
        let mut starts = self.held.char_indices().map(|(start, _)| start);
        let sure = starts.find(begun).unwrap_or(self.held.len());
        let held = self.held.split_off(sure);
        Said {
            text: std::mem::replace(&mut self.held, held),
            stopped: false,
        }
    }

    /// The text still held back at the end.
    pub(super) fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(pieces: &[&str], stops: &[&str]) -> Said {
        let mut stopping = Stops::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut all = String::new();
        for piece in pieces {
            let Said { text, stopped } = stopping.push(piece);
            all.push_str(&text);
            if stopped {
                return Said { text: all, stopped };
            }
        }
        all.push_str(&stopping.rest());
        Said {
            text: all,
            stopped: false,
        }
    }

    #[test]
    fn the_stop_string_that_is_complete_first_ends_the_text() {
        let abcd = said(&["xab", "cdef"], &["abcdef", "cd"]);
        assert_eq!((abcd.text.as_str(), abcd.stopped), ("xab", true));
        let never = said(&["xab", "c"], &["abcdef"]);
        assert_eq!((never.text.as_str(), never.stopped), ("xabc", false));
    }

    #[test]
    fn what_may_become_a_stop_string_is_held_back() {
        let mut stops = Stops::new(vec!["ende".to_owned()]);
        assert_eq!(stops.push("das en").text, "das ");
        assert_eq!(stops.push("t ").text, "ent ");
        assert_eq!(stops.push("en").text, "");
        assert_eq!(
            stops.push("de!"),
            Said {
                text: String::new(),
                stopped: true
            }
        );
    }

    proptest! {
        #[test]
        fn how_the_text_is_cut_makes_no_difference(
            pieces in prop::collection::vec("[abü]{0,4}", 0..8),
            stop in "[abü]{1,4}",
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let whole = pieces.concat();
            let said = said(&pieces, &[&stop]);
            prop_assert_eq!(said.stopped, whole.contains(&stop));
            prop_assert_eq!(said.text.as_str(), whole.split(&stop).next().unwrap_or_default());
        }
    }
}
