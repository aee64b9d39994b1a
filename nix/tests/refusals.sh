#!/usr/bin/env bash
# Checks the faults of refusals.nix that Nix itself reports: each message names its option.
# usage: refusals.sh NIX FLAKE [arguments of nix]
# With TIGHTWAD=path of the binary also checks the key that only the binary refuses. That needs a stand-in for nixpkgs whose YAML
# is plain text.
set -euo pipefail

nix=$1 checks=$2#checks.x86_64-linux.refusals
shift 2

options=$("$nix" eval --json "$checks.options" "$@" 2>/dev/null) || {
  "$nix" eval --json "$checks.options" "$@"
  exit 1
}
failed=0
while IFS=$'\t' read -r fault option; do
  if log=$("$nix" eval "$checks.thrown.$fault" "$@" 2>&1); then
    echo "refusals: $fault is not refused" >&2
    failed=1
  elif ! grep -qF "$option" <<<"$(grep -A 20 -E '^ *error: ' <<<"$log" | tail -n 20)"; then
    printf 'refusals: %s is refused, but not with the name of %s:\n%s\n' "$fault" "$option" "$log" >&2
    failed=1
  fi
done < <(python3 -c 'import json, sys; [print(*pair, sep="\t") for pair in json.load(sys.stdin).items()]' <<<"$options")

# This variable would change what the binary accepts.
if ! log=$(NIXPKGS_ALLOW_UNFREE=1 "$nix" eval --impure "$checks.name" "$@" 2>&1); then
  printf 'refusals: with NIXPKGS_ALLOW_UNFREE=1: %s\n' "$log" >&2
  failed=1
fi

if [ -n "${TIGHTWAD-}" ]; then
  file=$(mktemp)
  trap 'rm -f "$file"' EXIT
  "$nix" eval --raw "$checks.unknownKey.text" "$@" 2>/dev/null >"$file"
  if log=$("$TIGHTWAD" -c "$file" check-config 2>&1); then
    echo "refusals: check-config lets an unknown key pass" >&2
    failed=1
  elif ! grep -qF proxy.max_draft_tokenz <<<"$log"; then
    printf 'refusals: check-config does not name the unknown key:\n%s\n' "$log" >&2
    failed=1
  fi
fi
[ "$failed" = 0 ] && echo "refusals: every planted fault is refused with the name of its option"
exit "$failed"
