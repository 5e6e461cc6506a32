//! `flamingoc eval compare`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::Outcome;
use crate::cli::output::Output;
use crate::eval::compare::{Comparison, Side, compare};

/// Compare two runs over the same questions
///
/// Precision against precision, shots against shots: the difference of the scores, with an interval
/// of 95 % that draws questions anew for both runs at once (a paired bootstrap).
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc eval compare f32.json int8.json
  flamingoc eval compare run.json run.json --before-shots 4 --after-shots 8

Both files are what `flamingoc eval ARTIFACT --task … --json --items` prints.")]
pub(super) struct Compare {
    /// The first run
    before: PathBuf,
    /// The second run
    after: PathBuf,
    /// Of the first run only answers after so many examples
    #[arg(long, value_name = "N")]
    before_shots: Option<usize>,
    /// Of the second run only answers after so many examples
    #[arg(long, value_name = "N")]
    after_shots: Option<usize>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

impl Compare {
    pub(super) fn run(&self, output: &mut Output) -> Result<Outcome> {
        let before = (self.before.as_path(), Side { shots: self.before_shots });
        let after = (self.after.as_path(), Side { shots: self.after_shots });
        let found = compare(before, after)?;
        if self.json {
            output.json(&serde_json::json!({ "comparisons": found }))?;
            return Ok(Outcome::Ok);
        }
        let header = [
            "task",
            "shots",
            "then",
            "n",
            "score × 100",
            "then",
            "difference",
            "of 95 %",
            "changed",
        ];
        output.table(&header, &found.iter().map(row).collect::<Vec<_>>())?;
        Ok(Outcome::Ok)
    }
}

fn row(found: &Comparison) -> Vec<String> {
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let signed = |share: f64| format!("{:+.1}", 100.0 * share);
    vec![
        found.task.clone(),
        found.before_shots.to_string(),
        found.after_shots.to_string(),
        found.n.to_string(),
        percent(found.before),
        percent(found.after),
        signed(found.difference),
        format!("{} to {}", signed(found.low), signed(found.high)),
        found.changed.to_string(),
    ]
}
