//! `tightwad check-config`.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::output::{print, print_line};
use crate::config::check_config;

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

/// Checks it. The config goes to stdout, what is said about it to stderr.
pub fn check(file: Option<&Path>, options: &Options) -> Result<(), Failure> {
    let report = check_config(file);
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
        eprintln!("{report}");
    }
    Ok(())
}
