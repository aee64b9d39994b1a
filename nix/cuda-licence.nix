# Whether a package is unfree for being a part of CUDA, and for nothing else. The flake's own CUDA build allows these.
{ lib }:
package:
let
  licences = lib.toList (package.meta.license or [ ]);
  isFreeOrCuda = licence: licence.free or true || licence.shortName or "" == "CUDA EULA";
in
lib.all isFreeOrCuda licences
# Some parts say no more than `unfree`.
|| lib.any (part: lib.hasPrefix part (lib.getName package)) [
  "cuda"
  "libcublas"
  "libnv"
]
