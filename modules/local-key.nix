# Makes the key for a target or a draft that listens on a loopback address and has no configured key. The key keeps out other
# programs of the machine, for example a web page in a browser. Root makes it, because each unit runs as its own user.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.tightwad;
  topology = import ./topology.nix { inherit lib cfg; };
in
{
  config = lib.mkIf (cfg.enable && topology.localKeyFile != null) {
    systemd.services.tightwad-local-key = {
      description = "Tightwad: key of the servers on the loopback address";
      path = [ pkgs.coreutils ];
      enableDefaultPath = false;
      script = ''
        test -s key || {
          od -A n -v -t x1 -N 32 /dev/urandom | tr -d ' \n' >key.new
          mv key.new key
        }
      '';
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        RuntimeDirectory = baseNameOf (dirOf topology.localKeyFile);
        RuntimeDirectoryMode = "0700";
        # Keep the key when this unit restarts: the running units hold the old one.
        RuntimeDirectoryPreserve = true;
        WorkingDirectory = dirOf topology.localKeyFile;
        UMask = "0077";
        CapabilityBoundingSet = "";
        NoNewPrivileges = true;
        PrivateNetwork = true;
        PrivateTmp = true;
        ProtectHome = true;
        ProtectSystem = "strict";
        SystemCallFilter = [ "@system-service" ];
      };
    };
  };
}
