# Planted faults. Evaluation refuses each one with a message that names the option to change. `nix flake check` checks that each is
# refused, and reads the messages of assertions. It cannot read the messages that Nix itself throws; refusals.sh does.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  machine = import ../host.nix { inherit self pkgs; };

  # The system that this machine would switch to, or the error.
  evaluate =
    fault:
    let
      host = machine [
        {
          networking.hostName = "one";
          hardware.graphics.enable = true;
          services.tightwad.cluster = sound;
        }
        fault
      ];
      inherit (host.config) services systemd assertions;
      failed = lib.filter (
        entry: !entry.assertion && lib.hasPrefix "services.tightwad" entry.message
      ) assertions;
    in
    {
      messages = map (entry: entry.message) failed;
      # Forces every value that the module sets.
      made = builtins.deepSeq [
        failed
        services.tightwad.settings
        services.tightwad.interface
        (lib.mapAttrs (_: unit: unit.serviceConfig) (
          lib.filterAttrs (name: _: lib.hasPrefix "tightwad" name) systemd.services
        ))
        host.config.networking.firewall.extraCommands
      ] services.tightwad.configFile;
    };

  # A cluster without faults. This machine has all roles.
  sound = {
    hosts.one = {
      address = "10.0.0.1";
      roles = [
        "worker"
        "coordinator"
        "proxy"
      ];
    };
    hosts.two = {
      address = "10.0.0.2";
      roles = [ "draft" ];
    };
    proxy.auth_token_file = "/run/secrets/proxy";
    coordinator = { };
    draft = {
      port = 8081;
      model = "small";
      api_key_file = "/run/secrets/draft";
    };
    workers = [
      {
        name = "one";
        agent_token_file = "/run/secrets/worker";
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
  together = imports: { inherit imports; };
  cluster = changes: { services.tightwad.cluster = changes; };
  worker = changes: cluster { workers = lib.mkForce [ ({ name = "one"; } // changes) ]; };

  draftWithoutKey = more: {
    networking.hostName = lib.mkForce "two";
    services.tightwad.cluster.draft = {
      api_key_file = lib.mkForce null;
    }
    // more;
  };
  # A machine with CUDA that allows these unfree packages.
  allowing = allowUnfreePackages: {
    _module.args.pkgs = pkgs // {
      config = pkgs.config // {
        inherit allowUnfreePackages;
      };
    };
    services.tightwad.cluster.hosts.one.gpu = "cuda";
  };

  # Like nixpkgs: in an impure evaluation the environment variable also allows unfree packages.
  cudaWithoutUnfree = {
    "CUDA without unfree" = cluster { hosts.one.gpu = "cuda"; };
    "CUDA with another unfree package" = allowing [ "steam" ];
  };
  unfreeByVariable = builtins.getEnv "NIXPKGS_ALLOW_UNFREE" == "1";

  # Configurations that resemble a fault and are correct.
  accepted = lib.optionalAttrs unfreeByVariable cudaWithoutUnfree // {
    "a draft that everybody may use" = draftWithoutKey { allow_unauthenticated = true; };
    "CUDA with NVIDIA's driver allowed" = allowing [ "nvidia-x11" ];
    "a host with a name, where the firewall is not opened" = cluster {
      hosts.two.address = lib.mkForce "two.example";
    };
    "peers with IPv6" = together [
      (cluster { hosts.two.address = lib.mkForce "fd00::2"; })
      { services.tightwad.openFirewall = true; }
    ];
    "a worker with a GPU of its host's kind" = cluster {
      hosts.one.gpu = "rocm";
      workers = lib.mkForce [
        {
          name = "one";
          agent_token_file = "/run/secrets/worker";
          gpus = [
            {
              name = "first";
              vram_gb = 24;
              device = "ROCm0";
            }
          ];
        }
      ];
    };
    "a target that only this machine's own option runs" = together [
      (cluster {
        target.port = 8082;
        coordinator.api_key_file = "/run/secrets/pool";
      })
      { services.tightwad.target.enable = true; }
    ];
    "a coordinator without workers, with GPUs of its own" = cluster {
      hosts.one = {
        roles = lib.mkForce [
          "coordinator"
          "proxy"
        ];
        gpu = "vulkan";
      };
      workers = lib.mkForce [ ];
      coordinator.gpus = [
        {
          name = "first";
          vram_gb = 24;
        }
      ];
    };
    "firewalld, and its ports opened by hand" = {
      networking.firewall.backend = "firewalld";
    };
    "arguments and variables of other names" = cluster {
      draft.extra_args = [
        "--host-memory"
        "-p"
      ];
      draft.env.LLAMA_ARG_IMAGE_MAX_TOKENS = "1024";
      proxy.target.url = "http://10.0.0.9:8080/@me";
    };
  };
  # The faults. A message must begin with the given text; a message that Nix throws must contain it.
  faults = {
    host-not-in-the-cluster = {
      fault = {
        networking.hostName = lib.mkForce "three";
      };
      option = "services.tightwad.host: `three`";
    };
    role-without-its-section = {
      fault.services.tightwad.target.enable = true;
      option = "services.tightwad.cluster.target: missing";
    };
    role-of-two-hosts = {
      fault = cluster { hosts.two.roles = [ "proxy" ]; };
      option = "services.tightwad.cluster.hosts: one, two have the role `proxy`";
    };
    worker-without-its-entry = {
      fault = cluster { workers = lib.mkForce [ ]; };
      option = "services.tightwad.cluster.workers: no entry is this machine";
    };
    worker-without-address = {
      fault = cluster { workers = [ { name = "three"; } ]; };
      option = "services.tightwad.cluster.workers.1.host: missing";
    };
    worker-of-two-names = {
      fault = cluster { workers = [ { name = "one"; } ]; };
      option = "services.tightwad.worker.name: several entries";
    };
    worker-without-token = {
      fault = worker { };
      option = "services.tightwad.worker.agentTokenFile: missing";
    };
    rpc-on-all-interfaces = {
      fault = worker { host = "0.0.0.0"; };
      option = "services.tightwad.cluster.workers.0.host: 0.0.0.0";
    };
    rpc-on-all-interfaces-in-short = {
      fault = worker { host = "0"; };
      option = "services.tightwad.cluster.workers.0.host: 0 would";
    };
    rpc-on-all-interfaces-of-ipv6 = {
      fault = worker { host = "[::]"; };
      option = "services.tightwad.cluster.workers.0.host: [::] would";
    };
    rpc-on-all-interfaces-by-arguments = {
      fault = worker {
        extra_args = [
          "--host"
          "0.0.0.0"
        ];
      };
      option = "services.tightwad.cluster.workers.0.extra_args: must not hold `--host`";
    };
    rpc-on-another-port-by-arguments = {
      fault = worker {
        extra_args = [
          "-p"
          "50099"
        ];
      };
      option = "services.tightwad.cluster.workers.0.extra_args: must not hold `-p`";
    };
    draft-elsewhere-by-arguments = {
      fault = cluster { draft.extra_args = [ "--host=0.0.0.0" ]; };
      option = "services.tightwad.cluster.draft.extra_args: must not hold `--host`";
    };
    model-elsewhere-by-arguments = {
      fault = cluster {
        models.small.extra_args = [
          "--port"
          "9000"
        ];
      };
      option = "services.tightwad.cluster.models.small.extra_args: must not hold `--port`";
    };
    address-with-an-octet-of-300 = {
      fault = cluster { hosts.two.address = lib.mkForce "192.168.1.300"; };
      option = "services.tightwad.cluster.hosts.two.address: `192.168.1.300` is neither";
    };
    address-with-a-zone = {
      fault = cluster { hosts.two.address = lib.mkForce "fe80::1%eth0"; };
      option = "services.tightwad.cluster.hosts.two.address: `fe80::1%eth0` is neither";
    };
    address-of-ipv4-in-ipv6 = {
      fault = cluster { hosts.two.address = lib.mkForce "::ffff:10.0.0.2"; };
      option = "services.tightwad.cluster.hosts.two.address: `::ffff:10.0.0.2` is an IPv4";
    };
    address-of-two-hosts = {
      fault = cluster { hosts.two.address = lib.mkForce "10.0.0.1"; };
      option = "services.tightwad.cluster.hosts.two.address: `10.0.0.1` is the address of `one`";
    };
    address-of-two-hosts-in-two-spellings = {
      fault = cluster {
        hosts.one.address = lib.mkForce "fd00::1";
        hosts.two.address = lib.mkForce "fd00:0::1";
      };
      option = "services.tightwad.cluster.hosts.two.address: `fd00:0::1` is the address of `one`";
    };
    ipv6-peer-without-ipv6 = {
      fault = {
        networking.enableIPv6 = false;
        services.tightwad.cluster.hosts.two.address = lib.mkForce "fd00::2";
      };
      option = "services.tightwad.cluster.hosts.two.address: `fd00::2` is an IPv6 address";
    };
    address-to-listen-on-with-an-octet-of-300 = {
      fault = cluster { proxy.host = "10.0.0.300"; };
      option = "services.tightwad.cluster.proxy.host: `10.0.0.300` is neither";
    };
    address-of-a-worker-with-an-octet-of-300 = {
      fault = worker { host = "10.0.0.300"; };
      option = "services.tightwad.cluster.workers.0.host: `10.0.0.300` is neither";
    };
    draft-that-no-host-runs = {
      fault = cluster { hosts.two.roles = lib.mkForce [ ]; };
      option = "services.tightwad.cluster.draft: no host";
    };
    target-that-no-host-runs = {
      fault = cluster { target.port = 8082; };
      option = "services.tightwad.cluster.target: no host";
    };
    coordinator-without-workers-and-gpus = {
      fault = cluster {
        hosts.one.roles = lib.mkForce [
          "coordinator"
          "proxy"
        ];
        workers = lib.mkForce [ ];
      };
      option = "services.tightwad.cluster.coordinator.gpus: empty";
    };
    device-of-a-worker-without-gpu = {
      fault = worker {
        gpus = [
          {
            name = "first";
            vram_gb = 16;
            device = "CUDA0";
          }
        ];
      };
      option = "services.tightwad.cluster.workers.0.gpus.0.device: `CUDA0`";
    };
    device-of-rocm-on-a-host-with-cuda = {
      fault = together [
        (cluster { hosts.two.gpu = "cuda"; })
        (cluster {
          workers = [
            {
              name = "two";
              gpus = [
                {
                  name = "first";
                  vram_gb = 16;
                }
                {
                  name = "second";
                  vram_gb = 16;
                  device = "ROCm0";
                }
              ];
            }
          ];
        })
      ];
      option = "services.tightwad.cluster.workers.1.gpus.1.device: `ROCm0`";
    };
    device-of-a-coordinator-without-gpu = {
      fault = cluster {
        coordinator.gpus = [
          {
            name = "first";
            vram_gb = 24;
            device = "Vulkan0";
          }
        ];
      };
      option = "services.tightwad.cluster.coordinator.gpus.0.device: `Vulkan0`";
    };
    model-among-the-arguments = {
      fault = cluster {
        draft.extra_args = [
          "-m"
          "/models/other.gguf"
        ];
      };
      option = "services.tightwad.cluster.draft.extra_args: must not hold `-m`";
    };
    model-among-the-arguments-of-a-model = {
      fault = cluster { models.big.extra_args = [ "--model=/models/other.gguf" ]; };
      option = "services.tightwad.cluster.models.big.extra_args: must not hold `--model`";
    };
    workers-among-the-arguments = {
      fault = cluster {
        coordinator.extra_args = [
          "--rpc"
          "10.0.0.9:50052"
        ];
      };
      option = "services.tightwad.cluster.coordinator.extra_args: must not hold `--rpc`";
    };
    address-among-the-arguments = {
      fault = cluster {
        coordinator.extra_args = [
          "--host"
          "0.0.0.0"
        ];
      };
      option = "services.tightwad.cluster.coordinator.extra_args: must not hold `--host`";
    };
    cuda-without-the-driver-of-the-system = {
      fault = together [
        (allowing [ "nvidia-x11" ])
        { hardware.graphics.enable = lib.mkForce false; }
      ];
      option = "services.tightwad.gpu: \"cuda\" needs the driver";
    };
    vulkan-without-the-driver-of-the-system = {
      fault = together [
        (cluster { hosts.one.gpu = "vulkan"; })
        { hardware.graphics.enable = lib.mkForce false; }
      ];
      option = "services.tightwad.gpu: \"vulkan\" needs the driver";
    };
    host-on-all-interfaces = {
      fault = cluster { hosts.two.address = lib.mkForce "0.0.0.0"; };
      option = "services.tightwad.cluster.hosts.two.address: 0.0.0.0";
    };
    port-used-twice = {
      fault = cluster { proxy.port = 8080; };
      option = "services.tightwad.cluster.proxy.port: 8080";
    };
    port-of-an-agent-used-twice = {
      fault = cluster { proxy.port = 50051; };
      option = "services.tightwad.cluster.workers.agent_port: 50051";
    };
    gpu-of-two-minds = {
      fault.services.tightwad.gpu = "vulkan";
      option = "services.tightwad.gpu: \"vulkan\" is not what";
    };
    proxy-without-token = {
      fault = cluster { proxy.auth_token_file = lib.mkForce null; };
      option = "services.tightwad.proxy.authTokenFile: missing";
    };
    coordinator-without-key = {
      fault = cluster { coordinator.host = "10.0.0.1"; };
      option = "services.tightwad.coordinator.apiKeyFile: missing";
    };
    draft-without-key = {
      fault = draftWithoutKey { };
      option = "services.tightwad.draft.apiKeyFile: missing";
    };
    target-without-key = {
      fault = cluster {
        hosts.one.roles = [ "target" ];
        target = {
          host = "10.0.0.1";
          port = 8082;
        };
      };
      option = "services.tightwad.target.apiKeyFile: missing";
    };
    token-as-a-value = {
      fault = cluster { proxy.auth_token = "hush"; };
      option = "services.tightwad.cluster.proxy.auth_token: a secret";
    };
    key-of-a-draft-as-a-value = {
      fault = cluster {
        proxy.draft = [
          {
            url = "http://10.0.0.9:8080";
            api_key = "hush";
          }
        ];
      };
      option = "services.tightwad.cluster.proxy.draft.0.api_key: a secret";
    };
    key-of-drafters-as-a-value = {
      fault = cluster { coordinator.draft_key = "hush"; };
      option = "services.tightwad.cluster.coordinator.draft_key: a secret";
    };
    key-of-drafters-as-a-value-of-the-proxy = {
      fault = cluster {
        proxy.target = {
          url = "http://10.0.0.9:8080";
          draft_key = "hush";
        };
      };
      option = "services.tightwad.cluster.proxy.target.draft_key: a secret";
    };
    token-of-a-worker-as-a-value = {
      fault = worker { agent_token = "hush"; };
      option = "services.tightwad.cluster.workers.0.agent_token: a secret";
    };
    key-among-the-arguments = {
      fault = cluster {
        draft.extra_args = [
          "--api-key"
          "hush"
        ];
      };
      option = "services.tightwad.cluster.draft.extra_args: must not hold `--api-key`";
    };
    token-among-the-arguments-of-a-model = {
      fault = cluster {
        models.big.extra_args = [
          "-hft"
          "hush"
        ];
      };
      option = "services.tightwad.cluster.models.big.extra_args: must not hold `-hft`";
    };
    token-among-the-arguments-of-a-worker = {
      fault = worker { extra_args = [ "--hf-token=hush" ]; };
      option = "services.tightwad.cluster.workers.0.extra_args: must not hold `--hf-token`: everybody";
    };
    key-among-the-variables = {
      fault = cluster { coordinator.env.LLAMA_API_KEY = "hush"; };
      option = "services.tightwad.cluster.coordinator.env.LLAMA_API_KEY: a secret";
    };
    token-among-the-variables-of-a-worker = {
      fault = worker { env.HF_TOKEN = "hush"; };
      option = "services.tightwad.cluster.workers.0.env.HF_TOKEN: a secret";
    };
    password-in-the-address-of-the-target = {
      fault = cluster { proxy.target.url = "http://me:hush@10.0.0.9:8080"; };
      option = "services.tightwad.cluster.proxy.target.url: must not";
    };
    password-in-the-address-of-a-draft = {
      fault = cluster { proxy.draft = [ { url = "http://me:hush@10.0.0.9:8080"; } ]; };
      option = "services.tightwad.cluster.proxy.draft.0.url: must not";
    };
    model-in-a-home = {
      fault = cluster { models.big.path = lib.mkForce "/home/me/big.gguf"; };
      option = "services.tightwad.cluster.models.big.path: the units cannot see";
    };
    cache-in-no-cache-folder = {
      fault = worker {
        agent_token_file = "/run/secrets/worker";
        cache_dir = "/big/cache";
      };
      option = "services.tightwad.cluster.workers.cache_dir: /big/cache";
    };
    unknown-group = {
      fault.services.tightwad.modelGroup = "models";
      option = "services.tightwad.modelGroup: there is no group";
    };
    firewall-rule-of-a-name = {
      fault = {
        services.tightwad.openFirewall = true;
        services.tightwad.cluster.hosts.two.address = lib.mkForce "two.example";
      };
      option = "services.tightwad.cluster.hosts.two.address: `two.example` is a name";
    };
    firewall-rule-of-what-could-be-hexadecimal = {
      fault = {
        services.tightwad.openFirewall = true;
        services.tightwad.cluster.hosts.two.address = lib.mkForce "cafe";
      };
      option = "services.tightwad.cluster.hosts.two.address: `cafe` is a name";
    };
    firewall-without-rules-of-addresses = {
      fault = {
        services.tightwad.openFirewall = true;
        networking.firewall.backend = "firewalld";
      };
      option = "services.tightwad.openFirewall: NixOS gives firewalld";
    };
  };
  asserted =
    lib.optionalAttrs (!unfreeByVariable) (
      lib.mapAttrs (_: fault: {
        inherit fault;
        option = "services.tightwad.gpu: \"cuda\" needs NVIDIA's driver, which is unfree";
      }) cudaWithoutUnfree
    )
    // faults;
  thrown = {
    port-zero-of-the-proxy = {
      fault = cluster { proxy.port = 0; };
      option = "services.tightwad.cluster.proxy.port";
    };
    port-zero-of-a-draft = {
      fault = cluster { draft.port = lib.mkForce 0; };
      option = "services.tightwad.cluster.draft.port";
    };
    port-zero-of-a-coordinator = {
      fault = cluster { coordinator.port = 0; };
      option = "services.tightwad.cluster.coordinator.port";
    };
    port-zero-of-a-gpu = {
      fault = worker {
        agent_token_file = "/run/secrets/worker";
        gpus = [
          {
            name = "first";
            vram_gb = 24;
            rpc_port = 0;
          }
        ];
      };
      option = "rpc_port";
    };
    interface-with-a-quote = {
      fault.services.tightwad.interface = "wg0'";
      option = "services.tightwad.interface";
    };
    interface-with-a-blank = {
      fault.services.tightwad.interface = "wg 0";
      option = "services.tightwad.interface";
    };
    interface-with-a-name-that-is-too-long = {
      fault.services.tightwad.interface = "a-very-long-interface";
      option = "services.tightwad.interface";
    };
    misspelt-option = {
      fault.services.tightwad.openFirewal = true;
      option = "services.tightwad.openFirewal";
    };
    misspelt-section = {
      fault = cluster { wokers = [ ]; };
      option = "services.tightwad.cluster.wokers";
    };
    unknown-role = {
      fault = cluster { hosts.two.roles = [ "drafter" ]; };
      option = "services.tightwad.cluster.hosts.two.roles";
    };
    unknown-gpu = {
      fault.services.tightwad.gpu = "nvidia";
      option = "services.tightwad.gpu";
    };
    wrong-type = {
      fault = cluster { proxy.port = "eighty"; };
      option = "services.tightwad.cluster.proxy.port";
    };
    host-without-address = {
      fault = cluster { hosts.three.roles = [ ]; };
      option = "services.tightwad.cluster.hosts.three.address";
    };
    secret-in-the-store = {
      fault.services.tightwad.proxy.authTokenFile = "${pkgs.writeText "token" "hush"}";
      option = "services.tightwad.proxy.authTokenFile";
    };
    secret-beside-the-configuration = {
      fault.services.tightwad.proxy.authTokenFile = ./refusals.nix;
      option = "services.tightwad.proxy.authTokenFile";
    };
    secret-in-the-cluster-file = {
      fault = worker { agent_token_file = "${pkgs.writeText "token" "hush"}"; };
      option = "agent_token_file";
    };
    model-with-a-space-in-its-path = {
      fault = cluster { models.big.path = lib.mkForce "/models/big one.gguf"; };
      option = "services.tightwad.cluster.models.big.path";
    };
    model-that-would-be-copied-to-the-store = {
      fault = cluster { models.big.path = lib.mkForce ./refusals.nix; };
      option = "services.tightwad.cluster.models.big.path";
    };
  };

  # Keys that only the binary can refuse, when the file is built.
  unknownKey =
    (evaluate (cluster {
      proxy.max_draft_tokenz = 8;
    })).made;

  sane = lib.mapAttrs (_: evaluate) ({ "no fault" = { }; } // accepted);
  wrongly =
    lib.concatLists (
      lib.mapAttrsToList (
        name: { messages, ... }: map (message: "${name}: refused: ${message}") messages
      ) sane
    )
    ++ lib.concatLists (
      lib.mapAttrsToList (
        name:
        { fault, option }:
        let
          inherit (evaluate fault) messages;
        in
        lib.optional (
          !lib.any (lib.hasPrefix option) messages
        ) "${name}: no message begins with `${option}`; there are: ${lib.concatStringsSep " | " messages}"
      ) asserted
    )
    ++ lib.concatLists (
      lib.mapAttrsToList (
        name:
        { fault, ... }:
        let
          inherit (builtins.tryEval (evaluate fault).made) success;
        in
        lib.optional success "${name}: not refused"
      ) thrown
    );
in
lib.throwIf (wrongly != [ ]) (lib.concatStringsSep "\n" wrongly) (
  pkgs.runCommand "refusals"
    {
      nativeBuildInputs = [ self.packages.${pkgs.stdenv.hostPlatform.system}.tightwad ];
      unknownKey = unknownKey.unchecked;
      sound = sane."no fault".made;
      passthru = {
        # For refusals.sh.
        thrown = lib.mapAttrs (_: { fault, ... }: (evaluate fault).made.drvPath) thrown;
        options = lib.mapAttrs (_: { option, ... }: option) thrown;
        unknownKey = unknownKey.unchecked;
      };
    }
    ''
      test -s $sound
      if tightwad -c $unknownKey check-config 2>log; then
        echo "an unknown key passes check-config" >&2
        exit 1
      fi
      grep -F proxy.max_draft_tokenz log
      touch $out
    ''
)
