# Faults that evaluation can find before a host switches. Each message begins with the option to change.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.tightwad;
  topology = import ./topology.nix { inherit lib cfg; };
  address = import ./address.nix { inherit lib; };
  inherit (cfg) cluster settings;
  inherit (lib) optional;
  enabled = lib.filter (role: cfg.${role}.enable) topology.roles;
  listed = lib.concatStringsSep ", ";
  # The option as a user writes it. Items of lists have numbers, as in the binary's messages:
  # services.tightwad.cluster.hosts."my.host".address, services.tightwad.cluster.workers.0.host
  option =
    path:
    lib.concatStringsSep "." (
      [ "services.tightwad" ]
      ++ map (name: if builtins.match "[0-9]+" name == null then lib.showOption [ name ] else name) path
    );

  refuse = when: path: reason: {
    assertion = !when;
    message = "${option path}: ${reason}";
  };
  # The sections of `cluster`, by role.
  sections = lib.filterAttrs (_: section: section != null) (
    lib.getAttrs [ "proxy" "target" "draft" "coordinator" ] cluster
  );

  known = refuse (cluster.hosts != { } && topology.here == null) [ "host" ] (
    "`${cfg.host}` is not in services.tightwad.cluster.hosts (${listed (lib.attrNames cluster.hosts)}); add it there, "
    + "or say here which of them this machine is"
  );

  # The programs follow from `services.tightwad.gpu` and the file from `cluster.hosts`, so the two must agree.
  gpu = refuse (topology.here != null && cfg.gpu != topology.here.gpu) [ "gpu" ] (
    "\"${cfg.gpu}\" is not what services.tightwad.cluster.hosts.${cfg.host}.gpu says (\"${topology.here.gpu}\"); set it there only"
  );

  # Checks the form only. The units resolve names when they start.
  wellFormed =
    path: text:
    refuse (
      text != null && !topology.isWildcard text && !address.isIP text && !address.isName text
    ) path "`${toString text}` is neither an IP address nor a host name; correct it";
  hostNames = lib.attrNames cluster.hosts;
  addresses = lib.concatLists (
    lib.imap0 (
      number: name:
      let
        text = cluster.hosts.${name}.address;
        at = [
          "cluster"
          "hosts"
          name
          "address"
        ];
        same =
          other:
          let
            theirs = cluster.hosts.${other}.address;
          in
          theirs == text || (address.isIP text && address.parse theirs == address.parse text);
        other = lib.findFirst same null (lib.take number hostNames);
      in
      [
        (wellFormed at text)
        (refuse (topology.isWildcard text) at
          "${text} is every address and none that others can reach; give the host's own on the private network"
        )
        (refuse (address.isMapped text) at
          "`${text}` is an IPv4 address in the form of IPv6, which no peer has; give the IPv4 address"
        )
        (refuse (
          other != null
        ) at "`${text}` is the address of `${toString other}` already; give each host its own")
        # IPv6 is on by default.
        (refuse (address.isIPv6 text && !(config.networking.enableIPv6 or true)) at
          "`${text}` is an IPv6 address, and networking.enableIPv6 is off on this machine; turn that on, or give an IPv4 address"
        )
      ]
    ) hostNames
  );
  listening = lib.mapAttrsToList (
    role: section:
    wellFormed [
      "cluster"
      role
      "host"
    ] section.host
  ) sections;

  alone = map (
    role:
    refuse (lib.length (topology.hostsOf role) > 1) [ "cluster" "hosts" ]
      "${listed (topology.hostsOf role)} have the role `${role}`; the section ${role} describes one machine, so give it to one of them"
  ) (lib.remove "worker" topology.roles);

  sectioned = map (
    role:
    refuse (cfg.${role}.enable && cluster.${role} == null) [ "cluster" role ] (
      "missing, and this machine has the role `${role}`; describe it there, or take the role from "
      + "services.tightwad.cluster.hosts.${cfg.host}.roles"
    )
  ) (lib.remove "worker" topology.roles);

  # A section without a host that runs it.
  unused =
    map
      (
        role:
        refuse
          (
            cluster.hosts != { }
            && cluster.${role} != null
            && topology.hostsOf role == [ ]
            && !cfg.${role}.enable
          )
          [ "cluster" role ]
          "no host has the role `${role}`; give it to one of services.tightwad.cluster.hosts, or remove the section"
      )
      [
        "target"
        "draft"
      ];

  # llama.cpp's device names begin with the backend.
  devicePrefix = {
    cpu = "CPU";
    cuda = "CUDA";
    hip = "ROCm";
    metal = "MTL";
    vulkan = "Vulkan";
  };
  devices =
    path: backend: gpus:
    lib.imap0 (
      number: gpu:
      refuse
        (
          backend != null
          && gpu.device != null
          && builtins.match "${devicePrefix.${backend}}[0-9]*" gpu.device == null
        )
        (
          path
          ++ [
            "gpus"
            (toString number)
            "device"
          ]
        )
        "`${toString gpu.device}` is not a device of the backend `${toString backend}`, which is given or follows from `gpu` of the host; correct one of the two"
    ) gpus;
  coordinatorGpus = lib.optionals (cluster.coordinator != null) (
    [
      (refuse (cluster.workers == [ ] && cluster.coordinator.gpus == [ ])
        [ "cluster" "coordinator" "gpus" ]
        "empty, and so is services.tightwad.cluster.workers, so the pool has no GPU; list the coordinator's GPUs, add workers, or use the section `target`"
      )
    ]
    ++ devices [
      "cluster"
      "coordinator"
    ] (topology.serverBackend "coordinator") cluster.coordinator.gpus
  );

  # Workers, by their position in the list.
  workers = lib.concatLists (
    lib.imap0 (
      number: worker:
      let
        at = key: [
          "cluster"
          "workers"
          (toString number)
          key
        ];
      in
      [
        (refuse (worker.host == null) (at "host") (
          "missing; give the worker an address here, or a `name` that services.tightwad.cluster.hosts has"
          + lib.optionalString (worker.name != null) " (`${worker.name}` is not one)"
        ))
        (wellFormed (at "host") worker.host)
        (refuse (worker.host != null && topology.isWildcard worker.host) (at "host")
          "${toString worker.host} would offer RPC, which has no password, on all interfaces; give the host's address on the private network"
        )
      ]
      ++ devices [ "cluster" "workers" (toString number) ] worker.backend worker.gpus
    ) topology.workers
  );
  own = lib.head topology.ownWorkers;
  ownWorker = lib.optionals cfg.worker.enable (
    [
      (refuse (topology.ownWorkers == [ ]) [ "cluster" "workers" ]
        "no entry is this machine (${cfg.host}), which has the role `worker`; add one with `name = \"${cfg.host}\"`, or set services.tightwad.worker.name"
      )
      (refuse (lib.length topology.ownWorkers > 1) [
        "worker"
        "name"
      ] "several entries of services.tightwad.cluster.workers are this machine; say which one it is")
    ]
    ++ lib.optionals (topology.ownWorkers != [ ] && own.host != null) [
      (refuse (own.agent_port != 0 && cfg.worker.agentTokenFile == null && !topology.isLoopback own.host)
        [ "worker" "agentTokenFile" ]
        "missing; the agent listens on ${own.host} and needs a token (here or in agent_token_file of services.tightwad.cluster.workers), or `agent_port = 0` for a worker without an agent"
      )
      (refuse (own.cache_dir != null && builtins.match "/var/cache/[^[:space:]]+" own.cache_dir == null)
        [ "cluster" "workers" "cache_dir" ]
        "${toString own.cache_dir} is not a folder without spaces below /var/cache, where systemd makes folders for the unit's user; take one there, and mount a disk for it below /var/cache/private"
      )
    ]
  );

  # A listener that other machines can reach needs a token.
  tokens =
    lib.concatMap
      (
        {
          role,
          file,
          secret,
        }:
        let
          section = settings.${role};
          path = [
            role
            file
          ];
        in
        optional (lib.elem role enabled && settings ? ${role}) (
          refuse
            (
              !topology.isLoopback (section.host or "127.0.0.1")
              && cfg.${role}.${file} == null
              && !section.allow_unauthenticated
            )
            path
            "missing; the ${role} listens on ${section.host or ""} and needs a ${secret}, or services.tightwad.cluster.${role}.allow_unauthenticated = true if everybody who reaches this address may use it"
        )
      )
      (
        [
          {
            role = "proxy";
            file = "authTokenFile";
            secret = "token";
          }
        ]
        ++
          map
            (role: {
              inherit role;
              file = "apiKeyFile";
              secret = "key";
            })
            [
              "coordinator"
              "target"
              "draft"
            ]
      );

  # Every user could read a secret in the store.
  inline =
    path: section: key:
    refuse (section.${key} or null != null) (path ++ [ key ]) (
      "a secret in the configuration can be read by everybody in the Nix store; write it into a file and name that in ${
        option (path ++ [ "${key}_file" ])
      }"
    );
  # The servers that the section `proxy` names by URL.
  upstreams =
    let
      draft = cluster.proxy.draft or null;
      at = place: given: {
        path = [
          "cluster"
          "proxy"
        ]
        ++ place;
        inherit given;
      };
      drafts =
        if lib.isList draft then
          lib.imap0 (
            number:
            at [
              "draft"
              (toString number)
            ]
          ) draft
        else
          [ (at [ "draft" ] draft) ];
    in
    lib.filter (upstream: upstream.given != null) (
      [ (at [ "target" ] (cluster.proxy.target or null)) ] ++ drafts
    );
  secrets =
    lib.concatMap (
      { path, given }:
      [
        (inline path given "api_key")
        (inline path given "draft_key")
        (refuse (builtins.match ".*://[^/]*@.*" given.url != null) (path ++ [ "url" ])
          "must not hold a user or a password, which everybody could read in the Nix store; write the key into a file and name that in ${
            option (path ++ [ "api_key_file" ])
          }"
        )
      ]
    ) upstreams
    ++ lib.mapAttrsToList (
      role: section:
      inline [ "cluster" role ] section (if role == "proxy" then "auth_token" else "api_key")
    ) sections
    ++ lib.optional (cluster.coordinator != null) (
      inline [ "cluster" "coordinator" ] cluster.coordinator "draft_key"
    )
    ++ lib.imap0 (
      number: worker: inline [ "cluster" "workers" (toString number) ] worker "agent_token"
    ) cluster.workers;

  # Arguments of llama.cpp's programs must hold no secret, and must not override a key of the file, because the firewall and the
  # other hosts follow the key.
  programs =
    let
      program =
        {
          path,
          given,
          # Arguments that override keys of the file, with the keys to change instead.
          keys,
          # The option for a secret.
          file,
        }:
        let
          at = place: [ "cluster" ] ++ path ++ place;
          # Without the value of `--flag=value`.
          flags = map (argument: lib.head (lib.splitString "=" argument)) (
            lib.filter lib.isString (lib.toList (given.extra_args or [ ]))
          );
          secret = lib.filter (flag: builtins.match "(--api-key|--hf-token|-hft).*" flag != null) flags;
          variables = lib.filter (name: builtins.match ".*(API_KEY|TOKEN)" name != null) (
            lib.attrNames (given.env or { })
          );
        in
        [
          (refuse (secret != [ ]) (at [ "extra_args" ])
            "must not hold `${lib.head secret}`: everybody can read the store and the process list; its own key belongs to the file that ${file} names"
          )
        ]
        ++ map (
          { arguments, key }:
          let
            overriding = lib.filter (flag: lib.elem flag arguments) flags;
          in
          refuse (overriding != [ ]) (at [
            "extra_args"
          ]) "must not hold `${lib.head overriding}`: that is set by ${key}"
        ) keys
        ++ map (
          name:
          refuse true
            (at [
              "env"
              name
            ])
            "a secret in the configuration can be read by everybody in the Nix store; its own key belongs to the file that ${file} names"
        ) variables;
      hostAndPort = [
        "--host"
        "--port"
      ];
      ofLlamaServer = listener: [
        {
          arguments = hostAndPort;
          key = listener;
        }
        {
          arguments = [
            "-m"
            "--model"
            "-mu"
            "--model-url"
            "-hf"
            "-hfr"
            "--hf-repo"
            "-dr"
            "--docker-repo"
          ];
          key = "`path` of services.tightwad.cluster.models";
        }
        {
          arguments = [ "--rpc" ];
          key = "services.tightwad.cluster.workers";
        }
      ];
    in
    lib.concatMap program (
      lib.mapAttrsToList (role: given: {
        path = [ role ];
        inherit given;
        keys = ofLlamaServer "`host` and `port` of services.tightwad.cluster.${role}";
        file = "services.tightwad.${role}.apiKeyFile";
      }) (removeAttrs sections [ "proxy" ])
      ++ lib.mapAttrsToList (name: given: {
        path = [
          "models"
          name
        ];
        inherit given;
        keys = ofLlamaServer "`host` and `port` of the section that runs the model";
        file = "`apiKeyFile` of the role that runs the model";
      }) cluster.models
      ++ lib.imap0 (number: given: {
        path = [
          "workers"
          (toString number)
        ];
        inherit given;
        keys = [
          {
            arguments = hostAndPort ++ [
              "-H"
              "-p"
            ];
            key = "the worker's `host` and its GPUs' `rpc_port`";
          }
        ];
        file = "services.tightwad.worker.agentTokenFile";
      }) cluster.workers
    );

  # The ports of this machine, each with the option that sets it.
  listeners =
    map (role: {
      path = [
        "cluster"
        role
        "port"
      ];
      inherit (cluster.${role}) port;
    }) (lib.filter (role: role != "worker" && cluster.${role} != null) enabled)
    ++ lib.optionals (cfg.worker.enable && topology.ownWorkers != [ ]) (
      map (port: {
        path = [
          "cluster"
          "workers"
          "gpus"
          "rpc_port"
        ];
        inherit port;
      }) (topology.rpcPorts own)
      ++ optional (own.agent_port != 0) {
        path = [
          "cluster"
          "workers"
          "agent_port"
        ];
        port = own.agent_port;
      }
    );
  ports = lib.imap0 (
    number: listener:
    let
      other = lib.findFirst (other: other.port == listener.port) null (lib.take number listeners);
    in
    refuse (other != null && listener.port != 0) listener.path
      "${toString listener.port} is the port of ${option other.path} on this machine (${cfg.host}) already; give another port"
  ) listeners;

  # Folders that are hidden from the units.
  hidden = [
    "/home/"
    "/root/"
    "/run/user/"
    "/tmp/"
    "/var/tmp/"
  ];
  models =
    let
      readers = lib.filter (role: lib.elem role enabled) [
        "coordinator"
        "target"
        "draft"
      ];
      read = lib.foldl' (all: role: all // topology.modelsOf role) { } readers;
    in
    lib.mapAttrsToList (
      name: model:
      refuse (lib.any (folder: lib.hasPrefix folder model.path) hidden)
        [
          "cluster"
          "models"
          name
          "path"
        ]
        "the units cannot see ${model.path}: /home, /root, /run/user and temporary folders are hidden from them; move it to a folder such as /models"
    ) read
    ++ [
      (refuse (cfg.modelGroup != null && !(config.users.groups ? ${toString cfg.modelGroup}))
        [ "modelGroup" ]
        "there is no group `${toString cfg.modelGroup}`; add users.groups.${toString cfg.modelGroup} = { }"
      )
    ];

  # The host's NVIDIA driver is unfree.
  allowsUnfree =
    let
      inherit (pkgs) config;
      allows = config.allowUnfreePredicate or (_: false);
      package = name: license: {
        inherit name;
        pname = name;
        version = "";
        meta.license = license;
      };
    in
    config.allowUnfree or false
    || builtins.getEnv "NIXPKGS_ALLOW_UNFREE" == "1"
    || lib.any (name: lib.hasPrefix "nvidia" name || lib.hasPrefix "cuda" name) (
      config.allowUnfreePackages or [ ]
    )
    || allows (package "nvidia-x11" lib.licenses.unfreeRedistributable)
    || allows (package "cuda_cudart" (lib.licenses.unfree // { shortName = "CUDA EULA"; }));
  cuda =
    refuse (cfg.gpu == "cuda" && !allowsUnfree) [ "gpu" ]
      "\"cuda\" needs NVIDIA's driver, which is unfree; set nixpkgs.config.allowUnfree = true, or allow it in nixpkgs.config.allowUnfreePackages or allowUnfreePredicate";

  firewall = lib.optionals cfg.openFirewall (
    [
      (refuse ((config.networking.firewall.backend or null) == "firewalld") [ "openFirewall" ]
        "NixOS gives firewalld no rules for the address of one host; set networking.firewall.backend to \"nftables\" or \"iptables\", or leave this off and open the ports in firewalld yourself"
      )
    ]
    ++ lib.mapAttrsToList (
      name: host:
      refuse (address.isName host.address)
        [
          "cluster"
          "hosts"
          name
          "address"
        ]
        "`${host.address}` is a name, and services.tightwad.openFirewall makes rules of addresses; give its IP address, or open the ports yourself"
    ) cluster.hosts
  );
  # ROCm needs only the kernel's driver, and nothing in /run/opengl-driver.
  needsDriver =
    lib.elem cfg.gpu [
      "cuda"
      "vulkan"
    ]
    && lib.any (role: role != "proxy") enabled;
  driver = refuse (needsDriver && !config.hardware.graphics.enable) [ "gpu" ] (
    "\"${cfg.gpu}\" needs the driver in /run/opengl-driver, where llama.cpp looks for it; set hardware.graphics.enable = true"
  );
in
{
  config.assertions = lib.mkIf cfg.enable (
    [
      known
      gpu
      cuda
      driver
    ]
    ++ addresses
    ++ listening
    ++ alone
    ++ sectioned
    ++ unused
    ++ coordinatorGpus
    ++ workers
    ++ ownWorker
    ++ tokens
    ++ secrets
    ++ programs
    ++ ports
    ++ models
    ++ firewall
  );
}
