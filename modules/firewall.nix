# Opens the ports of this machine's roles, each only for the machines that use it.
{ config, lib, ... }:
let
  cfg = config.services.tightwad;
  topology = import ./topology.nix { inherit lib cfg; };
  inherit (import ./address.nix { inherit lib; }) isIPv6;
  inherit (cfg) settings;
  inherit (lib) optional;
  enabled = role: cfg.${role}.enable && settings ? ${role};
  reachable = role: enabled role && !topology.isLoopback (settings.${role}.host or "127.0.0.1");
  own = lib.head topology.ownWorkers;
  # Older versions of NixOS lack the option `backend`.
  backend =
    config.networking.firewall.backend
      or (if config.networking.nftables.enable then "nftables" else "iptables");

  # Ports that are open for every client on the interface.
  open = map (role: settings.${role}.port) (
    lib.filter reachable [
      "proxy"
      "coordinator"
    ]
  );

  # Ports that are open only for the machines with a certain role.
  restricted =
    lib.optional (cfg.worker.enable && topology.ownWorkers != [ ]) {
      role = "worker";
      ports = topology.rpcPorts own ++ optional (own.agent_port != 0) own.agent_port;
      from = topology.peersOf "coordinator";
    }
    ++
      map
        (role: {
          inherit role;
          ports = [ settings.${role}.port ];
          from = topology.peersOf "proxy";
        })
        (
          lib.filter reachable [
            "target"
            "draft"
          ]
        );
  rules = lib.concatMap (rule: map (from: rule // { inherit from; }) rule.from) restricted;

  words = list: lib.concatStringsSep " " (lib.concatLists list);
  inputRule =
    {
      role,
      ports,
      from,
    }:
    words [
      (optional (cfg.interface != null) ''iifname "${cfg.interface}"'')
      [
        "${if isIPv6 from then "ip6" else "ip"} saddr ${from}"
        "tcp dport { ${lib.concatMapStringsSep ", " toString ports} }"
        ''accept comment "tightwad ${role}"''
      ]
    ];
  # One rule for each port: iptables takes at most 15 ports in a rule.
  commands =
    verb:
    { ports, from, ... }:
    map (
      port:
      words [
        [ "${if isIPv6 from then "ip6tables" else "iptables"} -w -${verb} nixos-fw" ]
        (optional (cfg.interface != null) "-i ${cfg.interface}")
        [ "-s ${from} -p tcp --dport ${toString port} -j nixos-fw-accept" ]
      ]
    ) ports;
  # NixOS puts these commands into a script that ends at the first failure, before it closes the machine. A failed rule must
  # leave its own port closed and let the script continue.
  startCommands =
    rule:
    map (
      command:
      "${command} || echo '<4>services.tightwad.openFirewall: this rule for the ${rule.role} failed, and its port stays closed: ${command}' >&2"
    ) (commands "A" rule);
  stopCommands = rule: map (command: "${command} 2>/dev/null || true") (commands "D" rule);
  lines = lib.concatMapStrings (line: line + "\n");
in
{
  config = lib.mkIf (cfg.enable && cfg.openFirewall) {
    networking.firewall = lib.mkMerge [
      (
        if cfg.interface == null then
          { allowedTCPPorts = open; }
        else
          { interfaces.${cfg.interface}.allowedTCPPorts = open; }
      )
      (lib.mkIf (backend == "nftables") { extraInputRules = lines (map inputRule rules); })
      # NixOS refuses these with another backend.
      (lib.mkIf (backend == "iptables") {
        extraCommands = lines (lib.concatMap startCommands rules);
        extraStopCommands = lines (lib.concatMap stopCommands rules);
      })
    ];
  };
}
