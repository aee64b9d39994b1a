# The role `proxy`: the OpenAI endpoint.
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
  inherit (cfg) cluster;

  drafts =
    if cluster.proxy.draft or null == null then
      { "draft.api_key_file" = cfg.draft.apiKeyFile; }
    else if lib.isList cluster.proxy.draft then
      lib.listToAttrs (
        lib.imap0 (
          number: draft: lib.nameValuePair "proxy.draft.${toString number}.api_key_file" draft.api_key_file
        ) cluster.proxy.draft
      )
    else
      { "proxy.draft.api_key_file" = cluster.proxy.draft.api_key_file; };
  target =
    if cluster.proxy.target or null != null then
      {
        "proxy.target.api_key_file" = cluster.proxy.target.api_key_file;
        "proxy.target.draft_key_file" = cluster.proxy.target.draft_key_file;
      }
    else if cluster.target != null then
      { "target.api_key_file" = cfg.target.apiKeyFile; }
    else
      {
        "coordinator.api_key_file" = cfg.coordinator.apiKeyFile;
        "coordinator.draft_key_file" = cfg.coordinator.draftKeyFile;
      };
in
{
  options.services.tightwad.proxy = {
    enable = mkOption {
      type = types.bool;
      default = topology.isHere "proxy";
      defaultText = literalMD "whether this host has the role `proxy` in `cluster.hosts`";
      description = "Whether this machine runs the endpoint for clients (`cluster.proxy`).";
    };
    authTokenFile = mkOption {
      type = types.nullOr types.externalPath;
      default = cluster.proxy.auth_token_file or null;
      defaultText = literalMD "`cluster.proxy.auth_token_file`";
      example = "/run/secrets/tightwad-token";
      description = "Path on this machine, outside of the Nix store, of the token that clients send as `Authorization: Bearer …`.";
    };
  };

  config.systemd.services = lib.mkIf (cfg.enable && cfg.proxy.enable) {
    tightwad-proxy = unitOf "proxy" {
      description = "Tightwad proxy: the OpenAI endpoint";
      computes = false;
      servesAtOnce = true;
      credentials = {
        "proxy.auth_token_file" = cfg.proxy.authTokenFile;
        local_key = topology.localKeyFile;
      }
      // drafts
      // target;
      # Each request uses a connection to the client, to the target and to each draft.
      serviceConfig.LimitNOFILE = 65536;
    };
  };
}
