//! The key that the servers of one host share.
//!
//! A llama-server on a loopback address without a key would answer every program of the machine, and every web page in its browsers. So a
//! `target` or `draft` without a key requires a random one. The roles of a host find the key in the first of these places: the credential
//! `local_key` of a systemd unit, the file of the NixOS module if it is readable, and a file in the user's state folder. The first role
//! that needs the file makes it. The roles of one user always share one key.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{ConfigError, Secret, secret};

/// Name of the file and of the credential.
const NAME: &str = "local_key";
/// Key of the NixOS module (modules/local-key.nix). Its units get it as a credential; otherwise only root can read it.
const OF_THE_MODULE: &str = "/run/tightwad-local-key/key";

/// The key and its file.
#[derive(Debug, Clone)]
pub struct LocalKey {
    /// The key that servers require.
    pub key: Secret,
    /// The file that holds it.
    pub path: PathBuf,
}

/// The key of this host. Makes it if this user has none.
pub fn obtain() -> Result<LocalKey, ConfigError> {
    let path = path().map_err(|error| refusal(Path::new(NAME), &error.to_string()))?;
    if !path.exists() {
        make(&path).map_err(|error| refusal(&path, &format!("cannot be made: {error}")))?;
    }
    read(path)
}

/// The key of this host, if there is one.
pub fn existing() -> Result<Option<LocalKey>, ConfigError> {
    match path() {
        Ok(path) if path.exists() => read(path).map(Some),
        _ => Ok(None),
    }
}

fn read(path: PathBuf) -> Result<LocalKey, ConfigError> {
    match secret::read(&path) {
        Ok(key) => Ok(LocalKey { key, path }),
        Err(reason) => Err(refusal(&path, &reason)),
    }
}

fn refusal(path: &Path, reason: &str) -> ConfigError {
    ConfigError::Secret {
        key: "the key of this host's servers".to_owned(),
        path: path.to_owned(),
        reason: format!(
            "{reason}; set `api_key_file` of the section, or `allow_unauthenticated: true` if every program and web page on \
             this machine may use the server"
        ),
    }
}

/// Path of the key of this host, which may not exist yet.
pub fn path() -> io::Result<PathBuf> {
    let credential = std::env::var_os("CREDENTIALS_DIRECTORY").map(|folder| Path::new(&folder).join(NAME));
    let of_module = File::open(OF_THE_MODULE).is_ok().then(|| OF_THE_MODULE.into());
    match credential.filter(|credential| credential.exists()).or(of_module) {
        Some(file) => Ok(file),
        None => state_folder(&["XDG_STATE_HOME"]).map(|folder| folder.join(NAME)),
    }
}

/// Makes the file, unless another process makes it at the same time.
fn make(path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let draft = path.with_extension(format!("{:016x}", rand::random::<u64>()));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)?;
    let written = writeln!(file, "{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>())
        .and_then(|()| fs::hard_link(&draft, path));
    fs::remove_file(&draft)?;
    match written {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// The folder `tightwad` in the folder of the first set variable, else in `~/.local/state`.
pub fn state_folder(variables: &[&str]) -> io::Result<PathBuf> {
    let absolute = |variable: &str| {
        std::env::var_os(variable)
            .map(PathBuf::from)
            .filter(|folder| folder.is_absolute())
    };
    variables
        .iter()
        .find_map(|variable| absolute(variable))
        // The home of a system user may be `/`.
        .or_else(|| {
            absolute("HOME")
                .filter(|home| home.parent().is_some())
                .map(|home| home.join(".local/state"))
        })
        .map(|base| base.join("tightwad"))
        .ok_or_else(|| io::Error::other(format!("this user has no home; set {}", variables.join(" or "))))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_first_who_comes_makes_the_key_and_all_read_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/tightwad/local_key");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| make(&path).unwrap());
            }
        });
        let key = read(path.clone()).unwrap().key;
        make(&path).unwrap();
        assert_eq!(read(path.clone()).unwrap().key, key);
        assert!(key.expose().len() >= 64);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // No temporary file is left.
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
