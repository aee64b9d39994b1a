//! Clients of the servers behind us.
