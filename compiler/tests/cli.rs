//! A user's walk through the command line: each verb, its exit status, and the JSON that scripts
//! rely on.

#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/cache.rs"]
mod cache;
mod common;
#[path = "cli/device.rs"]
mod device;
#[path = "cli/doctor.rs"]
mod doctor;
#[path = "cli/eval.rs"]
mod eval;
#[path = "cli/gpu.rs"]
mod gpu;
#[path = "cli/inspect.rs"]
mod inspect;
#[path = "cli/talk.rs"]
mod talk;

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Ran, copy, flamingoc, repository};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

const VERBS: [&str; 12] = [
    "demo", "compile", "run", "chat", "score", "eval", "trace", "check", "inspect", "bench",
    "synth", "doctor",
];

/// The value at a JSON pointer.
#[track_caller]
fn at<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {value:#}"))
}

#[track_caller]
fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The demo model, compiled.
struct Demo {
    scratch: TempDir,
}

impl Demo {
    fn new() -> Demo {
        Demo::in_precision("f32")
    }

    fn in_precision(name: &str) -> Demo {
        let demo = Demo { scratch: tempfile::tempdir().unwrap() };
        let recipe = repository("tests/golden/tiny-scenes/recipe.toml");
        let quick = ["--no-calibration", "--no-gate"];
        flamingoc!("compile", recipe, "-o", demo.path(), "--precision", name, quick[0], quick[1])
            .ok();
        demo
    }

    fn path(&self) -> PathBuf {
        self.scratch.path().join("demo.flamingo")
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let path = self.path();
        let mut all: Vec<&OsStr> = vec!["run".as_ref(), path.as_ref()];
        all.extend(arguments.iter().map(AsRef::<OsStr>::as_ref));
        common::run(&all)
    }
}

fn picture(name: &str) -> String {
    repository("tests/golden/tiny-scenes/images").join(name).display().to_string()
}

/// A prompt of the demo with what PyTorch answers.
fn bundled_prompt() -> (Value, String) {
    let text = fs::read_to_string(repository("tests/golden/tiny-scenes/prompts.jsonl")).unwrap();
    let line = parse(text.lines().next().unwrap());
    let answer = at(&line, "/reference_prediction").as_str().unwrap().to_owned();
    (line, answer)
}

#[test]
fn help_shows_an_example_in_80_columns() {
    for verb in VERBS {
        for flag in ["-h", "--help"] {
            let help = flamingoc!(verb, flag).ok();
            let example = format!("  flamingoc {verb}");
            assert!(help.contains("Example") && help.contains(&example), "{verb}: {help}");
            for line in help.lines() {
                assert!(line.chars().count() <= 80, "{verb} {flag}: {line}");
            }
        }
    }
    let help = flamingoc!("--help").ok();
    for verb in VERBS {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb}: {help}");
    }
    assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
    assert!(help.contains("Exit status"), "{help}");
    assert_eq!(flamingoc!("--version").ok(), format!("flamingoc {}\n", env!("CARGO_PKG_VERSION")));
}

