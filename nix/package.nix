# The program `tightwad`. It starts llama.cpp's programs, which it looks for on PATH or where the config says.
{ lib, rustPlatform }:
let
  inherit (lib) fileset;
  manifest = lib.importTOML ../Cargo.toml;

  # These read files of the repository that the program is not built from.
  ofTheRepository = [
    "nix.rs"
    "readme.rs"
    "scripts.rs"
  ];
  # What declares the harness starts llama.cpp, and runs in the check `tests` instead.
  startsLlamaCpp =
    file:
    let
      text = builtins.readFile (../tests + "/${file}");
    in
    builtins.replaceStrings [ "\nmod harness;" ] [ "" ] text != text;
  runsInTheBuild =
    file: kind:
    kind == "regular"
    && lib.hasSuffix ".rs" file
    && !lib.elem file ofTheRepository
    && !startsLlamaCpp file;
  tests = lib.attrNames (lib.filterAttrs runsInTheBuild (builtins.readDir ../tests));
in
rustPlatform.buildRustPackage {
  pname = manifest.package.name;
  inherit (manifest.package) version;

  src = fileset.toSource {
    root = ../.;
    fileset = fileset.unions [
      ../Cargo.lock
      ../Cargo.toml
      ../configs
      ../src
      ../tests
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  cargoTestFlags = [
    "--lib"
    "--bins"
  ]
  ++ lib.concatMap (file: [
    "--test"
    (lib.removeSuffix ".rs" file)
  ]) tests;

  meta = {
    inherit (manifest.package) description;
    license = lib.licenses.mit;
    mainProgram = "tightwad";
    platforms = lib.platforms.linux;
  };
}
