//! The options of verbs that can show what the native backend spends its time on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use flamingo_runtime::backend::Backend;
use flamingo_runtime::machine::Machine;
use flamingo_runtime::profile::Record;

use super::output::Output;
use crate::profile::{HEADER, chrome_trace, rows};

/// Options of verbs that run the native backend.
#[derive(Args, Clone)]
pub(super) struct Profiling {
    /// Print time, GB/s and GOP/s of each kind of instruction to stderr
    #[arg(long)]
    pub(super) profile: bool,
    /// Write the instructions as a Chrome trace (about:tracing, Perfetto)
    #[arg(long, value_name = "FILE")]
    pub(super) trace: Option<PathBuf>,
}

impl Profiling {
    pub(super) fn is_on(&self) -> bool {
        self.profile || self.trace.is_some()
    }

    /// Starts recording, if asked for.
    pub(super) fn start(&self, backend: &dyn Backend) -> Result<()> {
        if self.is_on() && !backend.set_profiling(true) {
            bail!(
                "`--profile`: backend `{}` does not tell its instructions\n\n\
                 hint: pass `--backend native`",
                backend.name()
            )
        }
        Ok(())
    }

    /// Shows and writes what was recorded, against ceilings measured now.
    pub(super) fn finish(
        &self,
        backend: &dyn Backend,
        n_threads: Option<std::num::NonZeroUsize>,
        output: &mut Output,
    ) -> Result<()> {
        backend.set_profiling(false);
        let records = backend.take_profile();
        if let Some(path) = &self.trace {
            write_trace(&records, path)?;
        }
        if self.profile {
            show(&records, &Machine::measure(n_threads)?, output);
        }
        Ok(())
    }
}

/// A table to stderr.
pub(super) fn show(records: &[Record], machine: &Machine, output: &mut Output) {
    output.note_table(&HEADER, &rows(records, machine));
}

/// A Chrome trace to a file.
pub(super) fn write_trace(records: &[Record], path: &Path) -> Result<()> {
    let text = chrome_trace(records).to_string();
    fs::write(path, text).with_context(|| format!("{}: cannot write the trace", path.display()))
}
