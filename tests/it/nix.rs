//! What the Nix files pin is what everybody else builds from.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::prelude::{BASE64_STANDARD, Engine};
use bytes::Bytes;
use serde_json::Value;
use sha2::{Digest, Sha256};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn json(path: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(repository().join(path)).unwrap()).unwrap()
}

/// A string of a Nix archive: its length, itself, and zeros up to a multiple of eight.
fn put(archive: &mut impl Write, text: &[u8]) -> io::Result<()> {
    archive.write_all(&(text.len() as u64).to_le_bytes())?;
    archive.write_all(text)?;
    archive.write_all(&[0; 8][..text.len().next_multiple_of(8) - text.len()])
}

fn put_words(archive: &mut impl Write, words: &[&str]) -> io::Result<()> {
    words.iter().try_for_each(|word| put(archive, word.as_bytes()))
}

/// Writes a file, a folder or a link as a Nix archive has it.
fn put_tree(archive: &mut impl Write, path: &Path) -> io::Result<()> {
    put_words(archive, &["(", "type"])?;
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        put_words(archive, &["symlink", "target"])?;
        put(archive, fs::read_link(path)?.as_os_str().as_bytes())?;
    } else if metadata.is_dir() {
        put(archive, b"directory")?;
        let mut names: Vec<_> = fs::read_dir(path)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            put_words(archive, &["entry", "(", "name"])?;
            put(archive, name.as_bytes())?;
            put(archive, b"node")?;
            put_tree(archive, &path.join(&name))?;
            put(archive, b")")?;
        }
    } else {
        put(archive, b"regular")?;
        if metadata.permissions().mode() & 0o100 != 0 {
            put_words(archive, &["executable", ""])?;
        }
        put(archive, b"contents")?;
        put(archive, &fs::read(path)?)?;
    }
    put(archive, b")")
}

/// The hash by which Nix knows a folder.
fn nar_hash(folder: &Path) -> String {
    struct Sha(Sha256);
    impl Write for Sha {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut archive = BufWriter::new(Sha(Sha256::new()));
    put(&mut archive, b"nix-archive-1").unwrap();
    put_tree(&mut archive, folder).unwrap();
    let Ok(Sha(hash)) = archive.into_inner() else {
        panic!("the end of the archive is not hashed");
    };
    format!("sha256-{}", BASE64_STANDARD.encode(hash.finalize()))
}

/// Says why a test has looked at nothing. What `eprintln!` prints is not shown for a test that passes.
#[allow(clippy::explicit_write)]
fn skip(why: &str) {
    writeln!(io::stderr(), "skipped: {why}").unwrap();
}

fn cache() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty());
    let cache = cache.map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"),
        PathBuf::from,
    );
    cache.join("tightwad")
}

#[test]
fn nix_builds_the_llama_cpp_that_the_script_downloads() {
    let source = json("nix/llama-cpp/source.json");
    let pinned = |key: &str| source["sdist"][key].as_str().unwrap();
    let sdist = cache().join(format!("{}-{}.tar.gz", pinned("name"), pinned("version")));
    let Ok(mut file) = File::open(&sdist) else {
        return skip(&format!(
            "there is no {}; scripts/llama-cpp downloads it, unless TIGHTWAD_LLAMA_CPP names a finished build",
            sdist.display()
        ));
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(
        format!("{:x}", Bytes::copy_from_slice(&Sha256::digest(&bytes))),
        pinned("sha256"),
        "{}",
        sdist.display()
    );

    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let tar = Command::new("tar")
        .args(["--extract", "--gzip", "--strip-components=1", "--file"])
        .arg(&sdist)
        .arg("--directory")
        .arg(folder.path())
        .status()
        .unwrap();
    assert!(tar.success(), "{} cannot be unpacked", sdist.display());
    assert_eq!(nar_hash(&folder.path().join("llama.cpp")), source["narHash"]);
}

#[test]
fn the_hash_of_a_folder_is_that_of_nix() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("folder")).unwrap();
    fs::write(path("folder/plain"), "12345678").unwrap();
    fs::write(path("folder/empty"), "").unwrap();
    fs::write(path("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(path("run"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(path("folder/plain"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(path("folder/empty"), fs::Permissions::from_mode(0o644)).unwrap();
    std::os::unix::fs::symlink("folder/plain", path("link")).unwrap();
    // What `nix hash path` says of it.
    assert_eq!(
        nar_hash(folder.path()),
        "sha256-rWCsbFwV2x8qiXg2LxfJlgFdoB9GimdgOagMow61I/Y="
    );
}

#[test]
fn the_build_of_llama_cpp_and_of_its_source_package_are_one() {
    let source = json("nix/llama-cpp/source.json");
    let build = source["version"].as_str().unwrap();
    assert_eq!(source["sdist"]["version"], format!("{build}.0.0"));
}

#[test]
fn the_flake_has_one_input_and_it_is_pinned() {
    let lock = json("flake.lock");
    let nodes: BTreeSet<&str> = lock["nodes"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(nodes, BTreeSet::from(["nixpkgs", "root"]));
    let nixpkgs = &lock["nodes"]["nixpkgs"];
    let flake = fs::read_to_string(repository().join("flake.nix")).unwrap();
    let original = |key: &str| nixpkgs["original"][key].as_str().unwrap();
    let url = format!("github:{}/{}/{}", original("owner"), original("repo"), original("ref"));
    assert!(
        flake.contains(&format!("inputs.nixpkgs.url = \"{url}\";")),
        "{url} is not the input"
    );
    let locked = |key: &str| nixpkgs["locked"][key].as_str().unwrap();
    assert_eq!((locked("owner"), locked("repo")), (original("owner"), original("repo")));
    assert_eq!(locked("rev").len(), 40);
    assert!(locked("narHash").starts_with("sha256-"));
}

/// The blocks of a page in this language.
fn blocks<'a>(readme: &'a str, language: &str) -> Vec<&'a str> {
    let blocks = readme.split(language).skip(1);
    blocks.map(|rest| rest.split("```").next().unwrap()).collect()
}

#[test]
fn the_hosts_of_the_documentation_are_those_of_the_template() {
    let readme = fs::read_to_string(repository().join("docs/getting-started/nixos.md")).unwrap();
    let template: String = fs::read_dir(repository().join("nix/template"))
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    let blocks = blocks(&readme, "```nix\n");
    let of_template = blocks.iter().filter(|block| template.contains(**block)).count();
    assert_eq!(
        of_template,
        2,
        "the hosts, and what a host says:\n{}",
        blocks.join("---\n")
    );
}

#[test]
fn every_option_of_the_documentation_exists() {
    let readme = fs::read_to_string(repository().join("docs/getting-started/nixos.md")).unwrap();
    let options = fs::read_to_string(repository().join("docs/reference/nixos-options.md")).unwrap();
    let named: BTreeSet<&str> = readme
        .split(|character: char| character.is_whitespace() || "`();,".contains(character))
        .filter(|word| word.starts_with("services.tightwad."))
        .collect();
    assert!(named.len() >= 3, "{named:?}");
    for name in named {
        assert!(options.contains(&format!("## `{name}`\n")), "there is no option {name}");
    }
}
