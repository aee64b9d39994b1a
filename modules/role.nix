# Makes the unit of a role out of what the role needs.
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
  # What it does, in the journal and in `systemctl status`.
  description,
  # What stands behind `tightwad run <role>`.
  arguments ? [ ],
  # Whether it starts llama.cpp's programs.
  computes ? true,
  # The model files that it reads.
  models ? [ ],
  # Paths of secrets by the names under which the binary asks for them; null: there is none.
  credentials ? { },
  # Whether it serves as soon as it runs. The other roles wait for a model or a GPU.
  servesAtOnce ? false,
  # Directives of this role alone.
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
  # Wants, not requires: the unit itself retries what is missing.
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
  # It listens on an address of this machine, which has to be there.
  wants = awaited;
  after = awaited;
  # RequiresMountsFor would fail the start job when a mount fails, and `Restart` retries processes, not jobs.
  unitConfig = lib.optionalAttrs (models != [ ]) { WantsMountsFor = map escaped models; };
  # What is missing may come back: a mount, a driver, a secret. It is tried again for ever, more and more seldom.
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
      # The process reports its state in either case, and `systemctl status` shows it. With `notify`, whoever starts the unit
      # waits until the process is ready.
      Type = if servesAtOnce || cfg.waitUntilReady then "notify" else "exec";
      NotifyAccess = "main";
      WatchdogSec = 60;

      Restart = "on-failure";
      RestartSec = 2;
      RestartSteps = 6;
      RestartMaxDelaySec = 60;
      # A wrong command line stays wrong until the next switch. A wrong file (3) was refused when it was built: what is left
      # of that is an address that the machine does not have yet, of a VPN for example.
      RestartPreventExitStatus = 2;
      # Its first process ends the others in the right order.
      KillMode = "mixed";
      # It starts a server anew that was killed for memory, and says so.
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
      # For `--mlock` among a section's extra_args.
      LimitMEMLOCK = "infinity";
    }
    // serviceConfig;
}
