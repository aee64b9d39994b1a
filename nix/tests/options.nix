# docs/options.md has every option. Names only: nixpkgs words the types, and may word them anew.
{ self, pkgs }:
let
  made = import ../options-doc.nix { inherit self pkgs; };
in
pkgs.runCommand "options" { passthru = { inherit made; }; } ''
  diff <(grep '^## ' ${../../docs/options.md}) <(grep '^## ' ${made}) || {
    echo 'docs/options.md is not up to date: nix build .#options-doc && cp result docs/options.md' >&2
    exit 1
  }
  touch $out
''
