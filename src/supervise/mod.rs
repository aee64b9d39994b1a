//! Child processes: start, watch, restart, end.
