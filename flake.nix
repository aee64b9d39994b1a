{
  description = "Tightwad: speculative decoding across machines, and one model over the GPUs of several, behind one OpenAI-compatible endpoint";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      eachSystem =
        of:
        lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (
          system:
          of {
            inherit self;
            pkgs = nixpkgs.legacyPackages.${system};
          }
        );
    in
    {
      packages = eachSystem (import ./nix/packages.nix);
      apps = eachSystem (import ./nix/apps.nix);
      devShells = eachSystem (import ./nix/dev-shells.nix);
      checks = eachSystem (import ./nix/checks.nix);
      formatter = eachSystem ({ pkgs, ... }: pkgs.nixfmt-tree);

      overlays.default = import ./nix/overlay.nix;
      nixosModules.default = {
        _class = "nixos";
        # Imported twice it is one module.
        key = "tightwad#nixosModules.default";
        imports = [ (lib.modules.importApply ./modules { inherit self; }) ];
      };
      templates.default = {
        path = ./nix/template;
        description = "A cluster of four NixOS hosts: a pool of two, a target with the proxy, and a draft";
      };
    };
}
