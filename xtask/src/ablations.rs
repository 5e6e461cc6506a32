//! The ablations of the demo's model card: stage 3 trained again and again, one part of it changed each time.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::card::CARD;
use crate::process::{cargo, run, say};
use crate::tables;

/// Steps of stage 3 in each run; fewer than the model's own, so that all of them take an hour on two cores.
const STEPS: i64 = 600;
/// Prompts of each task.
const MEASURED: &str = "500";

/// What is changed: its name, keys of the recipe with their values, and by how much steps are multiplied.
type Ablation = (&'static str, &'static [(&'static str, &'static str, toml::Value)], i64);

const ABLATIONS: [Ablation; 5] = [
    ("nothing", &[], 1),
    ("no tanh gates", &[("gated", "tanh_gate", toml::Value::Boolean(false))], 1),
    ("cross-attention before every 2nd layer", &[("gated", "every", toml::Value::Integer(2))], 1),
    (
        "all earlier pictures seen",
        &[("flamingo", "only_last_image", toml::Value::Boolean(false))],
        1,
    ),
    // One data set in a step: four times as many steps are as many prompts.
    ("round-robin, as many prompts", &[("flamingo", "accumulate", toml::Value::Boolean(false))], 4),
];

/// Trains and measures, and writes the table into the card.
pub(crate) fn write(root: &Path) -> Result<()> {
    run(cargo().current_dir(root).args(["build", "--release", "-p", "flamingo-train"]))?;
    let model = root.join("models/demo");
    let recipe = fs::read_to_string(model.join("training.toml")).context("no training.toml")?;
    let recipe: toml::Table = recipe.parse().context("in training.toml")?;
    let mut columns = Vec::new();
    for (index, (name, changes, factor)) in ABLATIONS.iter().enumerate() {
        say(&format!("training: {name}"));
        let folder = root.join(format!("target/ablations/{index}"));
        fs::create_dir_all(&folder).context("cannot make target/ablations")?;
        let mut recipe = recipe.clone();
        let mut set = |path: &[&str], value: toml::Value| {
            let (key, tables) = path.split_last().context("an empty path")?;
            let mut table = &mut recipe;
            for name in tables {
                table = table[*name].as_table_mut().with_context(|| format!("no [{name}]"))?;
            }
            table.insert((*key).to_owned(), value);
            anyhow::Ok(())
        };
        set(&["flamingo", "schedule", "steps"], toml::Value::Integer(STEPS * factor))?;
        for (table, key, value) in *changes {
            set(&[table, key], value.clone())?;
        }
        let file = folder.join("recipe.toml");
        fs::write(&file, toml::to_string(&recipe)?).context("cannot write the recipe")?;
        let mut train = Command::new(root.join("target/release/flamingo-train"));
        train.arg(&file).arg("-o").arg(folder.join("run")).arg("--frozen-from").arg(&model);
        run(train.args(["--measured", MEASURED]))?;
        columns.push(last_line(&folder.join("run/metrics.jsonl"))?);
    }
    tables::insert(root, CARD, "ablations", &table(&columns)?)
}

fn last_line(metrics: &Path) -> Result<Value> {
    let text = fs::read_to_string(metrics)
        .with_context(|| format!("cannot read `{}`", metrics.display()))?;
    let line = text.lines().last().context("no metrics")?;
    serde_json::from_str(line).context("metrics are not JSON")
}

fn table(columns: &[Value]) -> Result<String> {
    let names: Vec<&str> = ABLATIONS.iter().map(|(name, ..)| *name).collect();
    let mut table =
        format!("| task | {} |\n|---|{}\n", names.join(" | "), "---:|".repeat(names.len()));
    let tasks = columns[0]["tasks"].as_object().context("no accuracies in the metrics")?;
    let score = |column: &Value, task: &str| {
        let score = column["tasks"][task]["score"].as_f64();
        score.map(|s| 100.0 * s).with_context(|| format!("no score of {task}"))
    };
    let mut sums = vec![0.0; columns.len()];
    for task in tasks.keys() {
        let scores: Vec<f64> = columns.iter().map(|c| score(c, task)).collect::<Result<_>>()?;
        sums.iter_mut().zip(&scores).for_each(|(sum, score)| *sum += score);
        let _ = writeln!(table, "| {task} | {} |", cells(&scores));
    }
    let means: Vec<f64> = sums.iter().map(|sum| sum / tasks.len() as f64).collect();
    let _ = writeln!(table, "| mean | {} |", cells(&means));
    Ok(table)
}

fn cells(values: &[f64]) -> String {
    values.iter().map(|v| format!("{v:.1}")).collect::<Vec<String>>().join(" | ")
}
