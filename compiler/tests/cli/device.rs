//! `--device`: a plan before anything is copied.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::common::{Ran, flamingoc, repository, run};
use crate::{Demo, at, parse};

/// Compiles the small scenes for a device with further arguments.
fn compile(output: &Path, device: &str, more: [&str; 2]) -> Ran {
    let recipe = repository("tests/golden/tiny-scenes/recipe.toml");
    flamingoc!(
        "compile",
        recipe,
        "-o",
        output,
        "--device",
        device,
        more[0],
        more[1],
        "--no-gate",
        "--no-calibration",
        "--json"
    )
}

#[track_caller]
fn check_plan(plan: &Value, device: &str, stages: &[&str]) {
    assert_eq!((at(plan, "/device/name"), at(plan, "/fits")), (&device.into(), &true.into()));
    let rows = at(plan, "/memory/rows").as_array().unwrap();
    let sum: u64 = rows.iter().map(|row| at(row, "/1").as_u64().unwrap()).sum();
    assert_eq!(at(plan, "/memory/needed_bytes").as_u64(), Some(sum));
    let predicted = at(plan, "/predicted").as_array().unwrap();
    let found: Vec<&str> = predicted.iter().map(|p| at(p, "/what").as_str().unwrap()).collect();
    assert_eq!(found, stages);
    for prediction in predicted {
        let [low, ms, high] =
            ["/low_ms", "/ms", "/high_ms"].map(|name| at(prediction, name).as_f64().unwrap());
        assert!(0.0 < low && low < ms && ms < high, "{prediction}");
    }
    let method = at(plan, "/method").as_str().unwrap();
    assert!(method.contains("never run on this device"), "{method}");
}

#[test]
fn devices_are_listed_where_the_name_is_missing_or_unknown() {
    for arguments in [&["--device", "orin-nano-9"][..], &["--device"]] {
        for verb in ["compile", "inspect"] {
            let words = [&[verb, "x"], arguments].concat();
            let words: Vec<&OsStr> = words.iter().map(AsRef::as_ref).collect();
            let ran = run(&words);
            assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""), "{verb} {arguments:?}");
            for device in ["orin-nano-8", "orin-nx-16-super", "agx-orin-64", "raspberry-pi-5-8"] {
                assert!(ran.stderr.contains(device), "{verb} {arguments:?}: {}", ran.stderr);
            }
        }
    }
}

#[test]
fn the_finest_precision_that_fits_is_taken_and_one_that_was_asked_for_is_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let stages = [
        "encode one picture",
        "of it the resampler",
        "prefill of 128 tokens",
        "decode after 128 tokens",
    ];
    for (device, more, precision) in [
        ("orin-nano-8", ["--max-context", "200"], "f16"),
        ("raspberry-pi-5-8", ["--precision", "int8"], "int8"),
    ] {
        let artifact = scratch.path().join(format!("{device}.flamingo"));
        let ran = compile(&artifact, device, more);
        assert!(ran.stderr.contains(&format!("{precision} fits {device}")), "{}", ran.stderr);
        let found = parse(&ran.ok());
        check_plan(at(&found, "/plan"), device, &stages);
        let manifest = parse(&fs::read_to_string(artifact.join("manifest.json")).unwrap());
        assert_eq!(at(&manifest, "/precision/language"), precision);
        let seen = parse(&flamingoc!("inspect", artifact, "--device", device, "--json").ok());
        assert_eq!(at(&seen, "/plan"), at(&found, "/plan"));
        let text = flamingoc!("inspect", artifact, "--device", "agx-orin-64").ok();
        for part in ["memory on the device", "it fits", "predicted", "never run on this device"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_arithmetic_and_what_would() {
    let scratch = tempfile::tempdir().unwrap();
    let artifact = scratch.path().join("a.flamingo");
    let refused = compile(&artifact, "orin-nano-4", ["--max-images", "100000000"]);
    assert_eq!((refused.status, refused.stdout.as_str()), (Some(2), ""));
    let message = refused.stderr;
    for part in ["does not fit", "f16", "int8", "int4", "100000000 pictures", "needed", "there is"]
    {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!artifact.exists());
    let (_, most) = message.split_once("hint: `--precision int4 --max-images ").expect(&message);
    let most = most.split('`').next().unwrap();
    compile(&artifact, "orin-nano-4", ["--max-images", most]).ok();
    let more = (most.parse::<u64>().unwrap() + 1).to_string();
    let other = scratch.path().join("b.flamingo");
    assert_eq!(compile(&other, "orin-nano-4", ["--max-images", &more]).status, Some(2));
}

#[test]
fn a_source_is_planned_by_compile() {
    let recipe = repository("tests/golden/tiny-scenes/recipe.toml");
    let ran = flamingoc!("inspect", recipe, "--device", "orin-nano-8");
    assert_eq!(ran.status, Some(2));
    assert!(ran.stderr.contains("hint: `flamingoc compile"), "{}", ran.stderr);
    let demo = Demo::new();
    let ran = flamingoc!("inspect", demo.path(), "--device", "orin-nano-8", "--graph", "decoder");
    assert_eq!(ran.status, Some(2));
}
