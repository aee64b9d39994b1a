//! The binary `tightwad`. All code is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tightwad::cli::main()
}
