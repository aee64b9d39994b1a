# Exposure of each unit by `systemd-analyze security`: below 3.0 for each role and driver stack.
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
            # Any build will do here, and some systems lack some builds.
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
    # systemd-analyze needs /run/systemd. A build cannot make it in its own root, so this uses another root.
    mkdir -p root/nix root/proc root/tmp root/run/systemd
    cd root
    for file in $files; do
      # Name of the unit without the hash of the store path.
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
