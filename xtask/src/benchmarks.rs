//! `BENCHMARKS.md`, measured: checkpoints of random weights, compiled in some precisions, which take turns in one run of
//! `flamingoc bench`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::process::{cargo, output as run, say};
use crate::tables::insert;

const FILE: &str = "BENCHMARKS.md";
/// Presets of `flamingoc synth` that have tables in the file.
const MODELS: [&str; 2] = ["of-mini", "of-3b"];
const PRECISIONS: [&str; 3] = ["bf16", "int8", "int4"];
/// What is timed of each model, besides [`pictures`].
const STAGES: [&str; 4] = ["--context", "256", "--prompt-tokens", "128"];
/// Stages that have rows in the table.
const SHOWN: [&str; 8] = [
    "load",
    "preprocess",
    "encode",
    "prefill",
    "decode",
    "first_token",
    "first_token_warm",
    "first_token_hot",
];

/// Measures the named models, or all, and writes their tables.
pub(crate) fn write(root: &Path, models: &[&str]) -> Result<()> {
    if let Some(unknown) = models.iter().find(|model| !MODELS.contains(model)) {
        bail!("no tables of `{unknown}` in {FILE}\n\nhint: name some of {}", MODELS.join(", "));
    }
    let models = if models.is_empty() { &MODELS } else { models };
    run(root, cargo().args(["build", "--release", "-p", "flamingoc"]))?;
    for model in models {
        let artifacts = artifacts(root, model)?;
        say(&format!("timing {model}"));
        let stages =
            bench(root, &artifacts, &[&["--images", pictures(model)], &STAGES[..]].concat())?;
        let scenarios = bench(root, &artifacts, &["--scenario", "all"])?;
        let text = format!(
            "{}\n{}\n{}",
            head(root, &stages)?,
            stage_table(&stages)?,
            scenario_table(&scenarios)?
        );
        insert(root, FILE, model, &text)?;
    }
    Ok(())
}

/// Numbers of pictures: the cold first token encodes all of them, which takes a released model seconds each.
fn pictures(model: &str) -> &'static str {
    match model {
        "of-3b" => "1,8",
        _ => "1,32",
    }
}

/// The model in each precision, compiled without calibration: speed does not depend on scales. What an earlier run made
/// is taken as it is.
fn artifacts(root: &Path, model: &str) -> Result<Vec<PathBuf>> {
    let scratch = root.join("target/benchmarks");
    fs::create_dir_all(&scratch).context("cannot make target/benchmarks")?;
    let program = program(root);
    let source = scratch.join(model);
    if !source.is_dir() {
        say(&format!("making {model}"));
        run(root, Command::new(&program).args(["synth", model, "-o"]).arg(&source))?;
    }
    let artifact = |precision: &&str| {
        let artifact = scratch.join(format!("{model}-{precision}.flamingo"));
        if artifact.is_dir() {
            return Ok(artifact);
        }
        say(&format!("compiling {model} {precision}"));
        let mut compile = Command::new(&program);
        compile.arg("compile").arg(&source).args(["--precision", precision, "--no-gate"]);
        run(root, compile.args(["--no-calibration", "-o"]).arg(&artifact))?;
        Ok(artifact)
    };
    PRECISIONS.iter().map(artifact).collect()
}

fn program(root: &Path) -> PathBuf {
    root.join("target/release/flamingoc")
}

fn bench(root: &Path, artifacts: &[PathBuf], arguments: &[&str]) -> Result<Value> {
    let mut command = Command::new(program(root));
    command.arg("bench").args(artifacts).args(arguments).arg("--json");
    serde_json::from_str(&run(root, &mut command)?).context("`flamingoc bench --json` is not JSON")
}

