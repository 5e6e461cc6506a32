//! Runs one command, prints it first, and turns a failing exit status into an error.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

/// Prints a line of progress to stderr.
#[expect(clippy::print_stderr, reason = "progress of a command-line tool goes to stderr")]
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}

/// Prints a result to stdout.
#[expect(clippy::print_stdout, reason = "the help text is this tool's result")]
pub(crate) fn print(text: &str) {
    print!("{text}");
}

/// The cargo that runs this task, without what it says of this program: build scripts that look at that would run again,
/// and all that needs them would be built again.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let own = |name: &OsString| {
        let name = name.to_string_lossy();
        name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
    };
    for name in std::env::vars_os().map(|(name, _)| name).filter(own) {
        command.env_remove(name);
    }
    command
}

/// Prints and runs a command; an exit status that is not 0 is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = describe(command);
    say(&format!("\n$ {line}"));
    let started = Instant::now();
    let status = command.status().with_context(|| format!("could not start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    say(&format!("  ok, {:.0} s", started.elapsed().as_secs_f64()));
    Ok(())
}

/// Runs a program in the repository and gives what it printed; on failure also what it said of it.
pub(crate) fn output(root: &Path, command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        command.current_dir(root).output().with_context(|| format!("cannot run `{name}`"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
    match String::from_utf8(output.stdout) {
        Ok(text) => Ok(text),
        Err(_) => bail!("`{name}` printed no UTF-8"),
    }
}

/// The command as one would type it, with the variables that were set for it.
fn describe(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        Some(format!("{}={}", name.to_string_lossy(), value?.to_string_lossy()))
    });
    let program = std::iter::once(command.get_program());
    let words =
        program.chain(command.get_args()).map(|word| quoted(word.to_string_lossy().as_ref()));
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    if word.contains(char::is_whitespace) { format!("'{word}'") } else { word.to_owned() }
}
