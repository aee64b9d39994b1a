# What a unit may do. `computes`: it starts llama.cpp's programs; `gpu` is what they compute on.
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
    # The name that older drivers give /dev/nvidia0.
    "char-nvidia-frontend"
    "char-nvidia-uvm"
    "char-nvidiactl"
  ];
  # The GPU under WSL, of every vendor.
  wsl = "/dev/dxg";
  devices = {
    none = [ ];
    cuda = nvidia ++ [ wsl ];
    rocm = [
      "char-drm"
      "char-kfd"
      wsl
    ];
    # NVIDIA's Vulkan driver goes by its own devices as well.
    vulkan = [ "char-drm" ] ++ nvidia ++ [ wsl ];
  };
in
{
  # A user of its own for each unit, made at its start.
  DynamicUser = true;
  UMask = "0077";

  AmbientCapabilities = "";
  CapabilityBoundingSet = "";
  LockPersonality = true;
  # The drivers compile kernels for the GPU, not code for the CPU.
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
  # /run/opengl-driver, which CUDA, ROCm and Vulkan load their drivers from, stays readable.
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
  # IP is what it serves; AF_UNIX is the socket on which it tells systemd that it is ready, and the way to nscd.
  RestrictAddressFamilies = [
    "AF_INET"
    "AF_INET6"
    "AF_UNIX"
  ];

  DevicePolicy = "closed";
  # The private /dev has no GPU in it; the list says which devices may be opened then.
  PrivateDevices = !usesGpu;
}
// lib.optionalAttrs usesGpu {
  DeviceAllow = map (device: "${device} rw") devices.${gpu};
}
// lib.optionalAttrs (usesGpu && gpu != "cuda") {
  # /dev/kfd and /dev/dri/* belong to these groups; NVIDIA's devices are open to everybody.
  SupplementaryGroups = [
    "render"
    "video"
  ];
}
// {
  # llama.cpp reads /proc/meminfo and /proc/cpuinfo, CUDA /proc/driver/nvidia, and the worker /proc/net/tcp.
  ProcSubset = if computes then "all" else "pid";
}
