//! Quantisation with a verdict: calibration loses less than rounding to nearest, the gate refuses what changes the
//! answers and names the layer, and mixing precisions repairs it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use flamingo_ir::op::PanelFormat;
use flamingo_models::manifest::Manifest;
use flamingo_tests::compile_options;
use flamingoc::compile::{CalibrateOn, CompileOptions, Gate, Report, compile};
use flamingoc::gate::{Refused, worst_first};
use flamingoc::scheme::{Choice, Precision, Scheme};
use flamingoc::synth::synthesize;

/// The layer that tests break.
const BROKEN: &str = "decoder.2.mlp";

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/recipe.toml")
}

/// Options with the bundled calibration and a gate that lets everything pass but NaN.
fn open_gate(source: &Path, folder: &Path, precision: Precision) -> CompileOptions {
    CompileOptions {
        calibrate: CalibrateOn::Bundled,
        gate: Some(Gate { max_kl: Some(f64::MAX), ..Gate::default() }),
        ..compile_options(source, &folder.join("model.flamingo"), precision.into())
    }
}

fn run(options: &CompileOptions) -> Result<(Manifest, Report)> {
    compile(options, &mut |_| {})
}

fn mean_kl(options: &CompileOptions) -> f64 {
    run(options).unwrap().1.quantisation.mean_kl.unwrap()
}

/// The demo model with one layer whose scales reach a fiftieth of what they should.
fn broken(folder: &Path, gate: Gate) -> CompileOptions {
    let choice = Choice { format: Some(PanelFormat::Int8), reach: Some(0.02) };
    let layers = [(BROKEN.to_owned(), choice)].into();
    CompileOptions {
        scheme: Scheme { layers, ..Precision::Int8.into() },
        gate: Some(gate),
        ..open_gate(&demo(), folder, Precision::Int8)
    }
}

#[test]
fn calibrated_int4_is_nearer_to_f32_than_rounding_to_nearest() {
    let scratch = tempfile::tempdir().unwrap();
    let fitted = open_gate(&demo(), &scratch.path().join("fitted"), Precision::Int4);
    let output = scratch.path().join("nearest/model.flamingo");
    let nearest = CompileOptions { calibrate: CalibrateOn::Nothing, output, ..fitted.clone() };
    let (with, without) = (mean_kl(&fitted), mean_kl(&nearest));
    assert!(with < 0.7 * without, "{with} {without}");
    assert!(with < 0.05, "{with}");
}

#[test]
fn outliers_are_migrated_where_rounding_to_nearest_fails_and_the_report_names_them() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    synthesize("tiny-openflamingo-mpt", &source, 9, true, &mut |_, _| ()).unwrap();
    let fitted = open_gate(&source, &scratch.path().join("fitted"), Precision::Int8);
    let output = scratch.path().join("nearest/model.flamingo");
    let nearest = CompileOptions { calibrate: CalibrateOn::Nothing, output, ..fitted.clone() };
    let report = run(&fitted).unwrap().1;
    let replaced = |report: &Report, stage: &str| {
        report.passes[stage].iter().find(|pass| pass.pass == "migrate_outliers").unwrap().replaced
    };
    assert!(replaced(&report, "decoder") > 0);
    let without = run(&nearest).unwrap().1;
    assert_eq!(replaced(&without, "decoder"), 0);
    let kl = |report: &Report| report.quantisation.mean_kl.unwrap();
    // Two of 64 columns are outliers; the wider a model, the more there is to gain.
    assert!(kl(&report) < 0.5 * kl(&without), "{} {}", kl(&report), kl(&without));
    let layers = &report.quantisation.layers;
    assert!(layers.iter().any(|layer| layer.outlier_ratio.is_some_and(|ratio| ratio > 8.0)));
    let ratio = |name: &str| layers.iter().find(|layer| layer.name == name).unwrap().outlier_ratio;
    let before = ratio("decoder.0.attention.merged_3.weight").unwrap();
    let behind = ratio("decoder.1.attention.merged_3.weight").unwrap();
    assert!(behind > 4.0 * before, "{behind} {before}");
    // A table of embeddings meets no rows; all others were measured.
    let measured: Vec<f64> = layers.iter().filter_map(|layer| layer.output_sqnr_db).collect();
    assert!(measured.len() > 10 && measured.iter().all(|db| *db > 15.0), "{measured:?}");
}

#[test]
fn a_broken_scale_is_refused_with_the_name_of_its_layer_and_nothing_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let options = broken(scratch.path(), Gate::default());
    let error = run(&options).unwrap_err();
    let refused = error.downcast_ref::<Refused>().unwrap_or_else(|| panic!("{error:#}"));
    assert!(refused.verdict.mean_kl > 0.01 && refused.bounds.max_kl == 0.01);
    assert_eq!(refused.worst[0].op(), BROKEN, "{refused}");
    assert!(refused.to_string().contains(&format!("{BROKEN}.")), "{refused}");
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "something was left");
}

