# `services.tightwad`: this machine's part of a cluster. The argument is the flake, whose packages are the defaults.
{ self }:
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib)
    literalExpression
    literalMD
    mkOption
    types
    ;
  cfg = config.services.tightwad;
  topology = import ./topology.nix { inherit lib cfg; };
  inherit (pkgs.stdenv.hostPlatform) system;
  llamaCpp = "llama-cpp-${if cfg.gpu == "none" then "cpu" else cfg.gpu}";
  build =
    self.packages.${system}.${llamaCpp}
      or (throw "services.tightwad.gpu: this flake has no ${llamaCpp} for ${system}; choose another gpu, or set services.tightwad.llamaCpp.package");
  # Arguments of the build that differ from the flake's default build.
  generations = lib.filterAttrs (_: list: list != null) (
    {
      cuda = { inherit (cfg) cudaCapabilities; };
      rocm = { inherit (cfg) rocmGpuTargets; };
    }
    .${cfg.gpu} or { }
  );
  inherit (import ./generations.nix { inherit lib; }) cudaCapabilities rocmGpuTargets;
in
{
  imports = [
    ./assertions.nix
    ./cluster.nix
    ./config-file.nix
    ./coordinator.nix
    ./draft.nix
    ./firewall.nix
    ./local-key.nix
    ./proxy.nix
    ./target.nix
    ./worker.nix
  ];

  options.services.tightwad = {
    enable = mkOption {
      type = types.bool;
      default = cfg.cluster.hosts != { } || lib.any (role: cfg.${role}.enable) topology.roles;
      defaultText = literalMD "whether `cluster.hosts` names a host or a role is enabled";
      example = false;
      description = ''
        Whether this machine is part of the cluster. If so, it gets the cluster file, the command `tightwad`, and a unit
        `tightwad-<role>.service` for each of its roles.
      '';
    };

    host = mkOption {
      type = types.str;
      default = config.networking.hostName;
      defaultText = literalExpression "config.networking.hostName";
      example = "gaming-pc";
      description = "Name of this machine's entry in `services.tightwad.cluster.hosts`.";
    };

    gpu = mkOption {
      type = types.enum [
        "none"
        "cuda"
        "rocm"
        "vulkan"
      ];
      default = topology.here.gpu or "none";
      defaultText = literalMD "`gpu` of this machine's entry of `cluster.hosts`";
      example = "cuda";
      description = ''
        Driver stack of this machine's GPUs: `cuda` (NVIDIA), `rocm` (AMD), `vulkan` (any) or `none` (the CPU computes).
        It chooses the build of llama.cpp and the devices that the units may open. Set it only on a machine that is not in
        `cluster.hosts`.
      '';
    };

    cudaCapabilities = mkOption (
      cudaCapabilities
      // {
        default = topology.here.cudaCapabilities or null;
        defaultText = literalMD "`cudaCapabilities` of this machine's entry of `cluster.hosts`";
      }
    );
    rocmGpuTargets = mkOption (
      rocmGpuTargets
      // {
        default = topology.here.rocmGpuTargets or null;
        defaultText = literalMD "`rocmGpuTargets` of this machine's entry of `cluster.hosts`";
      }
    );

    package = mkOption {
      type = types.package;
      default = self.packages.${system}.tightwad;
      defaultText = literalMD "`tightwad` of this flake";
      example = literalExpression "inputs.tightwad.packages.x86_64-linux.tightwad";
      description = "Package with the command `tightwad`.";
    };

    llamaCpp.package = mkOption {
      type = types.package;
      default = if generations == { } then build else build.override generations;
      defaultText = literalMD "`llama-cpp-cpu`, `-cuda`, `-rocm` or `-vulkan` of this flake, by `gpu`, for `cudaCapabilities` or `rocmGpuTargets`";
      example = literalExpression "inputs.tightwad.packages.x86_64-linux.llama-cpp-vulkan";
      description = ''
        Package with the `llama-server` and `ggml-rpc-server` that this machine runs. All hosts of a pool need the same build
        of llama.cpp, so use the same revision of the flake on every host.
      '';
    };

    modelGroup = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "models";
      description = ''
        Group that can read the model files. The units `coordinator`, `target` and `draft` run as dynamic users, which are in
        no other group. Left out: the files must be readable, and their folders accessible, for every user.
      '';
    };

    interface = mkOption {
      # Linux allows more characters, but the firewall rules contain the name unquoted.
      type = types.nullOr (types.strMatching "[A-Za-z0-9_.-]{1,15}");
      default = null;
      example = "wg0";
      description = ''
        Network interface on which the other hosts and the clients reach this machine. `openFirewall` opens ports on it. Left
        out: every interface.
      '';
    };

    waitUntilReady = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether `nixos-rebuild switch`, `systemctl start` and the boot wait until this machine's units are ready (`Type=notify`
        instead of `exec`). A target or a draft is ready when its model is loaded, which takes minutes from a slow disk. A role
        on a GPU waits until llama.cpp finds that GPU. If false, a unit is active as soon as its process runs, and a model that
        does not load does not fail the switch; `systemctl status` shows the state. The proxy is ready at once in both cases.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether to open the ports of this machine's roles: a worker's RPC and agent ports for the coordinator's address only, a
        draft's and a target's port for the proxy's address only, and the proxy's and the coordinator's port for every client
        on `interface`. A port on the loopback address stays closed.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    # `tightwad plan` asks the coordinator's llama-server for its devices.
    environment.systemPackages = [
      cfg.package
    ]
    ++ lib.optional cfg.coordinator.enable cfg.llamaCpp.package;
  };
}
