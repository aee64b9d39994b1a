# The role `coordinator`: one model over the workers' GPUs and this machine's own.
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
  # As this machine's file says; a worker may be beside the coordinator.
  tokenOf =
    worker:
    lib.nameValuePair "workers.${worker.name or worker.host}.agent_token_file" (
      worker.agent_token_file or null
    );
in
{
  options.services.tightwad.coordinator = {
    enable = mkOption {
      type = types.bool;
      default = topology.isHere "coordinator";
      defaultText = literalMD "whether this host has the role `coordinator` in `cluster.hosts`";
      description = "Whether this machine runs the pool's llama-server (`cluster.coordinator`).";
    };
    apiKeyFile = mkOption {
      type = types.nullOr types.externalPath;
      default = cfg.cluster.coordinator.api_key_file or null;
      defaultText = literalMD "`cluster.coordinator.api_key_file`";
      example = "/run/secrets/tightwad-pool-key";
      description = ''
        Where this machine has the key of the pool: the coordinator asks clients for it, and a proxy in front of it sends it.
        Outside of the Nix store.
      '';
    };
    draftKeyFile = mkOption {
      type = types.nullOr types.externalPath;
      default = cfg.cluster.coordinator.draft_key_file or null;
      defaultText = literalMD "`cluster.coordinator.draft_key_file`";
      example = "/run/secrets/tightwad-pool-draft-key";
      description = ''
        Where this machine has the key of the pool's drafters: the coordinator asks proxies on other hosts for it, and a proxy
        in front of it sends it. Outside of the Nix store.
      '';
    };
  };

  config.systemd.services = lib.mkIf (cfg.enable && cfg.coordinator.enable) {
    tightwad-coordinator = unitOf "coordinator" {
      description = "Tightwad coordinator: one model over the GPUs of the pool";
      models = lib.mapAttrsToList (_: model: model.path) (topology.modelsOf "coordinator");
      credentials = {
        "coordinator.api_key_file" = cfg.coordinator.apiKeyFile;
        "coordinator.draft_key_file" = cfg.coordinator.draftKeyFile;
      }
      // lib.listToAttrs (map tokenOf cfg.settings.workers);
      serviceConfig = {
        LimitNOFILE = 65536;
        # Running answers may finish, and the workers' memory is given back.
        TimeoutStopSec = 60 + cfg.cluster.coordinator.drain_seconds or 30;
      };
    };
  };
}
