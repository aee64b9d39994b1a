# Evaluates the module on one machine, with only those NixOS options that the module reads and sets. Dozens of tests take
# seconds this way, and minutes with whole systems. The checks `template-*` evaluate whole systems.
{ self, pkgs }:
modules:
let
  inherit (pkgs) lib;
  inherit (lib) mkOption types;
  option = type: default: mkOption { inherit type default; };
  lines = option types.lines "";
  allowedTCPPorts = option (types.listOf types.port) [ ];
in
lib.evalModules {
  modules = [
    self.nixosModules.default
    (
      { config, ... }:
      {
        options = {
          assertions = option (types.listOf types.raw) [ ];
          warnings = option (types.listOf types.str) [ ];
          environment.etc = option (types.attrsOf types.raw) { };
          environment.systemPackages = option (types.listOf types.package) [ ];
          hardware.graphics.enable = option types.bool false;
          networking = {
            enableIPv6 = option types.bool true;
            hostName = option types.str "nixos";
            nftables.enable = option types.bool false;
            firewall = {
              backend = option (types.enum [
                "iptables"
                "nftables"
                "firewalld"
              ]) (if config.networking.nftables.enable then "nftables" else "iptables");
              inherit allowedTCPPorts;
              interfaces = option (types.attrsOf (
                types.submodule { options = { inherit allowedTCPPorts; }; }
              )) { };
              extraCommands = lines;
              extraStopCommands = lines;
              extraInputRules = lines;
            };
          };
          systemd.services = option (types.attrsOf types.raw) { };
          users.groups = option (types.attrsOf types.raw) { };
        };
        config._module.args = {
          pkgs = lib.mkDefault pkgs;
          utils.escapeSystemdExecArgs = toString;
        };
      }
    )
  ]
  ++ modules;
}
