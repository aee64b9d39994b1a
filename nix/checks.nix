# The checks that a laptop can run. Builds for GPUs and tests with virtual machines are packages: nix build .#vm-test-pool
{ self, pkgs }:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) system;
  packages = self.packages.${system};

  named = prefix: lib.mapAttrs' (name: lib.nameValuePair "${prefix}-${name}");

  # Runs a cargo command in the whole repository, with the crates of the package.
  cargo =
    name: inputs: command:
    packages.tightwad.overrideAttrs (old: {
      pname = "tightwad-${name}";
      src = self;
      nativeBuildInputs = (old.nativeBuildInputs or [ ]) ++ inputs;
      buildPhase = command;
      doCheck = false;
      installPhase = "touch $out";
    });

  nixFiles = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.fileFilter (file: file.hasExt "nix") ../.;
  };
  overNixFiles =
    name: tool: command:
    pkgs.runCommand name { nativeBuildInputs = [ tool ]; } ''
      cd ${nixFiles}
      find . -name '*.nix' -exec ${command} {} +
      touch $out
    '';

  # Each file in tests/ is a check with the same name.
  testFiles = lib.filterAttrs (file: _: lib.hasSuffix ".nix" file) (builtins.readDir ./tests);
  tests = lib.mapAttrs' (
    file: _:
    lib.nameValuePair (lib.removeSuffix ".nix" file) (
      import (./tests + "/${file}") { inherit self pkgs; }
    )
  ) testFiles;

  # Evaluates the whole system of each host of the template, and builds only its cluster file.
  template = (import ./template/flake.nix).outputs {
    inherit (self.inputs) nixpkgs;
    tightwad = self;
  };
  templateHosts = lib.filterAttrs (
    _: host: host.pkgs.stdenv.hostPlatform.system == system
  ) template.nixosConfigurations;
  evaluated =
    name: host:
    pkgs.runCommand "template-${name}"
      {
        system = builtins.unsafeDiscardStringContext host.config.system.build.toplevel.drvPath;
        cluster = host.config.services.tightwad.configFile;
      }
      ''
        test -s $cluster
        echo "$system" >$out
      '';
in
tests
// named "package" {
  inherit (packages)
    llama-cpp-cpu
    options-doc
    tightwad
    tiny-models
    ;
}
// named "dev-shell" { inherit (self.devShells.${system}) default; }
// named "template" (lib.mapAttrs evaluated templateHosts)
// {
  clippy = cargo "clippy" [ pkgs.clippy ] "cargo clippy --locked --all-targets -- -D warnings";
  deadnix = overNixFiles "deadnix" pkgs.deadnix "deadnix --fail";
  documentation =
    cargo "documentation" [ ]
      "RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --document-private-items";
  format-nix = overNixFiles "format-nix" pkgs.nixfmt "nixfmt --check";
  format-rust = cargo "format-rust" [ pkgs.rustfmt ] "cargo fmt --check";
  # All tests, with the real llama.cpp and the tiny models; the package runs the tests that need neither. The network tests need
  # iproute2 and util-linux. The tests of the scripts are left out, because they download packages.
  tests =
    cargo "tests"
      [
        pkgs.iproute2
        pkgs.util-linux
      ]
      ''
        export HOME=$TMPDIR TIGHTWAD_LLAMA_CPP=${packages.llama-cpp-cpu}
        cargo test --locked --no-fail-fast -- --skip scripts::
      '';
}
