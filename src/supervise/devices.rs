//! The devices that a llama-server sees, listed before each start.
//!
//! A llama-server that finds no GPU computes on the CPU without a warning. So a server with a configured kind of GPU is not started
//! until `--list-devices` shows one, and gets the names with `--device`.

use std::ffi::OsStr;
use std::fmt;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use super::command::{Launch, Role};
use super::environment;
use crate::config::{GpuBackend, Secret};
use crate::failure::explain;

/// Time limit for `--list-devices`. A GPU driver may take several seconds to wake up.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);

/// The answer of `--list-devices`.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// What it printed: one device per indented line.
    pub(crate) text: String,
    devices: Vec<Device>,
    /// The error of a driver's library.
    complaint: Option<String>,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    /// `CUDA0`.
    name: String,
    /// `NVIDIA GeForce RTX 4070 Ti SUPER (16063 MiB, 15000 MiB free)`.
    what: String,
}

/// No device of the configured kind was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The kind.
    pub kind: GpuBackend,
    /// The devices that were found, or the driver's error.
    pub found: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, found } = self;
        write!(f, "no {kind} device: {found}; {}", remedy(*kind))
    }
}

/// The next thing to check.
fn remedy(kind: GpuBackend) -> &'static str {
    match kind {
        GpuBackend::Cuda => {
            "see what `nvidia-smi` says: if the NVIDIA driver and the kernel module differ, as after an update, reboot; a \
             llama.cpp that is built without CUDA finds none either"
        }
        GpuBackend::Hip => {
            "see what `rocminfo` says, and whether this user may open /dev/kfd and /dev/dri (groups `render` and `video`); a \
             llama.cpp that is built without HIP finds none either"
        }
        GpuBackend::Vulkan => {
            "see what `vulkaninfo --summary` says, and whether this user may open /dev/dri (groups `render` and `video`); a \
             llama.cpp that is built without Vulkan finds none either"
        }
        GpuBackend::Metal | GpuBackend::Cpu => "check `backend` in the config, and what llama.cpp is built for",
    }
}

/// Logs the devices of the server, and adds `--device` with those of the configured kind. Fails with [`Missing`] if there are none.
pub async fn choose(role: Role, launch: &Launch) -> Result<Launch, Missing> {
    let mut launch = launch.clone();
    let Some(kind) = launch.gpus else {
        log_devices(role, &launch).await;
        return Ok(launch);
    };
    let listing = list(&launch.program, &launch.env).await;
    let listing = listing.map_err(|found| Missing { kind, found })?;
    let of_kind: Vec<_> = listing.devices.iter().filter(|it| kind.is_named(&it.name)).collect();
    if of_kind.is_empty() {
        let found = listing.describe(&launch.program);
        return Err(Missing { kind, found });
    }
    tracing::info!("the {role} computes on {}", join(of_kind.iter().copied(), "; "));
    let names: Vec<&str> = of_kind.iter().map(|device| device.name.as_str()).collect();
    launch.args.extend(["--device".into(), names.join(",").into()]);
    Ok(launch)
}

/// Logs the devices of a server without a configured kind of GPU.
async fn log_devices(role: Role, launch: &Launch) {
    match launch.value_of("--device").or_else(|| launch.value_of("-dev")) {
        Some("none") => return tracing::info!("the {role} computes on the CPU"),
        Some(names) => return tracing::info!("the {role} computes on {names}"),
        None => {}
    }
    match list(&launch.program, &launch.env).await {
        Ok(listing) if listing.devices.is_empty() => {
            tracing::info!("the {role} computes on the CPU: {}", listing.describe(&launch.program));
        }
        Ok(listing) => tracing::info!("the {role} computes on {}", join(&listing.devices, "; ")),
        Err(error) => tracing::warn!("cannot list the devices of the {role}: {error}"),
    }
}

