//! The layout of `src`: which folder may import which.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Lower rows import from higher ones. A folder may also import what its imports may import. docs/architecture.md shows the
/// same table.
const TABLE: &str = "
| folder | holds | may import |
| --- | --- | --- |
| `config/` | the cluster file | - |
| `gguf/` | the header of a model file: `parse` (untrusted bytes), `types`, `shape` (what a plan needs) | - |
| `speculation/` | the drafting policy, pure: sessions, cost model, acceptance, lookup, retokenisation, simulator | - |
| `observe/` | log, metrics, problems that were logged | - |
| `http/` | what all servers and clients share: accept loop, limits, auth, headers, relay, errors by dialect, client | `config` |
| `supervise/` | child processes | `config` |
| `upstream/` | clients of llama-server, Ollama, vLLM, SGLang and OpenAI | `http` |
| `plan/` | which layers go on which device, pure: `settings`, `placement`, `suggestions` | `config`, `gguf` |
| `engine/` | attaches drafters to running completions; declares the `Verifier` trait | `speculation`, `upstream` |
| `rounds/` | implements `Verifier` for servers without the patch | `engine` |
| `proxy/` | the OpenAI-compatible endpoint that drafts | `observe`, `rounds` |
| `pool/` | one model over several machines: coordinator, worker, swap, lease | `observe`, `plan`, `supervise`, `upstream` |
| `bench/` | contenders, measurements, reports, the pool's benchmark | `proxy`, `supervise` |
| `cli/` | the command line: parse, call, print | `bench`, `pool`, `proxy` |
";

/// Modules of one file that import nothing; every folder may import them.
const LEAVES: [&str; 3] = ["background", "count", "failure"];

/// Arrows that the table does not allow, each with the reason why it stays.
const EXCEPTIONS: [(&str, &str, &str); 3] = [
    (
        "config",
        "gguf",
        "check-config reads the headers of the models that the file names",
    ),
    (
        "supervise",
        "http",
        "the stall watch asks llama-server for its slots with the one HTTP client",
    ),
    (
        "upstream",
        "speculation",
        "a token has one type, which the pure core declares",
    ),
];

/// The folders and what each may import directly.
fn table() -> BTreeMap<String, BTreeSet<String>> {
    let names = |cell: &str| -> BTreeSet<String> {
        let name = |it: &str| it.trim().trim_matches('`').trim_end_matches('/').to_owned();
        let names = cell.split(',').map(name);
        names.filter(|it| it != "-").collect()
    };
    rows(TABLE)
        .into_iter()
        .map(|row| (names(&row[0]).pop_first().unwrap(), names(&row[2])))
        .collect()
}

/// The rows of the markdown table with the columns folder, holds and may import.
fn rows(markdown: &str) -> Vec<[String; 3]> {
    let cells = |line: &str| -> Vec<String> {
        let line = line.trim().trim_start_matches('|').trim_end_matches('|');
        line.split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let lines = markdown
        .lines()
        .skip_while(|line| cells(line) != ["folder", "holds", "may import"]);
    let rows = lines.skip(2).take_while(|line| line.trim_start().starts_with('|'));
    rows.map(|line| cells(line).try_into().unwrap()).collect()
}

/// Everything that a folder may import: what its row lists, and what those may import.
fn closure(table: &BTreeMap<String, BTreeSet<String>>, folder: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut next: Vec<&str> = vec![folder];
    while let Some(folder) = next.pop() {
        for import in table.get(folder).into_iter().flatten() {
            if found.insert(import.clone()) {
                next.push(import);
            }
        }
    }
    found
}

/// All source files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|it| it == "rs") {
            files.push(path);
        }
    }
    files
}

/// The path of the module that a file holds, from the crate's root.
fn module_of(src: &Path, file: &Path) -> Vec<String> {
    let relative = file.strip_prefix(src).unwrap().with_extension("");
    let mut path: Vec<String> = relative.iter().map(|it| it.to_str().unwrap().to_owned()).collect();
    path.pop_if(|last| matches!(last.as_str(), "mod" | "lib" | "main"));
    path
}

/// What a file imports from the crate, outside of its tests.
#[derive(Default)]
struct Imports {
    /// First elements of the paths from the crate's root.
    folders: BTreeSet<String>,
    /// Modules in files of their own that exist in tests only.
    test_modules: Vec<String>,
}

impl Imports {
    fn of(module: &[String], text: &str) -> Self {
        let mut imports = Self::default();
        imports.scan(module, text.parse().unwrap());
        imports
    }

    fn scan(&mut self, module: &[String], tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            let rest = &tokens[at..];
            if is_of_tests(rest) {
                at += self.skip_item(rest);
                continue;
            }
            let name = |at: usize| match rest.get(at) {
                Some(TokenTree::Ident(name)) => name.to_string(),
                _ => String::new(),
            };
            let supers = (0..rest.len())
                .take_while(|nth| name(nth * 3) == "super" && is_path(&rest[nth * 3 + 1..]))
                .count();
            let is_root = name(0) == "crate" && is_path(&rest[1..]) || supers > 0 && supers >= module.len();
            if is_root {
                at += 3 * supers.max(1);
                self.folders.extend(first_names(tokens.get(at)));
                continue;
            }
            if let TokenTree::Group(group) = &tokens[at] {
                self.scan(module, group.stream());
            }
            // `super` is counted from the first one of a path.
            at += (3 * supers).max(1);
        }
    }

    /// The length of an item that begins with `#[cfg(test)]`.
    fn skip_item(&mut self, tokens: &[TokenTree]) -> usize {
        let is = |at: usize, word: &str| tokens[at].to_string() == word;
        let keywords = [
            "use", "mod", "fn", "struct", "enum", "impl", "const", "static", "type", "trait",
        ];
        let kind = (0..tokens.len()).find(|at| keywords.iter().any(|word| is(*at, word)));
        let is_use = kind.is_some_and(|at| is(at, "use"));
        for at in 0..tokens.len() {
            let ends = is(at, ";")
                || !is_use && matches!(&tokens[at], TokenTree::Group(group) if group.delimiter() == Delimiter::Brace);
            if ends {
                if is(at, ";") && at >= 2 && is(at - 2, "mod") {
                    self.test_modules.push(tokens[at - 1].to_string());
                }
                return at + 1;
            }
        }
        tokens.len()
    }
}

