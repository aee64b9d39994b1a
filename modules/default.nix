# `services.tightwad`: this machine's part of a cluster. A function of the flake, whose packages are the defaults.
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
  # What differs from the build that the flake has by itself.
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
        Whether this machine is part of the cluster. It then has the cluster file, the command `tightwad`, and a unit
        `tightwad-<role>.service` for each of its roles.
      '';
    };

    host = mkOption {
      type = types.str;
      default = config.networking.hostName;
      defaultText = literalExpression "config.networking.hostName";
      example = "gaming-pc";
      description = "Which entry of `services.tightwad.cluster.hosts` this machine is.";
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
        What drives this machine's GPUs: `cuda` (NVIDIA), `rocm` (AMD), `vulkan` (any) or `none` (the CPU computes).
        It chooses the build of llama.cpp and the devices that the units may open. To be set only on a machine that
        `cluster.hosts` does not name.
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
      description = "The package that has the command `tightwad`.";
    };

    llamaCpp.package = mkOption {
      type = types.package;
      default = if generations == { } then build else build.override generations;
      defaultText = literalMD "`llama-cpp-cpu`, `-cuda`, `-rocm` or `-vulkan` of this flake, by `gpu`, for `cudaCapabilities` or `rocmGpuTargets`";
      example = literalExpression "inputs.tightwad.packages.x86_64-linux.llama-cpp-vulkan";
      description = ''
        The llama.cpp whose `llama-server` and `ggml-rpc-server` this machine runs. A pool works with one build of
        llama.cpp only: take it on every host from the same revision of the flake.
      '';
    };

    modelGroup = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "models";
      description = ''
        Group that may read the model files. The units of coordinator, target and draft run as users of their own, who are
        in no other group. Left out: everybody has to be able to read the files, and to enter their folders.
      '';
    };

    interface = mkOption {
      # Linux allows more characters; the rules of the firewall contain the name as it stands here.
      type = types.nullOr (types.strMatching "[A-Za-z0-9_.-]{1,15}");
      default = null;
      example = "wg0";
      description = ''
        Network interface by which the hosts and the clients reach this machine; `openFirewall` opens its ports there. Left
        out: on every interface.
      '';
    };

    waitUntilReady = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether `nixos-rebuild switch`, `systemctl start` and the boot wait until the units of this machine serve
        (`Type=notify` in place of `exec`). A target or a draft serves when its model is loaded, which takes minutes from a slow
        disk; a role on a GPU serves when llama.cpp finds that GPU. If false, a unit is active as soon as its process runs,
        `systemctl status` shows what it waits for, and a model that does not load fails no switch. The proxy serves at once in
        either case.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether to open the ports of this machine's roles: a worker's RPC and agent ports to the coordinator's address
        only, a draft's and a target's port to the proxy's address only, the proxy's and the coordinator's port to
        everybody on `interface`. A port on the loopback address stays closed.
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
