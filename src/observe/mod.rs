//! Log and metrics.
