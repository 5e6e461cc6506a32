//! The tables of the demo's model card, measured: `flamingoc eval` for every task and precision.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::process::{cargo, output as run, say};
use crate::tables::insert;

/// The card.
pub(crate) const CARD: &str = "models/demo/README.md";
const PRECISIONS: [&str; 5] = ["f32", "f16", "bf16", "int8", "int4"];
/// Prompts of each task.
const N: &str = "500";

/// Measures and writes the tables into the card.
pub(crate) fn write(root: &Path) -> Result<()> {
    let program = root.join("target/release/flamingoc");
    run(root, cargo().args(["build", "--release", "-p", "flamingoc"]))?;
    let scratch = root.join("target/model-card");
    fs::create_dir_all(&scratch).context("cannot make target/model-card")?;
    let mut scores = Vec::new();
    let (mut blind, mut unseen) = (Vec::new(), Vec::new());
    let mut sizes = Vec::new();
    for precision in PRECISIONS {
        say(&format!("measuring {precision}"));
        let artifact = scratch.join(precision);
        let mut compile = Command::new(&program);
        compile.args(["compile", "models/demo/recipe.toml", "--overwrite", "-o"]).arg(&artifact);
        run(root, compile.args(["--precision", precision]))?;
        sizes.push(weights_bytes(&artifact)?);
        let eval = |more: &[&str]| {
            let mut command = Command::new(&program);
            results(&run(
                root,
                command.arg("eval").arg(&artifact).args(["--json", "--n", N]).args(more),
            )?)
        };
        scores.push(eval(&[])?);
        if precision == "f32" {
            blind = eval(&["--blind"])?;
            unseen = eval(&["--split", "unseen", "--tasks", "caption,attribute,pair,which_4"])?;
        }
    }
    insert(root, CARD, "accuracy", &accuracy(&scores[0], &blind, &unseen))?;
    insert(root, CARD, "precisions", &precisions(&scores, &sizes))
}

/// One row of `flamingoc eval --json`.
struct Row {
    name: String,
    score: f64,
    low: f64,
    high: f64,
}

fn results(json: &str) -> Result<Vec<Row>> {
    let value: Value = serde_json::from_str(json).context("`flamingoc eval --json` is not JSON")?;
    let rows = value["results"].as_array().context("no `results`")?;
    let number = |row: &Value, key: &str| row[key].as_f64().with_context(|| format!("no `{key}`"));
    let row = |row: &Value| {
        let task = row["task"].as_str().context("no `task`")?.to_owned();
        let name = match (task.as_str(), row["shots"].as_u64()) {
            ("few_shot" | "bind", Some(shots)) => format!("{task}, {shots} shots"),
            _ => task,
        };
        let [score, low, high] =
            [number(row, "score")?, number(row, "low")?, number(row, "high")?].map(|v| 100.0 * v);
        Ok(Row { name, score, low, high })
    };
    rows.iter().map(row).collect()
}

fn accuracy(scores: &[Row], blind: &[Row], unseen: &[Row]) -> String {
    let find = |rows: &[Row], name: &str| {
        let row = rows.iter().find(|row| row.name == name);
        row.map_or_else(|| "—".to_owned(), |row| format!("{:.1}", row.score))
    };
    let mut table = String::from(
        "| task | right % | 95 % interval | unseen pairs | without eyes |\n|---|---:|---:|---:|---:|\n",
    );
    for row in scores {
        let _ = writeln!(
            table,
            "| {} | {:.1} | {:.1} – {:.1} | {} | {} |",
            row.name,
            row.score,
            row.low,
            row.high,
            find(unseen, &row.name),
            find(blind, &row.name)
        );
    }
    table
}

fn precisions(scores: &[Vec<Row>], sizes: &[u64]) -> String {
    let mut table =
        format!("| task | {} |\n|---|---:|---:|---:|---:|---:|\n", PRECISIONS.join(" | "));
    let mut line = |name: &str, cells: Vec<String>| {
        let _ = writeln!(table, "| {name} | {} |", cells.join(" | "));
    };
    for index in 0..scores[0].len() {
        let cells = scores.iter().map(|rows| format!("{:.1}", rows[index].score)).collect();
        line(&scores[0][index].name, cells);
    }
    let mean = |rows: &Vec<Row>| rows.iter().map(|row| row.score).sum::<f64>() / rows.len() as f64;
    line("mean", scores.iter().map(|rows| format!("{:.1}", mean(rows))).collect());
    line("weights, MB", sizes.iter().map(|bytes| format!("{:.2}", *bytes as f64 / 1e6)).collect());
    table
}

/// Bytes of the weights.
fn weights_bytes(artifact: &Path) -> Result<u64> {
    let path = artifact.join("graphs/weights.safetensors");
    Ok(fs::metadata(&path).with_context(|| format!("no `{}`", path.display()))?.len())
}
