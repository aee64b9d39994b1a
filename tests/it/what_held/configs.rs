//! Config files that are made to take long.

use std::time::{Duration, Instant};

use tightwad::config::{Environment, load_in};

/// A config that is read takes no longer than this, and neither does one that is refused.
const READ: Duration = Duration::from_secs(20);

#[test]
fn a_yaml_bomb_is_refused_at_once() {
    let laughs = (1..12).fold("a0: &a0 [x, x]\n".to_owned(), |text, n| {
        let alias = format!("*a{}, ", n - 1).repeat(9);
        format!("{text}a{n}: &a{n} [{alias}x]\n")
    });
    let indented = (0..1000).fold(String::new(), |text, depth| format!("{text}{:depth$}a:\n", ""));
    let anchor = |n| format!("k{n}: &a{n} v\n");
    let bombs = [
        ("aliases of aliases", laughs),
        ("an alias of itself", "a: &a [*a]\n".to_owned()),
        ("lists in lists", "[".repeat(200_000)),
        ("mappings in mappings", "{a: ".repeat(100_000)),
        ("indentation", indented),
        ("a key without an end", format!("? {}", "a".repeat(900_000))),
        ("many anchors", (0..5_000).map(anchor).collect::<Vec<_>>().concat()),
        ("many references", format!("a: {}", "${A}".repeat(100_000))),
    ];
    for (what, text) in bombs {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tightwad.yaml"), text).unwrap();
        let environment = Environment {
            directory: folder.path().to_owned(),
            variables: [("A".to_owned(), "x".repeat(100))].into(),
        };
        let began = Instant::now();
        assert!(load_in(None, &environment).is_err(), "{what}");
        assert!(began.elapsed() < READ, "{what}: {:?}", began.elapsed());
    }
}
