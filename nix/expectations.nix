# A check that pairs of values are equal. Evaluation fails with the name of each pair that is not.
{ pkgs }:
name: passthru: expectations:
let
  inherit (pkgs) lib;
  unmet = lib.filterAttrs (_: pair: lib.head pair != lib.last pair) expectations;
  shown = lib.mapAttrsToList (
    property: pair:
    "${property}: ${builtins.toJSON (lib.head pair)} is not ${builtins.toJSON (lib.last pair)}"
  ) unmet;
in
lib.throwIf (unmet != { }) (lib.concatStringsSep "\n" shown) (
  pkgs.runCommand name { inherit passthru; } "touch $out"
)
