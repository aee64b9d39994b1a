//! `tightwad check-config`.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::exit::Failure;
use crate::config::{self, ConfigError, Loaded};

/// Options of `check-config`.
#[derive(Debug, Args)]
pub struct Options {
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Also print the config as it is after all layers and defaults; secrets are not shown.
    #[arg(long)]
    show: bool,
}

/// Checks it.
pub fn check(file: Option<&Path>, options: &Options) -> Result<(), Failure> {
    let checked = config::load(file).and_then(|loaded| {
        loaded.check_listeners()?;
        Ok(loaded)
    });
    if options.json {
        println!("{:#}", as_json(&checked, options.show));
    }
    match checked {
        Ok(loaded) if !options.json => tell(&loaded, options.show),
        Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn tell(loaded: &Loaded, show: bool) -> Result<(), Failure> {
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    if show {
        let yaml = serde_saphyr::to_string(&loaded.config).map_err(|error| Failure::other("show the config", error))?;
        print!("{yaml}");
    }
    match &loaded.path {
        Some(path) => eprintln!("{} is right", path.display()),
        None => eprintln!("the configuration from the environment is right"),
    }
    Ok(())
}

fn as_json(checked: &Result<Loaded, ConfigError>, show: bool) -> serde_json::Value {
    match checked {
        Ok(loaded) => {
            let mut report = json!({ "ok": true, "path": loaded.path, "warnings": loaded.warnings, "problems": [] });
            if show {
                report["config"] = json!(loaded.config);
            }
            report
        }
        Err(error) => json!({ "ok": false, "path": null, "warnings": [], "problems": error.problems() }),
    }
}
