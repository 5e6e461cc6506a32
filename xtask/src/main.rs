//! Development tasks: `cargo xtask test` is the one command that runs every check, here and in CI.
//!
//! [`setup`] installs what the tests need under `target/test-deps`; [`checks`] runs the checks in
//! order and stops at the first failure; [`aarch64`] and [`sanitizers`] run the kernels' tests on another processor
//! and under other eyes, [`pages`] opens pages in a browser; [`card`] measures the demo model, [`ablations`] others like it,
//! [`benchmarks`] speed, into [`tables`]; [`process`] runs one command and says what it runs.

mod aarch64;
mod ablations;
mod benchmarks;
mod card;
mod checks;
mod pages;
mod process;
mod sanitizers;
mod setup;
mod tables;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use sanitizers::Build;

const HELP: &str = "\
Development tasks of flamingoc.

Usage: cargo xtask <TASK>

  test             install what the tests need, then run every check: formatting, clippy,
                   documentation, feature builds, all tests, and, where the tools are
                   installed, the kernels' tests for aarch64 and under valgrind; stops
                   at the first failure
  setup            only install what the tests need, under target/test-deps: a Python with
                   `onnx` and `numpy`, and the ONNX Runtime shared library
  setup-aarch64    install a cross compiler and qemu from Debian 12's packages, as root
  test-aarch64     run the kernels' tests for aarch64 on three emulated processors
  test-sanitizers  run the kernels' tests under valgrind, and under AddressSanitizer with
                   a nightly compiler
  model-card       measure the demo model in every precision and write the tables of
                   models/demo/README.md
  benchmarks       time `of-mini` and `of-3b`, or those that are named, and write the tables
                   of BENCHMARKS.md; needs a quiet machine, and room for checkpoints
  setup-chromium   install Chromium from Debian's packages, as root
  test-pages       open every page that flamingoc writes in headless Chromium: no error in
                   its console, nothing from a network, no wider than a phone
  ablations        train the demo's stage 3 with one part changed at a time, an hour on
                   two cores, and write the table of models/demo/README.md

Environment:
  FLAMINGO_TEST_ORT_LIB   use this ONNX Runtime library instead of installing one
  FLAMINGO_TEST_PYTHON    use this Python (with `onnx` and `numpy`) instead

Example: cargo xtask test
";

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            process::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let root = workspace_root()?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["test"] => checks::run_all(&root, &setup::install(&root)?),
        ["setup-aarch64"] => aarch64::setup(),
        ["test-aarch64"] => aarch64::test(&root, &aarch64::Toolchain::find()?),
        ["ablations"] => ablations::write(&root),
        ["model-card"] => card::write(&root),
        ["benchmarks", ref models @ ..] => benchmarks::write(&root, models),
        ["setup-chromium"] => pages::setup(),
        ["test-pages"] => pages::test(&root, &pages::Chromium::find()?),
        ["test-sanitizers"] => test_sanitizers(&root),
        ["setup"] => setup::install(&root).map(|deps| deps.announce()),
        [] | ["help" | "--help" | "-h"] => {
            process::print(HELP);
            Ok(())
        }
        _ => bail!("unknown task `{}`\n\nhint: see `cargo xtask --help`", args.join(" ")),
    }
}

fn test_sanitizers(root: &Path) -> Result<()> {
    sanitizers::find_valgrind()?;
    sanitizers::find_address_sanitizer()?;
    sanitizers::test_valgrind(root, Build::Kernels)?;
    sanitizers::test_address_sanitizer(root)
}

/// The folder that holds the workspace's `Cargo.toml`: the parent of this crate's.
fn workspace_root() -> Result<PathBuf> {
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR")
        .context("`CARGO_MANIFEST_DIR` is not set\n\nhint: run it as `cargo xtask`")?;
    let root = Path::new(&manifest_dir).parent().context("xtask has no parent folder")?;
    Ok(root.to_path_buf())
}
