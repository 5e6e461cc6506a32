//! The `flamingoc` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    flamingoc::cli::main()
}
