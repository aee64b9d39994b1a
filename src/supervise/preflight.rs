//! Checks before a server is started: program, model file, key file, port. Each failure is one sentence that names the config key,
//! instead of forty lines of the server's log.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use super::command::{self, EXTERNAL_DRAFT_OPTION, Launch, Role};
use super::environment;
use crate::config::{Binaries, MaxDraftTokens, Model, Server};

/// The first bytes of a GGUF file.
const GGUF_MAGIC: [u8; 4] = *b"GGUF";
/// Time limit for `--help`, which takes milliseconds unless a GPU driver has to wake up.
const HELP_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a server cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// No such program.
    #[error(
        "there is no program `{}`; build it with scripts/llama-cpp, or name yours under `binaries` in the config",
        .0.display()
    )]
    NoProgram(PathBuf),
    /// No such file.
    #[error("the {what} {} does not exist; check `{key}` in the config", .path.display())]
    NoFile {
        /// Kind of the file.
        what: &'static str,
        /// The key that names it.
        key: &'static str,
        /// The path that the config gives.
        path: PathBuf,
    },
    /// The file exists and cannot be read.
    #[error("the {what} {} cannot be read ({source}); check its permissions", .path.display())]
    Unreadable {
        /// Kind of the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not a GGUF model.
    #[error("{} is not a GGUF model (it does not begin with `GGUF`); download or convert it again", .0.display())]
    NotGguf(PathBuf),
    /// `--help` does not end in time.
    #[error(
        "`{} --help` does not answer within {} s, so Tightwad cannot find out whether it verifies drafts; check whether the \
         machine is overloaded or its GPU driver hangs, and try again",
        .0.display(), HELP_TIMEOUT.as_secs()
    )]
    HelpTimedOut(PathBuf),
    /// Another program has the port.
    #[error(
        "port {port} on {host} is in use; end the program that listens there, or choose another port (`port` in the config)"
    )]
    PortInUse {
        /// Address.
        host: String,
        /// Port.
        port: u16,
    },
    /// The system refuses to listen on the address.
    #[error("cannot listen on {host} port {port} ({source}); check `host` and `port` in the config")]
    CannotListen {
        /// Address.
        host: String,
        /// Port.
        port: u16,
        /// Why.
        source: io::Error,
    },
}

/// Runs all checks and returns the command line of a llama-server.
pub async fn llama_server(
    role: Role,
    binaries: &Binaries,
    server: &Server,
    (name, gguf): (&str, &Model),
    drafts: MaxDraftTokens,
) -> Result<Launch, PreflightError> {
    let program = program(&binaries.llama_server)?;
    model(&gguf.path)?;
    if let Some(file) = &server.api_key_file {
        key_file(file)?;
    }
    let external_draft = match role {
        Role::Draft | Role::Rpc => None,
        Role::Target | Role::Coordinator => external_draft(role, &program, drafts).await?,
    };
    let launch = command::llama_server(program, server, name, gguf, external_draft);
    let (host, port) = launch.address();
    port_free(&host, port)?;
    Ok(launch)
}

/// Largest number of draft tokens per step, if the llama-server can verify drafts.
pub async fn external_draft(role: Role, program: &Path, drafts: MaxDraftTokens) -> Result<Option<u16>, PreflightError> {
    let Some(wanted) = command::external_draft(drafts) else {
        return Ok(None);
    };
    if takes_external_drafts(program, HELP_TIMEOUT).await? {
        return Ok(Some(wanted));
    }
    tracing::warn!(
        "{} cannot verify drafts (it has no option {EXTERNAL_DRAFT_OPTION}), so the {role} runs without; build one that can \
         with scripts/llama-cpp",
        program.display()
    );
    Ok(None)
}

/// Finds a program by its path, or on `PATH`.
pub fn program(name: &Path) -> Result<PathBuf, PreflightError> {
    which::which(name).map_err(|_| PreflightError::NoProgram(name.to_owned()))
}

/// Checks that the file is a GGUF model.
pub fn model(path: &Path) -> Result<(), PreflightError> {
    let mut file = readable("model file", "path", path)?;
    let mut magic = [0; 4];
    match file.read_exact(&mut magic) {
        Ok(()) if magic == GGUF_MAGIC => Ok(()),
        Err(source) if source.kind() != ErrorKind::UnexpectedEof => Err(PreflightError::Unreadable {
            what: "model file",
            path: path.to_owned(),
            source,
        }),
        _ => Err(PreflightError::NotGguf(path.to_owned())),
    }
}

