//! The kernels' tests under tools that see what a passing test does not: reads and writes outside of an allocation,
//! and uses of memory that was never written.
//!
//! AddressSanitizer runs all instruction sets of this machine, so AVX-512 too, and sees the stack; it needs a nightly
//! compiler. valgrind knows no AVX-512 and hides it from the tests, which then run up to AVX2; it sees values that
//! were never written.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::process;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A tool and what it takes to run the tests under it.
#[derive(Clone, Copy)]
pub(crate) enum Sanitizer {
    /// Instruments the code when it is compiled.
    Address,
    /// Runs the tests that the other checks run.
    Valgrind,
}

impl Sanitizer {
    /// All of them.
    pub(crate) const ALL: [Sanitizer; 2] = [Sanitizer::Valgrind, Sanitizer::Address];

    /// An error that says what is missing.
    pub(crate) fn find(self) -> Result<()> {
        if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
            bail!("sanitizers: run on Linux on x86-64 only");
        }
        let (mut probe, missing) = match self {
            Sanitizer::Address => (
                nightly(&["rustc", "--version"]),
                "AddressSanitizer: no nightly compiler\n\nhint: `rustup toolchain install nightly --profile minimal`",
            ),
            Sanitizer::Valgrind => {
                let mut valgrind = Command::new("valgrind");
                valgrind.arg("--version");
                (valgrind, "no `valgrind`\n\nhint: install the package `valgrind`")
            }
        };
        let found = probe.stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !found.is_ok_and(|status| status.success()) {
            bail!("{missing}");
        }
        Ok(())
    }

    /// Runs the kernels' tests under it.
    pub(crate) fn test(self, root: &Path) -> Result<()> {
        let mut cargo = match self {
            Sanitizer::Address => {
                let mut cargo = nightly(&["cargo"]);
                cargo.env("RUSTFLAGS", "-Zsanitizer=address");
                cargo.env("CARGO_TARGET_DIR", root.join("target").join("sanitizers"));
                cargo
            }
            Sanitizer::Valgrind => {
                let mut cargo = Command::new(process::cargo());
                let runner = "valgrind --quiet --error-exitcode=9";
                cargo.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", runner);
                if has_avx2() {
                    cargo.env("FLAMINGO_TEST_ISAS", "scalar avx2");
                }
                cargo
            }
        };
        cargo.current_dir(root).env_remove("FLAMINGO_ISA");
        cargo.args(["test", "--locked", "-p", "flamingo-kernels", "--lib"]);
        if matches!(self, Sanitizer::Address) {
            cargo.args(["--target", TARGET]);
        }
        process::run(&mut cargo)
    }
}

/// Whether the kernels have an AVX2 version for this machine, which valgrind then must not hide from them.
#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

/// A program of the nightly toolchain, without what the running cargo tells its children.
fn nightly(args: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly"]).args(args);
    for variable in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(variable);
    }
    command
}
