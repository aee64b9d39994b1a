# The options that say which generations of GPUs llama.cpp is compiled for: of a host of the cluster, and of this machine.
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
      The compute capabilities of its NVIDIA GPUs, for which llama.cpp is compiled with `gpu = "cuda"`: fewer build faster, and
      a Jetson needs its own (`[ "8.7" ]` for Orin), since its CUDA is another. Left out: 7.5, 8.6, 8.9 and 12.0, which are
      RTX 20 to 50 and run on a DGX Spark.
    '';
  };
  rocmGpuTargets = {
    type = listOf "gfx[0-9a-z-]+";
    example = [ "gfx1201" ];
    description = ''
      Its AMD GPUs as `rocminfo` names them, for which llama.cpp is compiled with `gpu = "rocm"`. Left out: gfx1100, which is
      the RX 7900.
    '';
  };
}
