# `services.tightwad.cluster`: the cluster file as Nix values, and `hosts`, from which addresses and roles follow.
# A section also takes keys that are not listed here; the binary checks them at build time.
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

  # An optional key. Without a value it is left out of the file.
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

  # Units read secrets from these paths at start. Secrets in the store would be readable by every user.
  secretFile =
    description: example:
    optional types.externalPath example
      "${description} A path outside of the Nix store, for example from sops-nix or agenix. Default: none.";

  # 0 (any free port) is not allowed: the other hosts could not know the port.
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
      description = "Name for people.";
    };
    vram_gb = mkOption {
      type = types.numbers.positive;
      example = 16;
      description = "Memory in GiB.";
    };
    device =
      optional str "CUDA0"
        "Name of the device in llama.cpp. Left out: the host's GPUs in llama.cpp's order.";
  };
  workerGpu = gpu // {
    rpc_port =
      key port 50052
        "Port of the `ggml-rpc-server` that serves this GPU; GPUs with the same port share one server.";
  };

  # Options that `target`, `draft` and `coordinator` share.
  server = {
    slots =
      key types.ints.positive 4
        "Requests served at once, each with the model's whole `ctx_size`.";
    threads = optional types.ints.positive 8 "CPU threads. Left out: llama-server's choice.";
    api_key_file = secretFile "File with the key that clients of this server must send." "/run/secrets/tightwad-key";
    allow_unauthenticated = key bool false "Whether to listen on a non-loopback address without a key.";
    extra_args =
      key (listOf str) [ ]
        "Further arguments of llama-server; they override those that Tightwad gives. `--host`, `--port`, `--model` and `--rpc` are refused, because other keys set them. Secrets are refused, because every user can read the Nix store.";
    env =
      key (attrsOf str) { }
        "Further environment variables of llama-server; they override those that Tightwad gives. Put no secrets here: every user can read the Nix store.";
  };
  llamaServer =
    role: example: defaultPort: defaultHost:
    freeform (
      server
      // {
        host = optional str "192.168.1.50" defaultHost;
        port = key port defaultPort "Port to listen on. Each role of a machine needs its own port.";
        backend =
          optional backend "cuda"
            "Backend of llama.cpp that computes. The server starts only when llama.cpp finds a GPU of this kind. Left out: follows from `gpu` of the host with this role.";
        model =
          optional str example
            "Name of the model in `models` that the ${role} runs. Left out: the one marked `default`, else the only one.";
      }
    );
  besideProxy = "Address to listen on. Left out: the loopback address when the proxy is on the same machine, else the address of the host that has this role. Every address except loopback needs a key.";

  upstreamKeys = {
    url = mkOption {
      type = str;
      example = "http://192.168.1.50:11434";
      description = "Base URL, without `/v1`.";
    };
    model_name =
      optional str "qwen3:8b"
        "Name of the model on that server; required if the server has several. Left out: the server's only model.";
    backend = key (enum [
      "llamacpp"
      "ollama"
      "vllm"
      "sglang"
      "openai"
    ]) "llamacpp" "Kind of server; `openai` is any other server with an OpenAI API.";
    api_key_file = secretFile "File with the key that this server requires." "/run/secrets/draft-key";
  };
  upstream = freeform upstreamKeys;
  targetUpstream = freeform (
    upstreamKeys
    // {
      draft_key_file = secretFile "File with the key for drafting on a pool's coordinator on another host." "/run/secrets/pool-draft-key";
    }
  );

  corsOrigins =
    optional (listOf str) [ "http://localhost:3000" ]
      "Origins of the web pages that may use this endpoint from a browser; `*` allows all. Left out: none.";

  proxy = freeform {
    host =
      optional str "192.168.1.10"
        "Address to listen on; every address except loopback needs a token. Left out: the address of the host with the role `proxy`, else 127.0.0.1.";
    port = key port 8088 "Port to listen on.";
    draft = mkOption {
      type = nullOr (either (listOf upstream) upstream);
      default = null;
      example = {
        url = "http://192.168.1.50:11434";
        backend = "ollama";
        model_name = "qwen3:0.6b";
      };
      description = "The server that drafts tokens, or a list of servers. Left out: the section `draft`, else no drafting.";
    };
    target = mkOption {
      type = nullOr targetUpstream;
      default = null;
      example.url = "http://192.168.1.100:8080";
      description = "The server that writes the answers. Left out: the section `target`, else `coordinator`.";
    };
    cors_origins = corsOrigins;
    auth_token_file = secretFile "File with the token that clients send as `Authorization: Bearer …`." "/run/secrets/tightwad-token";
    allow_unauthenticated =
      key bool false
        "Whether to listen on a non-loopback address without a token.";
  };

  coordinator = freeform (
    server
    // {
      host =
        optional str "192.168.1.10"
          "${besideProxy} With a section `target` too, the proxy uses that target, and not the pool.";
      port = key port 8080 "Port to listen on.";
      backend =
        optional backend "hip"
          "Backend of llama.cpp for its own GPUs. Left out: follows from `gpu` of its host.";
      gpus = key (listOf (freeform gpu)) [ ] "Its own GPUs.";
      cors_origins = corsOrigins;
      draft_key_file = secretFile "File with the key that proxies on other hosts must send to draft for the pool's answers. Without it only proxies on this host can draft." "/run/secrets/pool-draft-key";
      swap_on_request =
        key bool false
          "Whether a request that names another model replaces the running one.";
      drain_seconds =
        key types.ints.unsigned 30
          "Seconds that running answers get to finish before a swap or the stop of the unit cancels them.";
    }
  );

  worker = freeform {
    name =
      optional (types.strMatching "[A-Za-z0-9._-]+") "gaming-pc"
        "Name for people. If it is a name of `hosts`, the worker has that host's address. Left out: its `host`.";
    host =
      optional str "192.168.1.100"
        "IPv4 address, or host name, on which the worker listens and the coordinator reaches it. Left out: the address of the host called `name`.";
    backend =
      optional backend "cuda"
        "Backend of llama.cpp for its GPUs. Left out: follows from `gpu` of the host with its address.";
    gpus = key (listOf (
      freeform workerGpu
    )) [ ] "Its GPUs. If the list is empty, its server listens on port 50052.";
    agent_port =
      key types.port 50051
        "Port of its agent, which reports its state to the coordinator. 0: there is no agent, and its `ggml-rpc-server` runs all the time.";
    agent_token_file = secretFile "File with the token that coordinators send to its agent. Required on every address except loopback." "/run/secrets/tightwad-worker-token";
    cache_dir =
      optional types.externalPath "/var/cache/tightwad-parts"
        "Folder below `/var/cache` for the model parts that it keeps. To use a disk of its own, mount it below `/var/cache/private`, for example at `/var/cache/private/tightwad-parts`: systemd keeps the cache folders of units with a dynamic user there. Left out: `/var/cache/tightwad-worker`.";
    extra_args =
      key (listOf str) [ ]
        "Further arguments of ggml-rpc-server; they override those that Tightwad gives. The address and the port are refused, because `host` and `gpus.*.rpc_port` set them.";
    env =
      key (attrsOf str) { }
        "Further environment variables of ggml-rpc-server. Put no secrets here: every user can read the Nix store.";
  };

  model = freeform {
    path = mkOption {
      # A string, because a Nix path would copy the whole model to the store. Without spaces, because systemd splits at them.
      type = types.strMatching "/[^[:space:]]+";
      example = "/models/Qwen3-32B-Q4_K_M.gguf";
      description = ''
        The GGUF file, or the first part of a split model. The path has no spaces. Only the hosts that run the model need the
        file. Their units wait for its mount, and cannot see `/home`, `/root`, `/tmp` and `/var/tmp`.
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
        description = "Address at which the other hosts reach it, on the private network or in the VPN. A worker needs an IPv4 address, and `openFirewall` needs an IP address.";
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
        description = "Roles that it runs. Each role except `worker` belongs to one host.";
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
        description = "Driver stack of its GPUs.";
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
      The whole cluster; every host imports the same value. It has the keys of the cluster file (see `configs/reference.yaml`)
      and `hosts`, from which addresses and roles follow. The build checks the file with `tightwad check-config`.
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
        proxy = section proxy "The OpenAI endpoint in front of a target and a draft. `{ }` is an endpoint with default values. Left out: no endpoint.";
        target = section (llamaServer "target" "qwen3-32b" 8080
          besideProxy
        ) "A llama-server that runs the big model on one host.";
        draft = section (llamaServer "draft" "qwen3-0.6b" 8081
          besideProxy
        ) "A llama-server that runs the small model.";
        coordinator = section coordinator "A llama-server that spreads one model over the workers' GPUs and its own.";
        workers =
          key (listOf worker) [ ]
            "The hosts that lend their GPUs to the coordinator. RPC has no password: keep it on a private network.";
        models = key (attrsOf model) { } "The models by name.";
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
