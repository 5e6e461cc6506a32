//! Two runs over the same questions: which is better, and how sure that is.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::interval::paired_interval;
use super::metric::{Figure, score};
use super::run::Outcome;

/// What is compared in a run, if not everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// These shots only.
    pub shots: Option<usize>,
}

/// A task in both runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The task.
    pub task: String,
    /// Examples in the first run.
    pub before_shots: usize,
    /// Examples in the second.
    pub after_shots: usize,
    /// Questions that both answered.
    pub n: usize,
    /// Score of the first run on them.
    pub before: f64,
    /// Score of the second.
    pub after: f64,
    /// Second minus first.
    pub difference: f64,
    /// Lower end of its interval of 95 %, a bootstrap over questions.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// Questions whose answers differ.
    pub changed: usize,
}

/// What `eval --json --items` writes.
#[derive(Deserialize)]
struct RunFile {
    results: Vec<Outcome>,
}

/// Compares two files of `eval --json --items`: tasks of one name, after equal numbers of examples unless sides name them.
///
/// # Errors
/// Files that are none, or have nothing in common.
pub fn compare(before: (&Path, Side), after: (&Path, Side)) -> Result<Vec<Comparison>> {
    let (first, second) = (read(before.0)?, read(after.0)?);
    let mut found = Vec::new();
    for own in first.iter().filter(|own| before.1.shots.is_none_or(|shots| shots == own.shots)) {
        let wanted = after.1.shots.unwrap_or(own.shots);
        let is_same = |other: &&Outcome| {
            other.task == own.task && other.shots == wanted && other.metric == own.metric
        };
        if let Some(other) = second.iter().find(is_same) {
            found.extend(comparison(own, other));
        }
    }
    ensure!(
        !found.is_empty(),
        "`{}` and `{}`: no answers to the same questions\n\nhint: both need `--json --items`, the same task, and the \
         same shots unless `--before-shots` or `--after-shots` name them",
        before.0.display(),
        after.0.display()
    );
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<Outcome>> {
    let place = || format!("`{}`", path.display());
    let text = fs::read_to_string(path).with_context(place)?;
    let file: RunFile = serde_json::from_str(&text).with_context(|| {
        format!("`{}`: expected what `eval --task … --json --items` writes", path.display())
    })?;
    Ok(file.results)
}

/// Questions that both answered, by their names.
fn comparison(before: &Outcome, after: &Outcome) -> Option<Comparison> {
    let by_id: BTreeMap<&str, _> =
        after.items.iter().map(|item| (item.id.as_str(), item)).collect();
    let pairs = before.items.iter().filter_map(|item| Some((item, *by_id.get(item.id.as_str())?)));
    let pairs: Vec<_> = pairs.collect();
    let first: Vec<Figure> = pairs.iter().map(|(own, _)| own.figure.clone()).collect();
    let second: Vec<Figure> = pairs.iter().map(|(_, other)| other.figure.clone()).collect();
    if pairs.is_empty() {
        return None;
    }
    let (low, high) = paired_interval(&first, &second);
    let (before_score, after_score) = (score(first.iter()), score(second.iter()));
    Some(Comparison {
        task: before.task.clone(),
        before_shots: before.shots,
        after_shots: after.shots,
        n: pairs.len(),
        before: before_score,
        after: after_score,
        difference: after_score - before_score,
        low,
        high,
        changed: pairs.iter().filter(|(own, other)| own.given != other.given).count(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn file(folder: &Path, name: &str, runs: &[(usize, &[(&str, f64)])]) -> std::path::PathBuf {
        let result = |(shots, items): &(usize, &[(&str, f64)])| -> Value {
            let item = |(id, value): &(&str, f64)| json!({"id": id, "given": value.to_string(), "figure": value});
            json!({"task": "t", "shots": shots, "n": items.len(), "score": 0.0, "low": 0.0, "high": 0.0,
                   "metric": "exact", "bad": 0, "items": items.iter().map(item).collect::<Vec<_>>()})
        };
        let path = folder.join(name);
        let results: Vec<Value> = runs.iter().map(result).collect();
        fs::write(&path, json!({"results": results, "timings": []}).to_string()).unwrap();
        path
    }

    #[test]
    fn questions_of_both_runs_are_compared() {
        let folder = tempfile::tempdir().unwrap();
        let a = file(
            folder.path(),
            "a",
            &[(4, &[("x", 1.0), ("y", 0.0), ("z", 1.0)]), (8, &[("x", 0.0)])],
        );
        let b = file(folder.path(), "b", &[(4, &[("y", 1.0), ("x", 1.0), ("w", 0.0)])]);
        let found = compare((&a, Side::default()), (&b, Side::default())).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].n, found[0].changed), (2, 1));
        assert_eq!((found[0].before, found[0].after, found[0].difference), (0.5, 1.0, 0.5));
        let shots = |shots| Side { shots: Some(shots) };
        let found = compare((&a, shots(8)), (&b, shots(4))).unwrap();
        assert_eq!((found[0].before_shots, found[0].after_shots, found[0].n), (8, 4, 1));
        let error = compare((&a, shots(2)), (&b, Side::default())).unwrap_err().to_string();
        assert!(error.contains("hint: "), "{error}");
        fs::write(&a, "{}").unwrap();
        assert!(compare((&a, Side::default()), (&b, Side::default())).is_err());
    }
}
