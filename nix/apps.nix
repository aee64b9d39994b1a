{ self, pkgs }:
let
  inherit (pkgs) lib;
  packages = self.packages.${pkgs.stdenv.hostPlatform.system};

  app = description: program: {
    type = "app";
    program = lib.getExe program;
    meta = { inherit description; };
  };

  # The package contains no llama.cpp, because a host with a GPU needs another build. This app adds the build for the CPU at the
  # end of PATH.
  tightwadWithLlamaCpp = pkgs.writeShellApplication {
    name = "tightwad";
    text = ''
      export PATH="$PATH:${lib.makeBinPath [ packages.llama-cpp-cpu ]}"
      exec ${lib.getExe packages.tightwad} "$@"
    '';
  };

  tightwadDemo = pkgs.writeShellApplication {
    name = "tightwad-demo";
    runtimeInputs = [
      pkgs.bash
      pkgs.coreutils
      pkgs.gnugrep
      pkgs.gnused
      (pkgs.python3.withPackages (python: [
        python.gguf
        python.numpy
      ]))
    ];
    text = ''
      export TIGHTWAD_BIN=${lib.getExe packages.tightwad}
      export TIGHTWAD_LLAMA_CPP=${packages.llama-cpp-cpu}
      exec bash ${
        lib.fileset.toSource {
          root = ../.;
          fileset = lib.fileset.unions [
            ../scripts
            ../tests/models
          ];
        }
      }/scripts/demo "$@"
    '';
  };
in
rec {
  default = tightwad;
  tightwad = app "The command tightwad, with a llama.cpp for the CPU" tightwadWithLlamaCpp;
  demo = app "Show what drafting gains on this machine; needs no GPU, no model and no configuration" tightwadDemo;
}
