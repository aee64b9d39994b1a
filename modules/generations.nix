# The options with the GPU generations that llama.cpp is compiled for. A host of the cluster and this machine share them.
{ lib }:
let
  inherit (lib) types;
  listOf = pattern: types.nullOr (types.nonEmptyListOf (types.strMatching pattern));
in
{
  cudaCapabilities = {
    type = listOf "[0-9]+[.][0-9]+[af]?";
    example = [ "12.1" ];
    description = ''
      Compute capabilities of its NVIDIA GPUs. With `gpu = "cuda"`, llama.cpp is compiled for these; a shorter list builds
      faster. A Jetson needs its own value (`[ "8.7" ]` for Orin), because it has another CUDA. Left out: 7.5, 8.6, 8.9 and
      12.0, which cover RTX 20 to 50 and the DGX Spark.
    '';
  };
  rocmGpuTargets = {
    type = listOf "gfx[0-9a-z-]+";
    example = [ "gfx1201" ];
    description = ''
      Its AMD GPUs as `rocminfo` names them. With `gpu = "rocm"`, llama.cpp is compiled for these. Left out: gfx1100, the
      RX 7900.
    '';
  };
}
