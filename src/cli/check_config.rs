//! `tightwad check-config`: prints the problems and warnings of the config. Starts nothing.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::output::{print, print_line, say};
use crate::config::{Scope, check_config};

/// Options of `check-config`.
#[derive(Debug, Args)]
pub struct Options {
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Check the file alone, so that the result is the same on every host: ignore this host's models, keys and programs, and
    /// `TIGHTWAD_*` variables that set keys
    #[arg(long)]
    portable: bool,
    /// Also print the effective config with defaults and without secrets
    #[arg(long)]
    show: bool,
}

/// Checks the config. The config goes to stdout, problems and warnings to stderr.
pub fn check(file: Option<&Path>, options: &Options) -> Result<(), Failure> {
    let scope = if options.portable { Scope::File } else { Scope::ThisHost };
    let report = check_config(file, scope);
    let config = report.config.as_ref().filter(|_| options.show);
    if options.json {
        let mut json = serde_json::to_value(&report).map_err(|error| Failure::other("write JSON", error))?;
        if let Some(config) = config {
            json["config"] = json!(config);
        }
        print_line(format_args!("{json:#}"))?;
    } else if let Some(config) = config {
        print(config.to_yaml()?)?;
    }
    if !report.ok {
        return Err(Failure::new(Exit::Config, report.to_string()));
    }
    if !options.json {
        say(format_args!("{report}"));
    }
    Ok(())
}
