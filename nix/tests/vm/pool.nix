# A pool over two machines. It answers, swaps its model, survives a reboot of its worker, and refuses other machines.
{ self, pkgs }:
let
  models = self.packages.${pkgs.stdenv.hostPlatform.system}.tiny-models;
  cluster = {
    hosts = {
      pool = {
        address = "192.168.1.1";
        roles = [ "coordinator" ];
      };
      worker = {
        address = "192.168.1.3";
        roles = [ "worker" ];
      };
    };
    coordinator = {
      api_key_file = "/var/lib/secrets/pool";
      slots = 1;
    };
    workers = [
      {
        name = "worker";
        agent_token_file = "/var/lib/secrets/worker";
        gpus = [
          {
            name = "CPU";
            vram_gb = 1;
          }
        ];
      }
    ];
    models = {
      big = {
        path = "${models}/tightwad-tiny-target-q8_0.gguf";
        ctx_size = 1024;
        default = true;
      };
      small = {
        path = "${models}/tightwad-tiny-draft-f16.gguf";
        ctx_size = 1024;
      };
    };
  };
in
import ../../vm-test.nix { inherit self pkgs; } {
  name = "pool";
  inherit cluster;
  # Covers the other firewall backend.
  nodes.worker.networking.nftables.enable = true;
  secrets = {
    pool = [
      "pool"
      "worker"
    ];
    worker = [ "worker" ];
  };
  script = ''
    key = secrets.token_hex(16)
    token = secrets.token_hex(16)


    def ask(model, timeout=60):
        body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0})
        answer = stranger.succeed(
            f"curl --silent --show-error --fail --max-time {timeout} http://192.168.1.1:8080/v1/completions "
            f"-H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{body}'"
        )
        text = json.loads(answer)["choices"][0]["text"]
        assert text.strip(), answer
        return text


    with subtest("the units wait for their secrets, and are ready soon after"):
        pool.fail("systemctl is-active tightwad-coordinator")
        keep(pool, "pool", key)
        keep(pool, "worker", token)
        keep(worker, "worker", token)
        worker.succeed("systemctl restart tightwad-worker", timeout=120)
        pool.succeed("systemctl restart tightwad-coordinator", timeout=120)

    with subtest("the pool answers, and only with its key"):
        pool.wait_until_succeeds("tightwad status", timeout=180)
        first = ask("big")
        refused = stranger.succeed(
            "curl --silent --output /dev/null --write-out '%{http_code}' http://192.168.1.1:8080/v1/models"
        )
        assert refused == "401", refused

    with subtest("a worker's ports are open to the coordinator and closed to a stranger"):
        worker.succeed("ss --listening --tcp --numeric | grep 192.168.1.3:50052")
        pool.succeed("timeout 5 bash -c '</dev/tcp/192.168.1.3/50051'")
        for port in [50051, 50052]:
            stranger.fail(f"timeout 5 bash -c '</dev/tcp/192.168.1.3/{port}'")

    with subtest("it swaps its model, and back"):
        pool.succeed("tightwad swap small", timeout=180)
        ask("small")
        pool.succeed("tightwad swap big", timeout=180)
        assert ask("big") == first

    with subtest("a worker that is rebooted comes back by itself"):
        worker.shutdown()
        pool.wait_until_fails("tightwad status", timeout=120)
        worker.start()
        worker.wait_for_unit("tightwad-worker.service")
        pool.wait_until_succeeds("tightwad status", timeout=300)
        assert ask("big") == first
  '';
}
