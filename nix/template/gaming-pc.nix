# An RTX 4070 Ti Super: lends its GPU to the coordinator.
{
  networking.hostName = "gaming-pc";

  services.tightwad = {
    cluster = import ./cluster.nix;
    openFirewall = true;
  };

  # NVIDIA's driver and CUDA are unfree.
  nixpkgs.config.allowUnfree = true;
  hardware.graphics.enable = true;
  hardware.nvidia.open = true;
  services.xserver.videoDrivers = [ "nvidia" ];

  # Replace the rest by the hardware-configuration.nix of this machine and your own settings.
  nixpkgs.hostPlatform = "x86_64-linux";
  boot.loader.systemd-boot.enable = true;
  fileSystems."/" = {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };
  system.stateVersion = "26.05";
}