/// Machine, system, date and state of the repository.
fn head(root: &Path, report: &Value) -> Result<String> {
    let text = |pointer: &str| {
        let value = report.pointer(pointer).with_context(|| format!("no `{pointer}`"))?;
        anyhow::Ok(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    };
    let rate = |pointer: &str| match report.pointer(pointer).and_then(Value::as_f64) {
        Some(rate) => format!("{rate:.0}"),
        None => "none".to_owned(),
    };
    let date = run(root, Command::new("date").arg("+%Y-%m-%d"))?;
    Ok(format!(
        "{}, {}, {} threads, {}, flamingoc {}, {}. Measured in the run of the stages: read {} GB/s, f32 {} GOP/s, bf16 {}, \
         int8 {}.\n",
        text("/machine/cpu")?,
        text("/machine/isa")?,
        text("/machine/threads")?,
        text("/system/os")?,
        text("/system/flamingoc")?,
        date.trim(),
        rate("/machine/read_gb_per_s"),
        rate("/machine/f32_gop_per_s"),
        rate("/machine/bf16_gop_per_s"),
        rate("/machine/int8_gop_per_s"),
    ))
}

/// A time with the interval of its median, and the share of the ceiling, for each stage and precision.
fn stage_table(report: &Value) -> Result<String> {
    let results = report["results"].as_array().context("no `results`")?;
    let mut places: Vec<(&str, u64, u64)> = Vec::new();
    for result in results {
        let stage = result["stage"].as_str().unwrap_or_default();
        let place = (stage, count(result, "images"), count(result, "context"));
        if SHOWN.contains(&stage) && !places.contains(&place) {
            places.push(place);
        }
    }
    let mut table = header("| stage | pictures | tokens |", "|---|---:|---:|");
    for (stage, images, context) in places {
        let _ = write!(table, "| {stage} | {images} | {context} |");
        for precision in PRECISIONS {
            let is_own = |result: &&Value| {
                let artifact = result["artifact"].as_str().unwrap_or_default();
                result["stage"] == stage
                    && count(result, "images") == images
                    && count(result, "context") == context
                    && artifact.ends_with(precision)
            };
            let cell = results.iter().find(is_own).map(cell);
            let _ = write!(table, " {} |", cell.unwrap_or_default());
        }
        table.push('\n');
    }
    Ok(table)
}

fn header(names: &str, rule: &str) -> String {
    let precisions = PRECISIONS.map(|precision| format!(" {precision}, ms |")).concat();
    format!("{names}{precisions}\n{rule}{}\n", "---:|".repeat(PRECISIONS.len()))
}

fn count(result: &Value, key: &str) -> u64 {
    result[key].as_u64().unwrap_or(0)
}

/// `57.6 (57.2 – 58.0), 86 %`.
fn cell(result: &Value) -> String {
    let share = result["of_ceiling"].as_f64();
    let share = share.map_or(String::new(), |share| format!(", {:.0} %", 100.0 * share));
    format!("{}{share}", time(&result["ms"]))
}

fn time(ms: &Value) -> String {
    let of = |key: &str| ms[key].as_f64().map_or_else(|| "—".to_owned(), three_digits);
    format!("{} ({} – {})", of("median"), of("low"), of("high"))
}

fn three_digits(value: f64) -> String {
    let digits = (2 - value.abs().max(1e-3).log10().floor() as i32).clamp(0, 3);
    format!("{value:.*}", usize::try_from(digits).unwrap_or(0))
}

fn scenario_table(report: &Value) -> Result<String> {
    let results = report["scenarios"].as_array().context("no `scenarios`")?;
    let mut table = header("| scenario | what |", "|---|---|");
    let mut names: Vec<&str> = results.iter().filter_map(|r| r["scenario"].as_str()).collect();
    names.dedup();
    let rows: [(&str, &str); 3] = [
        ("first token", "first_token_ms"),
        ("a token", "token_ms"),
        ("whole answer", "end_to_end_ms"),
    ];
    for name in names {
        for (what, key) in rows {
            let _ = write!(table, "| {name} | {what} |");
            for precision in PRECISIONS {
                let is_own = |result: &&Value| {
                    let artifact = result["artifact"].as_str().unwrap_or_default();
                    result["scenario"] == name && artifact.ends_with(precision)
                };
                let cell = results.iter().find(is_own).map(|result| time(&result[key]));
                let _ = write!(table, " {} |", cell.unwrap_or_default());
            }
            table.push('\n');
        }
    }
    Ok(table)
}
