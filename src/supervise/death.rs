//! Explains why a child died: a sentence with the cause and the next thing to do. Pure.
//!
//! The cause comes from the exit status and from fragments of llama.cpp's own log.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use super::devices::Missing;
use super::restart::Prospect;
use super::stall::Stalled;

/// A death: the most likely cause, and the last lines.
#[derive(Debug, Clone)]
pub struct Death {
    /// The cause.
    pub cause: Cause,
    /// Its last lines.
    pub last_lines: Vec<String>,
}

/// Cause of a child's death. A `String` holds llama.cpp's own line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// Another program listens on its port.
    PortInUse,
    /// The model file is missing, broken, or of a kind that this llama.cpp does not support.
    ModelNotLoaded(String),
    /// A GPU or the machine has too little memory. The line may name the device.
    OutOfMemory(String),
    /// It does not know one of its arguments.
    BadArgument(String),
    /// The connection to a worker broke.
    WorkerLost(String),
    /// A worker has another version of the RPC protocol.
    OtherBuild(String),
    /// It used an instruction that this processor does not have.
    IllegalInstruction,
    /// The supervisor ended it because it made no progress.
    Stalled(Stalled),
    /// It was not started, because no device of the configured kind was found.
    NoDevice(Missing),
    /// A configured device does not exist.
    UnknownDevice(String),
    /// The system could not start the process.
    NotStarted(String),
    /// The supervision of the process has panicked, which ended the process.
    Unsupervised(String),
    /// Another exit code.
    Code(i32),
    /// Another signal.
    Signal(i32),
}

