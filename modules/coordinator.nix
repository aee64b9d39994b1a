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
  # The worker's token as a credential. The path is that of this machine's file.
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
      description = "Whether this machine runs the coordinator of the pool (`cluster.coordinator`).";
    };
    apiKeyFile = mkOption {
      type = types.nullOr types.externalPath;
      default = cfg.cluster.coordinator.api_key_file or null;
      defaultText = literalMD "`cluster.coordinator.api_key_file`";
      example = "/run/secrets/tightwad-pool-key";
      description = ''
        Path of the pool's key on this machine, outside of the Nix store. The coordinator requires the key from clients, and a
        proxy in front of it sends the key.
      '';
    };
    draftKeyFile = mkOption {
      type = types.nullOr types.externalPath;
      default = cfg.cluster.coordinator.draft_key_file or null;
      defaultText = literalMD "`cluster.coordinator.draft_key_file`";
      example = "/run/secrets/tightwad-pool-draft-key";
      description = ''
        Path of the key for drafting on this machine, outside of the Nix store. The coordinator requires the key from proxies on
        other hosts, and a proxy in front of it sends the key.
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
        # Time to finish running answers and to return the workers.
        TimeoutStopSec = 60 + cfg.cluster.coordinator.drain_seconds or 30;
      };
    };
  };
}
