# `services.tightwad.cluster`: the cluster file as Nix values, key by key, and `hosts`, from which the rest follows.
# Sections take further keys than those below; the binary says at build time whether it knows them.
{
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  inherit (types)
    attrsOf
    bool
    either
    enum
    listOf
    nullOr
    str
    submodule
    ;

  generations = import ./generations.nix { inherit lib; };

  freeform =
    options:
    submodule {
      freeformType = (pkgs.formats.yaml { }).type;
      inherit options;
    };

  # A key that is left out of the file when it is not given.
  optional =
    type: example: description:
    mkOption {
      type = nullOr type;
      default = null;
      inherit example description;
    };
  # A key with the binary's own default.
  key =
    type: default: description:
    mkOption { inherit type default description; };

  # Units get secrets from these paths at start; in the store everybody could read them.
  secretFile =
    description: example:
    optional types.externalPath example
      "${description} Outside of the Nix store: a file that sops-nix, agenix or you put there. Default: none.";

  # No 0: where it takes a free port, nobody else knows that.
  port = types.ints.between 1 65535;

  backend = enum [
    "hip"
    "cuda"
    "vulkan"
    "metal"
    "cpu"
  ];

  gpu = {
    name = mkOption {
      type = str;
      example = "RTX 4070 Ti Super";
      description = "What people call it.";
    };
    vram_gb = mkOption {
      type = types.numbers.positive;
      example = 16;
      description = "Its memory in GiB.";
    };
    device =
      optional str "CUDA0"
        "What llama.cpp calls it. Left out: the host's GPUs in llama.cpp's order.";
  };
  workerGpu = gpu // {
    rpc_port =
      key port 50052
        "Port of the `ggml-rpc-server` that serves it; GPUs with the same port share one.";
  };

  # What `target`, `draft` and `coordinator` have in common.
  server = {
    slots =
      key types.ints.positive 4
        "Requests served at once, each with the model's whole `ctx_size`.";
    threads = optional types.ints.positive 8 "CPU threads. Left out: llama-server's choice.";
    api_key_file = secretFile "File that holds the key which clients of this server must send." "/run/secrets/tightwad-key";
    allow_unauthenticated = key bool false "Whether to listen on a non-loopback address without a key.";
    extra_args =
      key (listOf str) [ ]
        "More arguments of llama-server; they win over those that Tightwad gives. Not `--host`, `--port`, `--model` and `--rpc`, which keys of this file set, and no secrets: everybody can read the store.";
    env =
      key (attrsOf str) { }
        "More environment variables of llama-server; they win over those that Tightwad gives. No place for secrets: everybody can read the store.";
  };
  llamaServer =
    role: example: defaultPort: defaultHost:
    freeform (
      server
      // {
        host = optional str "192.168.1.50" defaultHost;
        port = key port defaultPort "Port to listen on. Roles of one machine need ports of their own.";
        backend =
          optional backend "cuda"
            "What it computes on: it serves only when llama.cpp finds a GPU of this kind. Left out: follows from `gpu` of the host with this role.";
        model =
          optional str example
            "Which of `models` the ${role} runs. Left out: the one marked `default`, else the only one.";
      }
    );
  besideProxy = "Address to listen on. Left out: the loopback address when the proxy is on the same machine, else the address of the host that has this role. Any but a loopback address needs a key.";

  upstreamKeys = {
    url = mkOption {
      type = str;
      example = "http://192.168.1.50:11434";
      description = "Base URL, without `/v1`.";
    };
    model_name =
      optional str "qwen3:8b"
        "What the model is called there; needed where a server holds several. Left out: the server's only model.";
    backend = key (enum [
      "llamacpp"
      "ollama"
      "vllm"
      "sglang"
      "openai"
    ]) "llamacpp" "What answers there; `openai` is anything else with an OpenAI API.";
    api_key_file = secretFile "File that holds the key which this server asks for." "/run/secrets/draft-key";
  };
  upstream = freeform upstreamKeys;
  targetUpstream = freeform (
    upstreamKeys
    // {
      draft_key_file = secretFile "File that holds the key which a pool's coordinator on another host asks of drafters." "/run/secrets/pool-draft-key";
    }
  );

  corsOrigins =
    optional (listOf str) [ "http://localhost:3000" ]
      "Origins of the web pages that may use this endpoint from a browser; `*` alone allows all. Left out: none.";

  proxy = freeform {
    host =
      optional str "192.168.1.10"
        "Address to listen on; any but a loopback address needs a token. Left out: the address of the host with the role `proxy`, else 127.0.0.1.";
    port = key port 8088 "Port to listen on.";
    draft = mkOption {
      type = nullOr (either (listOf upstream) upstream);
      default = null;
      example = {
        url = "http://192.168.1.50:11434";
        backend = "ollama";
        model_name = "qwen3:0.6b";
      };
      description = "The server that guesses tokens, or a list of several. Left out: the section `draft`, if there is one; else nothing is drafted.";
    };
    target = mkOption {
      type = nullOr targetUpstream;
      default = null;
      example.url = "http://192.168.1.100:8080";
      description = "The server whose answers these are. Left out: the section `target`, else `coordinator`.";
    };
    cors_origins = corsOrigins;
    auth_token_file = secretFile "File that holds the token which clients send as `Authorization: Bearer …`." "/run/secrets/tightwad-token";
    allow_unauthenticated =
      key bool false
        "Whether to listen on a non-loopback address without a token.";
  };

  coordinator = freeform (
    server
    // {
      host =
        optional str "192.168.1.10"
          "${besideProxy} A pool beside a section `target` is no target of the proxy's.";
      port = key port 8080 "Port to listen on.";
      backend =
        optional backend "hip"
          "What drives its own GPUs. Left out: follows from `gpu` of its host.";
      gpus = key (listOf (freeform gpu)) [ ] "Its own GPUs.";
      cors_origins = corsOrigins;
      draft_key_file = secretFile "File that holds the key which proxies on other hosts must send to draft for the pool's answers. Without it only proxies on this host can draft." "/run/secrets/pool-draft-key";
      swap_on_request =
        key bool false
          "Whether to load the model that a request names, in place of the one that runs.";
      drain_seconds =
        key types.ints.unsigned 30
          "Seconds that running answers have to finish before a swap, or the end of the unit, ends them.";
    }
  );

  worker = freeform {
    name =
      optional (types.strMatching "[A-Za-z0-9._-]+") "gaming-pc"
        "What people call it; a name of `hosts` gives it that host's address. Left out: its `host`.";
    host =
      optional str "192.168.1.100"
        "IPv4 address, or name of one, that the coordinator reaches it by and that it listens on. Left out: the address of the host called `name`.";
    backend =
      optional backend "cuda"
        "What its GPUs are driven by. Left out: follows from `gpu` of the host with its address.";
    gpus = key (listOf (
      freeform workerGpu
    )) [ ] "Its GPUs. Without any its server listens on port 50052.";
    agent_port =
      key types.port 50051
        "Port of its agent, by which the coordinator knows how it is; 0: it has none, and its `ggml-rpc-server` simply runs, as where somebody starts it by hand.";
    agent_token_file = secretFile "File that holds the token which coordinators send to its agent. Needed on any but a loopback address." "/run/secrets/tightwad-worker-token";
    cache_dir =
      optional types.externalPath "/var/cache/tightwad-parts"
        "Folder for the model parts that it keeps, below `/var/cache`. A disk for it is mounted below `/var/cache/private`, at `/var/cache/private/tightwad-parts` for example: systemd keeps the folders of units with users of their own there. Left out: `/var/cache/tightwad-worker`.";
    extra_args =
      key (listOf str) [ ]
        "More arguments of ggml-rpc-server; they win over those that Tightwad gives. Not where it listens (`host`, `gpus.*.rpc_port`).";
    env =
      key (attrsOf str) { }
        "More environment variables of ggml-rpc-server. No place for secrets: everybody can read the store.";
  };

  model = freeform {
    path = mkOption {
      # A Nix path would be copied to the store, as large as it is.
      # Systemd would take one with a space for two.
      type = types.strMatching "/[^[:space:]]+";
      example = "/models/Qwen3-32B-Q4_K_M.gguf";
      description = ''
        The GGUF file; of a split model the first part. A path without spaces. Only the hosts that run the model need it; their units wait for its
        mount, and cannot see `/home`, `/root`, `/tmp` and `/var/tmp`.
      '';
    };
    ctx_size = key types.ints.positive 8192 "Context of each slot in tokens.";
    default = key bool false "Whether sections that name no model take this one; at most one.";
  };

  host = submodule {
    options = {
      address = mkOption {
        type = str;
        example = "192.168.1.10";
        description = "Address by which the other hosts reach it: its own on the private network, or in the VPN. An IPv4 address where it is a worker; an IP address where `openFirewall` is to make rules of it.";
      };
      roles = mkOption {
        type = listOf (enum [
          "worker"
          "coordinator"
          "target"
          "draft"
          "proxy"
        ]);
        default = [ ];
        example = [
          "coordinator"
          "proxy"
        ];
        description = "What it runs. All but `worker` are of one host each.";
      };
      gpu = mkOption {
        type = enum [
          "none"
          "cuda"
          "rocm"
          "vulkan"
        ];
        default = "none";
        example = "rocm";
        description = "What drives its GPUs.";
      };
      inherit (lib.mapAttrs (_: generation: mkOption (generation // { default = null; })) generations)
        cudaCapabilities
        rocmGpuTargets
        ;
    };
  };

  section =
    type: description:
    mkOption {
      type = nullOr type;
      default = null;
      inherit description;
    };
in
{
  options.services.tightwad.cluster = mkOption {
    default = { };
    example = lib.literalExpression "import ./cluster.nix";
    description = ''
      The whole cluster; every host imports the same value. It is the cluster file key by key (see `configs/reference.yaml`),
      and `hosts`, from which addresses and roles follow. The file is checked by `tightwad check-config` when it is built.
    '';
    type = submodule {
      options = {
        hosts = mkOption {
          type = attrsOf host;
          default = { };
          example = {
            server = {
              address = "192.168.1.10";
              roles = [
                "coordinator"
                "proxy"
              ];
              gpu = "rocm";
            };
            gaming-pc = {
              address = "192.168.1.100";
              roles = [ "worker" ];
              gpu = "cuda";
            };
          };
          description = "The machines by their host names.";
        };
        proxy = section proxy "The OpenAI endpoint in front of a target and a draft. Left out: there is none; `{ }` is one with nothing but defaults.";
        target = section (llamaServer "target" "qwen3-32b" 8080
          besideProxy
        ) "A llama-server that holds the big model alone.";
        draft = section (llamaServer "draft" "qwen3-0.6b" 8081
          besideProxy
        ) "A llama-server that holds the small model.";
        coordinator = section coordinator "A llama-server that spreads one model over the workers' GPUs and its own.";
        workers =
          key (listOf worker) [ ]
            "The hosts that lend their GPUs to the coordinator. RPC has no password: keep it on a private network.";
        models = key (attrsOf model) { } "What can be run, by name.";
        binaries = mkOption {
          type = nullOr (freeform { });
          default = null;
          example.llama_server = "/opt/llama-cpp/bin/llama-server";
          description = "Paths of llama.cpp's programs, the same on every host. Left out: those of `services.tightwad.llamaCpp.package`.";
        };
      };
    };
  };
}
