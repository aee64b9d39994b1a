//! Decisions of speculative decoding, free of I/O.
