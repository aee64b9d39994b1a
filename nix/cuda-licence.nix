# Whether a package is unfree only because it is a part of CUDA. The flake's own CUDA build allows these packages.
{ lib }:
package:
let
  licences = lib.toList (package.meta.license or [ ]);
  isFreeOrCuda = licence: licence.free or true || licence.shortName or "" == "CUDA EULA";
in
lib.all isFreeOrCuda licences
# Some parts of CUDA have only the licence `unfree`.
|| lib.any (part: lib.hasPrefix part (lib.getName package)) [
  "cuda"
  "libcublas"
  "libnv"
]
