import ./llama-server.nix "target" "with the big model"
