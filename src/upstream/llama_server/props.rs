//! `GET /props`: what a llama-server tells of itself.
//!
//! A server behind this process is not trusted: each count is capped where it is read, because it sizes what is kept of the
//! server.

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

/// Answer to `GET /props`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Props {
    /// Slots: requests served at once.
    #[serde(deserialize_with = "count::<_, _, MOST_SLOTS>")]
    pub total_slots: usize,
    /// The model's name.
    #[serde(default)]
    pub model_alias: Option<String>,
    /// The model's file.
    #[serde(default)]
    pub model_path: String,
    /// The text of the token that begins a sequence; empty where the model has none.
    #[serde(default)]
    pub bos_token: String,
    /// Version of llama.cpp.
    #[serde(default)]
    pub build_info: String,
    /// Most draft tokens per step; absent without our patch, 0 where drafting is off.
    #[serde(default, deserialize_with = "maybe_count::<_, _, MOST_DRAFTED>")]
    pub draft_external_max: Option<usize>,
    /// Why a pool's coordinator takes no drafts from this proxy.
    #[serde(default)]
    pub draft_refused: Option<String>,
    /// Defaults of a request.
    #[serde(default)]
    pub default_generation_settings: GenerationSettings,
}

/// Part of [`Props`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct GenerationSettings {
    /// Context of a slot in tokens; 0 where the server does not report it.
    #[serde(default, deserialize_with = "count::<_, _, ANY>")]
    pub n_ctx: usize,
}

/// Most slots of a llama-server (`LLAMA_MAX_SEQ`).
const MOST_SLOTS: i64 = 256;
/// Most draft tokens of a step: they have to fit the physical batch, which has 512 tokens unless its owner wants more.
pub(super) const MOST_DRAFTED: i64 = 1024;
/// Most tokens of a vocabulary; 262144 is the largest known.
pub(super) const MOST_TOKENS: i64 = 1 << 22;
/// Most of anything else that a llama-server counts.
pub(super) const ANY: i64 = (1 << 31) - 1;
/// Longest step, in microseconds: an hour.
pub(super) const LONGEST_STEP_US: i64 = 3_600_000_000;

/// Reads a count and caps it at `MOST`. A negative count, or one beyond 63 bits, is an error.
pub(super) fn count<'de, D: Deserializer<'de>, T: TryFrom<i64>, const MOST: i64>(
    deserializer: D,
) -> Result<T, D::Error> {
    let given = i64::deserialize(deserializer)?;
    T::try_from(given.min(MOST)).map_err(|_| D::Error::custom(format!("{given} is not a count")))
}

/// As [`count`], for a count that may be absent.
fn maybe_count<'de, D: Deserializer<'de>, T: TryFrom<i64>, const MOST: i64>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let given = Option::<i64>::deserialize(deserializer)?;
    let count =
        |given: i64| T::try_from(given.min(MOST)).map_err(|_| D::Error::custom(format!("{given} is not a count")));
    given.map(count).transpose()
}
