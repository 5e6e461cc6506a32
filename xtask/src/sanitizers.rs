//! The kernels' tests under tools that see what a passing test does not: reads and writes outside of an allocation,
//! and uses of memory that was never written.
//!
//! valgrind runs the tests as they are; it knows no AVX-512 and hides it, so that they go up to AVX2. AddressSanitizer
//! runs every instruction set of this machine and sees the stack too; it needs a nightly compiler and a build of its
//! own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// Which tests a build covers: what the other checks have built already, or the kernels' alone.
#[derive(Clone, Copy)]
pub(crate) enum Build {
    /// The build of all other tests.
    Workspace,
    /// The least that has the kernels.
    Kernels,
}

/// valgrind, or an error that says that it is missing.
pub(crate) fn find_valgrind() -> Result<()> {
    check_machine()?;
    check_runs(Command::new("valgrind").arg("--version"))
        .context("no `valgrind`\n\nhint: install the package `valgrind`")
}

/// A nightly compiler, or an error that says that it is missing.
pub(crate) fn find_address_sanitizer() -> Result<()> {
    check_machine()?;
    check_runs(&mut nightly(&["rustc", "--version"])).context(
        "AddressSanitizer: no nightly compiler\n\nhint: `rustup toolchain install nightly --profile minimal`",
    )
}

/// Runs the kernels' tests under valgrind.
pub(crate) fn test_valgrind(root: &Path, build: Build) -> Result<()> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9"]).arg(kernel_tests(root, build)?);
    valgrind.current_dir(root.join("kernels")).env_remove("FLAMINGO_ISA");
    if has_avx2() {
        valgrind.env("FLAMINGO_TEST_ISAS", "scalar avx2");
    }
    process::run(&mut valgrind)
}

/// Runs the kernels' tests under AddressSanitizer.
pub(crate) fn test_address_sanitizer(root: &Path) -> Result<()> {
    let mut cargo = nightly(&["cargo", "test", "--locked", "-p", "flamingo-kernels", "--lib"]);
    cargo.args(["--target", "x86_64-unknown-linux-gnu"]).current_dir(root);
    cargo.env("CARGO_TARGET_DIR", root.join("target").join("sanitizers"));
    cargo.env("RUSTFLAGS", "-Zsanitizer=address").env_remove("FLAMINGO_ISA");
    process::run(&mut cargo)
}

/// Builds the kernels' tests and says where cargo put the program.
fn kernel_tests(root: &Path, build: Build) -> Result<PathBuf> {
    let mut cargo = process::cargo();
    cargo.current_dir(root).args(["test", "--locked", "--no-run"]);
    match build {
        Build::Workspace => cargo.args(["--workspace", "--all-features"]),
        Build::Kernels => cargo.args(["-p", "flamingo-kernels", "--lib"]),
    };
    let output = cargo.stderr(Stdio::piped()).output().context("could not start cargo")?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("the kernels' tests do not build:\n{messages}");
    }
    let program = messages.lines().find_map(|line| {
        let (_, path) = line.split_once('(')?;
        path.strip_suffix(')').filter(|path| path.contains("/deps/flamingo_kernels-"))
    });
    let program = program.with_context(|| format!("cargo names no tests of kernels:\n{messages}"));
    program.map(|program| root.join(program))
}

fn check_machine() -> Result<()> {
    if cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Ok(());
    }
    bail!("sanitizers: only on Linux on x86-64")
}

fn check_runs(command: &mut Command) -> Result<()> {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { bail!("{status}") }
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
