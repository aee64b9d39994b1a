# docs/reference/nixos-options.md has every option. Names only: nixpkgs words the types, and may word them anew.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  made = import ../options-doc.nix { inherit self pkgs; };
  headings = text: lib.filter (lib.hasPrefix "## ") (lib.splitString "\n" text);
  stale = headings (builtins.readFile ../../docs/reference/nixos-options.md) != headings made.text;
in
lib.throwIf stale
  "docs/reference/nixos-options.md is not up to date: nix build .#options-doc && cp result docs/reference/nixos-options.md"
  (pkgs.runCommand "options" { passthru = { inherit made; }; } "touch $out")
