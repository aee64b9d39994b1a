# Directives that restrict a unit. `computes`: whether the unit starts llama.cpp's programs. `gpu`: the driver stack that they use.
{
  lib,
  computes,
  gpu,
}:
let
  usesGpu = computes && gpu != "none";
  nvidia = [
    "char-nvidia"
    "char-nvidia-caps"
    # Older drivers use this name for /dev/nvidia0.
    "char-nvidia-frontend"
    "char-nvidia-uvm"
    "char-nvidiactl"
  ];
  # The GPU of any vendor under WSL.
  wsl = "/dev/dxg";
  devices = {
    none = [ ];
    cuda = nvidia ++ [ wsl ];
    rocm = [
      "char-drm"
      "char-kfd"
      wsl
    ];
    # NVIDIA's Vulkan driver opens NVIDIA's own devices too.
    vulkan = [ "char-drm" ] ++ nvidia ++ [ wsl ];
  };
in
{
  # Each unit runs as its own dynamic user.
  DynamicUser = true;
  UMask = "0077";

  AmbientCapabilities = "";
  CapabilityBoundingSet = "";
  LockPersonality = true;
  # The drivers compile kernels for the GPU, not code for the CPU, so this breaks nothing.
  MemoryDenyWriteExecute = true;
  NoNewPrivileges = true;
  PrivateMounts = true;
  PrivateTmp = true;
  PrivateUsers = true;
  ProtectClock = true;
  ProtectControlGroups = true;
  ProtectHome = true;
  ProtectHostname = true;
  ProtectKernelLogs = true;
  ProtectKernelModules = true;
  ProtectKernelTunables = true;
  ProtectProc = "invisible";
  # CUDA, ROCm and Vulkan load their drivers from /run/opengl-driver, which stays readable.
  ProtectSystem = "strict";
  RemoveIPC = true;
  RestrictNamespaces = true;
  RestrictRealtime = true;
  RestrictSUIDSGID = true;
  SystemCallArchitectures = "native";
  SystemCallErrorNumber = "EPERM";
  SystemCallFilter = [
    "@system-service"
    "~@privileged"
  ];
  # The unit serves over IP. It needs AF_UNIX for the notify socket of systemd and for nscd.
  RestrictAddressFamilies = [
    "AF_INET"
    "AF_INET6"
    "AF_UNIX"
  ];

  DevicePolicy = "closed";
  # A private /dev has no GPU. A unit with a GPU gets the list of allowed devices instead.
  PrivateDevices = !usesGpu;
}
// lib.optionalAttrs usesGpu {
  DeviceAllow = map (device: "${device} rw") devices.${gpu};
}
// lib.optionalAttrs (usesGpu && gpu != "cuda") {
  # These groups own /dev/kfd and /dev/dri/*. Every user can open NVIDIA's devices.
  SupplementaryGroups = [
    "render"
    "video"
  ];
}
// {
  # llama.cpp reads /proc/meminfo and /proc/cpuinfo, CUDA /proc/driver/nvidia, and the worker /proc/net/tcp.
  ProcSubset = if computes then "all" else "pid";
}
