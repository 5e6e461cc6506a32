//! The kernels of aarch64 on another machine: a cross toolchain out of Debian's packages, and the kernels' tests
//! under qemu's user emulation, on processors with and without the later instructions.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::process;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64-static";
/// The loader of dynamically linked programs, out of `libc6:arm64`. The C library of Debian's cross compiler is not
/// a substitute: under emulation its `pthread_create` hangs.
const LOADER: &str = "/lib/ld-linux-aarch64.so.1";
/// Debian's own compiler, which matches the standard library of [`PACKAGES`].
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// What `setup-aarch64` installs on Debian 12 on x86-64.
const PACKAGES: [&str; 8] = [
    "rustc-web",
    "cargo-web",
    "libstd-rust-web-dev:arm64",
    "libc6-dev:arm64",
    "libgcc-12-dev:arm64",
    "libstdc++-12-dev:arm64",
    "g++-aarch64-linux-gnu",
    "qemu-user-static",
];

/// An emulated processor.
struct Processor {
    name: &'static str,
    /// What the kernels must find on it, so that no kernel goes untested unseen.
    isas: &'static str,
    /// Names of the tests to run on it: all, or those of kernels that no other processor runs.
    tests: &'static [&'static str],
}

const PROCESSORS: [Processor; 3] = [
    Processor { name: "cortex-a76", isas: "scalar neon+dotprod", tests: &[] },
    Processor { name: "cortex-a57", isas: "scalar neon", tests: &["tests::panels", "isa::"] },
    Processor { name: "max", isas: "scalar neon+dotprod+i8mm", tests: &["tests::panels", "isa::"] },
];

/// What cross-compiles and runs.
pub(crate) struct Toolchain {
    rustc: &'static str,
}

/// Installs the toolchain with apt.
pub(crate) fn setup() -> Result<()> {
    if let Ok(toolchain) = Toolchain::find() {
        process::say(&format!("{TARGET}: installed already, `{}`", toolchain.rustc));
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("no `apt-get`, expected Debian 12 on x86-64\n\n{}", hint());
    }
    if output(Command::new("id").arg("-u"))?.trim() != "0" {
        bail!("`setup-aarch64` installs packages, which needs root\n\n{}", hint());
    }
    process::run(Command::new("dpkg").args(["--add-architecture", "arm64"]))?;
    process::run(Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.args(["install", "-qq", "--yes", "--no-install-recommends"]).args(PACKAGES);
    process::run(install.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))?;
    Toolchain::find().map(drop)
}

/// Runs the kernels' tests on every emulated processor.
pub(crate) fn test(root: &Path, toolchain: &Toolchain) -> Result<()> {
    for processor in &PROCESSORS {
        let mut cargo = process::cargo();
        cargo.current_dir(root).env("RUSTC", toolchain.rustc);
        cargo.env("CARGO_TARGET_DIR", root.join("target").join("aarch64"));
        cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER);
        cargo.env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
            format!("{EMULATOR} -cpu {}", processor.name),
        );
        cargo.env("FLAMINGO_TEST_ISAS", processor.isas).env_remove("FLAMINGO_ISA");
        cargo.args(["test", "--locked", "--target", TARGET, "-p", "flamingo-kernels", "--lib"]);
        cargo.arg("--").args(processor.tests);
        process::run(&mut cargo)?;
    }
    Ok(())
}

impl Toolchain {
    /// The toolchain, or an error that names all that is missing.
    pub(crate) fn find() -> Result<Toolchain> {
        let rustc = ["rustc", DEBIAN_RUSTC].into_iter().find(|rustc| has_target(rustc));
        let no_std = rustc.is_none().then(|| format!("a Rust standard library for {TARGET}"));
        let no_loader = (!Path::new(LOADER).exists()).then(|| format!("`{LOADER}`"));
        let no_program = [LINKER, EMULATOR].into_iter().filter(|program| !runs(program));
        let missing: Vec<String> = no_std
            .into_iter()
            .chain(no_loader)
            .chain(no_program.map(|program| format!("`{program}`")))
            .collect();
        match rustc {
            Some(rustc) if missing.is_empty() => Ok(Toolchain { rustc }),
            _ => bail!("{TARGET}: missing {}\n\n{}", missing.join(", "), hint()),
        }
    }
}

fn hint() -> String {
    format!(
        "hint: `cargo xtask setup-aarch64` installs on Debian 12, as root: {}",
        PACKAGES.join(" ")
    )
}

/// Whether a compiler has the standard library of the target.
fn has_target(rustc: &str) -> bool {
    let folder = output(Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]));
    folder.is_ok_and(|folder| PathBuf::from(folder.trim()).is_dir())
}

fn runs(program: &str) -> bool {
    output(Command::new(program).arg("--version")).is_ok()
}

/// What a command that succeeds prints.
fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("could not start `{program}`"))?;
    if !output.status.success() {
        bail!("`{program}` failed: {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
