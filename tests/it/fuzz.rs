//! A short run of the fuzz targets on the stable compiler: their seeds, and mutations of them that are the same in each run.

use std::fs;
use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

#[path = "../../fuzz/src/lib.rs"]
mod targets;

/// Numbers at which sizes and counts are apt to go wrong.
const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX];

/// Prints the input of a target that panics.
struct Input(Vec<u8>);

impl Drop for Input {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input: {}", self.0.escape_ascii());
        }
    }
}

/// Gives the seeds of a target to it, and then `count` mutations.
fn run(name: &str, count: usize, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
    let mut paths: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(!seeds.is_empty());
    for seed in &seeds {
        target(&Input(seed.clone()).0);
    }
    let mut random = StdRng::seed_from_u64(16);
    for _ in 0..count {
        target(&Input(mutated(&mut random, &seeds)).0);
    }
}

/// One of the seeds with one to four changes.
fn mutated(random: &mut StdRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds.choose(random).unwrap().clone();
    for _ in 0..random.random_range(1..=4) {
        let at = random.random_range(0..=bytes.len());
        let end = random.random_range(at..=bytes.len().min(at + 32));
        match random.random_range(0..7) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => drop(bytes.splice(at..at, bytes[at..end].to_vec())),
            3 => bytes.insert(at, random.random()),
            4 => {
                let other = seeds.choose(random).unwrap();
                let from = random.random_range(0..=other.len());
                drop(bytes.splice(at..end, other[from..].iter().take(64).copied()));
            }
            5 => {
                let number = NUMBERS.choose(random).unwrap().to_le_bytes();
                bytes
                    .iter_mut()
                    .skip(at)
                    .zip(number)
                    .for_each(|(byte, new)| *byte = new);
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.random_range(0..8);
                }
            }
        }
    }
    bytes
}

#[test]
fn model_files() {
    run("gguf", 4000, targets::gguf);
}

#[test]
fn cluster_files() {
    run("config", 2000, targets::config);
}

#[test]
fn event_streams() {
    run("sse", 500, targets::sse);
}

#[test]
fn answers_of_rpc_servers() {
    run("rpc_probe", 1000, targets::rpc_probe);
}

#[test]
fn drafts_and_offers() {
    run("draft", 500, targets::draft);
}
