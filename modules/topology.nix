# Values that follow from `cluster.hosts`: the host of each role, its address, and the worker entry of this machine.
{ lib, cfg }:
let
  inherit (cfg) cluster;
  address = import ./address.nix { inherit lib; };
  having = role: lib.filterAttrs (_: entry: lib.elem role entry.roles) cluster.hosts;
in
rec {
  roles = [
    "worker"
    "coordinator"
    "target"
    "draft"
    "proxy"
  ];

  # This machine's entry, or null.
  here = cluster.hosts.${cfg.host} or null;
  isHere = role: here != null && lib.elem role here.roles;

  # The names and the addresses of the hosts that have a role.
  hostsOf = role: lib.attrNames (having role);
  addressesOf = role: lib.mapAttrsToList (_: entry: entry.address) (having role);
  # The addresses of the other hosts with the role. This machine needs no firewall rule for itself.
  peersOf = role: lib.unique (lib.remove (here.address or null) (addressesOf role));

  inherit (address) isLoopback isWildcard;

  # The address on which a role listens: loopback if only a proxy on the same machine uses it. Null if no host has the role.
  # If there is a target too, the proxy uses the target, and the pool is an endpoint for clients.
  listenAddress =
    role:
    let
      proxies = hostsOf "proxy";
      own = hostsOf role;
      behindProxy = role != "proxy" && (role == "coordinator" -> cluster.target == null);
    in
    if own == [ ] then
      null
    else if behindProxy && proxies == own then
      "127.0.0.1"
    else
      lib.head (addressesOf role);

  # The file of the key that this machine's units share; null unless a target or a draft of this machine listens on a loopback
  # address without a key of its own.
  localKeyFile =
    let
      asksForIt =
        role:
        let
          section = cfg.settings.${role};
        in
        cfg.${role}.enable
        && cfg.settings ? ${role}
        && isLoopback (section.host or "127.0.0.1")
        && !(section ? api_key_file)
        && !section.allow_unauthenticated;
    in
    if asksForIt "target" || asksForIt "draft" then "/run/tightwad-local-key/key" else null;

  # llama.cpp's name of the backend for a host's GPUs.
  backendOf =
    host:
    {
      cuda = "cuda";
      rocm = "hip";
      vulkan = "vulkan";
      none = "cpu";
    }
    .${host.gpu};

  # The backend of a role's section: the given one, else that of its host. Null for a target or a draft on a host without a GPU;
  # llama.cpp then computes on the CPU.
  serverBackend =
    role:
    let
      given = cluster.${role}.backend or null;
      host = lib.findFirst (_: true) null (lib.attrValues (having role));
    in
    if given != null then
      given
    else if host == null || (role != "coordinator" && host.gpu == "none") then
      null
    else
      backendOf host;

  # `cluster.workers` with the hosts' addresses and GPUs.
  workers = map (
    worker:
    let
      named = cluster.hosts.${toString worker.name} or null;
      host = if worker.host != null then worker.host else named.address or null;
      at = lib.findFirst (entry: entry.address == host) null (lib.attrValues cluster.hosts);
    in
    worker
    // {
      inherit host;
      backend =
        if worker.backend != null then
          worker.backend
        else if at != null then
          backendOf at
        else
          null;
    }
  ) cluster.workers;
  workerName = worker: if worker.name != null then worker.name else worker.host;
  rpcPorts =
    worker: if worker.gpus == [ ] then [ 50052 ] else lib.unique (map (gpu: gpu.rpc_port) worker.gpus);

  # The entries of this machine: as `worker.name` says, else the one with its name, else those with its address.
  isOwnWorker =
    let
      byName = worker: workerName worker == cfg.host;
    in
    if cfg.worker.name != null then
      worker: workerName worker == cfg.worker.name
    else if lib.any byName workers then
      byName
    else
      worker: here != null && worker.host == here.address;
  ownWorkers = lib.filter isOwnWorker workers;

  # The models that a role of this machine reads.
  modelsOf =
    role:
    let
      wanted = cluster.${role}.model or null;
      default = lib.filterAttrs (_: model: model.default) cluster.models;
    in
    if role == "coordinator" then
      # Leaves out the model that only drafts.
      lib.filterAttrs (
        name: model:
        name != (cluster.draft.model or null)
        || model.default
        || lib.length (lib.attrNames cluster.models) == 1
      ) cluster.models
    else if wanted != null then
      lib.filterAttrs (name: _: name == wanted) cluster.models
    else if default != { } then
      default
    else
      cluster.models;
}
