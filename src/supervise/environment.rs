//! The environment of llama.cpp's programs: the variables that they need to find libraries, GPUs and caches, and no secrets.
//!
//! The supervisor's environment may hold tokens for other services. A crashing child may write its environment into a core file, and
//! every process of its user can read it. So a child inherits only the variables that are listed here. It also gets those of `env` in
//! the cluster file.

use std::ffi::OsStr;

use tokio::process::Command;

use crate::config::{Secret, is_secret};

/// Variables that a child inherits.
const NAMES: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LOCALE_ARCHIVE",
    "TZ",
    "TZDIR",
    "TMPDIR",
    "TMP",
    "TEMP",
    // Some Vulkan drivers and layers use the desktop session.
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "DRI_PRIME",
    // The visible GPUs, as set by OpenCL, ROCm and batch systems.
    "GPU_DEVICE_ORDINAL",
    "GLIBC_TUNABLES",
    // The loader for programs that were not built for NixOS.
    "NIX_LD",
    "NIX_LD_LIBRARY_PATH",
];

/// Beginnings of the names of variables that a child inherits.
const PREFIXES: &[&str] = &[
    "LC_",
    "LD_",
    "DYLD_",
    "XDG_",
    // llama.cpp.
    "GGML_",
    "LLAMA_",
    // NVIDIA.
    "CUDA_",
    "CUBLAS_",
    "NVIDIA_",
    "NCCL_",
    "__NV_",
    // AMD.
    "HIP_",
    "ROCR_",
    "ROCM_",
    "ROCBLAS_",
    "HIPBLASLT_",
    "HSA_",
    "AMD_",
    "GPU_MAX_",
    "RCCL_",
    "MIOPEN_",
    "TENSILE_",
    // Vulkan and Mesa.
    "VK_",
    "MESA_",
    "RADV_",
    "ANV_",
    "AMDVLK_",
    "LIBGL_",
    // Intel, Moore Threads, Huawei, Apple.
    "ONEAPI_",
    "SYCL_",
    "ZE_",
    "UR_",
    "OCL_",
    "MUSA_",
    "ASCEND_",
    "METAL_",
    "MTL_",
    // Threads and BLAS.
    "OMP_",
    "KMP_",
    "GOMP_",
    "MKL_",
    "OPENBLAS_",
    "BLIS_",
    "MALLOC_",
];

/// Sets the environment of `command`: the inherited variables, then `own`, which win.
pub fn apply(command: &mut Command, own: &[(String, Secret)]) {
    command.env_clear();
    command.envs(std::env::vars_os().filter(|(name, _)| is_inherited(name)));
    command.envs(own.iter().map(|(name, value)| (name, value.expose())));
}

/// Whether a child inherits a variable of this name.
fn is_inherited(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let listed = NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    // `LLAMA_API_KEY` of a user's shell is not the key of this server.
    listed && !is_secret(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_libraries_gpus_and_caches_is_inherited_and_secrets_are_not() {
        for name in [
            "PATH",
            "LD_LIBRARY_PATH",
            "CUDA_VISIBLE_DEVICES",
            "HSA_OVERRIDE_GFX_VERSION",
            "ROCR_VISIBLE_DEVICES",
            "VK_DRIVER_FILES",
            "GGML_CUDA_NO_PINNED",
            "XDG_CACHE_HOME",
            "NIX_LD_LIBRARY_PATH",
        ] {
            assert!(is_inherited(OsStr::new(name)), "{name}");
        }
        for name in [
            "HF_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "TIGHTWAD_PROXY__AUTH_TOKEN",
            "LLAMA_API_KEY",
            "NOTIFY_SOCKET",
            "WATCHDOG_USEC",
            "CREDENTIALS_DIRECTORY",
            "SSH_AUTH_SOCK",
        ] {
            assert!(!is_inherited(OsStr::new(name)), "{name}");
        }
    }
}