/// Checks that the file with the API key can be read.
fn key_file(path: &Path) -> Result<(), PreflightError> {
    readable("key file", "api_key_file", path).map(drop)
}

fn readable(what: &'static str, key: &'static str, path: &Path) -> Result<File, PreflightError> {
    File::open(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => PreflightError::NoFile {
            what,
            key,
            path: path.to_owned(),
        },
        _ => PreflightError::Unreadable {
            what,
            path: path.to_owned(),
            source,
        },
    })
}

/// Checks that the port is free.
pub fn port_free(host: &str, port: u16) -> Result<(), PreflightError> {
    let host = host.trim_matches(['[', ']']);
    match TcpListener::bind((host, port)) {
        Ok(_) => Ok(()),
        Err(error) => Err(not_listening(host, port, error)),
    }
}

/// Listens there.
pub async fn listen(host: &str, port: u16) -> Result<tokio::net::TcpListener, PreflightError> {
    let listener = tokio::net::TcpListener::bind((host, port)).await;
    listener.map_err(|error| not_listening(host, port, error))
}

fn not_listening(host: &str, port: u16, error: io::Error) -> PreflightError {
    let host = host.to_owned();
    if error.kind() == ErrorKind::AddrInUse {
        PreflightError::PortInUse { host, port }
    } else {
        let source = error;
        PreflightError::CannotListen { host, port, source }
    }
}

/// A port of this machine that is free right now.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Whether drafters can attach to this llama-server, which has an option for that only with Tightwad's patch. `false` for a program
/// that does not print its help; its start then reports the cause.
async fn takes_external_drafts(llama_server: &Path, timeout: Duration) -> Result<bool, PreflightError> {
    let mut command = tokio::process::Command::new(llama_server);
    environment::apply(&mut command, &[]);
    command
        .arg("--help")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    match tokio::time::timeout(timeout, command.output()).await {
        Ok(Ok(help)) => Ok(String::from_utf8_lossy(&help.stdout).contains(EXTERNAL_DRAFT_OPTION)),
        Ok(Err(_)) => Ok(false),
        Err(_) => Err(PreflightError::HelpTimedOut(llama_server.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_text_file_is_no_model() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "version https://git-lfs.github.com/spec/v1").unwrap();
        assert!(matches!(model(file.path()), Err(PreflightError::NotGguf(_))));
    }

    #[test]
    fn an_empty_file_is_no_model() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(model(file.path()), Err(PreflightError::NotGguf(_))));
    }

    #[test]
    fn a_missing_model_names_its_path_and_key() {
        let error = model(Path::new("/no/such.gguf")).unwrap_err().to_string();
        assert!(error.contains("/no/such.gguf") && error.contains("`path`"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_gives_its_help_too_late_is_not_taken_for_one_that_cannot_verify() {
        let folder = tempfile::tempdir().unwrap();
        let llama_server = folder.path().join("llama-server");
        let slow = format!("#!/bin/sh\nsleep 2; echo '{EXTERNAL_DRAFT_OPTION}'\n");
        std::fs::write(&llama_server, slow).unwrap();
        std::fs::set_permissions(&llama_server, std::fs::Permissions::from_mode(0o755)).unwrap();
        let late = takes_external_drafts(&llama_server, Duration::from_millis(100)).await;
        assert!(matches!(late, Err(PreflightError::HelpTimedOut(_))), "{late:?}");
        assert!(takes_external_drafts(&llama_server, HELP_TIMEOUT).await.unwrap());
    }

    #[test]
    fn a_port_with_a_listener_is_in_use() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(matches!(
            port_free("127.0.0.1", port),
            Err(PreflightError::PortInUse { .. })
        ));
        drop(listener);
        assert!(port_free("127.0.0.1", port).is_ok());
    }

    #[test]
    fn an_address_of_another_machine_cannot_be_listened_on() {
        assert!(matches!(
            port_free("192.0.2.1", 1),
            Err(PreflightError::CannotListen { .. })
        ));
    }
}
