# The build of llama.cpp for a machine, by its driver stack, GPU generations and system; and the import of the module.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  host = import ../host.nix;
  machine =
    system: modules:
    (host
      {
        inherit self;
        pkgs = self.inputs.nixpkgs.legacyPackages.${system};
      }
      (
        [
          {
            networking.hostName = "one";
            services.tightwad.cluster.hosts.one.address = "10.0.0.1";
          }
        ]
        ++ modules
      )
    ).config.services.tightwad.llamaCpp.package;
  here = modules: machine "x86_64-linux" modules;
  gpu = gpu: more: {
    services.tightwad.cluster.hosts.one = {
      inherit gpu;
    }
    // more;
  };
  # The GPU generations of a build.
  architectures =
    package: lib.filter (flag: lib.hasInfix "_ARCHITECTURES" flag) (lib.reverseList package.cmakeFlags);
  inherit (self.packages.x86_64-linux) llama-cpp-cuda llama-cpp-rocm;
  compiled = package: lib.head (architectures package);

  expectations = {
    "CUDA is compiled for RTX 20 to 50" = [
      (compiled (here [ (gpu "cuda" { }) ]))
      "-DCMAKE_CUDA_ARCHITECTURES:STRING=75;86;89;120"
    ];
    "and is the flake's package" = [
      (here [ (gpu "cuda" { }) ]).drvPath
      llama-cpp-cuda.drvPath
    ];
    "a host of the cluster has its own generations" = [
      (compiled (here [ (gpu "cuda" { cudaCapabilities = [ "9.0a" ]; }) ]))
      "-DCMAKE_CUDA_ARCHITECTURES:STRING=90a"
    ];
    "and so has a machine" = [
      (compiled (here [
        (gpu "cuda" { cudaCapabilities = [ "9.0" ]; })
        { services.tightwad.cudaCapabilities = [ "12.1" ]; }
      ]))
      "-DCMAKE_CUDA_ARCHITECTURES:STRING=121"
    ];
    "nixpkgs knows them too: Jetson has a CUDA of its own" = [
      (lib.elem "-DCMAKE_CUDA_ARCHITECTURES:STRING=87"
        (self.packages.aarch64-linux.llama-cpp-cuda.override { cudaCapabilities = [ "8.7" ]; }).cmakeFlags
      )
      true
    ];
    "CUDA is there for aarch64" = [
      (compiled (machine "aarch64-linux" [ (gpu "cuda" { cudaCapabilities = [ "8.7" ]; }) ]))
      "-DCMAKE_CUDA_ARCHITECTURES:STRING=87"
    ];
    "ROCm is compiled for the RX 7900" = [
      (compiled (here [ (gpu "rocm" { }) ]))
      "-DCMAKE_HIP_ARCHITECTURES:STRING=gfx1100"
    ];
    "or for what the host says" = [
      (compiled (here [
        (gpu "rocm" {
          rocmGpuTargets = [
            "gfx1030"
            "gfx1201"
          ];
        })
      ]))
      "-DCMAKE_HIP_ARCHITECTURES:STRING=gfx1030;gfx1201"
    ];
    "generations of another kind of GPU change nothing" = [
      (here [ (gpu "rocm" { cudaCapabilities = [ "9.0" ]; }) ]).drvPath
      llama-cpp-rocm.drvPath
    ];
    "a laptop can run the checks: those that take long are packages" = [
      (lib.filter (name: builtins.match ".*(cuda|rocm|vulkan|pool|speculation).*" name != null) (
        lib.attrNames self.checks.x86_64-linux
      ))
      [ ]
    ];
    "and virtual machines are tested by packages" = [
      (lib.filter (lib.hasPrefix "vm-test-") (lib.attrNames self.packages.x86_64-linux))
      [
        "vm-test-pool"
        "vm-test-speculation"
      ]
    ];
    "the tests of networks have what they need, and are not skipped" = [
      (lib.subtractLists (map lib.getName self.checks.x86_64-linux.tests.nativeBuildInputs) [
        "iproute2"
        "util-linux"
      ])
      [ ]
    ];
    "the module may be imported twice" = [
      (here [
        { imports = [ self.nixosModules.default ]; }
        (gpu "cuda" { })
      ]).drvPath
      llama-cpp-cuda.drvPath
    ];
    "the module is one of NixOS" = [
      (builtins.tryEval
        (lib.evalModules {
          class = "homeManager";
          modules = [ self.nixosModules.default ];
        }).config
      ).success
      false
    ];
  };
in
import ../expectations.nix { inherit pkgs; } "builds" { } expectations
