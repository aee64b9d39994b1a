# The role `worker`: lends this machine's GPUs to the coordinator.
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
  own = lib.head topology.ownWorkers;
  name = topology.workerName own;
  # systemd gives the folder to the unit's user.
  cache = lib.removePrefix "/var/cache/" (toString own.cache_dir);
in
{
  options.services.tightwad.worker = {
    enable = mkOption {
      type = types.bool;
      default = topology.isHere "worker";
      defaultText = literalMD "whether this host has the role `worker` in `cluster.hosts`";
      description = "Whether this machine lends its GPUs to the coordinator, as an entry of `cluster.workers`.";
    };
    name = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "gaming-pc";
      description = "Name of this machine's entry in `cluster.workers`. Left out: the one with this host's name, else the one with its address.";
    };
    agentTokenFile = mkOption {
      type = types.nullOr types.externalPath;
      default = if topology.ownWorkers == [ ] then null else own.agent_token_file;
      defaultText = literalMD "`agent_token_file` of its entry of `cluster.workers`";
      example = "/run/secrets/tightwad-worker-token";
      description = "Path on this machine, outside of the Nix store, of the token that coordinators send to its agent.";
    };
  };

  config.systemd.services = lib.mkIf (cfg.enable && cfg.worker.enable && topology.ownWorkers != [ ]) {
    tightwad-worker = unitOf "worker" {
      description = "Tightwad worker: lends this machine's GPUs to the pool";
      arguments = [ name ];
      credentials."workers.${name}.agent_token_file" = cfg.worker.agentTokenFile;
      serviceConfig = lib.optionalAttrs (own.cache_dir != null) {
        CacheDirectory = [
          "tightwad-worker"
          cache
        ];
      };
    };
  };
}
