//! Where a verb's words go: results to stdout, progress and notes to stderr.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use flamingo_runtime::Model;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// The two streams of a verb.
pub(super) struct Output {
    stdout: io::Stdout,
    stderr: io::Stderr,
}

impl Output {
    pub(super) fn new() -> Output {
        Output { stdout: io::stdout(), stderr: io::stderr() }
    }

    /// A piece of the result, without a line end; seen at once.
    pub(super) fn text(&mut self, text: &str) -> Result<()> {
        self.stdout.write_all(text.as_bytes())?;
        Ok(self.stdout.flush()?)
    }

    /// A line of the result.
    pub(super) fn line(&mut self, text: &str) -> Result<()> {
        Ok(writeln!(self.stdout, "{text}")?)
    }

    /// The result for machines.
    pub(super) fn json(&mut self, value: &impl Serialize) -> Result<()> {
        self.line(&serde_json::to_string_pretty(value)?)
    }

    /// As [`table`].
    pub(super) fn table(&mut self, header: &[&str], rows: &[Vec<String>]) -> Result<()> {
        self.line(&table(header, rows))
    }

    /// As [`Output::table`], for the person who watches.
    pub(super) fn note_table(&mut self, header: &[&str], rows: &[Vec<String>]) {
        self.note(&table(header, rows));
    }

    /// What a model's caches and its backend have to say.
    pub(super) fn warnings(&mut self, model: &Model) {
        for warning in model.take_warnings() {
            self.note(&format!("warning: {warning}"));
        }
    }

    /// The beginning of a line that the person who watches will end.
    pub(super) fn prompt(&mut self, text: &str) {
        // A closed stderr must not end the work.
        let _ = self.stderr.write_all(text.as_bytes()).and_then(|()| self.stderr.flush());
    }

    /// A line for the person who watches.
    pub(super) fn note(&mut self, text: &str) {
        // A closed stderr must not end the work.
        let _ = writeln!(self.stderr, "{text}");
    }
}

/// A table: the first column to the left, the others, numbers, to the right.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header).add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        if index > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// Whether the reader of stdout went away, which is its right.
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// A progress bar over bytes; silent without a terminal.
pub(super) fn byte_bar(label: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0).with_message(label.to_owned());
    let template = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A progress bar over samples; silent without a terminal.
pub(super) fn count_bar() -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A size for people: `13.2 MB`.
pub(super) fn bytes(n: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{value:.1} {}", units[unit]),
    }
}
