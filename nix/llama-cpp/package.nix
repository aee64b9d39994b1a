# nixpkgs' llama-cpp with the source and the patch that Tightwad needs, and with RPC. All variants are of one source, because
# the two ends of an RPC connection have to be of one version.
{
  lib,
  config,
  fetchFromGitHub,
  llama-cpp,
  # The Vulkan drivers to go with the build, which have to be of its C library; null: those of the system it runs on.
  mesa ? null,
  spirv-headers,
  stdenv,
  cudaSupport ? config.cudaSupport,
  rocmSupport ? config.rocmSupport,
  vulkanSupport ? false,
  # NVIDIA's generations to compile for: by default those of RTX 20, 30, 40 and 50 (and of a DGX Spark, which runs the code of
  # the last one). Each adds minutes to the build.
  cudaCapabilities ? [
    "7.5"
    "8.6"
    "8.9"
    "12.0"
  ],
  # AMD's, as `rocminfo` names them: by default those of RX 7900.
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
  # BLAS takes over from a certain number of tokens on and rounds otherwise: a draft's tokens would get other logits when
  # they are verified together.
  blasSupport = false;
}).overrideAttrs
  (old: {
    inherit (source) version;
    src = fetchFromGitHub {
      owner = "ggml-org";
      repo = "llama.cpp";
      tag = "b${source.version}";
      # The source package of scripts/llama-cpp lacks this file, and both are to have one hash.
      postFetch = "rm $out/build-xcframework.sh";
      hash = source.narHash;
    };
    patches = (old.patches or [ ]) ++ [ ./external-draft.patch ];

    nativeBuildInputs = lib.filter (input: !isForTheWebPage input) old.nativeBuildInputs;
    buildInputs = old.buildInputs ++ lib.optional vulkanSupport spirv-headers;
    npmDeps = null;
    npmRoot = null;
    preConfigure = "";

    # Of two flags of one name the last counts. Without LLAMA_USE_PREBUILT_UI=OFF the web page would be downloaded.
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

    # What nixpkgs does here is for programs that this build names otherwise.
    postInstall = "";
    # Backends are loaded from the folder of the program, so the programs that Tightwad starts have to lie beside them.
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
        # For VK_DRIVER_FILES. NVIDIA's driver has to be that of the system's kernel.
        vulkanDriverFiles = lib.concatStringsSep ":" [
          "${mesa}/share/vulkan/icd.d"
          "/run/opengl-driver/share/vulkan/icd.d/nvidia_icd.${stdenv.hostPlatform.parsed.cpu.name}.json"
        ];
      };

    meta = old.meta // {
      mainProgram = "llama-server";
    };
  })
