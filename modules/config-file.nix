# The files that the binary reads: one with the whole cluster, for people, and one for each unit with the part that its role
# reads. They hold `cluster` with the values that follow from `hosts`, and this machine's paths of secrets.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.tightwad;
  inherit (cfg) cluster settings;
  topology = import ./topology.nix { inherit lib cfg; };
  yaml = pkgs.formats.yaml { };

  # Drops keys without a value, so that the binary's default applies.
  pruned =
    value:
    if lib.isAttrs value then
      lib.mapAttrs (_: pruned) (lib.filterAttrs (_: value: value != null) value)
    else if lib.isList value then
      map pruned value
    else
      value;

  section =
    role: more:
    let
      given = cluster.${role};
      host = if given.host != null then given.host else topology.listenAddress role;
    in
    if given == null then null else given // more // { inherit host; };
  server =
    role: more:
    section role (
      more
      // {
        api_key_file = cfg.${role}.apiKeyFile;
        backend = topology.serverBackend role;
      }
    );
  workers = map (
    worker:
    worker
    // lib.optionalAttrs (topology.isOwnWorker worker) { agent_token_file = cfg.worker.agentTokenFile; }
  ) topology.workers;

  # Drops the string context of `path`, so that a file which only names a model does not make Nix download it.
  named = model: model // { path = builtins.unsafeDiscardStringContext model.path; };

  # The sections that `tightwad run ROLE` reads. A change of anything else does not restart the unit.
  parts =
    let
      reads = names: lib.intersectAttrs (lib.genAttrs names (_: null)) settings;
      computes = role: {
        models = topology.modelsOf role;
        # Port 0 clashes with no other port of the file.
        proxy =
          let
            max_draft_tokens = cluster.proxy.max_draft_tokens or null;
          in
          if max_draft_tokens == null then
            null
          else
            {
              port = 0;
              inherit max_draft_tokens;
            };
      };
      # The keys that the proxy reads of a server behind it.
      asked =
        role:
        lib.optionalAttrs (settings ? ${role}) {
          ${role} = lib.intersectAttrs {
            host = null;
            port = null;
            model = null;
            api_key_file = null;
            draft_key_file = null;
            allow_unauthenticated = null;
          } settings.${role};
        };
      askedModels =
        role:
        lib.optionalAttrs (settings ? ${role}) (
          lib.mapAttrs (_: model: { inherit (named model) path default; }) (topology.modelsOf role)
        );
      behindProxy =
        lib.optional (cluster.proxy.target or null == null) (
          if cluster.target != null then "target" else "coordinator"
        )
        ++ lib.optional (lib.elem (cluster.proxy.draft or null) [
          null
          [ ]
        ]) "draft";
    in
    {
      worker = reads [ "binaries" ] // {
        workers = lib.filter topology.isOwnWorker workers;
      };
      coordinator =
        reads [
          "coordinator"
          "workers"
          "binaries"
        ]
        // computes "coordinator";
      target =
        reads [
          "target"
          "binaries"
        ]
        // computes "target";
      draft =
        reads [
          "draft"
          "binaries"
        ]
        // computes "draft";
      proxy =
        reads [ "proxy" ]
        // lib.mergeAttrsList (map asked behindProxy)
        // {
          models = lib.mergeAttrsList (map askedModels behindProxy);
        };
    };

  checked =
    name: settings:
    let
      unchecked = yaml.generate name settings;
    in
    pkgs.runCommand name
      {
        inherit unchecked;
        passthru = { inherit settings unchecked; };
        preferLocalBuild = true;
      }
      ''
        if ! ${lib.getExe cfg.package} -c $unchecked check-config --portable; then
          echo "services.tightwad.cluster: correct the keys named above in this option" >&2
          exit 1
        fi
        cp $unchecked $out
      '';
in
{
  options.services.tightwad = {
    settings = mkOption {
      inherit (yaml) type;
      readOnly = true;
      internal = true;
      description = "Content of the cluster file on this machine.";
    };
    configFile = mkOption {
      type = types.package;
      readOnly = true;
      description = ''
        The checked cluster file. Only the paths of secrets differ between hosts. A host does not download the models that the
        file names. Each unit reads the part for its role, so that an edit of the cluster restarts only the units whose part
        changes.
      '';
    };
    roleFiles = mkOption {
      type = types.attrsOf types.package;
      readOnly = true;
      internal = true;
      description = "The checked files that this machine's units read, by role.";
    };
  };

  config = {
    services.tightwad = {
      settings = pruned {
        inherit (cluster) binaries;
        inherit workers;
        models = lib.mapAttrs (_: named) cluster.models;
        proxy = section "proxy" { auth_token_file = cfg.proxy.authTokenFile; };
        target = server "target" { };
        draft = server "draft" { };
        coordinator = server "coordinator" { draft_key_file = cfg.coordinator.draftKeyFile; };
      };
      configFile = checked "cluster.yaml" settings;
      roleFiles = lib.genAttrs (lib.filter (role: cfg.${role}.enable) topology.roles) (
        role: checked "tightwad-${role}.yaml" (pruned parts.${role})
      );
    };
    # The command `tightwad` looks for the file here.
    environment.etc = lib.mkIf cfg.enable { "tightwad/cluster.yaml".source = cfg.configFile; };
  };
}
