# Makes the systemd unit of a role.
{
  config,
  lib,
  utils,
}:
let
  cfg = config.services.tightwad;
in
role:
{
  # Description in the journal and in `systemctl status`.
  description,
  # Further arguments of `tightwad run <role>`.
  arguments ? [ ],
  # Whether the role starts llama.cpp's programs.
  computes ? true,
  # The model files that the role reads.
  models ? [ ],
  # Paths of secrets, by credential name. A null path is left out.
  credentials ? { },
  # Whether the role is ready as soon as it runs. The other roles wait for a model or a GPU.
  servesAtOnce ? false,
  # Further directives of this role.
  serviceConfig ? { },
}:
let
  name = "tightwad-${role}";
  escaped = lib.replaceStrings [ "%" ] [ "%%" ];
  secrets = lib.filterAttrs (_: path: path != null) credentials;
  hardening = import ./hardening.nix {
    inherit lib computes;
    inherit (cfg) gpu;
  };
  # `wants` and not `requires`, because the unit itself retries what is missing.
  awaited = [
    "network-online.target"
  ]
  ++ lib.optional (secrets ? local_key) "tightwad-local-key.service";
  groups =
    (hardening.SupplementaryGroups or [ ])
    ++ lib.optional (models != [ ] && cfg.modelGroup != null) cfg.modelGroup;
in
{
  inherit description;
  wantedBy = [ "multi-user.target" ];
  # The role listens on an address of this machine, which must exist first.
  wants = awaited;
  after = awaited;
  # RequiresMountsFor would fail the start job when a mount fails, and `Restart` retries processes, not jobs.
  unitConfig = lib.optionalAttrs (models != [ ]) { WantsMountsFor = map escaped models; };
  # Retry for ever, with growing pauses: a missing mount, driver or secret may come back.
  startLimitIntervalSec = 0;

  path = lib.optional computes cfg.llamaCpp.package;
  enableDefaultPath = false;
  environment = {
    # CUDA's and ROCm's caches of compiled kernels go below HOME.
    HOME = "/var/cache/${name}";
    XDG_CACHE_HOME = "/var/cache/${name}";
    XDG_RUNTIME_DIR = "/run/${name}";
    XDG_STATE_HOME = "/var/lib/${name}";
  }
  # The drivers of a system that is newer than the build need a newer C library than the build uses.
  // lib.optionalAttrs (computes && cfg.gpu == "vulkan" && cfg.llamaCpp.package ? vulkanDriverFiles) {
    VK_DRIVER_FILES = cfg.llamaCpp.package.vulkanDriverFiles;
  };

  serviceConfig =
    hardening
    // {
      ExecStart = utils.escapeSystemdExecArgs (
        [
          (lib.getExe cfg.package)
          "-c"
          # The store path of this role's part, so that only a change of that part restarts the unit.
          cfg.roleFiles.${role}
          "run"
          role
        ]
        ++ arguments
      );
      # `systemctl status` shows the state of the process in both cases. With `notify`, `systemctl start` also waits until the
      # process is ready.
      Type = if servesAtOnce || cfg.waitUntilReady then "notify" else "exec";
      NotifyAccess = "main";
      WatchdogSec = 60;

      Restart = "on-failure";
      RestartSec = 2;
      RestartSteps = 6;
      RestartMaxDelaySec = 60;
      # Do not retry a wrong command line (2). Retry a config error (3): the build has checked the file, so the cause is an
      # address that the machine does not have yet, for example of a VPN.
      RestartPreventExitStatus = 2;
      # The main process stops its children in the right order.
      KillMode = "mixed";
      # The main process restarts a server that the kernel killed for lack of memory.
      OOMPolicy = "continue";

      StateDirectory = name;
      CacheDirectory = name;
      RuntimeDirectory = name;
      StateDirectoryMode = "0700";
      CacheDirectoryMode = "0700";
      RuntimeDirectoryMode = "0700";
    }
    // lib.optionalAttrs (secrets != { }) {
      LoadCredential = lib.mapAttrsToList (name: path: "${name}:${escaped path}") secrets;
    }
    // lib.optionalAttrs (groups != [ ]) { SupplementaryGroups = groups; }
    // lib.optionalAttrs computes {
      # For `--mlock` in `extra_args`.
      LimitMEMLOCK = "infinity";
    }
    // serviceConfig;
}
