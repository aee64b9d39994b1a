//! The lines of an event stream, however its bytes are cut.

/// Collects bytes until lines are complete.
#[derive(Debug, Default)]
pub struct Data {
    rest: Vec<u8>,
}

impl Data {
    /// Takes bytes and returns the `data:` of the lines that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else {
            return Vec::new();
        };
        let rest = self.rest.split_off(end + 1);
        let complete = std::mem::replace(&mut self.rest, rest);
        let text = String::from_utf8_lossy(&complete);
        text.lines()
            .filter_map(|line| line.strip_prefix("data:"))
            .map(|data| data.trim().to_owned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_makes_no_difference(texts in prop::collection::vec("[a-zäöü日]{1,8}", 0..8), size in 1_usize..9) {
            let events = texts.iter().map(|text| format!(": comment\r\ndata: {text}\r\n\r\n"));
            let stream = events.collect::<Vec<_>>().concat();
            let mut data = Data::default();
            let read: Vec<String> = stream.as_bytes().chunks(size).flat_map(|chunk| data.push(chunk)).collect();
            prop_assert_eq!(read, texts);
        }
    }
}