#[test]
fn mixing_precisions_repairs_the_broken_layer_first() {
    let scratch = tempfile::tempdir().unwrap();
    let options = broken(scratch.path(), Gate { auto_mixed: true, ..Gate::default() });
    let (manifest, report) = run(&options).unwrap();
    let raised = &report.quantisation.raised;
    assert_eq!((raised[0].layer.as_str(), raised[0].to.as_str()), (BROKEN, "f16"));
    assert!(report.quantisation.mean_kl.unwrap() <= 0.01);
    assert!(manifest.precision["language"].contains("f16"), "{:?}", manifest.precision);
    assert!(options.output.join("manifest.json").is_file());
}

#[test]
fn calibration_is_kept_for_the_same_model_and_gives_the_same_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    let cache = Some(scratch.path().join("seen.safetensors"));
    let first = CompileOptions {
        calibration_cache: cache.clone(),
        gate: None,
        ..open_gate(&demo(), &scratch.path().join("first"), Precision::Int4)
    };
    let output = scratch.path().join("second/model.flamingo");
    let second = CompileOptions { output, ..first.clone() };
    let weights = |options: &CompileOptions| {
        run(options).unwrap();
        fs::read(options.output.join("graphs/weights.safetensors")).unwrap()
    };
    let made = weights(&first);
    let saved = fs::metadata(cache.as_ref().unwrap()).unwrap().modified().unwrap();
    assert!(made == weights(&second), "the cache gives other weights");
    assert_eq!(fs::metadata(cache.as_ref().unwrap()).unwrap().modified().unwrap(), saved);
    let other = CompileOptions {
        calibration_cache: cache.clone(),
        ..open_gate(
            &flamingo_tests::tiny_scenes().join("recipe.toml"),
            &scratch.path().join("other"),
            Precision::Int4,
        )
    };
    let error = format!("{:#}", run(&other).unwrap_err());
    assert!(error.contains("of another model or of other prompts"), "{error}");
    fs::write(cache.as_ref().unwrap(), b"no calibration").unwrap();
    let error = format!("{:#}", run(&second_again(&second)).unwrap_err());
    assert!(error.contains("is no calibration"), "{error}");
}

fn second_again(options: &CompileOptions) -> CompileOptions {
    CompileOptions { overwrite: true, ..options.clone() }
}

#[test]
fn a_file_of_prompts_calibrates_and_its_bad_lines_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let prompts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/prompts.jsonl");
    let text = fs::read_to_string(&prompts).unwrap();
    let first = text.lines().next().unwrap();
    let folder = prompts.parent().unwrap();
    let options = |path: PathBuf| CompileOptions {
        calibrate: CalibrateOn::File(path),
        ..open_gate(&demo(), scratch.path(), Precision::Int8)
    };
    let report = run(&options(prompts.clone())).unwrap().1;
    assert_eq!(report.quantisation.verdict.unwrap().n_examples, text.lines().count() / 4);
    let refused = |lines: &str| {
        let path = scratch.path().join("prompts.jsonl");
        fs::write(&path, lines).unwrap();
        let options = CompileOptions { overwrite: true, ..options(path) };
        format!("{:#}", run(&options).unwrap_err())
    };
    let absolute = first.replace("\"images/", &format!("\"{}/images/", folder.display()));
    assert!(refused(&format!("{absolute}\n{{\n")).contains("line 2"));
    assert!(refused("\n").contains("has no prompts"));
    assert!(refused(first).contains("line 1"), "a picture that is not there");
}

#[test]
fn unknown_layers_are_refused_and_known_ones_listed() {
    let scratch = tempfile::tempdir().unwrap();
    let layers = [("decoder.99.mlp".to_owned(), Choice { format: None, reach: None })].into();
    let scheme = Scheme { layers, ..Precision::Int8.into() };
    let options = compile_options(&demo(), &scratch.path().join("model.flamingo"), scheme);
    let error = format!("{:#}", run(&options).unwrap_err());
    assert!(error.contains("no such layer") && error.contains("decoder.4.mlp"), "{error}");
}

#[test]
fn a_layer_chosen_by_name_is_stored_so() {
    let scratch = tempfile::tempdir().unwrap();
    let layers = [(BROKEN.to_owned(), Choice { format: None, reach: None })].into();
    let scheme = Scheme { layers, ..Precision::Int8.into() };
    let options = compile_options(&demo(), &scratch.path().join("model.flamingo"), scheme);
    let report = run(&options).unwrap().1;
    let worst = worst_first(&report.quantisation.layers);
    assert!(!worst.is_empty() && worst.iter().all(|layer| layer.op() != BROKEN));
    let in_f32 = |report: &Report| {
        report.quantisation.layers.iter().filter(|layer| layer.scheme == "f32").count()
    };
    let all =
        compile_options(&demo(), &scratch.path().join("all.flamingo"), Precision::Int8.into());
    assert_eq!(in_f32(&report), in_f32(&run(&all).unwrap().1) + 2);
}
