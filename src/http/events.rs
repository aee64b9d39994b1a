//! Finds the beginning and the end of each event in a server-sent event stream.
//!
//! A pure state machine over bytes: how they are cut into chunks makes no difference. `relay` asks it before it inserts
//! anything.

/// Comment for a client that waits for the target.
pub(crate) const WAITING: &[u8] = b": waiting for the target\n\n";

/// Tracks whether the bytes that passed end between two events, the only place where a comment or an event can be
/// inserted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boundary {
    /// The current line has no bytes so far.
    line_is_empty: bool,
    /// The last line was blank, so that an event, if there was one, is over.
    after_blank_line: bool,
    /// The last byte was a carriage return; a line feed would belong to it.
    after_return: bool,
}

impl Boundary {
    /// Before the first byte.
    pub(crate) fn new() -> Self {
        Self {
            line_is_empty: true,
            after_blank_line: true,
            after_return: false,
        }
    }

    /// Notes that these bytes passed.
    pub(crate) fn pass(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' if self.after_return => self.after_return = false,
                b'\n' | b'\r' => {
                    self.after_blank_line = self.line_is_empty;
                    self.line_is_empty = true;
                    self.after_return = *byte == b'\r';
                }
                _ => {
                    *self = Self {
                        line_is_empty: false,
                        after_blank_line: false,
                        after_return: false,
                    }
                }
            }
        }
    }

    /// Whether an event can begin here.
    pub(crate) fn is_between_events(self) -> bool {
        self.after_blank_line && !self.after_return
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn between(bytes: &[u8]) -> bool {
        let mut boundary = Boundary::new();
        boundary.pass(bytes);
        boundary.is_between_events()
    }

    #[test]
    fn only_a_blank_line_ends_an_event() {
        for text in ["", "data: x\n\n", "data: x\r\n\r\n", "data: x\n\n\n", ": comment\n\n"] {
            assert!(between(text.as_bytes()), "{text:?}");
        }
        for text in [
            "d",
            "data: x",
            "data: x\n",
            "data: x\r\n",
            "data: x\r\n\r",
            "data: x\n\nd",
            "event: e\ndata: x\n",
        ] {
            assert!(!between(text.as_bytes()), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_makes_no_difference(text in "[a\r\n]{0,24}", cut in 0_usize..24) {
            let (head, tail) = text.as_bytes().split_at(cut.min(text.len()));
            let mut boundary = Boundary::new();
            boundary.pass(head);
            boundary.pass(tail);
            prop_assert_eq!(boundary.is_between_events(), between(text.as_bytes()));
        }

        #[test]
        fn a_comment_put_in_leaves_the_events_as_they_were(text in "[a\r\n]{0,24}", cut in 0_usize..24) {
            let (head, tail) = text.as_bytes().split_at(cut.min(text.len()));
            if between(head) {
                let with = [head, WAITING, tail].concat();
                prop_assert_eq!(events(&with), events(text.as_bytes()));
            }
        }
    }

    /// The events as a client reads them: groups of lines that are no comments.
    fn events(bytes: &[u8]) -> Vec<Vec<String>> {
        let text = String::from_utf8_lossy(bytes).replace("\r\n", "\n").replace('\r', "\n");
        text.split("\n\n")
            .map(|event| {
                event
                    .lines()
                    .filter(|line| !line.is_empty() && !line.starts_with(':'))
                    .map(Into::into)
                    .collect()
            })
            .filter(|event: &Vec<String>| !event.is_empty())
            .collect()
    }
}
