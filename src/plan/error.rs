//! Why there is no plan.

use super::MAX_DEVICES;
use super::settings::CACHE_TYPES;

/// Why there is no plan. That a model does not fit is not among it: then there is a [`Plan`] that says so.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// Nothing to put layers on.
    #[error("the pool has no device; give `gpus` to the coordinator or to a worker, or start the workers' agents")]
    NoDevices,
    /// More devices than llama.cpp can use.
    #[error(
        "the pool has {0} devices, and llama.cpp b11434 spreads a model over at most {MAX_DEVICES}; take some `gpus` or \
         `workers` out of the config"
    )]
    TooManyDevices(usize),
    /// A type of the KV cache that llama.cpp does not have.
    #[error("`{value}` is no type for a KV cache ({key}); use one of {}", CACHE_TYPES.join(", "))]
    CacheType {
        /// The key in the config.
        key: &'static str,
        /// What it says.
        value: String,
    },
}
