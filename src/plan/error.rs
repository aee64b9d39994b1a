//! Why there is no plan.

use super::MAX_DEVICES;
use super::settings::CACHE_TYPES;

/// Why there is no plan. A model that does not fit is not an error: its [`Plan`](super::Plan) says so.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// The pool has no device.
    #[error("the pool has no device; give `gpus` to the coordinator or to a worker, or start the workers' agents")]
    NoDevices,
    /// The pool has more devices than llama.cpp supports.
    #[error(
        "the pool has {0} devices, and llama.cpp b11434 spreads a model over at most {MAX_DEVICES}; take some `gpus` or \
         `workers` out of the config"
    )]
    TooManyDevices(usize),
    /// llama.cpp has no such format for its KV cache.
    #[error("`{value}` is no type for a KV cache ({key}); use one of {}", CACHE_TYPES.join(", "))]
    CacheType {
        /// The key in the config.
        key: &'static str,
        /// Its value.
        value: String,
    },
}