/// Each small preset: made, looked at, compiled, checked.
#[test]
fn presets_from_synth_to_check() {
    let presets = [
        "tiny-openflamingo-mpt1b",
        "tiny-openflamingo-mpt",
        "tiny-openflamingo-gpt-neox",
        "tiny-openflamingo-llama",
        "tiny-openflamingo-opt",
        "tiny-idefics",
    ];
    for preset in presets {
        let scratch = tempfile::tempdir().unwrap();
        let (source, artifact) = (scratch.path().join("source"), scratch.path().join("a.flamingo"));
        let made = parse(&flamingoc!("synth", preset, "-o", source, "--json").ok());
        assert!(at(&made, "/bytes").as_u64().unwrap() > 10_000, "{preset}: {made}");

        let seen = parse(&flamingoc!("inspect", source, "--json").ok());
        assert_eq!(
            at(&seen, "/config/family"),
            if preset == "tiny-idefics" { "idefics" } else { "openflamingo" }
        );
        let tensors: u64 = at(&seen, "/parts")
            .as_array()
            .unwrap()
            .iter()
            .map(|p| at(p, "/tensors").as_u64().unwrap())
            .sum();
        assert_eq!(Some(tensors), at(&made, "/tensors").as_u64(), "{preset}");
        assert!(flamingoc!("inspect", source).ok().contains("language model"), "{preset}");

        let compiled = parse(&flamingoc!("compile", source, "-o", artifact, "--json").ok());
        assert_eq!(at(&compiled, "/artifact"), artifact.to_str().unwrap());
        for stage in ["media", "decoder"] {
            let passes = at(&compiled, &format!("/report/passes/{stage}")).as_array().unwrap();
            assert_eq!(at(&passes[0], "/pass"), "source", "{preset}");
            assert!(passes.len() > 5, "{preset}");
        }

        let seen = parse(&flamingoc!("inspect", artifact, "--json").ok());
        assert_eq!(at(&seen, "/manifest/schema_version"), 1);
        assert!(at(&seen, "/memory_bytes/decode step").as_u64().unwrap() > 0);
        let text = flamingoc!("inspect", artifact).ok();
        assert!(text.contains("parity not checked yet"), "{preset}: {text}");

        let checked = parse(&flamingoc!("check", artifact, "--against", source, "--json").ok());
        assert_eq!(at(&checked, "/verdict"), "pass", "{preset}");
    }
}

#[test]
fn graphs_are_dumped_and_shown_as_text() {
    let scratch = tempfile::tempdir().unwrap();
    let source = repository("tests/golden/openflamingo-opt");
    let artifact = scratch.path().join("a.flamingo");
    let dumps = scratch.path().join("dumps");
    let ran = flamingoc!(
        "compile",
        source,
        "-o",
        artifact,
        "--dump-after",
        "merge_linears",
        "--dump-dir",
        dumps
    );
    ran.ok();
    let dumped = fs::read_to_string(dumps.join("decoder.merge_linears.txt")).unwrap();
    assert!(dumps.join("media.merge_linears.txt").is_file());
    let shown = flamingoc!("inspect", artifact, "--graph", "decoder").ok();
    for op in ["GatedCrossAttention", "SelfAttention", "FeedForward"] {
        assert!(dumped.contains(op) && shown.contains(op), "{op}");
    }
    assert!(flamingoc!("inspect", source, "--graph", "media").ok().contains("pixel_values"));
}

