#!/usr/bin/env bash
# Runs the firewall rules in a separate network namespace. A rule that fails must not leave the machine open.
# usage: firewall.sh NIX FLAKE [arguments of nix]
set -euo pipefail

nix=$1 rules=$2#checks.x86_64-linux.topology.firewall
shift 2

skip() {
  echo "firewall: the rules are not carried out: $1" >&2
  exit 0
}
unshare --map-root-user --net true 2>/dev/null || skip "no network of its own can be made here"
command -v iptables >/dev/null || skip "there is no iptables"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for text in start stop nftables; do
  "$nix" eval --raw "$rules.$text" "$@" 2>"$work/log" >"$work/$text" || {
    cat "$work/log" >&2
    exit 1
  }
done

# Like the script of NixOS, this one ends at the first failure and closes the machine last.
script() {
  cat <<SCRIPT
set -e
iptables -w -N nixos-fw-accept
iptables -w -A nixos-fw-accept -j ACCEPT
iptables -w -N nixos-fw
$1
iptables -w -A nixos-fw -j DROP
iptables -w -A INPUT -j nixos-fw
SCRIPT
}
failed=0
fail() {
  printf 'firewall: %s\n' "$*" >&2
  failed=1
}
# carry_out VARIANT RULES: runs the rules, then prints INPUT and nixos-fw and the output of the script.
carry_out() {
  script "$2" >"$work/script"
  unshare --map-root-user --net sh -c '
    PATH=$1:$PATH
    sh "$2" 2>"$3" || echo "the script failed"
    iptables -w -S INPUT
    iptables -w -S nixos-fw
    sh "$4" && iptables -w -S nixos-fw | sed "s/^/stopped: /"
  ' sh "$1" "$work/script" "$work/said" "$work/stop"
}

for variant in iptables-nft iptables-legacy; do
  command -v "$variant" >/dev/null || continue
  mkdir -p "$work/$variant"
  ln -sf "$(command -v "$variant")" "$work/$variant/iptables"
  state=$(carry_out "$work/$variant" "$(cat "$work/start")")
  [ "$(grep -c '^-A nixos-fw -s 10.0.0.1/32 .* -j nixos-fw-accept' <<<"$state")" = 3 ] ||
    fail "$variant: not every rule is there: $state"
  grep -q '^stopped: .*nixos-fw-accept' <<<"$state" && fail "$variant: the rules outlive the stop: $state"

  # The first rule fails.
  broken=$(sed '1s/10\.0\.0\.1/192.168.1.300/g' "$work/start")
  state=$(carry_out "$work/$variant" "$broken")
  grep -q '^-A INPUT -j nixos-fw$' <<<"$state" || fail "$variant: a rule that fails leaves the machine open: $state"
  [ "$(tail -n 1 <<<"$(grep '^-A nixos-fw ' <<<"$state")")" = '-A nixos-fw -j DROP' ] ||
    fail "$variant: the rest is not dropped: $state"
  [ "$(grep -c '^-A nixos-fw .* -j nixos-fw-accept' <<<"$state")" = 2 ] ||
    fail "$variant: the rules after one that fails are not there: $state"
  grep -q 'services.tightwad.openFirewall.*192.168.1.300' "$work/said" || fail "$variant: the script does not report the failure"
  [ "$failed" = 1 ] || echo "firewall: $variant: a rule that fails leaves its port closed and the machine too"
done

if command -v nft >/dev/null; then
  printf 'table inet t {\n chain input {\n%s\n }\n}\n' "$(cat "$work/nftables")" >"$work/ruleset"
  unshare --map-root-user --net nft --check --file "$work/ruleset" || fail "nftables refuses the rules"
fi
exit "$failed"
