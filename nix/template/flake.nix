# In a git checkout, Nix sees no file that git does not know: `git add` these first.
{
  description = "A Tightwad cluster of four NixOS hosts";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    # With its own nixpkgs every host has the llama.cpp that was tested. For an NVIDIA GPU with `gpu = "vulkan"` let it follow
    # yours, because NVIDIA's driver and llama.cpp then have to be of one C library:
    # tightwad.inputs.nixpkgs.follows = "nixpkgs";
    # Replace OWNER by the account whose repository this is.
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
