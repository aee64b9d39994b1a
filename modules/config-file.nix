# The file that the binary reads: `cluster` without `hosts`, with what follows from them, and with the paths where this
# machine has its secrets.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.tightwad;
  inherit (cfg) cluster;
  topology = import ./topology.nix { inherit lib cfg; };

  # A key without a value is left to the binary.
  pruned =
    value:
    if lib.isAttrs value then
      lib.mapAttrs (_: pruned) (lib.filterAttrs (_: value: value != null) value)
    else if lib.isList value then
      map pruned value
    else
      value;

  section =
    role: secret:
    let
      given = cluster.${role};
      host = if given.host != null then given.host else topology.listenAddress role;
    in
    if given == null then null else given // secret // { inherit host; };

  coordinator = section "coordinator" { api_key_file = cfg.coordinator.apiKeyFile; };

  unchecked = (pkgs.formats.yaml { }).generate "cluster.yaml" cfg.settings;
  checked =
    pkgs.runCommand "cluster.yaml"
      {
        inherit unchecked;
        passthru = { inherit unchecked; };
        preferLocalBuild = true;
      }
      ''
        if ! ${lib.getExe cfg.package} -c $unchecked check-config; then
          echo "services.tightwad.cluster: the keys named above are those of this option; correct them there" >&2
          exit 1
        fi
        cp $unchecked $out
      '';
in
{
  options.services.tightwad = {
    settings = mkOption {
      type = (pkgs.formats.yaml { }).type;
      readOnly = true;
      internal = true;
      description = "What the cluster file says on this machine.";
    };
    configFile = mkOption {
      type = types.package;
      readOnly = true;
      description = "The cluster file, checked. It is the same on every host but for the paths of secrets.";
    };
  };

  config = {
    services.tightwad = {
      settings = pruned {
        inherit (cluster) models binaries;
        proxy = section "proxy" { auth_token_file = cfg.proxy.authTokenFile; };
        target = section "target" { api_key_file = cfg.target.apiKeyFile; };
        draft = section "draft" { api_key_file = cfg.draft.apiKeyFile; };
        coordinator =
          if coordinator == null then null else coordinator // { backend = topology.coordinatorBackend; };
        workers = map (
          worker:
          worker
          // lib.optionalAttrs (topology.isOwnWorker worker) { agent_token_file = cfg.worker.agentTokenFile; }
        ) topology.workers;
      };
      configFile = checked;
    };
    # Where the command `tightwad` looks for it.
    environment.etc = lib.mkIf cfg.enable { "tightwad/cluster.yaml".source = cfg.configFile; };
  };
}
