# docs/reference/nixos-options.md: every option of the NixOS module, from the module itself.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  inherit (import ./host.nix { inherit self pkgs; } [ ]) options;
  documented = lib.filter (option: option.visible && !option.internal) (
    lib.optionAttrSetToDocList options.services.tightwad
  );

  # A value as Nix code. A value of several lines becomes a code block.
  value =
    title: shown:
    if shown._type == "literalMD" then
      "${title}: ${shown.text}\n"
    else if lib.hasInfix "\n" shown.text then
      "${title}:\n\n```nix\n${shown.text}\n```\n"
    else
      "${title}: `${shown.text}`\n";
  entry =
    option:
    lib.concatStringsSep "\n" (
      [
        "## `${option.name}`\n"
        "${lib.trim option.description}\n"
        "Type: ${option.type}\n"
      ]
      # A default of null is not shown: the description says what it means.
      ++ lib.optional (option ? default && option.default.text != "null") (value "Default" option.default)
      ++ lib.optional (option ? example) (value "Example" option.example)
    );
in
pkgs.writeText "options.md" ''
  # NixOS options

  `nix build .#options-doc` generates this page from `modules/`. Any other key of the [cluster file](config.md) can be set under
  `services.tightwad.cluster` too.

  ${lib.concatMapStringsSep "\n" entry documented}''
