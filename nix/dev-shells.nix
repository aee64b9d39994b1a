# Shells for all scripts in scripts/. TIGHTWAD_LLAMA_CPP names the llama.cpp of the shell, so scripts and tests build none.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  packages = self.packages.${pkgs.stdenv.hostPlatform.system};

  shell =
    llama-cpp: more:
    pkgs.mkShell {
      # Adds cmake, ninja and the compiler of llama.cpp, for work on the patch.
      inputsFrom = [
        packages.tightwad
        llama-cpp
      ];
      packages = [
        pkgs.cargo
        pkgs.cargo-nextest
        pkgs.clippy
        pkgs.deadnix
        pkgs.iproute2
        pkgs.nixfmt
        pkgs.rust-analyzer
        pkgs.rustc
        pkgs.rustfmt
        pkgs.util-linux
        (pkgs.python3.withPackages (python: [
          python.gguf
          python.numpy
        ]))
      ]
      ++ more;
      RUST_SRC_PATH = pkgs.rustPlatform.rustLibSrc;
      TIGHTWAD_LLAMA_CPP = llama-cpp;
    };
in
{
  default = shell packages.llama-cpp-cpu [ ];
}
// {
  cuda = shell packages.llama-cpp-cuda [ ];
}
// lib.optionalAttrs (packages ? llama-cpp-rocm) {
  rocm = shell packages.llama-cpp-rocm [
    pkgs.rocmPackages.rocm-smi
    pkgs.rocmPackages.rocminfo
  ];
}
