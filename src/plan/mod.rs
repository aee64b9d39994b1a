//! Which layers of a model go on which device, and whether that fits. No I/O.

mod placement;

pub use placement::{
    Device, HostShare, KnownFrom, MARGIN_BYTES, MAX_DEVICES, Placement, Plan, PlanError, Settings, Suggestion, amount,
    placing_options, plan,
};
