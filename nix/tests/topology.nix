# Values that follow from `cluster.hosts` on each machine: units and their secrets, addresses and backends in the cluster file,
# firewall rules.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  host = import ../host.nix { inherit self pkgs; };
  cluster = {
    hosts = {
      server = {
        address = "10.0.0.1";
        roles = [
          "coordinator"
          "proxy"
        ];
        gpu = "rocm";
      };
      gaming-pc = {
        address = "10.0.0.2";
        roles = [ "worker" ];
        gpu = "vulkan";
      };
      mini-pc = {
        address = "10.0.0.3";
        roles = [ "draft" ];
      };
    };
    proxy.auth_token_file = "/run/secrets/proxy";
    coordinator.api_key_file = "/run/secrets/pool";
    draft = {
      model = "small";
      api_key_file = "/run/secrets/draft";
    };
    workers = [
      {
        name = "gaming-pc";
        agent_token_file = "/run/secrets/worker";
        gpus = [
          {
            name = "first";
            vram_gb = 16;
          }
          {
            name = "second";
            vram_gb = 8;
            rpc_port = 50060;
          }
        ];
      }
      # A worker that is not in `hosts`, for example with Windows.
      {
        name = "guest";
        host = "10.0.0.9";
        backend = "cuda";
        agent_port = 0;
      }
    ];
    models = {
      big = {
        path = "/models/big.gguf";
        default = true;
      };
      small.path = "/models/small.gguf";
    };
  };
  machine =
    hostName: more:
    let
      inherit
        (host [
          {
            networking = { inherit hostName; };
            services.tightwad = {
              inherit cluster;
              # Every system has this build.
              llamaCpp.package = self.packages.${pkgs.stdenv.hostPlatform.system}.llama-cpp-cpu;
            };
          }
          more
        ])
        config
        ;
      units = lib.filterAttrs (name: _: lib.hasPrefix "tightwad-" name) config.systemd.services;
      roles = removeAttrs units [ "tightwad-local-key" ];
    in
    {
      inherit (config.services.tightwad) settings;
      inherit (config.networking) firewall;
      units = lib.attrNames units;
      secrets = lib.mapAttrs (_: unit: unit.serviceConfig.LoadCredential) roles;
      after = lib.mapAttrs (_: unit: unit.after) roles;
      reads = lib.mapAttrs (_: unit: unit.unitConfig.WantsMountsFor or [ ]) roles;
      # A unit with a permanent fault is not restarted.
      requires = lib.mapAttrs (
        _: unit: unit.unitConfig.RequiresMountsFor or [ ] ++ unit.requires or [ ]
      ) roles;
      starts = lib.mapAttrs (_: unit: unit.serviceConfig.ExecStart) roles;
      types = lib.mapAttrs (_: unit: unit.serviceConfig.Type) roles;
      environment = lib.mapAttrs (_: unit: unit.environment) roles;
      devices = lib.mapAttrs (_: unit: unit.serviceConfig.DeviceAllow or [ ]) roles;
      parts = lib.mapAttrs (_: file: file.settings) config.services.tightwad.roleFiles;
    };
  open = {
    services.tightwad = {
      openFirewall = true;
      interface = "wg0";
    };
  };
  linesOf = text: lib.filter (line: line != "") (lib.splitString "\n" text);
  rulesOf =
    machine:
    map (line: lib.head (lib.splitString " || " line)) (linesOf machine.firewall.extraCommands);
  server = machine "server" open;
  gaming-pc = machine "gaming-pc" open;
  mini-pc = machine "mini-pc" (lib.recursiveUpdate open { networking.nftables.enable = true; });
  otherwise = machine "gaming-pc" (
    lib.recursiveUpdate open {
      networking.nftables.enable = true;
      networking.firewall.backend = "iptables";
    }
  );
  closed = machine "gaming-pc" { };
  withOwnPath = machine "server" {
    services.tightwad.draft.apiKeyFile = "/etc/keys/draft";
  };
  withTarget = machine "server" {
    services.tightwad.cluster.target.port = 8082;
  };
  # The units of three machines that an edit of the cluster changes.
  restarted =
    edit:
    lib.concatMap (
      name:
      let
        before = (machine name open).starts;
        after =
          (machine name {
            imports = [
              open
              { services.tightwad.cluster = edit; }
            ];
          }).starts;
      in
      map (unit: "${name}: ${unit}") (
        lib.filter (unit: before.${unit} != after.${unit}) (lib.attrNames before)
      )
    ) (lib.attrNames cluster.hosts);
  withTargets = machine "server" {
    services.tightwad.cluster = {
      hosts.server.roles = lib.mkForce [ "target" ];
      hosts.server.gpu = lib.mkForce "cuda";
      hosts.mini-pc.roles = lib.mkForce [
        "draft"
        "proxy"
      ];
      target.api_key_file = "/run/secrets/target";
      proxy.max_draft_tokens = 4;
      models.small.path = lib.mkForce "${fetched}";
    };
  };
  # A model that Nix downloads.
  fetched = pkgs.writeText "fetched.gguf" "GGUF";
  isNeeded = path: builtins.hasContext path;
  withFetched =
    model: name:
    machine name { services.tightwad.cluster.models.${model}.path = lib.mkForce "${fetched}"; };
  withLocalKey = machine "server" {
    services.tightwad.cluster = {
      hosts.server.roles = lib.mkForce [
        "target"
        "proxy"
      ];
      target.port = 8082;
    };
  };
  poolOf = edit: (machine "server" { services.tightwad.cluster = edit; }).parts.coordinator.models;
  withDraftKey = machine "server" {
    services.tightwad.cluster.coordinator.draft_key_file = "/run/secrets/pool-draft";
  };
  withPool = machine "server" {
    services.tightwad.cluster.proxy.target = {
      url = "http://10.0.0.9:8080";
      api_key_file = "/run/secrets/their-key";
      draft_key_file = "/run/secrets/their-draft-key";
    };
  };
  # With Vulkan drivers from its own nixpkgs.
  mesa = pkgs.writeText "mesa" "";
  withDrivers = machine "gaming-pc" {
    services.tightwad.llamaCpp.package = lib.mkForce (
      self.packages.${pkgs.stdenv.hostPlatform.system}.llama-cpp-vulkan.override { inherit mesa; }
    );
  };
  waiting = machine "server" { services.tightwad.waitUntilReady = true; };
  withoutProxy = machine "server" {
    services.tightwad.cluster.hosts.server.roles = lib.mkForce [ "coordinator" ];
  };

  expectations = {
    "the coordinator listens on loopback, where only the proxy beside it asks it" = [
      server.settings.coordinator.host
      "127.0.0.1"
    ];
    "a coordinator beside a target is an endpoint of its own" = [
      withTarget.settings.coordinator.host
      "10.0.0.1"
    ];
    "and so is one without a proxy" = [
      withoutProxy.settings.coordinator.host
      "10.0.0.1"
    ];
    "the proxy and a draft on another machine listen on their machines' addresses" = [
      (map (role: server.settings.${role}.host) [
        "proxy"
        "draft"
      ])
      [
        "10.0.0.1"
        "10.0.0.3"
      ]
    ];
    "a worker has the address and the backend of its host, or its own" = [
      (map (worker: [
        worker.host
        worker.backend
      ]) server.settings.workers)
      [
        [
          "10.0.0.2"
          "vulkan"
        ]
        [
          "10.0.0.9"
          "cuda"
        ]
      ]
    ];
    "the coordinator's backend is that of its host" = [
      server.settings.coordinator.backend
      "hip"
    ];
    "the file is the same everywhere" = [
      [
        gaming-pc.settings
        mini-pc.settings
      ]
      [
        server.settings
        server.settings
      ]
    ];
    "but for the path of a secret" = [
      (lib.recursiveUpdate withOwnPath.settings { draft.api_key_file = "/run/secrets/draft"; })
      server.settings
    ];
    "each machine runs its roles" = [
      (map (machine: machine.units) [
        server
        gaming-pc
        mini-pc
      ])
      [
        [
          "tightwad-coordinator"
          "tightwad-proxy"
        ]
        [ "tightwad-worker" ]
        [ "tightwad-draft" ]
      ]
    ];
    "a unit has the secrets of its role and no other" = [
      (server.secrets // gaming-pc.secrets // mini-pc.secrets)
      {
        tightwad-coordinator = [
          "coordinator.api_key_file:/run/secrets/pool"
          "workers.gaming-pc.agent_token_file:/run/secrets/worker"
        ];
        tightwad-proxy = [
          "coordinator.api_key_file:/run/secrets/pool"
          "draft.api_key_file:/run/secrets/draft"
          "proxy.auth_token_file:/run/secrets/proxy"
        ];
        tightwad-worker = [ "workers.gaming-pc.agent_token_file:/run/secrets/worker" ];
        tightwad-draft = [ "draft.api_key_file:/run/secrets/draft" ];
      }
    ];
    "a target behind a proxy of its machine shares a key with that, made at the boot" = [
      withLocalKey.secrets
      {
        tightwad-proxy = [
          "draft.api_key_file:/run/secrets/draft"
          "local_key:/run/tightwad-local-key/key"
          "proxy.auth_token_file:/run/secrets/proxy"
        ];
        tightwad-target = [ "local_key:/run/tightwad-local-key/key" ];
      }
    ];
    "and where everybody may use it there is none" = [
      (machine "server" {
        services.tightwad.cluster = {
          hosts.server.roles = lib.mkForce [ "target" ];
          target = {
            port = 8082;
            host = "127.0.0.1";
            allow_unauthenticated = true;
          };
        };
      }).units
      [ "tightwad-target" ]
    ];
    "a coordinator and the proxy before it have the key of those who draft" = [
      withDraftKey.secrets
      {
        tightwad-coordinator = [
          "coordinator.api_key_file:/run/secrets/pool"
          "coordinator.draft_key_file:/run/secrets/pool-draft"
          "workers.gaming-pc.agent_token_file:/run/secrets/worker"
        ];
        tightwad-proxy = [
          "coordinator.api_key_file:/run/secrets/pool"
          "coordinator.draft_key_file:/run/secrets/pool-draft"
          "draft.api_key_file:/run/secrets/draft"
          "proxy.auth_token_file:/run/secrets/proxy"
        ];
      }
    ];
    "and so has a proxy in front of a pool that it names" = [
      (lib.filter (lib.hasPrefix "proxy.target.") withPool.secrets.tightwad-proxy)
      [
        "proxy.target.api_key_file:/run/secrets/their-key"
        "proxy.target.draft_key_file:/run/secrets/their-draft-key"
      ]
    ];
    "the files name it" = [
      [
        withDraftKey.parts.coordinator.coordinator.draft_key_file
        withDraftKey.parts.proxy.coordinator.draft_key_file
        withPool.parts.proxy.proxy.target.draft_key_file
      ]
      [
        "/run/secrets/pool-draft"
        "/run/secrets/pool-draft"
        "/run/secrets/their-draft-key"
      ]
    ];
    "units are started after the key is made" = [
      withLocalKey.after
      (lib.genAttrs
        [
          "tightwad-proxy"
          "tightwad-target"
        ]
        (_: [
          "network-online.target"
          "tightwad-local-key.service"
        ])
      )
    ];
    "from where this machine has it" = [
      (lib.elem "draft.api_key_file:/etc/keys/draft" withOwnPath.secrets.tightwad-proxy)
      true
    ];
    "a unit waits for the mounts of the models that it reads" = [
      (server.reads // gaming-pc.reads // mini-pc.reads)
      {
        tightwad-coordinator = [
          "/models/big.gguf"
        ];
        tightwad-proxy = [ ];
        tightwad-worker = [ ];
        tightwad-draft = [ "/models/small.gguf" ];
      }
    ];
    "a unit whose mount fails is tried again" = [
      (server.requires // gaming-pc.requires // mini-pc.requires)
      {
        tightwad-coordinator = [ ];
        tightwad-proxy = [ ];
        tightwad-worker = [ ];
        tightwad-draft = [ ];
      }
    ];
    "a model that Nix downloads is needed by the hosts that read it only" = [
      {
        server = isNeeded (withFetched "big" "server").parts.coordinator.models.big.path;
        mini-pc = isNeeded (withFetched "small" "mini-pc").parts.draft.models.small.path;
        proxy = lib.any isNeeded (
          map (model: model.path) (lib.attrValues (withFetched "small" "server").parts.proxy.models)
        );
        worker = (withFetched "big" "gaming-pc").parts.worker ? models;
        cluster-file = isNeeded (withFetched "small" "mini-pc").settings.models.small.path;
      }
      {
        server = true;
        mini-pc = true;
        proxy = false;
        worker = false;
        cluster-file = false;
      }
    ];
    "an edit of the draft restarts the draft" = [
      (restarted { draft.slots = 2; })
      [ "mini-pc: tightwad-draft" ]
    ];
    "and one that concerns the proxy restarts the proxy too" = [
      (restarted { draft.port = 8090; })
      [
        "mini-pc: tightwad-draft"
        "server: tightwad-proxy"
      ]
    ];
    "another worker restarts the coordinator, and no worker" = [
      (restarted {
        workers = [
          {
            name = "laptop";
            host = "10.0.0.8";
          }
        ];
      })
      [ "server: tightwad-coordinator" ]
    ];
    "an edit of the proxy restarts the proxy" = [
      (restarted { proxy.keepalive_seconds = 5; })
      [ "server: tightwad-proxy" ]
    ];
    "a model's context restarts those that read it" = [
      (restarted { models.big.ctx_size = 4096; })
      [ "server: tightwad-coordinator" ]
    ];
    "a pool has every model but the one that only drafts" = [
      [
        (lib.attrNames server.parts.coordinator.models)
        (lib.attrNames (poolOf {
          draft.model = lib.mkForce null;
        }))
        (lib.attrNames (poolOf {
          draft.model = lib.mkForce "big";
        }))
      ]
      [
        [ "big" ]
        [
          "big"
          "small"
        ]
        [
          "big"
          "small"
        ]
      ]
    ];
    "a target has its own model and the proxy's limit of draft tokens" = [
      withTargets.parts
      {
        target = {
          target = withTargets.settings.target;
          models.big = withTargets.settings.models.big;
          proxy = {
            port = 0;
            max_draft_tokens = 4;
          };
        };
      }
    ];
    "a target and a draft have the backend of their host" = [
      (map (role: withTargets.settings.${role}.backend or null) [
        "target"
        "draft"
      ])
      [
        "cuda"
        null
      ]
    ];
    "Vulkan's drivers are of the nixpkgs that llama.cpp is of" = [
      withDrivers.environment.tightwad-worker.VK_DRIVER_FILES
      "${mesa}/share/vulkan/icd.d:/run/opengl-driver/share/vulkan/icd.d/nvidia_icd.${pkgs.stdenv.hostPlatform.parsed.cpu.name}.json"
    ];
    "and no other machine has one" = [
      (lib.filter (unit: server.environment.${unit} ? VK_DRIVER_FILES) server.units)
      [ ]
    ];
    "the GPU of WSL may be opened, with the others" = [
      (map (lib.elem "/dev/dxg rw") [
        server.devices.tightwad-coordinator
        withDrivers.devices.tightwad-worker
      ])
      [
        true
        true
      ]
    ];
    "`switch` waits for no model" = [
      (server.types // gaming-pc.types // mini-pc.types)
      {
        tightwad-coordinator = "exec";
        tightwad-proxy = "notify";
        tightwad-worker = "exec";
        tightwad-draft = "exec";
      }
    ];
    "but where it is to" = [
      waiting.types
      {
        tightwad-coordinator = "notify";
        tightwad-proxy = "notify";
      }
    ];
    "clients reach the proxy on the interface, and not the coordinator on loopback" = [
      server.firewall.interfaces.wg0.allowedTCPPorts
      [ 8088 ]
    ];
    "a worker's ports are open to the coordinator only" = [
      (rulesOf gaming-pc)
      [
        "iptables -w -A nixos-fw -i wg0 -s 10.0.0.1 -p tcp --dport 50052 -j nixos-fw-accept"
        "iptables -w -A nixos-fw -i wg0 -s 10.0.0.1 -p tcp --dport 50060 -j nixos-fw-accept"
        "iptables -w -A nixos-fw -i wg0 -s 10.0.0.1 -p tcp --dport 50051 -j nixos-fw-accept"
      ]
    ];
    "no command of the firewall can end its script" = [
      (map (text: lib.filter (line: !lib.hasInfix " || " line) (linesOf text)) [
        gaming-pc.firewall.extraCommands
        gaming-pc.firewall.extraStopCommands
      ])
      [
        [ ]
        [ ]
      ]
    ];
    "a draft's port is open to the proxy only, with nftables too" = [
      mini-pc.firewall.extraInputRules
      "iifname \"wg0\" ip saddr 10.0.0.1 tcp dport { 8081 } accept comment \"tightwad draft\"\n"
    ];
    "the backend of the firewall is what NixOS says, and not a service that happens to run" = [
      otherwise.firewall
      gaming-pc.firewall
    ];
    "nothing is open by itself" = [
      [
        closed.firewall.extraCommands
        closed.firewall.extraInputRules
        closed.firewall.interfaces
      ]
      [
        ""
        ""
        { }
      ]
    ];
  };
in
import ../expectations.nix { inherit pkgs; } "topology" {
  # For firewall.sh.
  firewall = {
    start = gaming-pc.firewall.extraCommands;
    stop = gaming-pc.firewall.extraStopCommands;
    nftables = mini-pc.firewall.extraInputRules;
  };
} expectations
