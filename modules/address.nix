# Recognises IP addresses and host names in text. Resolves no name.
{ lib }:
let
  # The four octets, or null. Refuses a leading zero, because some programs read such an octet as octal.
  parseIPv4 =
    text:
    let
      octet = "(0|[1-9][0-9]{0,2})";
      found = builtins.match "${octet}[.]${octet}[.]${octet}[.]${octet}" text;
      octets = map lib.toInt found;
    in
    if found != null && lib.all (octet: octet <= 255) octets then octets else null;

  # The groups between colons, or null. The last one may be an IPv4 address, which stands for two groups.
  parseGroups =
    text:
    let
      words = if text == "" then [ ] else lib.splitString ":" text;
      embedded = if words == [ ] then null else parseIPv4 (lib.last words);
      octet = lib.elemAt embedded;
      group =
        word: if builtins.match "[0-9a-fA-F]{1,4}" word == null then null else lib.fromHexString word;
      groups =
        if embedded == null then
          map group words
        else
          map group (lib.init words)
          ++ [
            (octet 0 * 256 + octet 1)
            (octet 2 * 256 + octet 3)
          ];
    in
    if lib.elem null groups then null else groups;

  # The eight groups, or null. Refuses a zone (`%eth0`), which has a meaning on one machine only.
  parseIPv6 =
    text:
    let
      halves = lib.splitString "::" text;
      parsed = map parseGroups halves;
      # `::` stands for one group or more.
      missing = 8 - lib.foldl' (sum: groups: sum + lib.length groups) 0 parsed;
      head = lib.head parsed;
      tail = lib.last parsed;
      # An IPv4 address is allowed at the end only.
      misplaced = lib.length halves == 2 && lib.hasInfix "." (lib.head halves);
    in
    if lib.elem null parsed || misplaced then
      null
    else if lib.length halves == 1 && missing == 0 then
      head
    else if lib.length halves == 2 && missing >= 1 then
      head ++ lib.replicate missing 0 ++ tail
    else
      null;
in
rec {
  # The numbers of an address, equal for all its spellings, or null.
  parse =
    text:
    let
      octets = parseIPv4 text;
    in
    if octets != null then octets else parseIPv6 text;

  isIPv4 = text: parseIPv4 text != null;
  isIPv6 = text: parseIPv6 text != null;
  isIP = text: parse text != null;

  # Whether the address is IPv4-mapped, such as `::ffff:10.0.0.1`. Packets of such a peer arrive over IPv4, so no firewall rule
  # for IPv6 matches them.
  isMapped =
    text:
    let
      groups = parseIPv6 text;
    in
    groups != null
    &&
      lib.take 6 groups == [
        0
        0
        0
        0
        0
        65535
      ];

  isLoopback =
    text:
    let
      octets = parseIPv4 text;
    in
    text == "localhost"
    || (octets != null && lib.head octets == 127)
    || parseIPv6 text == lib.replicate 7 0 ++ [ 1 ];

  # Whether the address is all zeros, in any spelling: 0.0.0.0, 0, ::, [::], ::0.
  isWildcard = text: builtins.match "[][0.:]+" text != null;

  # Whether the text is a host name: labels, of which the last is no number. `192.168.1.300` is a mistyped address.
  isName =
    text:
    let
      label = "[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?";
    in
    builtins.match "(${label}[.])*${label}[.]?" text != null
    && builtins.match "(.*[.])?[0-9]+[.]?" text == null;
}