/// Runs `--list-devices`. The error is a sentence.
pub(crate) async fn list(program: &OsStr, env: &[(String, Secret)]) -> Result<Listing, String> {
    let mut command = Command::new(program);
    environment::apply(&mut command, env);
    command.arg("--list-devices").stdin(Stdio::null()).kill_on_drop(true);
    let question = format!("`{} --list-devices`", program.display());
    let output = timeout(LIST_TIMEOUT, command.output())
        .await
        .map_err(|_| format!("{question} does not answer within {} s", LIST_TIMEOUT.as_secs()))?
        .map_err(|error| format!("{question} cannot be run: {}", explain(&error)))?;
    let complaint = complaint(String::from_utf8_lossy(&output.stderr).lines());
    if !output.status.success() {
        let words = complaint.map(|words| format!(": {words}")).unwrap_or_default();
        return Err(format!("{question} fails ({}){words}", output.status));
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(Listing {
        devices: parse(&text),
        text,
        complaint,
    })
}

impl Listing {
    /// The error of the driver, or the devices that the program lists.
    pub(crate) fn describe(&self, program: &OsStr) -> String {
        if let Some(complaint) = &self.complaint {
            return complaint.clone();
        }
        let program = program.display();
        match self.devices.as_slice() {
            [] => format!("`{program} --list-devices` lists none"),
            devices => format!("`{program} --list-devices` lists only {}", join(devices, ", ")),
        }
    }
}

fn join<'a>(devices: impl IntoIterator<Item = &'a Device>, between: &str) -> String {
    let devices = devices.into_iter();
    let shown: Vec<String> = devices.map(|Device { name, what }| format!("{name}: {what}")).collect();
    shown.join(between)
}

/// Reads the devices, each on an indented line (llama.cpp b11434, `common_print_available_devices`).
fn parse(list: &str) -> Vec<Device> {
    let lines = list.lines().filter(|line| line.starts_with("  "));
    let devices = lines.filter_map(|line| line.trim().split_once(": "));
    devices
        .map(|(name, what)| Device {
            name: name.to_owned(),
            what: what.trim().to_owned(),
        })
        .collect()
}

/// The first line in which a driver's library reports an error.
pub fn complaint<T: AsRef<str>>(lines: impl IntoIterator<Item = T>) -> Option<String> {
    let fails = |line: &str| {
        let line = line.to_lowercase();
        ["fail", "error", "no cuda", "no rocm"]
            .iter()
            .any(|words| line.contains(words))
    };
    let mut lines = lines.into_iter();
    lines
        .find(|line| fails(line.as_ref()))
        .map(|line| line.as_ref().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_from_their_indented_lines() {
        let list = "load_backend: loaded CUDA backend\nAvailable devices:\n  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23900 MiB free)\n";
        let devices = parse(list);
        assert_eq!(
            join(&devices, ";"),
            "CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23900 MiB free)"
        );
        assert!(parse("Available devices:\n  (none)\n").is_empty());
    }

    #[test]
    fn a_driver_that_does_not_load_is_quoted() {
        let stderr = "hello\nggml_cuda_init: failed to initialize CUDA: forward compatibility was attempted on non supported HW\n";
        assert!(complaint(stderr.lines()).unwrap().starts_with("ggml_cuda_init: failed"));
        let missing = Missing {
            kind: GpuBackend::Cuda,
            found: complaint(stderr.lines()).unwrap(),
        };
        let sentence = missing.to_string();
        assert!(sentence.starts_with("no CUDA device: ggml_cuda_init"), "{sentence}");
        assert!(sentence.contains("reboot"), "{sentence}");
    }

    #[test]
    fn a_device_is_of_a_kind_by_its_name_and_number() {
        assert!(GpuBackend::Cuda.is_named("CUDA10"));
        assert!(!GpuBackend::Cuda.is_named("CUDA0x"));
        assert!(GpuBackend::Hip.is_named("ROCm0"));
        assert!(!GpuBackend::Hip.is_named("Vulkan0"));
    }
}
