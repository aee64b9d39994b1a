{ self, pkgs }:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) isx86_64 system;
  llama-cpp = from: from.callPackage ./llama-cpp/package.nix;
  # CUDA is unfree. It is allowed here, for one package, so that nobody has to allow it to evaluate this flake.
  withCuda = import pkgs.path {
    inherit system;
    config.allowUnfreePredicate = import ./cuda-licence.nix { inherit lib; };
  };
  tightwad = pkgs.callPackage ./package.nix { };
in
{
  inherit tightwad;
  default = tightwad;
  llama-cpp-cpu = llama-cpp pkgs { };
  llama-cpp-vulkan = llama-cpp pkgs { vulkanSupport = true; };
  options-doc = import ./options-doc.nix { inherit self pkgs; };
  tiny-models = pkgs.callPackage ./tiny-models.nix { };
}
// lib.optionalAttrs isx86_64 {
  llama-cpp-cuda = llama-cpp withCuda { cudaSupport = true; };
  llama-cpp-rocm = llama-cpp pkgs { rocmSupport = true; };
}
