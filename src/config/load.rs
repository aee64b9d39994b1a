//! Finding, layering and checking the cluster file.
