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
  # The test driver numbers the machines in the order of their names.
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
pkgs.testers.runNixOSTest {
  name = "tightwad-speculation";

  defaults = {
    imports = [ self.nixosModules.default ];
    services.tightwad = {
      inherit cluster;
      waitUntilReady = true;
      interface = "eth1";
      openFirewall = true;
    };
    virtualisation.memorySize = 2048;
    virtualisation.cores = 2;
  };
  nodes = {
    draft = { };
    target.environment.systemPackages = [ pkgs.jq ];
    stranger = {
      services.tightwad.enable = false;
      environment.systemPackages = [ pkgs.curl ];
    };
  };

  testScript = ''
    import json
    import secrets

    token = secrets.token_hex(16)
    key = secrets.token_hex(16)


    def keep(machine, name, secret):
        machine.succeed(f"mkdir -p /var/lib/secrets && (umask 077 && echo {secret} >/var/lib/secrets/{name})")


    start_all()
    for machine in [draft, target, stranger]:
        machine.wait_for_unit("multi-user.target")
    assert "192.168.1.1/" in draft.succeed("ip -4 address show eth1")
    assert "192.168.1.3/" in target.succeed("ip -4 address show eth1")

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

    with subtest("no secret is in a unit, in the cluster file, or among the processes"):
        for machine, names in [(target, ["proxy", "draft"]), (draft, ["draft"])]:
            machine.succeed("cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ >/tmp/processes 2>/dev/null || true")
            machine.succeed("grep -qa tightwad /tmp/processes")
            for name in names:
                search = f"grep -alFf /var/lib/secrets/{name}"
                machine.succeed(f"{search} /var/lib/secrets/{name}")
                for places in [
                    "/tmp/processes",
                    "$(readlink -f /etc/tightwad/cluster.yaml)",
                    "/etc/systemd/system/tightwad-*.service",
                ]:
                    status, found = machine.execute(f"{search} {places}")
                    # Exit code of grep: 0 means found, 2 means that a file is missing or unreadable.
                    assert status == 1, f"{machine.name}: {name} in {places}: grep ends with {status}: {found}"
  '';
}
