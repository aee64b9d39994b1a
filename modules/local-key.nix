# The key that a target or a draft without a key of its own asks for on the loopback address: other programs of the machine, a
# web page in a browser for example, do not have it. Units have users of their own, so root makes it for all of them.
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
      description = "Tightwad: the key of the servers that only this machine reaches";
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
        # A key that changes would lock out who has the old one.
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
