# How much of the system a unit could reach, as systemd reckons: below 3.0 for every role, on every kind of GPU.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  roles = [
    "worker"
    "coordinator"
    "target"
    "draft"
    "proxy"
  ];
  host =
    gpu:
    self.inputs.nixpkgs.lib.nixosSystem {
      modules = [
        self.nixosModules.default
        {
          nixpkgs.hostPlatform = pkgs.stdenv.hostPlatform.system;
          nixpkgs.config.allowUnfree = true;
          networking.hostName = "one";
          users.groups.models = { };
          services.tightwad = {
            # Which one it is does not matter here, and not every system has all of them.
            llamaCpp.package = self.packages.${pkgs.stdenv.hostPlatform.system}.llama-cpp-cpu;
            modelGroup = "models";
            cluster = {
              hosts.one = {
                address = "10.0.0.1";
                inherit roles gpu;
              };
              proxy.auth_token_file = "/run/secrets/proxy";
              coordinator.api_key_file = "/run/secrets/coordinator";
              target.port = 8082;
              draft.port = 8081;
              workers = [
                {
                  name = "one";
                  agent_token_file = "/run/secrets/worker";
                }
              ];
              models.only.path = "/models/only.gguf";
            };
          };
        }
      ];
    };
  unitsOn =
    gpu:
    let
      inherit ((host gpu).config.systemd) services;
    in
    lib.listToAttrs (
      map (
        role:
        lib.nameValuePair "${gpu}-${role}.service" (
          lib.generators.toINI { listsAsDuplicateKeys = true; } {
            Service = services."tightwad-${role}".serviceConfig // {
              ExecStart = "/bin/true";
            };
          }
        )
      ) roles
    );
  units = lib.mergeAttrsList (
    map unitsOn [
      "none"
      "cuda"
      "rocm"
      "vulkan"
    ]
  );
in
pkgs.runCommand "exposure"
  {
    nativeBuildInputs = [
      pkgs.systemd
      pkgs.util-linux
    ];
    files = lib.mapAttrsToList pkgs.writeText units;
    passthru = { inherit units; };
  }
  ''
    # It wants a /run/systemd, which the root of a build does not have and does not let be made: here is a root that has one.
    mkdir -p root/nix root/proc root/tmp root/run/systemd
    cd root
    for file in $files; do
      # The name of a unit, without the store's hash.
      unit=''${file##*/}
      cp "$file" "''${unit#*-}"
    done
    unshare --map-root-user --mount sh -euc '
      mount --rbind /nix nix
      mount --rbind /proc proc
      chroot . systemd-analyze security --offline=true --threshold=30 --no-pager ./*.service
    '
    touch $out
  ''
