{ self, pkgs }:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) isx86_64 system;
  llama-cpp = from: from.callPackage ./llama-cpp/package.nix;
  # CUDA is unfree. This allows it for one package, so that the flake evaluates without `allowUnfree`. `cudaCapabilities` go to
  # nixpkgs too, because nixpkgs chooses another CUDA for Jetson.
  withCuda =
    capabilities:
    llama-cpp (import pkgs.path {
      inherit system;
      config = capabilities // {
        allowUnfreePredicate = import ./cuda-licence.nix { inherit lib; };
      };
    }) (capabilities // { cudaSupport = true; });
  tightwad = pkgs.callPackage ./package.nix { };
  # Each file in tests/vm is a test with virtual machines.
  vmTests = lib.mapAttrs' (
    file: _:
    lib.nameValuePair "vm-test-${lib.removeSuffix ".nix" file}" (
      import (./tests/vm + "/${file}") { inherit self pkgs; }
    )
  ) (builtins.readDir ./tests/vm);
in
{
  inherit tightwad;
  default = tightwad;
  llama-cpp-cpu = llama-cpp pkgs { };
  llama-cpp-cuda = lib.makeOverridable withCuda { };
  llama-cpp-vulkan = llama-cpp pkgs { vulkanSupport = true; };
  options-doc = import ./options-doc.nix { inherit self pkgs; };
  tiny-models = pkgs.callPackage ./tiny-models.nix { };
}
// vmTests
// lib.optionalAttrs isx86_64 {
  llama-cpp-rocm = llama-cpp pkgs { rocmSupport = true; };
}
