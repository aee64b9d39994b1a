# The roles `target` and `draft`: a llama-server that uses only this machine.
role: purpose:
{
  config,
  lib,
  utils,
  ...
}:
let
  inherit (lib) literalMD mkOption types;
  cfg = config.services.tightwad;
  topology = import ./topology.nix { inherit lib cfg; };
  unitOf = import ./role.nix { inherit config lib utils; };
in
{
  options.services.tightwad.${role} = {
    enable = mkOption {
      type = types.bool;
      default = topology.isHere role;
      defaultText = literalMD "whether this host has the role `${role}` in `cluster.hosts`";
      description = "Whether this machine runs the llama-server ${purpose} (`cluster.${role}`).";
    };
    apiKeyFile = mkOption {
      type = types.nullOr types.externalPath;
      default = cfg.cluster.${role}.api_key_file or null;
      defaultText = literalMD "`cluster.${role}.api_key_file`";
      example = "/run/secrets/tightwad-${role}-key";
      description = ''
        Path of the ${role}'s key on this machine, outside of the Nix store. The ${role} requires the key from clients, and a
        proxy in front of it sends the key.
      '';
    };
  };

  config.systemd.services = lib.mkIf (cfg.enable && cfg.${role}.enable) {
    "tightwad-${role}" = unitOf role {
      description = "Tightwad ${role}: the llama-server ${purpose}";
      models = lib.mapAttrsToList (_: model: model.path) (topology.modelsOf role);
      credentials = {
        "${role}.api_key_file" = cfg.${role}.apiKeyFile;
        local_key = topology.localKeyFile;
      };
      serviceConfig = {
        # The unit is ready when the model is loaded, which takes minutes from a slow disk. The binary decides when to give up.
        TimeoutStartSec = "infinity";
      };
    };
  };
}
