# The roles `target` and `draft`: a llama-server of this machine's own.
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
        Where this machine has the key of the ${role}: the ${role} asks clients for it, and a proxy in front of it sends it.
        Outside of the Nix store.
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
        # It is ready when the model answers. That takes minutes from a slow disk; the binary knows when to give up.
        TimeoutStartSec = "infinity";
      };
    };
  };
}
