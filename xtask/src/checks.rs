//! Every check of the repository, in the order from quick to slow. CI runs this list and nothing else.

use std::path::Path;
use std::{panic, thread};

use anyhow::Result;

use crate::aarch64::{self, Toolchain};
use crate::pages::{self, Chromium};
use crate::process;
use crate::sanitizers::{self, Build};
use crate::setup::TestDeps;

/// One cargo call: its arguments and the variables it needs.
struct Check {
    args: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
}

/// The feature builds only check: the tests run with all features on, and share the compiled
/// dependencies of one target folder. The default features are those of every ordinary build.
const CHECKS: [Check; 6] = [
    Check { args: &["fmt", "--all", "--check"], env: &[] },
    Check {
        args: &[
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--",
            "-D",
            "warnings",
        ],
        env: &[],
    },
    Check {
        args: &["doc", "--locked", "--workspace", "--no-deps", "--all-features"],
        env: &[("RUSTDOCFLAGS", "-Dwarnings")],
    },
    Check {
        args: &["check", "--locked", "-p", "flamingo-runtime", "--no-default-features"],
        env: &[],
    },
    Check { args: &["check", "--locked", "-p", "flamingoc", "--no-default-features"], env: &[] },
    Check { args: &["test", "--locked", "--workspace", "--all-features"], env: &[] },
];

/// Runs every check and stops at the first that fails.
pub(crate) fn run_all(root: &Path, deps: &TestDeps) -> Result<()> {
    for check in &CHECKS {
        let mut command = process::cargo();
        command.current_dir(root).args(check.args).envs(check.env.iter().copied());
        if check.args[0] == "test" {
            command.envs(deps.variables());
        }
        process::run(&mut command)?;
    }
    // valgrind runs one thread at a time, for minutes: beside the others.
    thread::scope(|scope| {
        let valgrind = scope.spawn(|| {
            if_installed(sanitizers::find_valgrind(), |()| {
                sanitizers::test_valgrind(root, Build::Workspace)
            })
        });
        if_installed(Toolchain::find(), |toolchain| aarch64::test(root, &toolchain))?;
        if_installed(Chromium::find(), |chromium| pages::test(root, &chromium))?;
        valgrind.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    })?;
    process::say("\nall checks passed");
    Ok(())
}

/// Runs a check that needs a tool that not every machine has, or says in one line that it did not run.
fn if_installed<T>(tool: Result<T>, check: impl FnOnce(T) -> Result<()>) -> Result<()> {
    match tool {
        Ok(tool) => check(tool),
        Err(missing) => {
            let missing = missing.to_string();
            let line = missing.lines().next().unwrap_or_default();
            process::say(&format!("\nNOT RUN: {line}"));
            Ok(())
        }
    }
}
