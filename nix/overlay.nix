# For those who put packages together themselves; the NixOS module needs no overlay. The name is not `llama-cpp`, so that nobody
# else's changes.
final: _: {
  tightwad = final.callPackage ./package.nix { };
  # For CUDA or ROCm as this nixpkgs is configured; `.override` chooses.
  tightwad-llama-cpp = final.callPackage ./llama-cpp/package.nix { };
}
