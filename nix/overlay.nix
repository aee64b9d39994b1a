# Overlay for users who combine packages themselves; the NixOS module needs none. The name is not `llama-cpp`, so that the
# package of nixpkgs stays as it is.
final: _: {
  tightwad = final.callPackage ./package.nix { };
  # The build for CUDA or ROCm follows the configuration of nixpkgs; `.override` changes it.
  tightwad-llama-cpp = final.callPackage ./llama-cpp/package.nix { };
}