/// Fragment of llama.cpp's log, and the cause that it shows. The most specific fragments come first.
type Sign = (&'static str, fn(String) -> Cause);
const SIGNS: &[Sign] = &[
    ("Remote RPC server crashed", Cause::WorkerLost),
    ("Failed to connect to", Cause::WorkerLost),
    ("RPC server version mismatch", Cause::OtherBuild),
    ("RPC handshake failed", Cause::OtherBuild),
    ("couldn't bind", |_| Cause::PortInUse),
    ("address already in use", |_| Cause::PortInUse),
    ("Failed to create server socket", |_| Cause::PortInUse),
    // This line names the device: `unable to allocate CUDA0 buffer`.
    ("unable to allocate", Cause::OutOfMemory),
    ("out of memory", Cause::OutOfMemory),
    ("failed to allocate", Cause::OutOfMemory),
    ("bad_alloc", Cause::OutOfMemory),
    ("invalid device:", Cause::UnknownDevice),
    ("error: unknown device", Cause::UnknownDevice),
    ("error: invalid argument", Cause::BadArgument),
    ("error: unknown argument", Cause::BadArgument),
    ("error while handling argument", Cause::BadArgument),
    ("error loading model", Cause::ModelNotLoaded),
    ("failed to load model", Cause::ModelNotLoaded),
];

const SIGILL: i32 = 4;
const SIGKILL: i32 = 9;

impl Death {
    /// Explains an exit status by the last lines.
    #[must_use]
    pub fn explain(status: ExitStatus, last_lines: Vec<String>) -> Self {
        let cause = match (status.signal(), sign(&last_lines)) {
            (Some(SIGILL), _) => Cause::IllegalInstruction,
            (_, Some(cause)) => cause,
            (Some(signal), None) => Cause::Signal(signal),
            (None, None) => Cause::Code(status.code().unwrap_or_default()),
        };
        Self { cause, last_lines }
    }

    /// The death of a child that the system could not start.
    #[must_use]
    pub fn not_started(error: &std::io::Error) -> Self {
        Cause::NotStarted(error.to_string()).into()
    }

    /// The missing device, if that is the cause.
    #[must_use]
    pub fn missing(&self) -> Option<&Missing> {
        match &self.cause {
            Cause::NoDevice(missing) => Some(missing),
            _ => None,
        }
    }

    /// Whether starting again may help.
    #[must_use]
    pub fn is_curable(&self) -> bool {
        self.prospect() != Prospect::Hopeless
    }

    /// Whether starting again may help.
    #[must_use]
    pub fn prospect(&self) -> Prospect {
        match self.cause {
            Cause::ModelNotLoaded(_) | Cause::BadArgument(_) | Cause::IllegalInstruction => Prospect::Hopeless,
            Cause::NoDevice(_) => Prospect::Waits,
            _ => Prospect::Open,
        }
    }
}

impl From<Cause> for Death {
    fn from(cause: Cause) -> Self {
        Self {
            cause,
            last_lines: Vec::new(),
        }
    }
}

fn sign(lines: &[String]) -> Option<Cause> {
    SIGNS.iter().find_map(|(fragment, cause)| {
        let fragment = fragment.to_lowercase();
        lines
            .iter()
            .find(|line| line.to_lowercase().contains(&fragment))
            .map(|line| cause(message(line).to_owned()))
    })
}

/// A line of llama.cpp without time and level: `0.00.004 E llama_model_load: error …` becomes `llama_model_load: error …`.
fn message(line: &str) -> &str {
    let mut words = line.splitn(3, ' ');
    match (words.next(), words.next(), words.next()) {
        (Some(time), Some("E" | "W" | "I"), Some(rest)) if time.starts_with(|c: char| c.is_ascii_digit()) => {
            rest.trim()
        }
        _ => line.trim(),
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::PortInUse => {
                f.write_str("another program listens on its port; choose another `port` or end that program")
            }
            Cause::ModelNotLoaded(words) => {
                write!(
                    f,
                    "it could not load the model ({words}); check `path` and whether the file is complete"
                )
            }
            Cause::OutOfMemory(words) => write!(
                f,
                "it ran out of memory ({words}); use a smaller model or quantisation, a smaller `ctx_size`, or fewer \
                 `slots`"
            ),
            Cause::BadArgument(words) => write!(f, "it does not take its arguments ({words}); check `extra_args`"),
            Cause::WorkerLost(words) => write!(
                f,
                "it lost a worker ({words}); check that its host is up, and the network between the two"
            ),
            Cause::OtherBuild(words) => write!(
                f,
                "a worker speaks another version of the protocol ({words}); install the same build of llama.cpp on both"
            ),
            Cause::IllegalInstruction => f.write_str(
                "it used an instruction that this processor does not have; use a llama-server built for this machine, \
                 or try `extra_args: [--no-repack]`",
            ),
            Cause::Stalled(stalled @ Stalled::Still(_)) => write!(
                f,
                "{stalled} while it should answer, so it was ended; give more `stall_seconds` if one batch of a prompt takes \
                 longer"
            ),
            Cause::Stalled(stalled @ Stalled::Stopped(_)) => write!(f, "{stalled}, so it was ended"),
            Cause::NoDevice(missing) => missing.fmt(f),
            Cause::UnknownDevice(words) => write!(
                f,
                "a device that it is to compute on is not there ({words}); check `backend` and `device` in the config, and \
                 the GPU's driver"
            ),
            Cause::NotStarted(error) => write!(f, "it could not be started: {error}"),
            Cause::Unsupervised(panic) => f.write_str(panic),
            Cause::Code(0) => f.write_str("it ended by itself"),
            Cause::Code(127) => f.write_str("it could not be executed (exit code 127); see its last lines"),
            Cause::Code(code) => write!(f, "it ended with exit code {code}; see its last lines"),
            Cause::Signal(SIGKILL) => {
                f.write_str("it was killed (signal 9), probably because the machine ran out of memory: see `dmesg`")
            }
            Cause::Signal(signal) => write!(f, "it was ended by signal {signal}; see its last lines"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn death(raw_status: i32, lines: &[&str]) -> Death {
        Death::explain(
            ExitStatus::from_raw(raw_status),
            lines.iter().map(|line| (*line).to_owned()).collect(),
        )
    }

    #[test]
    fn a_taken_port_is_told_from_the_lines_that_llama_server_writes() {
        let lines = [
            "0.00.003.097 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18998",
            "0.00.003.171 E srv  llama_server: exiting due to HTTP server error",
        ];
        assert_eq!(death(1 << 8, &lines).cause, Cause::PortInUse);
    }

    #[test]
    fn a_broken_model_is_not_tried_again_and_its_error_is_quoted() {
        let lines = [
            "0.00.004.545 E llama_model_load: error loading model: llama_model_loader: failed to load model from /m.gguf",
            "0.00.005.419 E srv  llama_server: exiting due to model loading error",
        ];
        let death = death(1 << 8, &lines);
        assert!(!death.is_curable());
        assert!(
            death.to_string().contains("failed to load model from /m.gguf"),
            "{death}"
        );
        assert!(!death.to_string().contains("0.00.004"), "{death}");
    }

    #[test]
    fn memory_is_named_before_the_model_that_did_not_fit() {
        let lines = [
            "0.10 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9000 MiB on device 0: cudaMalloc failed: out of memory",
            "0.11 E llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        ];
        let death = death(1 << 8, &lines);
        assert!(matches!(death.cause, Cause::OutOfMemory(_)), "{death}");
        assert!(death.to_string().contains("CUDA0"), "{death}");
    }

    #[test]
    fn a_worker_that_is_gone_is_told_from_one_with_another_build() {
        let gone = death(6, &["0.1 E Remote RPC server crashed or returned malformed response"]);
        assert!(matches!(gone.cause, Cause::WorkerLost(_)), "{gone}");
        assert!(!gone.to_string().contains("build"), "{gone}");
        let other = death(1 << 8, &["0.1 E RPC handshake failed with 10.0.0.2:50052"]);
        assert!(matches!(other.cause, Cause::OtherBuild(_)), "{other}");
        assert!(
            other.to_string().contains("build") && other.to_string().contains("10.0.0.2"),
            "{other}"
        );
    }

    #[test]
    fn signals_are_named() {
        assert_eq!(death(4, &[]).cause, Cause::IllegalInstruction);
        assert_eq!(death(11, &["0.1 I srv  all slots are idle"]).cause, Cause::Signal(11));
        assert!(death(9, &[]).to_string().contains("dmesg"));
    }

    #[test]
    fn an_unknown_exit_code_is_shown() {
        assert!(death(3 << 8, &["hello"]).to_string().contains("exit code 3"));
    }
}