/// Whether an item begins here that exists in tests only.
fn is_of_tests(tokens: &[TokenTree]) -> bool {
    let [TokenTree::Punct(hash), TokenTree::Group(attribute), ..] = tokens else {
        return false;
    };
    hash.as_char() == '#' && attribute.stream().to_string().replace(' ', "") == "cfg(test)"
}

fn is_path(tokens: &[TokenTree]) -> bool {
    let colon = |at: usize| matches!(tokens.get(at), Some(TokenTree::Punct(it)) if it.as_char() == ':');
    colon(0) && colon(1)
}

/// The first names of `name::…` or `{name::…, name::…}`.
fn first_names(token: Option<&TokenTree>) -> Vec<String> {
    match token {
        Some(TokenTree::Ident(name)) => vec![name.to_string()],
        Some(TokenTree::Group(group)) => {
            let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
            let paths = tokens.split(|it| matches!(it, TokenTree::Punct(it) if it.as_char() == ','));
            paths.flat_map(|path| first_names(path.first())).collect()
        }
        _ => Vec::new(),
    }
}

/// Each arrow between top folders, with the files that draw it.
fn arrows() -> BTreeMap<(String, String), Vec<String>> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules: BTreeMap<Vec<String>, (PathBuf, Imports)> = BTreeMap::new();
    for file in sources(&src) {
        let module = module_of(&src, &file);
        let imports = Imports::of(&module, &fs::read_to_string(&file).unwrap());
        modules.insert(module, (file, imports));
    }
    let of_tests: Vec<Vec<String>> = modules
        .iter()
        .flat_map(|(module, (_, imports))| {
            let names = imports.test_modules.iter();
            names.map(|name| [module.as_slice(), std::slice::from_ref(name)].concat())
        })
        .collect();
    let mut arrows: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for (module, (file, imports)) in &modules {
        let Some(from) = module.first() else { continue };
        if of_tests.iter().any(|tests| module.starts_with(tests)) {
            continue;
        }
        for to in imports.folders.iter().filter(|to| *to != from) {
            let file = file.strip_prefix(&src).unwrap().display().to_string();
            arrows.entry((from.clone(), to.clone())).or_default().push(file);
        }
    }
    arrows
}

#[test]
fn every_folder_imports_only_what_its_row_allows() {
    let table = table();
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = String::new();
    for file in sources(&src) {
        let module = module_of(&src, &file);
        if let Some(top) = module.first()
            && !table.contains_key(top)
            && !LEAVES.contains(&top.as_str())
        {
            writeln!(wrong, "{} belongs to no row of the table", file.display()).unwrap();
        }
    }
    let arrows = arrows();
    for ((from, to), files) in &arrows {
        let allowed = closure(&table, from).contains(to)
            || LEAVES.contains(&to.as_str()) && table.contains_key(from)
            || EXCEPTIONS.iter().any(|(a, b, _)| a == from && b == to);
        if !allowed {
            writeln!(wrong, "{from} -> {to}: {}", files.join(", ")).unwrap();
        }
    }
    for (from, to, reason) in EXCEPTIONS {
        if !arrows.contains_key(&(from.to_owned(), to.to_owned())) {
            writeln!(
                wrong,
                "{from} -> {to} is no longer needed ({reason}); take it out of the exceptions"
            )
            .unwrap();
        }
    }
    assert!(
        wrong.is_empty(),
        "these imports break the table of tests/it/layout.rs:\n{wrong}"
    );
}

#[test]
fn no_folder_imports_itself_through_others() {
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (from, to) in arrows().into_keys() {
        imports.entry(from).or_default().insert(to);
    }
    for folder in imports.keys() {
        let reached = closure(&imports, folder);
        assert!(
            !reached.contains(folder),
            "{folder} imports itself through others: {reached:?}"
        );
    }
}

#[test]
fn the_documentation_shows_the_same_table() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md");
    let Ok(text) = fs::read_to_string(&page) else { return };
    assert_eq!(
        rows(&text),
        rows(TABLE),
        "the tables of tests/it/layout.rs and {} differ",
        page.display()
    );
}

#[test]
fn imports_are_found_in_every_form_and_not_in_tests() {
    let text = "
        use crate::{alpha::a, beta::{b, c}};
        use super::sibling;
        /// Not [`crate::comment`].
        fn f() -> crate::gamma::G { println!(\"crate::text {}\", super::super::delta::d()) }
        #[cfg(test)]
        use crate::{test_a, test_b};
        #[cfg(test)]
        mod builder;
        pub(crate) fn g() {}
        #[cfg(test)]
        mod tests { use crate::test_c; }
        use crate::epsilon;
    ";
    let module = ["pool".to_owned(), "swap".to_owned()];
    let imports = Imports::of(&module, text);
    let found: Vec<_> = imports.folders.iter().map(String::as_str).collect();
    assert_eq!(found, ["alpha", "beta", "delta", "epsilon", "gamma"]);
    assert_eq!(imports.test_modules, ["builder"]);
}
