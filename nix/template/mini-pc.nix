# No GPU: drafts with the small model.
{
  networking.hostName = "mini-pc";

  services.tightwad = {
    cluster = import ./cluster.nix;
    openFirewall = true;
  };

  # Replace the rest by the hardware-configuration.nix of this machine and your own settings.
  nixpkgs.hostPlatform = "x86_64-linux";
  boot.loader.systemd-boot.enable = true;
  fileSystems."/" = {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };
  system.stateVersion = "26.05";
}
