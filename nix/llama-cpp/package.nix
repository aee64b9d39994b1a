# The llama-cpp of nixpkgs with Tightwad's source and patch, and with RPC. All variants have one source, because both ends of an
# RPC connection need the same version.
{
  lib,
  config,
  fetchFromGitHub,
  llama-cpp,
  # Vulkan drivers with the same C library as the build. Null: the drivers of the system.
  mesa ? null,
  spirv-headers,
  stdenv,
  cudaSupport ? config.cudaSupport,
  rocmSupport ? config.rocmSupport,
  vulkanSupport ? false,
  # Generations of NVIDIA GPUs to compile for: by default RTX 20, 30, 40 and 50. A DGX Spark runs the code for RTX 50. Each
  # generation adds minutes to the build.
  cudaCapabilities ? [
    "7.5"
    "8.6"
    "8.9"
    "12.0"
  ],
  # AMD GPUs to compile for, as `rocminfo` names them: by default the RX 7900.
  rocmGpuTargets ? [ "gfx1100" ],
}:
let
  source = lib.importJSON ./source.json;
  isForTheWebPage =
    input:
    lib.any (tool: lib.hasPrefix tool (lib.getName input)) [
      "nodejs"
      "npm"
    ];
in
(llama-cpp.override {
  inherit
    cudaSupport
    rocmGpuTargets
    rocmSupport
    vulkanSupport
    ;
  rpcSupport = true;
  # Without BLAS. It takes over from a certain number of tokens on and rounds differently, so that draft tokens that are verified
  # together would get other logits.
  blasSupport = false;
}).overrideAttrs
  (old: {
    inherit (source) version;
    src = fetchFromGitHub {
      owner = "ggml-org";
      repo = "llama.cpp";
      tag = "b${source.version}";
      # The source package of scripts/llama-cpp lacks this file, and both sources must have the same hash.
      postFetch = "rm $out/build-xcframework.sh";
      hash = source.narHash;
    };
    patches = (old.patches or [ ]) ++ [ ./external-draft.patch ];

    nativeBuildInputs = lib.filter (input: !isForTheWebPage input) old.nativeBuildInputs;
    buildInputs = old.buildInputs ++ lib.optional vulkanSupport spirv-headers;
    npmDeps = null;
    npmRoot = null;
    preConfigure = "";

    # The last of two flags with one name counts. Without LLAMA_USE_PREBUILT_UI=OFF the build would download the web page.
    cmakeFlags =
      old.cmakeFlags
      ++ [
        (lib.cmakeBool "LLAMA_BUILD_UI" false)
        (lib.cmakeBool "LLAMA_USE_PREBUILT_UI" false)
        (lib.cmakeFeature "LLAMA_BUILD_NUMBER" source.version)
        (lib.cmakeFeature "LLAMA_BUILD_COMMIT" "b${source.version}")
      ]
      ++ lib.optional cudaSupport (
        lib.cmakeFeature "CMAKE_CUDA_ARCHITECTURES" (
          lib.concatMapStringsSep ";" (lib.replaceStrings [ "." ] [ "" ]) cudaCapabilities
        )
      );

    # Replaces the phase of nixpkgs, which expects other names of the programs.
    postInstall = "";
    # A program loads backends from its own folder, so the programs that Tightwad starts must lie beside them.
    doInstallCheck = true;
    installCheckPhase = ''
      runHook preInstallCheck
      test -x $out/bin/ggml-rpc-server
      $out/bin/llama-server --version 2>&1 | grep --fixed-strings "build ${source.version}"
      $out/bin/llama-server --help | grep --fixed-strings -e --spec-draft-external-max
      runHook postInstallCheck
    '';

    passthru =
      (old.passthru or { })
      // lib.optionalAttrs (vulkanSupport && mesa != null) {
        # For VK_DRIVER_FILES. Leaves out NVIDIA's driver, which must match the system's kernel.
        vulkanDriverFiles = lib.concatStringsSep ":" [
          "${mesa}/share/vulkan/icd.d"
          "/run/opengl-driver/share/vulkan/icd.d/nvidia_icd.${stdenv.hostPlatform.parsed.cpu.name}.json"
        ];
      };

    meta = old.meta // {
      mainProgram = "llama-server";
    };
  })
