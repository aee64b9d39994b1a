# The program `tightwad`. It finds llama.cpp's programs on PATH, or at the paths in the config.
{ lib, rustPlatform }:
let
  inherit (lib) fileset;
  manifest = lib.importTOML ../Cargo.toml;

  # Tests that read files of the repository outside of the package's source.
  ofTheRepository = [
    "nix.rs"
    "readme.rs"
    "scripts.rs"
  ];
  # Tests with the harness start llama.cpp. They run in the check `tests` instead.
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
