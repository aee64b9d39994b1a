# Two RX 7900 XTX: spreads the big model over its own GPUs and those of the workers.
{
  networking.hostName = "server";

  services.tightwad = {
    cluster = import ./cluster.nix;
    openFirewall = true;
  };

  hardware.graphics.enable = true;

  # Replace the rest by the hardware-configuration.nix of this machine and your own settings.
  nixpkgs.hostPlatform = "x86_64-linux";
  boot.loader.systemd-boot.enable = true;
  fileSystems."/" = {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };
  system.stateVersion = "26.05";
}
