# The whole cluster, the same on every host. It has two endpoints: http://workstation:8088 answers fast from one GPU with the help
# of a draft, and http://server:8080 runs a model that is too big for any one of these machines.
{
  hosts = {
    server = {
      address = "192.168.1.10";
      roles = [ "coordinator" ];
      gpu = "rocm";
    };
    gaming-pc = {
      address = "192.168.1.20";
      roles = [ "worker" ];
      gpu = "cuda";
    };
    workstation = {
      address = "192.168.1.30";
      roles = [
        "target"
        "proxy"
      ];
      gpu = "cuda";
    };
    mini-pc = {
      address = "192.168.1.40";
      roles = [ "draft" ];
      gpu = "none";
    };
  };

  # Units read the files of keys when they start. Each machine needs the keys of its roles; make one with `openssl rand -hex 32`.
  # These are the paths of sops-nix. agenix uses /run/agenix/NAME. If you write the files by hand, use a folder that survives a
  # reboot, for example /var/lib/secrets, with `umask 077`.
  proxy.auth_token_file = "/run/secrets/tightwad-proxy";
  target.model = "qwen3-32b";
  draft = {
    port = 8081;
    model = "qwen3-0.6b";
    api_key_file = "/run/secrets/tightwad-draft";
  };
  coordinator = {
    api_key_file = "/run/secrets/tightwad-pool";
    gpus = [
      {
        name = "first 7900 XTX";
        vram_gb = 24;
        device = "ROCm0";
      }
      {
        name = "second 7900 XTX";
        vram_gb = 24;
        device = "ROCm1";
      }
    ];
  };
  workers = [
    {
      name = "gaming-pc";
      agent_token_file = "/run/secrets/tightwad-worker";
      gpus = [
        {
          name = "RTX 4070 Ti Super";
          vram_gb = 16;
          device = "CUDA0";
        }
      ];
    }
  ];

  # Only the hosts that run a model need its file. A worker needs no model files.
  models = {
    "llama-3.3-70b" = {
      path = "/models/Llama-3.3-70B-Instruct-Q4_K_M.gguf";
      ctx_size = 16384;
      default = true;
    };
    qwen3-32b.path = "/models/Qwen3-32B-Q4_K_M.gguf";
    "qwen3-0.6b".path = "/models/Qwen3-0.6B-Q8_0.gguf";
  };
}
