//! The scripts as their users meet them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::harness::gguf::deep_target;

fn script(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name));
    // A cache of its own, so that nothing is built already.
    command
        .args(args)
        .env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What `scripts/llama-cpp` would build: cmake's flags, and the folder at the end.
fn flags(args: &[&str]) -> (BTreeSet<String>, String) {
    let output = script("llama-cpp", args).arg("--print-flags").output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    let mut lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    let folder = lines.pop().unwrap();
    (lines.into_iter().collect(), folder)
}

#[test]
fn each_variant_of_llama_cpp_has_its_flags_and_a_folder_of_its_own() {
    let (cpu, cpu_folder) = flags(&[]);
    assert!(cpu.contains("-DGGML_RPC=ON"), "{cpu:?}");
    let mut folders = BTreeSet::from([cpu_folder]);
    for (args, variant, expected) in [
        (
            &["--cuda", "8.6,8.9"][..],
            "-cuda-",
            &["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=86;89"][..],
        ),
        (
            &["--cuda", "120"],
            "-cuda-",
            &["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=120"],
        ),
        (
            &["--hip", "gfx1030,gfx1100"],
            "-hip-",
            &["-DGGML_HIP=ON", "-DGPU_TARGETS=gfx1030;gfx1100"],
        ),
        (&["--vulkan"], "-vulkan-", &["-DGGML_VULKAN=ON"]),
    ] {
        let (found, folder) = flags(args);
        let added: BTreeSet<String> = found.difference(&cpu).cloned().collect();
        let expected: BTreeSet<String> = expected.iter().map(|&flag| flag.to_owned()).collect();
        assert_eq!(added, expected, "{args:?}");
        assert!(cpu.is_subset(&found), "{args:?}");
        assert!(folder.contains(variant), "{args:?}: {folder}");
        assert!(folders.insert(folder), "{args:?} shares a folder");
    }
    // Without a list, those of this machine's GPUs or a list of our own: cmake never chooses.
    let chosen = |args: &[&str], key: &str| flags(args).0.iter().any(|flag| flag.starts_with(key));
    assert!(chosen(&["--cuda"], "-DCMAKE_CUDA_ARCHITECTURES="));
    assert!(chosen(&["--hip"], "-DGPU_TARGETS=gfx"));
}

#[test]
fn a_mistake_in_the_command_line_of_llama_cpp_is_named_and_exits_2() {
    for (args, words) in [
        (&["--cuda", "RTX4090"][..], "`RTX4090` are no compute capabilities"),
        (&["--hip", "7900"], "`7900` are no GPU targets"),
        (&["--cuda", "--vulkan"], "ask for one at a time"),
        (&["--rocm"], "there is no option --rocm"),
        (&["--try", "b1"], "--try needs the number"),
    ] {
        let output = script("llama-cpp", args).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(words), "{args:?}: {stderr}");
    }
}

#[test]
fn a_missing_compiler_of_a_gpu_is_named_with_the_way_to_get_it() {
    for (variant, program, folder) in [
        ("--cuda", "nvcc", "/usr/local/cuda/bin"),
        ("--hip", "hipcc", "/opt/rocm/bin"),
        ("--vulkan", "glslc", "/nowhere"),
    ] {
        if which::which(program).is_ok() || Path::new(folder).join(program).exists() {
            eprintln!("{program} is here, so that nothing is missing for {variant}");
            continue;
        }
        let output = script("llama-cpp", &[variant]).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{variant}: {stderr}");
        let sentence = format!("{program} is missing; install ");
        assert!(stderr.contains(&sentence), "{variant}: {stderr}");
        assert!(output.stdout.is_empty(), "{variant}: {}", text(&output.stdout));
    }
}

/// Runs `scripts/inflated`; `None` where numpy cannot be had, as in a build without a network.
fn inflated(model: &Path, size: &str) -> Option<Output> {
    let output = script("inflated", &[model.to_str().unwrap(), size]).output().unwrap();
    let stderr = text(&output.stderr);
    let has_python = !stderr.contains("could not be installed") && !stderr.contains("is missing");
    if !has_python {
        eprintln!("not tested: {stderr}");
    }
    has_python.then_some(output)
}

#[test]
fn a_model_without_a_description_and_with_tensors_of_any_type_is_inflated() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = folder.path().join("odd.gguf");
    // The last of its blocks are of F32. A key of another name is a key that is missing.
    let mut bytes = std::fs::read(deep_target(2)).unwrap();
    let key = b"general.description";
    let at = bytes.windows(key.len()).position(|part| part == key).unwrap();
    bytes[at..at + key.len()].copy_from_slice(b"general.descriptiox");
    std::fs::write(&model, bytes).unwrap();
    let Some(output) = inflated(&model, "40M") else { return };
    assert!(output.status.success(), "{}", text(&output.stderr));
    let made = PathBuf::from(text(&output.stdout).trim());
    let size = made.metadata().unwrap().len() >> 20;
    assert!((30..80).contains(&size), "{size} MiB");
    std::fs::remove_file(made).unwrap();
}

#[test]
fn a_file_that_cannot_be_inflated_is_named_without_a_traceback() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = folder.path().join("gemma.gguf");
    let mut bytes = std::fs::read(crate::harness::llama_server::target()).unwrap();
    let key = b"general.architecture";
    let at = bytes.windows(key.len()).position(|part| part == key).unwrap();
    let value = at + key.len() + 4 + 8;
    assert_eq!(&bytes[value..value + 5], b"llama");
    bytes[value..value + 5].copy_from_slice(b"gemma");
    std::fs::write(&model, bytes).unwrap();
    let Some(output) = inflated(&model, "40M") else { return };
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("'gemma'; only 'llama' is supported"), "{stderr}");
    assert!(!stderr.contains("Traceback"), "{stderr}");
}
