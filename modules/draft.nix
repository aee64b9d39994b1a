import ./llama-server.nix "draft" "that drafts tokens"
