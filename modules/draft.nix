import ./llama-server.nix "draft" "that guesses tokens"
