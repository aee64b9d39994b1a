# A draft on one machine, and the target and the proxy on another. Drafted answers equal plain answers.
{ self, pkgs }:
let
  models = self.packages.${pkgs.stdenv.hostPlatform.system}.tiny-models;
  # A target that answers like the tiny model and takes milliseconds per token. The proxy does not draft for a faster one.
  slowTarget =
    pkgs.runCommand "tightwad-slow-target.gguf"
      {
        nativeBuildInputs = [
          (pkgs.python3.withPackages (python: [
            python.gguf
            python.numpy
          ]))
        ];
      }
      ''
        python3 ${../../../tests/models/inflate.py} ${models}/tightwad-tiny-target-q8_0.gguf $out --size 256M --type f16 --embd 1024
      '';
  cluster = {
    hosts = {
      draft = {
        address = "192.168.1.1";
        roles = [ "draft" ];
      };
      target = {
        address = "192.168.1.3";
        roles = [
          "target"
          "proxy"
        ];
      };
    };
    proxy.auth_token_file = "/var/lib/secrets/proxy";
    target = {
      model = "big";
      slots = 1;
    };
    draft = {
      port = 8081;
      model = "small";
      slots = 1;
      api_key_file = "/var/lib/secrets/draft";
    };
    models = {
      big = {
        path = "${slowTarget}";
        ctx_size = 1024;
      };
      small = {
        path = "${models}/tightwad-tiny-draft-f16.gguf";
        ctx_size = 1024;
      };
    };
  };
in
import ../../vm-test.nix { inherit self pkgs; } {
  name = "speculation";
  inherit cluster;
  nodes.target.environment.systemPackages = [ pkgs.jq ];
  settings.waitUntilReady = true;
  secrets = {
    target = [
      "proxy"
      "draft"
    ];
    draft = [ "draft" ];
  };
  script = ''
    token = secrets.token_hex(16)
    key = secrets.token_hex(16)

    keep(draft, "draft", key)
    keep(target, "draft", key)
    keep(target, "proxy", token)

    with subtest("a unit is started when it serves, and the proxy serves at once"):
        target.succeed("systemctl stop tightwad-target")
        target.succeed("systemctl restart tightwad-proxy", timeout=60)
        target.fail("curl --silent --fail http://192.168.1.3:8088/readyz")
        target.succeed("systemctl start tightwad-target", timeout=300)
        draft.succeed("systemctl restart tightwad-draft", timeout=300)
        target.wait_until_succeeds("curl --silent --fail http://192.168.1.3:8088/readyz", timeout=60)

    with subtest("drafted answers equal the plain ones"):
        target.wait_until_succeeds(
            "tightwad proxy status --json | jq --exit-status '"
            '.verification == "attached" and .reason == null and .drafts[0].healthy'
            "'",
            timeout=180,
        )
        # verify fails if an answer differs, and if nothing was drafted.
        print(target.succeed("tightwad verify --kinds code,list --count 4 --max-tokens 48", timeout=600))

    with subtest("clients reach the proxy with its token, and nothing behind it"):
        body = json.dumps({"messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 24})
        url = "http://192.168.1.3:8088/v1/chat/completions"
        answer = stranger.succeed(
            f"curl --silent --show-error --fail --max-time 120 {url} "
            f"-H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' -d '{body}'"
        )
        assert json.loads(answer)["choices"][0]["message"]["content"].strip(), answer
        refused = stranger.succeed(f"curl --silent --output /dev/null --write-out '%{{http_code}}' -d '{body}' {url}")
        assert refused == "401", refused
        draft.succeed("ss --listening --tcp --numeric | grep 192.168.1.1:8081")
        stranger.fail("timeout 5 bash -c '</dev/tcp/192.168.1.1/8081'")
        stranger.fail("timeout 5 bash -c '</dev/tcp/192.168.1.3/8080'")

    with subtest("answers go on without the draft"):
        draft.succeed("systemctl stop tightwad-draft")
        stranger.succeed(
            f"curl --silent --show-error --fail --max-time 120 {url} "
            f"-H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' -d '{body}'"
        )
        draft.succeed("systemctl start tightwad-draft", timeout=300)
  '';
}
