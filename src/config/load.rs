//! Finds the cluster file, applies the layers over the defaults, and checks the result.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use figment::value::{Dict, Empty, Value};

use super::environment::Environment;
use super::error::{ConfigError, Problem};
use super::origin::{Finding, KeyPath, Origin, Origins};
use super::validate::{self, SECTIONS};
use super::{Config, credentials, decode, yaml};

/// A configuration, its source and its warnings.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The checked configuration.
    pub config: Config,
    /// The file. None: the environment alone set it.
    pub path: Option<PathBuf>,
    /// Settings that are allowed but probably unwanted; one sentence each.
    pub warnings: Vec<String>,
    pub(super) origins: Origins,
}

impl Loaded {
    /// [`Config::check_listeners`] with file and line in the message.
    pub fn check_listeners(&self) -> Result<(), ConfigError> {
        self.refuse_open(|_| true)
    }

    /// The same for one section, which is about to listen.
    pub fn check_listener(&self, section: &str) -> Result<(), ConfigError> {
        self.refuse_open(|open| open == section)
    }

    fn refuse_open(&self, about: impl Fn(&str) -> bool) -> Result<(), ConfigError> {
        let open = validate::open_listeners(&self.config).filter(|(section, _)| about(section));
        ConfigError::unless_none(open.map(|(_, finding)| self.origins.locate(finding)).collect())
    }
}

/// Loads the configuration from three layers: the defaults, the cluster file (`explicit`, else the first that the search finds), and the
/// `TIGHTWAD_<SECTION>__<KEY>` variables of this process. A later layer wins.
pub fn load(explicit: Option<&Path>) -> Result<Loaded, ConfigError> {
    load_in(explicit, &Environment::of_this_process())
}

/// [`load`] in a given environment.
pub fn load_in(explicit: Option<&Path>, environment: &Environment) -> Result<Loaded, ConfigError> {
    let Reading {
        config,
        findings,
        origins,
    } = read(explicit, environment)?;
    let problems = origins.locate_all(findings);
    let Some(config) = config.filter(|_| problems.is_empty()) else {
        return Err(ConfigError::Invalid(problems));
    };
    let warnings = origins.locate_all(validate::warnings(&config));
    Ok(Loaded {
        config,
        path: origins.file.clone(),
        warnings: warnings.iter().map(ToString::to_string).collect(),
        origins,
    })
}

/// Content of the sources, correct or not.
pub(super) struct Reading {
    /// `None` if a value could not be decoded.
    pub config: Option<Config>,
    /// The problems.
    pub findings: Vec<Finding>,
    pub origins: Origins,
}

/// Reads all layers.
pub(super) fn read(explicit: Option<&Path>, environment: &Environment) -> Result<Reading, ConfigError> {
    let file = find_file(explicit, environment)?;
    let mut origins = Origins::default();
    let mut root = match &file {
        Found::File { path, text } => read_file(path, text, environment, &mut origins)?,
        Found::Nothing { .. } => Dict::new(),
    };
    environment.overlay(&mut root, &mut origins);
    if let Found::Nothing { looked } = file
        && !root.contains_key("proxy")
    {
        return Err(ConfigError::NotFound { looked });
    }
    let (mut config, mut findings) = decode::decode(root, &mut origins);
    if let Some(config) = &mut config {
        findings.extend(validate::problems(config));
        credentials::take(config, environment);
    }
    Ok(Reading {
        config,
        findings,
        origins,
    })
}

enum Found {
    File { path: PathBuf, text: String },
    Nothing { looked: Vec<PathBuf> },
}

fn find_file(explicit: Option<&Path>, environment: &Environment) -> Result<Found, ConfigError> {
    let variable = environment.get("TIGHTWAD_CONFIG").map(Path::new);
    if let Some(named) = explicit.or(variable) {
        let path = environment.directory.join(named);
        return match read_text(&path) {
            Ok(text) => Ok(Found::File { path, text }),
            Err(source) => Err(ConfigError::Read {
                path,
                from_variable: explicit.is_none(),
                source,
            }),
        };
    }
    let mut looked = vec![
        environment.directory.join("tightwad.yaml"),
        environment.directory.join("configs/cluster.yaml"),
    ];
    let home = |home: &str| Path::new(home).join(".config");
    let user = environment.get("XDG_CONFIG_HOME").map(PathBuf::from);
    let user = user.or_else(|| environment.get("HOME").map(home));
    looked.extend(user.map(|folder| folder.join("tightwad/config.yaml")));
    looked.push("/etc/tightwad/cluster.yaml".into());
    for path in &looked {
        match read_text(path) {
            Ok(text) => {
                return Ok(Found::File {
                    path: path.clone(),
                    text,
                });
            }
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.clone(),
                    from_variable: false,
                    source,
                });
            }
        }
    }
    Ok(Found::Nothing { looked })
}

/// Largest cluster file in bytes. A file for a hundred hosts needs a tenth of it.
const MOST_BYTES: u64 = 1 << 20;

/// Reads the cluster file or a secret from a file or a pipe (`-c <(generate)`). Refuses a device, which may never end.
pub(super) fn read_text(path: &Path) -> io::Result<String> {
    let refuse = |what: String| Err(io::Error::other(what));
    let kind = fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_fifo() {
        let what = if kind.is_dir() {
            "a folder"
        } else {
            "a device or a socket"
        };
        return refuse(format!("it is {what}; name a regular file or a pipe"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return refuse(format!("it is larger than {} MiB; name another file", MOST_BYTES >> 20));
    }
    String::from_utf8(bytes).or_else(|_| refuse("it is not text in UTF-8; name another file".to_owned()))
}

/// Reads the values of the file. Their lines go to `origins`.
fn read_file(path: &Path, text: &str, environment: &Environment, origins: &mut Origins) -> Result<Dict, ConfigError> {
    let problem = |line: Option<usize>, message: String| {
        ConfigError::Invalid(vec![Problem {
            file: Some(path.to_owned()),
            line,
            message,
            ..Problem::default()
        }])
    };
    let tree = yaml::read(text, &|name| environment.variables.get(name).cloned())
        .map_err(|error| problem(Some(error.line), error.message))?;
    origins.file = Some(path.to_owned());
    let line = |(key, line): (KeyPath, usize)| (key, Origin::Line(line));
    origins.keys = tree.lines.into_iter().map(line).collect();
    if !tree.findings.is_empty() {
        let findings = tree.findings.into_iter().map(|finding| origins.locate(finding));
        return Err(ConfigError::Invalid(findings.collect()));
    }
    match tree.value {
        Value::Dict(_, root) => Ok(root),
        Value::Empty(_, Empty::Unit | Empty::None) => Err(problem(
            None,
            format!("the file is empty; {SECTIONS} (configs/reference.yaml lists every key)"),
        )),
        _ => Err(problem(Some(1), "the file must be a list of `key: value` lines".into())),
    }
}
