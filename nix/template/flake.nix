# In a git checkout, Nix sees only files that git tracks: `git add` these first.
{
  description = "A Tightwad cluster of four NixOS hosts";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    # With the flake's own nixpkgs, every host has the tested llama.cpp. For an NVIDIA GPU with `gpu = "vulkan"`, follow your own
    # nixpkgs, because NVIDIA's driver and llama.cpp then need the same C library:
    # tightwad.inputs.nixpkgs.follows = "nixpkgs";
    # Replace OWNER by the account that owns the repository.
    tightwad.url = "github:OWNER/tightwad";
  };

  outputs =
    { nixpkgs, tightwad, ... }:
    let
      host =
        file:
        nixpkgs.lib.nixosSystem {
          modules = [
            tightwad.nixosModules.default
            file
          ];
        };
    in
    {
      nixosConfigurations = {
        server = host ./server.nix;
        gaming-pc = host ./gaming-pc.nix;
        mini-pc = host ./mini-pc.nix;
        workstation = host ./workstation.nix;
      };
    };
}
