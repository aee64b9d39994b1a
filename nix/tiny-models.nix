# The models of tests/models, for tests and the demo.
{ lib, runCommand }:
let
  inherit (lib) fileset;
  models = fileset.toSource {
    root = ../tests/models;
    fileset = fileset.fileFilter (file: file.hasExt "gguf") ../tests/models;
  };
in
runCommand "tightwad-tiny-models" { meta.license = lib.licenses.mit; } ''
  mkdir $out
  cp ${models}/*.gguf $out
''