#[test]
fn run_answers_a_prompt_and_a_prompt_file_alike() {
    let demo = Demo::new();
    let (line, answer) = bundled_prompt();
    let name = at(&line, "/segments/0/image").as_str().unwrap();
    let image = repository("tests/golden/tiny-scenes").join(name).display().to_string();
    let ran = demo.run(&["--prompt", "<image>", "--image", &image]);
    assert_eq!(ran.stderr, "", "nothing to say");
    assert_eq!(ran.ok(), format!("{answer}\n"));

    let prompt = json!({"segments": [{"image": image}], "max_new_tokens": 3, "temperature": 0});
    let file = demo.scratch.path().join("p.json");
    fs::write(&file, prompt.to_string()).unwrap();
    let file = file.to_str().unwrap();
    let three: Vec<&str> = answer.split(' ').take(3).collect();
    assert_eq!(demo.run(&["--prompt-file", file]).ok(), format!("{}\n", three.join(" ")));
    let two = demo.run(&["--prompt-file", file, "--max-new-tokens", "2"]).ok();
    assert_eq!(two, format!("{}\n", three[..2].join(" ")), "the option wins over the file");

    let relative = demo.scratch.path().join("q.json");
    fs::copy(&image, demo.scratch.path().join("a.png")).unwrap();
    fs::write(&relative, r#"{"segments": [{"image": "a.png"}]}"#).unwrap();
    let ran = demo.run(&["--prompt-file", relative.to_str().unwrap()]);
    assert_eq!(ran.ok(), format!("{answer}\n"), "paths are relative to the prompt file");
}

#[test]
fn run_json_keeps_its_contract() {
    let demo = Demo::new();
    let image = picture("single-000.png");
    let ran = demo.run(&[
        "--prompt",
        "<image>what color ?<image>what color ?",
        "--image",
        &image,
        "--image",
        &image,
        "--json",
    ]);
    let found = parse(&ran.ok());
    assert!(at(&found, "/text").is_string());
    let tokens = at(&found, "/tokens").as_array().unwrap();
    assert!(!tokens.is_empty() && tokens.iter().all(Value::is_u64), "{found:#}");
    assert!(at(&found, "/timings/first_token_ms").as_f64().unwrap() > 0.0);
    let rate = at(&found, "/timings/decode_tokens_per_s");
    assert!(rate.is_null() || rate.as_f64().unwrap() > 0.0, "{found:#}");
    assert_eq!(
        at(&found, "/cache"),
        &json!({
            "visual_hits": 1, "visual_misses": 1, "visual_disk_hits": 0,
            "prefix_tokens_reused": 0,
        })
    );
    assert_eq!(at(&found, "/n_prompt_tokens"), 9);

    let one = demo.run(&["--prompt", "what", "--max-new-tokens", "1", "--json"]);
    let one = parse(&one.ok());
    assert_eq!(at(&one, "/tokens").as_array().unwrap().len(), 1);
    assert_eq!(at(&one, "/stop"), "length");
    let none = parse(&demo.run(&["--prompt", "what", "--max-new-tokens", "0", "--json"]).ok());
    assert_eq!(at(&none, "/tokens"), &json!([]));
}

#[test]
fn greedy_is_greedy_twice_and_sampling_follows_its_seed() {
    let demo = Demo::new();
    let text = |arguments: &[&str]| {
        let fixed = ["--prompt", "what", "--max-new-tokens", "24"];
        demo.run(&[&fixed[..], arguments].concat()).ok()
    };
    assert_eq!(text(&[]), text(&[]));
    assert_eq!(text(&[]), text(&["--seed", "7"]), "greedy uses no seed");
    assert_eq!(text(&[]), text(&["--threads", "1"]));
    assert_eq!(text(&[]), text(&["--temperature", "5", "--top-k", "1"]), "one token to choose");
    let sampled = |seed: &str| text(&["--temperature", "5", "--seed", seed]);
    let first = sampled("0");
    assert_eq!(first, sampled("0"));
    let others: Vec<String> = ["1", "2", "3", "4"].iter().map(|seed| sampled(seed)).collect();
    assert!(others.iter().any(|other| *other != first), "{first}");
}

/// Writes token ids and grey pictures as inputs of a trace.
fn write_inputs(path: &Path, ids: &[i64], pixels: Option<[usize; 5]>) {
    let ids_bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let mut views =
        vec![("input_ids", TensorView::new(Dtype::I64, vec![ids.len()], &ids_bytes).unwrap())];
    let shape = pixels.unwrap_or_default();
    let values: Vec<u8> = (0..shape.iter().product::<usize>())
        .flat_map(|index| ((index % 17) as f32 / 17.0 - 0.5).to_le_bytes())
        .collect();
    if pixels.is_some() {
        views.push(("pixel_values", TensorView::new(Dtype::F32, shape.to_vec(), &values).unwrap()));
    }
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn trace_writes_the_tensors_it_names() {
    let demo = Demo::new();
    let folder = demo.scratch.path();
    let (inputs, outputs) = (folder.join("in.safetensors"), folder.join("out.safetensors"));
    write_inputs(&inputs, &[1, 2, 10, 2, 11], Some([2, 3, 3, 32, 32]));
    let path = demo.path();
    let ran = flamingoc!(
        "trace",
        path,
        "--inputs",
        inputs,
        "--outputs",
        outputs,
        "--greedy",
        "4",
        "--json"
    );
    let expected = json!({"visual_tokens": [2, 8, 96], "logits": [5, 72], "tokens": [4]});
    assert_eq!(parse(&ran.ok()), expected);
    let bytes = fs::read(&outputs).unwrap();
    let found = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(found.len(), 3);
    for (name, dtype) in
        [("visual_tokens", Dtype::F32), ("logits", Dtype::F32), ("tokens", Dtype::I64)]
    {
        let tensor = found.tensor(name).unwrap();
        assert_eq!(json!(tensor.shape()), expected[name]);
        assert_eq!(tensor.dtype(), dtype, "{name}");
    }

    write_inputs(&inputs, &[1, 10], None);
    let text = flamingoc!("trace", path, "--inputs", inputs, "--outputs", outputs).ok();
    assert_eq!(text, "logits [2, 72]\n");
}

#[test]
fn check_stores_its_verdict_and_the_artifact_stays_whole() {
    let demo = Demo::new();
    let (path, recipe) = (demo.path(), repository("tests/golden/tiny-scenes/recipe.toml"));
    let table = flamingoc!("check", path, "--against", recipe, "--no-store").ok();
    assert!(table.contains("logits") && table.contains("worst"), "{table}");
    let report = || parse(&fs::read_to_string(path.join("report.json")).unwrap());
    assert!(at(&report(), "/parity").is_null());
    flamingoc!("check", path, "--against", recipe, "--seed", "3").ok();
    assert_eq!(at(&report(), "/verdict"), "pass");
    assert_eq!(at(&report(), "/parity/seed"), 3);
    for comparison in at(&report(), "/parity/comparisons").as_array().unwrap() {
        assert_eq!(at(comparison, "/pass"), true, "{comparison}");
    }
    demo.run(&["--prompt", "what", "--verify"]).ok();
    assert!(!flamingoc!("inspect", path).ok().contains("not checked yet"));
}

#[test]
fn check_fails_where_one_weight_differs() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, artifact) = (scratch.path().join("source"), scratch.path().join("a.flamingo"));
    copy(&repository("tests/golden/idefics-plain"), &source);
    flamingoc!("compile", source, "-o", artifact).ok();
    let file = source.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let mut changed = bytes.clone();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors.tensor("model.layers.3.mlp.down_proj.weight").unwrap().data();
    let offset = data.as_ptr() as usize - bytes.as_ptr() as usize;
    let value = f32::from_le_bytes(data[..4].try_into().unwrap()) + 0.5;
    changed[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(&file, changed).unwrap();

    let ran = flamingoc!("check", artifact, "--against", source);
    assert_eq!(ran.status, Some(1), "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("FAILED") && ran.stdout.contains("expected"), "{}", ran.stdout);
    let report = parse(&fs::read_to_string(artifact.join("report.json")).unwrap());
    assert_eq!(at(&report, "/verdict"), "fail");
    let ran = flamingoc!("check", artifact, "--against", source, "--json");
    assert_eq!((ran.status, at(&parse(&ran.stdout), "/verdict")), (Some(1), &json!("fail")));
    let original = repository("tests/golden/idefics-plain");
    flamingoc!("check", artifact, "--against", original).ok();
}

#[test]
fn precisions_are_compiled_checked_and_shown() {
    let recipe = repository("tests/golden/tiny-scenes/recipe.toml");
    for (precision, format) in
        [("f16", "f16"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "int4/32")]
    {
        let scratch = tempfile::tempdir().unwrap();
        let artifact = scratch.path().join("a.flamingo");
        let nearest = ["--no-calibration", "--no-gate"];
        let compiled = ["--precision", precision, nearest[0], nearest[1]];
        flamingoc!(
            "compile",
            recipe,
            "-o",
            artifact,
            compiled[0],
            compiled[1],
            compiled[2],
            compiled[3]
        )
        .ok();
        let report = || parse(&fs::read_to_string(artifact.join("report.json")).unwrap());
        let quantisation = at(&report(), "/quantisation").clone();
        assert!(quantisation.get("mean_kl").is_none(), "not measured yet");
        let bytes = |name: &str| at(&quantisation, name).as_u64().unwrap();
        assert!(bytes("/bytes") * 10 < bytes("/bytes_f32") * 6, "{quantisation}");
        let layers = at(&quantisation, "/layers").as_array().unwrap();
        let packed: Vec<&Value> = layers.iter().filter(|l| at(l, "/scheme") != "f32").collect();
        assert!(packed.len() >= 10 && packed.iter().any(|l| at(l, "/scheme") == format));
        for layer in packed {
            let db = at(layer, "/sqnr_db").as_f64().unwrap();
            assert!((10.0..120.0).contains(&db), "{layer}");
        }
        let manifest = parse(&fs::read_to_string(artifact.join("manifest.json")).unwrap());
        assert_eq!(at(&manifest, "/precision/language"), format);
        assert_eq!(at(&manifest, "/weight_layout"), "panel16");

        // Four bits rounded to nearest are too few for so narrow a model, and `check` says so.
        let ran = flamingoc!("check", artifact, "--against", recipe);
        assert_eq!(ran.status, Some(i32::from(precision == "int4")), "{}", ran.stderr);
        let table = ran.stdout;
        assert!(table.contains("mean KL") && table.contains("best token"), "{table}");
        assert!(at(&report(), "/quantisation/mean_kl").as_f64().unwrap() > 0.0);
        assert!(at(&report(), "/quantisation/top1_agreement").as_f64().unwrap() > 0.5);
        let table = flamingoc!("inspect", artifact).ok();
        assert!(table.contains("weight matrices") && table.contains(format), "{table}");
    }
}

#[test]
fn check_fails_where_next_tokens_are_others() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, artifact) = (scratch.path().join("source"), scratch.path().join("a.flamingo"));
    copy(&repository("tests/golden/idefics-plain"), &source);
    flamingoc!("compile", source, "-o", artifact, "--precision", "f16", "--no-gate").ok();
    let original = repository("tests/golden/idefics-plain");
    flamingoc!("check", artifact, "--against", original).ok();
    let file = source.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let mut changed = bytes.clone();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors.tensor("model.layers.3.mlp.down_proj.weight").unwrap().data();
    let offset = data.as_ptr() as usize - bytes.as_ptr() as usize;
    changed[offset..offset + 4].copy_from_slice(&20f32.to_le_bytes());
    fs::write(&file, changed).unwrap();
    let ran = flamingoc!("check", artifact, "--against", source);
    assert_eq!(ran.status, Some(1), "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("FAILED") && ran.stdout.contains("mean KL"), "{}", ran.stdout);
}

#[test]
fn compile_refuses_a_broken_scale_with_status_1_and_names_its_layer() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("demo.flamingo");
    let recipe = repository("models/demo/recipe.toml");
    let broken = "decoder.2.mlp=int8:reach=0.02";
    let compile = |option: &str| {
        flamingoc!(
            "compile",
            recipe,
            "-o",
            output,
            "--precision",
            "int8",
            "--layer",
            broken,
            option
        )
    };
    let ran = compile("--json");
    assert_eq!(ran.status, Some(1), "{}", ran.stderr);
    for part in ["the answers changed", "decoder.2.mlp.", "hint: pass `--auto-mixed`"] {
        assert!(ran.stderr.contains(part), "{}", ran.stderr);
    }
    let refused = parse(&ran.stdout);
    assert_eq!(at(&refused, "/verdict"), "fail");
    assert!(at(&refused, "/gate/worst/0/name").as_str().unwrap().starts_with("decoder.2.mlp."));
    assert!(!output.exists());
    assert!(compile("--no-gate").ok().contains("demo.flamingo"));
}

