# The program `tightwad`. It finds llama.cpp's programs on PATH, or at the paths in the config.
{ lib, rustPlatform }:
let
  inherit (lib) fileset;
  manifest = lib.importTOML ../Cargo.toml;

  # Modules of tests/it that need neither llama.cpp nor files of the repository outside of the package's source. The check `tests`
  # runs all modules.
  modules = [
    "cli"
    "cli_output"
    "config"
    "pid_files"
    "proxy"
  ];
in
rustPlatform.buildRustPackage {
  pname = manifest.package.name;
  inherit (manifest.package) version;

  src = fileset.toSource {
    root = ../.;
    fileset = fileset.unions [
      ../Cargo.lock
      ../Cargo.toml
      ../benches
      ../configs
      ../fuzz/src
      ../src
      ../tests
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  cargoTestFlags = [
    "--lib"
    "--bins"
  ];
  postCheck = ''
    cargo test --locked --offline --release --test it -- ${
      toString (map (module: "${module}::") modules)
    } --skip pool_
  '';

  meta = {
    inherit (manifest.package) description;
    license = lib.licenses.mit;
    mainProgram = "tightwad";
    platforms = lib.platforms.linux;
  };
}
