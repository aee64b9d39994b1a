//! Progress of a load, and the estimate of the time left. Pure.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// No estimate before this share is loaded or this time has passed.
const TELLING: (f32, Duration) = (0.05, Duration::from_secs(2));

/// Prefix of the lines that llama-server writes to its standard output for a router process (build b11434,
/// `tools/server/server-models.cpp`).
const NEWS: &str = "cmd_child_to_router:state:";
/// The environment variable that makes llama-server write them; any value does.
pub(super) const TELLS_PROGRESS: &str = "LLAMA_SERVER_ROUTER_PORT";

/// The progress of a load.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// From 0 to 1; `None` while nothing is loaded.
    pub progress: Option<f32>,
    /// Seconds left; `None` while there is no estimate.
    pub eta_seconds: Option<u64>,
}

impl Load {
    /// The load after `elapsed`, at `progress` from 0 to 1.
    pub(super) fn after(progress: f32, elapsed: Duration) -> Self {
        let progress = progress.clamp(0.0, 1.0);
        let told = progress >= TELLING.0 && progress < 1.0 && elapsed >= TELLING.1;
        let left = Duration::try_from_secs_f32(elapsed.as_secs_f32() * (1.0 - progress) / progress);
        Self {
            progress: Some(progress),
            eta_seconds: left.ok().filter(|_| told).map(|left| left.as_secs().max(1)),
        }
    }
}

/// A line of llama-server.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Line {
    /// Share of the model that is loaded, from 0 to 1.
    Progress(f32),
    /// Another message for a router.
    News,
    /// A line of the log.
    Log,
}

/// Reads a line.
pub(super) fn read(line: &str) -> Line {
    let Some(news) = line.strip_prefix(NEWS) else {
        return Line::Log;
    };
    let news: serde_json::Value = serde_json::from_str(news).unwrap_or_default();
    let payload = &news["payload"];
    let stages = payload["stages"].as_array().map_or(1, Vec::len).max(1);
    let stage = payload["stages"]
        .as_array()
        .and_then(|all| all.iter().position(|stage| *stage == payload["current"]))
        .unwrap_or_default();
    #[expect(clippy::cast_possible_truncation, reason = "a fraction")]
    match payload["value"].as_f64() {
        Some(value) if news["state"] == "loading" => Line::Progress(((stage as f64 + value) / stages as f64) as f32),
        _ => Line::News,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_what_llama_server_tells_its_router() {
        let line = |stage: &str, value| {
            format!(
                r#"{NEWS}{{"state":"loading","payload":{{"stages":["text_model","spec_model"],"current":"{stage}","value":{value}}}}}"#
            )
        };
        assert_eq!(read(&line("text_model", 0.5)), Line::Progress(0.25));
        assert_eq!(read(&line("spec_model", 1.0)), Line::Progress(1.0));
        assert_eq!(
            read(&format!(r#"{NEWS}{{"state":"ready","payload":{{}}}}"#)),
            Line::News
        );
        assert_eq!(read("0.00.075 I srv  llama_server: model loaded"), Line::Log);
    }

    #[test]
    fn the_time_left_is_left_out_rather_than_guessed() {
        let seconds = Duration::from_secs;
        assert_eq!(Load::after(0.25, seconds(10)).eta_seconds, Some(30));
        assert_eq!(Load::after(0.01, seconds(10)).eta_seconds, None);
        assert_eq!(Load::after(0.5, seconds(1)).eta_seconds, None);
        assert_eq!(Load::after(1.0, seconds(10)).eta_seconds, None);
        assert_eq!(
            Load::after(0.0, seconds(0)),
            Load {
                progress: Some(0.0),
                eta_seconds: None
            }
        );
    }
}