#[test]
fn demo_answers_measures_and_times() {
    let found = parse(&flamingoc!("demo", "--json", "--n", "3").ok());
    let answers = at(&found, "/answers").as_array().unwrap();
    assert!(answers.len() >= 8, "{found:#}");
    for answer in answers {
        assert_eq!(at(answer, "/text"), at(answer, "/answer"), "{answer:#}");
        let picture = at(answer, "/picture").as_str();
        let is_which = at(answer, "/task").as_str().unwrap().starts_with("which");
        assert_eq!(picture.is_some_and(|name| name.ends_with(".png")), is_which, "{answer:#}");
    }
    let scores = at(&found, "/scores").as_array().unwrap();
    let right = scores.iter().map(|score| at(score, "/score").as_f64().unwrap()).sum::<f64>();
    assert!(scores.len() >= 10 && right / scores.len() as f64 > 0.7, "{found:#}");
    let latency = at(&found, "/latency").as_object().unwrap();
    assert!(latency.values().all(|value| value.as_f64().unwrap() > 0.0), "{found:#}");
    let text = flamingoc!("demo", "--n", "0").ok();
    assert!(text.contains(", that is [which_4-") && !text.contains('\x1b'), "{text}");
}

#[test]
fn eval_saves_prompts_that_run_answers_alike() {
    let scratch = tempfile::tempdir().unwrap();
    let (artifact, saved) = (scratch.path().join("demo.flamingo"), scratch.path().join("saved"));
    flamingoc!("compile", repository("models/demo/recipe.toml"), "-o", artifact).ok();
    let tasks = "caption,video,which_2,few_shot";
    flamingoc!(
        "eval", artifact, "--tasks", tasks, "--shots", "2", "--n", "2", "--seed", "5", "--save",
        saved
    )
    .ok();
    let lines = fs::read_to_string(saved.join("prompts.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 8);
    for line in lines.lines() {
        let mut line = parse(line);
        let given = at(&line, "/given").as_str().unwrap().to_owned();
        for key in ["task", "shots", "answer", "given"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line["max_new_tokens"] = given.split(' ').count().into();
        let file = saved.join("one.json");
        fs::write(&file, line.to_string()).unwrap();
        let text = flamingoc!("run", artifact, "--prompt-file", file).ok();
        assert_eq!(text.trim_end(), given, "{line}");
    }
}

#[test]
fn doctor_says_what_this_machine_has() {
    let found = parse(&flamingoc!("doctor", "--json").ok());
    let isa = at(&found, "/isa").as_str().unwrap();
    assert_eq!(at(&found, &format!("/isa_available/{isa}")), true, "{found:#}");
    assert!(at(&found, "/threads").as_u64().unwrap() > 0);
    for ceiling in ["read_gb_per_s", "f32_gop_per_s"] {
        assert!(at(&found, &format!("/{ceiling}")).as_f64().unwrap() > 0.0, "{ceiling}");
    }
    let features = at(&found, "/features").as_object().unwrap();
    let has = |name: &str| features.get(name).is_some_and(|has| has == true);
    let is_best = isa == "avx512";
    let rate = |name: &str| at(&found, &format!("/{name}_gop_per_s")).is_number();
    assert_eq!(rate("bf16"), is_best && has("avx512bf16"), "{found:#}");
    assert_eq!(rate("int8"), (is_best && has("avx512vnni")) || isa == "avx2", "{found:#}");
    assert!(at(&found, "/onnx_runtime").is_string());
}

/// Runs with a stdout whose reader leaves after one byte.
#[track_caller]
fn reader_leaves(arguments: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flamingoc"));
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
    assert!(!stderr.contains("error"), "{arguments:?}: {stderr}");
    assert!(output.status.code().is_some(), "{arguments:?}: {}", output.status);
}

#[test]
fn a_reader_may_leave() {
    let demo = Demo::new();
    let path = demo.path();
    let path = path.to_str().unwrap();
    reader_leaves(&["run", path, "--prompt", "what", "--max-new-tokens", "200"]);
    reader_leaves(&["inspect", path]);
    reader_leaves(&["inspect", path, "--json"]);
    reader_leaves(&["inspect", path, "--graph", "decoder"]);
    reader_leaves(&["demo", "--n", "2"]);
    reader_leaves(&["compile", "--help"]);
}

#[test]
fn flags_that_are_wrong_end_with_status_2() {
    for arguments in [&["compile"][..], &["run", "x", "--colour"], &["bake"], &[]] {
        let arguments: Vec<&OsStr> = arguments.iter().map(AsRef::<OsStr>::as_ref).collect();
        let ran = common::run(&arguments);
        assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(ran.stderr.contains("Usage: flamingoc"), "{}", ran.stderr);
    }
}
