//! What the command line's tests share: running the program, and copies of checkpoints to damage.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Address space of the program in kB: what it asks for before it checked a size shows as a crash.
const MAX_ADDRESS_SPACE_KB: u32 = 3_000_000;

/// How the program ended and what it wrote.
pub(crate) struct Ran {
    /// Exit status; `None` after a signal.
    pub(crate) status: Option<i32>,
    /// The result.
    pub(crate) stdout: String,
    /// Progress, notes and errors.
    pub(crate) stderr: String,
}

impl Ran {
    fn new(output: Output) -> Ran {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        Ran { status: output.status.code(), stdout, stderr }
    }

    /// Asserts exit status 0 and gives what went to stdout.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.status, Some(0), "{}{}", self.stdout, self.stderr);
        self.stdout
    }
}

/// Runs `flamingoc` in limited memory.
pub(crate) fn run(arguments: &[&OsStr]) -> Ran {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {MAX_ADDRESS_SPACE_KB}; exec \"$0\" \"$@\"")]);
    command.arg(env!("CARGO_BIN_EXE_flamingoc")).args(arguments);
    Ran::new(command.output().expect("a shell"))
}

/// Runs `flamingoc` with words and paths as arguments.
macro_rules! flamingoc {
    ($($argument:expr),+ $(,)?) => {
        crate::common::run(&[$(std::convert::AsRef::<std::ffi::OsStr>::as_ref(&$argument)),+])
    };
}
pub(crate) use flamingoc;

/// A path of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Copies a folder of files and folders.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a new folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("a copy")),
        }
    }
}
