# modules/address.nix: texts that are addresses, and texts that only look like one.
{ pkgs, ... }:
let
  inherit (pkgs) lib;
  address = import ../../modules/address.nix { inherit lib; };

  ipv4 = [
    "0.0.0.0"
    "10.0.0.1"
    "127.0.0.1"
    "192.168.1.255"
    "255.255.255.255"
  ];
  ipv6 = [
    "::"
    "::1"
    "1::"
    "fd00::2"
    "fe80::1"
    "2001:DB8::1"
    "1:2:3:4:5:6:7:8"
    "1:2:3:4:5:6:7::"
    "::2:3:4:5:6:7:8"
    "::ffff:192.168.1.1"
    "1:2:3:4:5:6:1.2.3.4"
  ];
  names = [
    "ada"
    "cafe"
    "two.example"
    "two.example."
    "my_host"
    "3d-printer"
    "localhost"
  ];
  none = [
    ""
    "192.168.1.300"
    "192.168.1"
    "192.168.1.1.1"
    "192.168.01.1"
    "192.168.1.1/24"
    "1.2.3.4000"
    "1234"
    ":"
    ":::"
    "1:::2"
    "1::2::3"
    "1:2:3:4:5:6:7"
    "1:2:3:4:5:6:7:8:9"
    "1:2:3:4::5:6:7:8"
    "12345::"
    "g::1"
    "fe80::1%eth0"
    "[fd00::2]"
    "1.2.3.4::"
    "::1.2.3.4:5"
    "::1.2.3.300"
    "1:2:3:4:5:6:7:1.2.3.4"
    "two hosts"
    "-two"
    "two-"
    "two..example"
    "two'; reboot; '"
  ];

  kind =
    text:
    lib.concatStringsSep "+" (
      lib.optional (address.isIPv4 text) "IPv4"
      ++ lib.optional (address.isIPv6 text) "IPv6"
      ++ lib.optional (address.isName text) "name"
    );
  kinds = [
    {
      texts = ipv4;
      wanted = "IPv4";
    }
    {
      texts = ipv6;
      wanted = "IPv6";
    }
    {
      texts = names;
      wanted = "name";
    }
    {
      texts = none;
      wanted = "";
    }
  ];
  readings = lib.listToAttrs (
    lib.concatMap (
      { texts, wanted }:
      map (
        text:
        lib.nameValuePair "`${text}`" [
          (kind text)
          wanted
        ]
      ) texts
    ) kinds
  );

  properties = {
    "one address has one value in all spellings" =
      address.parse "2001:db8::1" == address.parse "2001:0DB8:0:0:0:0:0:1";
    "an embedded IPv4 address has its bits" =
      address.parse "::1.2.3.4" == [
        0
        0
        0
        0
        0
        0
        258
        772
      ];
    "mapped addresses are found" =
      lib.all address.isMapped [
        "::ffff:10.0.0.1"
        "0:0:0:0:0:FFFF:a00:1"
      ]
      && !lib.any address.isMapped [
        "10.0.0.1"
        "::1"
        "1::ffff:10.0.0.1"
      ];
    "loopback is 127.0.0.0/8, ::1 and localhost" =
      lib.all address.isLoopback [
        "localhost"
        "127.0.0.1"
        "127.9.9.9"
        "::1"
        "0:0:0:0:0:0:0:1"
      ]
      && !lib.any address.isLoopback [
        "127.example.com"
        "127.0.0.300"
        "::2"
        "10.0.0.1"
      ];
    "a wildcard is found in every spelling" =
      lib.all address.isWildcard [
        "0.0.0.0"
        "0"
        "::"
        "[::]"
        "::0"
      ]
      && !lib.any address.isWildcard [
        "10.0.0.1"
        "::1"
      ];
  };
in
import ../expectations.nix { inherit pkgs; } "address" { } (
  readings
  // lib.mapAttrs (_: holds: [
    holds
    true
  ]) properties
)
