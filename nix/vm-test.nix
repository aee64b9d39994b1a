# Tests a cluster in virtual machines: one for each host, and a stranger that belongs to none. The test driver numbers the
# machines in the order of their names. The files of tests/vm give what differs.
{ self, pkgs }:
{
  name,
  cluster,
  # What the machines need beyond their part of the cluster.
  nodes ? { },
  # Further options of `services.tightwad`, on every machine.
  settings ? { },
  # Names of secrets by the host that keeps them: each is a file in /var/lib/secrets, and holds what the script gives to `keep`.
  secrets,
  # Runs when every machine is up.
  script,
}:
let
  inherit (pkgs) lib;
  hosts = cluster.hosts;
  pythonList = lib.concatMapStringsSep ", " builtins.toJSON;
in
pkgs.testers.runNixOSTest {
  name = "tightwad-${name}";

  defaults = {
    imports = [ self.nixosModules.default ];
    services.tightwad = {
      inherit cluster;
      interface = "eth1";
      openFirewall = true;
    }
    // settings;
    virtualisation.memorySize = 2048;
    virtualisation.cores = 2;
  };
  nodes =
    lib.mapAttrs (_: _: { }) hosts
    // nodes
    // {
      stranger = {
        services.tightwad.enable = false;
        environment.systemPackages = [ pkgs.curl ];
      };
    };

  testScript = ''
    import json
    import secrets


    def keep(machine, name, secret):
        machine.succeed(f"mkdir -p /var/lib/secrets && (umask 077 && echo {secret} >/var/lib/secrets/{name})")


    start_all()
    for machine in machines:
        machine.wait_for_unit("multi-user.target")
    ${lib.concatStrings (
      lib.mapAttrsToList (host: { address, ... }: ''
        assert "${address}/" in ${host}.succeed("ip -4 address show eth1")
      '') hosts
    )}
  ''
  + script
  + ''

    with subtest("no secret is in a unit, in the cluster file, or among the processes"):
        for machine, names in [${
          lib.concatStringsSep ", " (
            lib.mapAttrsToList (host: names: "(${host}, [${pythonList names}])") secrets
          )
        }]:
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
