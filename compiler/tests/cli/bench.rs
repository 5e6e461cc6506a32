//! `bench`, and the profiles that it and `run` show: the JSON that scripts rely on, counts against
//! the model's configuration, and times against the clock.

use std::fs;
use std::time::{Duration, Instant};

use flamingo_models::config::ModelConfig;
use flamingo_runtime::Artifact;
use flamingo_runtime::backend::{Backend, Step};
use flamingo_runtime::native::NativeBackend;
use flamingo_runtime::profile::{Arithmetic, Record};
use serde_json::{Value, json};

use super::common::{self, Ran, flamingoc, repository};
use super::{Demo, at, parse};

impl Demo {
    fn bench(&self, arguments: &[&str]) -> Ran {
        let path = self.path().display().to_string();
        let fixed = ["bench", &path, "--reps", "3", "--budget-s", "0.5"];
        let all: Vec<_> = fixed.iter().chain(arguments).map(AsRef::as_ref).collect();
        common::run(&all)
    }
}

fn number(value: &Value, pointer: &str) -> f64 {
    at(value, pointer).as_f64().unwrap_or_else(|| panic!("{pointer} in {value:#}"))
}

/// Operations of a decode step over one picture after `context` tokens, by hand: matrices of all
/// layers, head, attention over tokens and latents; a multiply-add is two.
fn decode_operations(config: &ModelConfig, context: usize) -> usize {
    let language = &config.language;
    let (width, inner) = (language.width, language.n_heads * language.head_dim);
    let kv = language.n_kv_heads * language.head_dim;
    let up = if language.gated_mlp { 2 } else { 1 };
    let layer = width * (2 * inner + 2 * kv) + (up + 1) * width * language.mlp_width;
    let cross = &config.cross_attention;
    let gated_inner = cross.n_heads * cross.head_dim;
    let gated = 2 * width * gated_inner + 2 * width * (4 * width);
    let attention = 2 * (context + 1) * inner;
    let gated_attention = 2 * config.n_latents() * gated_inner;
    2 * (language.n_layers * (layer + attention)
        + cross.layers.len() * (gated + gated_attention)
        + width * language.vocabulary)
}

#[test]
fn the_json_keeps_its_contract() {
    let demo = Demo::new();
    let ran =
        demo.bench(&["--images", "2,1", "--context", "16", "--prompt-tokens", "12", "--json"]);
    let is_quiet = ran.stderr.is_empty() || ran.stderr.starts_with("note: other processes");
    assert!(is_quiet, "{}", ran.stderr);
    let found = parse(&ran.ok());
    for ceiling in ["read_gb_per_s", "f32_gop_per_s", "threads"] {
        assert!(number(&found, &format!("/machine/{ceiling}")) > 0.0, "{ceiling}");
    }
    assert!(at(&found, "/machine/cpu").is_string() && at(&found, "/machine/isa").is_string());
    for narrow in ["bf16_gop_per_s", "int8_gop_per_s"] {
        let rate = at(&found, &format!("/machine/{narrow}"));
        assert!(rate.is_null() || rate.as_f64().unwrap() > 0.0, "{narrow}");
    }
    let results = at(&found, "/results").as_array().unwrap();
    let places: Vec<Value> = results
        .iter()
        .map(|r| json!([at(r, "/stage"), at(r, "/images"), at(r, "/context")]))
        .collect();
    let expected = json!([
        ["load", 0, 0],
        ["preprocess", 1, 0],
        ["encode", 1, 0],
        ["resample", 1, 0],
        ["media_kv", 1, 0],
        ["prefill", 1, 12],
        ["decode", 1, 16],
        ["first_token", 1, 12],
        ["first_token_warm", 1, 12],
        ["first_token_hot", 1, 12],
        ["prefill", 2, 12],
        ["decode", 2, 16],
        ["first_token", 2, 12],
        ["first_token_warm", 2, 12],
        ["first_token_hot", 2, 12],
    ]);
    assert_eq!(Value::from(places), expected);
    for result in results {
        let [p10, median, p90, p99] =
            ["p10", "median", "p90", "p99"].map(|part| number(result, &format!("/ms/{part}")));
        assert!(0.0 < p10 && p10 <= median && median <= p90 && p90 <= p99, "{result:#}");
        let [low, high] = ["low", "high"].map(|part| number(result, &format!("/ms/{part}")));
        assert!(low <= median && median <= high, "{result:#}");
        assert_eq!(at(result, "/ms/n"), 3, "{result:#}");
        let stage = at(result, "/stage").as_str().unwrap();
        assert_eq!(at(result, "/precision"), if stage == "preprocess" { "" } else { "f32" });
        assert_eq!((at(result, "/backend"), at(result, "/batch")), (&json!("native"), &json!(1)));
        let is_counted =
            !["load", "preprocess", "first_token_warm", "first_token_hot"].contains(&stage);
        for rate in ["weight_bytes", "weight_gb_per_s", "gop", "gop_per_s"] {
            let rate = at(result, &format!("/{rate}"));
            assert_eq!(rate.as_f64().is_some_and(|rate| rate > 0.0), is_counted, "{result:#}");
        }
        let has_ceiling = is_counted && !["first_token", "media_kv"].contains(&stage);
        assert_eq!(at(result, "/of_ceiling").is_number(), has_ceiling, "{result:#}");
        assert!(result.get("others").is_some(), "{result:#}");
    }
    let [peak, steady] = ["/peak_rss_bytes", "/steady_rss_bytes"].map(|key| number(&found, key));
    assert!(peak >= steady && steady > 1e6, "{peak} {steady}");
    assert!(number(&found, "/cache_bytes/media_per_image") > 0.0);
    assert!(number(&found, "/system/processors") >= 1.0);
    let memory = at(&found, "/memory").as_array().unwrap();
    assert!(memory.iter().any(|entry| at(entry, "/doing") == "timing"), "{memory:?}");
    let decode = results.iter().find(|result| at(result, "/stage") == "decode").unwrap();
    let (harness, step) = (number(&found, "/harness_ms"), number(decode, "/ms/median"));
    assert!(harness <= 0.01 * step, "timing takes {harness} ms of a step of {step} ms");

    let config = Artifact::open(&demo.path(), false).unwrap().manifest.config;
    let language = &config.language;
    let kv = 2 * 4 * 16 * language.n_layers * language.n_kv_heads * language.head_dim;
    assert_eq!(at(&found, "/cache_bytes/kv"), kv);
    let expected = decode_operations(&config, 16) as f64 / 1e9;
    let gop = number(&results[6], "/gop");
    assert!((gop / expected - 1.0).abs() < 1e-9, "expected {expected}, found {gop}");
    assert_eq!(at(&results[11], "/gop"), gop, "a token looks at one picture");
    let first = 2.0 * number(&results[2], "/gop") + number(&results[10], "/gop");
    assert!((number(&results[12], "/gop") / first - 1.0).abs() < 1e-9);
    assert!(number(&results[3], "/gop") < number(&results[2], "/gop"));
}

#[test]
fn the_table_has_a_row_for_each_stage_and_profiles_go_to_stderr() {
    let demo = Demo::new();
    let trace = demo.scratch.path().join("t.json");
    let trace_argument = trace.display().to_string();
    let ran = demo.bench(&["--images", "1", "--profile", "--trace", &trace_argument]);
    assert!(ran.stderr.contains("decode, 1 images") && ran.stderr.contains("self_attention"));
    let table = ran.ok();
    let stages = [
        "load",
        "preprocess",
        "encode",
        "resample",
        "media_kv",
        "prefill",
        "decode",
        "first_token",
        "first_token_warm",
        "first_token_hot",
    ];
    for stage in stages {
        assert!(table.lines().any(|line| line.trim_start().starts_with(stage)), "{stage}: {table}");
    }
    assert!(table.contains("governor") && table.contains("energy: "), "{table}");
    check_trace(&fs::read_to_string(&trace).unwrap());
}

/// Whether a file is a Chrome trace with instructions of both graphs.
#[track_caller]
fn check_trace(text: &str) {
    let trace = parse(text);
    let events = at(&trace, "/traceEvents").as_array().unwrap();
    for graph in ["media", "decoder"] {
        assert!(events.iter().any(|event| at(event, "/tid") == graph), "{graph}");
    }
    for event in events {
        assert_eq!(at(event, "/ph"), "X");
        assert!(number(event, "/ts") >= 0.0 && number(event, "/dur") >= 0.0);
        assert!(at(event, "/args/weight_bytes").is_u64() && at(event, "/name").is_string());
    }
}

#[test]
fn run_shows_a_profile_beside_its_answer() {
    let demo = Demo::new();
    let image = repository("tests/golden/tiny-scenes/images/single-000.png");
    let trace = demo.scratch.path().join("t.json");
    let prompt = ["--prompt", "<image>what color ?", "--image"];
    let [flag, text, image_flag] = prompt;
    let plain = flamingoc!("run", demo.path(), flag, text, image_flag, image).ok();
    let path = demo.path();
    let ran = flamingoc!("run", path, flag, text, image_flag, image, "--profile", "--trace", trace);
    assert!(ran.stderr.contains("% of ceiling") && ran.stderr.contains("total"), "{}", ran.stderr);
    assert_eq!(ran.ok(), plain);
    check_trace(&fs::read_to_string(&trace).unwrap());
}

#[test]
fn options_without_room_are_listed_together() {
    let demo = Demo::new();
    let ran = demo.bench(&["--images", "9999", "--context", "999999", "--prompt-tokens", "0"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""));
    for flag in ["`--images`", "`--context`", "`--prompt-tokens`", "hint: "] {
        assert!(ran.stderr.contains(flag), "{flag}: {}", ran.stderr);
    }
    for arguments in
        [["--budget-s", "0"], ["--budget-s", "nan"], ["--reps", "x"], ["--images", "a"]]
    {
        let ran = demo.bench(&arguments);
        assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(ran.stderr.contains(arguments[0]), "{arguments:?}: {}", ran.stderr);
    }
    assert_eq!(flamingoc!("bench", "no/such.flamingo").status, Some(2));
}

/// The demo's native backend, and its configuration.
fn native(demo: &Demo) -> (NativeBackend, ModelConfig) {
    let artifact = Artifact::open(&demo.path(), false).unwrap();
    let graphs = artifact.load().unwrap();
    let backend =
        NativeBackend::new(&graphs.media, &graphs.decoder, graphs.weights.clone(), None).unwrap();
    (backend, artifact.manifest.config)
}

fn weight_bytes(records: &[Record]) -> usize {
    records.iter().map(|record| record.work.weight_bytes).sum()
}

#[test]
fn profiles_count_every_weight_once_and_cover_the_time() {
    let demo = Demo::new();
    let (backend, config) = native(&demo);
    let size = config.vision.image_size;
    let pixels = vec![0.25; 3 * size * size];
    let media = backend.encode(&pixels, 1, 1).unwrap();
    assert!(backend.take_profile().is_empty(), "off unless asked for");
    assert!(backend.set_profiling(true));

    backend.encode(&pixels, 1, 1).unwrap();
    let bindings = [("n_media", 1), ("n_frames", 1)].map(|(name, n)| (name.to_owned(), n));
    let bindings = bindings.into();
    let stages = backend.media_stages().into_iter();
    let expected: usize = stages.map(|stage| stage.memory(&bindings).unwrap().weight_bytes).sum();
    assert_eq!(weight_bytes(&backend.take_profile()), expected);

    let media: Vec<_> = media.into_iter().map(std::sync::Arc::new).collect();
    let mut sequence = backend.new_sequence(8).unwrap();
    let mut best_share = 0.0f64;
    for _ in 0..50 {
        sequence.truncate(0);
        let step = Step { input_ids: &[1], media_time: &[1], media: &media, logit_rows: &[0] };
        let start = Instant::now();
        sequence.advance(&step).unwrap();
        let wall = start.elapsed();
        let records = backend.take_profile();
        let sum: Duration = records.iter().map(|record| record.duration).sum();
        assert!(sum <= wall, "{sum:?} of {wall:?}");
        best_share = best_share.max(sum.as_secs_f64() / wall.as_secs_f64());
        let names = ["text_len", "past_len", "n_media", "n_latents", "n_logits"].map(str::to_owned);
        let bindings = names.into_iter().zip([1, 0, 1, config.n_latents(), 1]).collect();
        let memory = backend.decoder_stage().memory(&bindings).unwrap();
        let language = &config.language;
        let table = 4 * language.vocabulary * language.width;
        let unread = if language.tied_head { 0 } else { table };
        let row = 4 * language.width;
        assert_eq!(weight_bytes(&records), memory.weight_bytes - unread + row);
    }
    assert!(best_share >= 0.8, "{best_share}");

    assert!(backend.set_profiling(false));
    sequence.truncate(0);
    let step = Step { input_ids: &[1], media_time: &[0], media: &[], logit_rows: &[0] };
    sequence.advance(&step).unwrap();
    assert!(backend.take_profile().is_empty());
}

#[test]
fn profiles_count_small_formats_in_their_own_bytes_and_arithmetic() {
    let step = Step { input_ids: &[1], media_time: &[0], media: &[], logit_rows: &[0] };
    let decode = |precision: &str| {
        let (backend, _) = native(&Demo::in_precision(precision));
        assert!(backend.set_profiling(true));
        backend.new_sequence(1).unwrap().advance(&step).unwrap();
        backend.take_profile()
    };
    let operations =
        |records: &[Record]| records.iter().map(|record| record.work.operations).sum::<u64>();
    let f32 = decode("f32");
    for (precision, arithmetic, share) in [
        ("f16", Arithmetic::F32, 0.5),
        ("bf16", Arithmetic::Bf16, 0.5),
        ("int8", Arithmetic::Int8, 0.25),
    ] {
        let records = decode(precision);
        assert_eq!(operations(&records), operations(&f32), "{precision}");
        let mlp = |records: &[Record]| -> Vec<Record> {
            records.iter().filter(|record| record.node.ends_with(".mlp")).cloned().collect()
        };
        let (own, whole) = (mlp(&records), mlp(&f32));
        assert!(own.iter().all(|record| record.work.arithmetic == arithmetic), "{precision}");
        // Scales and biases stay f32, and panels are filled up to 16 rows.
        let found = weight_bytes(&own) as f64 / weight_bytes(&whole) as f64;
        assert!((share..share * 1.2).contains(&found), "{precision}: {found}");
    }
}

#[test]
fn the_baseline_makes_keys_and_values_again() {
    let demo = Demo::new();
    let flags = ["--images", "1,4", "--context", "32", "--prompt-tokens", "32", "--reps", "3"];
    let table = {
        let path = demo.path();
        let mut all: Vec<&std::ffi::OsStr> = vec!["bench".as_ref(), path.as_ref()];
        all.extend(flags.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
        all.extend(["--baseline", "reproject"].map(AsRef::<std::ffi::OsStr>::as_ref));
        super::common::run(&all).ok()
    };
    let rows = table.lines().filter(|line| line.trim_start().starts_with("decode_reprojected"));
    assert_eq!(rows.count(), 2, "{table}");
    let factor = |images: &str| {
        let start = format!("{images} pictures: ");
        let line = table.lines().find_map(|line| line.strip_prefix(&start)).expect("a factor");
        line.split(' ').next().and_then(|factor| factor.parse::<f64>().ok()).expect("a number")
    };
    // How large it is, a busy machine would say wrongly.
    assert!(factor("1") > 0.0 && factor("4") > 0.0, "{table}");
}

#[test]
fn the_first_token_after_examples_is_timed_with_and_without_a_bank() {
    let demo = Demo::new();
    let examples = demo.scratch.path().join("examples.jsonl");
    let line = |n: usize| {
        let picture = repository(&format!("tests/golden/tiny-scenes/images/multi-00{n}.png"));
        json!({"segments": [{"image": picture}, {"text": "what color ?"}, {"end_of_chunk": true}]})
            .to_string()
    };
    fs::write(&examples, (0..4).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    let path = examples.display().to_string();
    let few = ["--images", "1", "--examples", &path, "--shots", "3"];
    let found = parse(&demo.bench(&[&few[..], &["--json"]].concat()).ok());
    let results = at(&found, "/results").as_array().unwrap();
    let [inline, bank] = ["few_shot", "few_shot_bank"].map(|stage| {
        let result = results.iter().find(|result| at(result, "/stage") == stage).expect(stage);
        assert_eq!(at(result, "/images"), 4, "three examples and the question");
        number(result, "/ms/median")
    });
    assert!((number(&found, "/few_shot_factor") - inline / bank).abs() < 1e-9);
    for (text, reason) in [("{}", "line 1: "), ("", "no examples")] {
        fs::write(&examples, text).unwrap();
        let ran = demo.bench(&few);
        assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""));
        assert!(ran.stderr.contains(reason), "{}", ran.stderr);
    }
}

/// A report against itself, against one that is slower on purpose, and against what is none.
#[test]
fn diff_tells_a_regression_from_the_same() {
    let demo = Demo::new();
    let path = demo.path().display().to_string();
    let ran = flamingoc![
        "bench",
        &path,
        "--reps",
        "20",
        "--budget-s",
        "1",
        "--images",
        "1",
        "--context",
        "16",
        "--prompt-tokens",
        "12",
        "--json"
    ];
    let mut report = parse(&ran.ok());
    // Tests run beside each other: the spread of a quiet machine in place of what was measured.
    for result in report["results"].as_array_mut().unwrap() {
        let median = at(result, "/ms/median").as_f64().unwrap();
        let sample = |i: usize| median * (1.0 + 0.01 * (i * 7 % 5) as f64);
        result["samples_ms"] = json!((0..20).map(sample).collect::<Vec<f64>>());
    }
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, report: &Value| {
        let path = folder.path().join(name).display().to_string();
        fs::write(&path, report.to_string()).unwrap();
        path
    };
    let before = write("before.json", &report);
    let mut slower = report.clone();
    for result in slower["results"].as_array_mut().unwrap() {
        let factor = if result["stage"] == "decode" { 1.5 } else { 1.0 };
        for sample in result["samples_ms"].as_array_mut().unwrap() {
            *sample = json!(sample.as_f64().unwrap() * factor);
        }
    }
    let after = write("after.json", &slower);
    let same = flamingoc!["bench", "diff", &before, &before, "--fail-over", "5%", "--json"];
    let same = parse(&same.ok());
    let changes = at(&same, "/changes").as_array().unwrap();
    assert!(changes.len() >= 5 && changes.iter().all(|change| change["verdict"] == "same"));
    let ran = flamingoc!["bench", "diff", &before, &after, "--fail-over", "5%"];
    assert_eq!(ran.status, Some(1), "{}{}", ran.stdout, ran.stderr);
    let slow: Vec<&str> = ran.stdout.lines().filter(|line| line.contains("SLOWER")).collect();
    assert!(
        matches!(slow[..], [line] if line.trim_start().starts_with("decode")),
        "{}",
        ran.stdout
    );
    assert_eq!(flamingoc!["bench", "diff", &before, &after, "--fail-over", "60%"].status, Some(0));
    let none =
        flamingoc!["bench", "diff", &before, &repository("Cargo.toml").display().to_string()];
    assert_eq!(none.status, Some(2));
    assert!(none.stderr.contains("flamingoc bench ARTIFACT --json >"), "{}", none.stderr);
}

/// The page stands alone and has the plots that its figures allow.
#[test]
fn the_page_has_its_plots() {
    let demo = Demo::new();
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("bench.html");
    let page = page.display().to_string();
    let sizes = ["--images", "0,2", "--context", "16", "--prompt-tokens", "12", "--html", &page];
    demo.bench(&sizes).ok();
    let text = fs::read_to_string(&page).unwrap();
    assert_eq!(
        text.matches("<svg").count(),
        6,
        "pictures, tokens, ceiling, roofline, parts, memory"
    );
    for part in
        ["</html>", "first_token", "pictures in the prompt", "p99", "peak resident", "Roofline"]
    {
        assert!(text.contains(part), "{part}");
    }
    assert!(!text.contains("src=") && !text.contains("<script"), "nothing from outside");
}

/// Artifacts, threads and batches take turns in one run, each result with its own ceiling and name.
#[test]
fn variants_share_a_run() {
    let (demo, small) = (Demo::new(), Demo::in_precision("int8"));
    let copy = small.path().display().to_string();
    let sizes = ["--images", "1", "--context", "8,16", "--prompt-tokens", "8", "--batch", "1,3"];
    let others = [copy.as_str(), "--threads", "1,2", "--json"];
    let found = parse(&demo.bench(&[&others[..], &sizes[..]].concat()).ok());
    let results = at(&found, "/results").as_array().unwrap();
    let decodes: Vec<&Value> = results.iter().filter(|r| at(r, "/stage") == "decode").collect();
    assert_eq!(decodes.len(), 2 * 2 * 2 * 2, "artifacts, threads, contexts, batches");
    let of = |precision: &str, threads: usize, context: usize, batch: usize| {
        let place = json!([precision, threads, context, batch]);
        let found = decodes.iter().find(|r| {
            let own =
                ["/precision", "/threads", "/context", "/batch"].map(|key| at(r, key).clone());
            json!(own) == place
        });
        *found.unwrap_or_else(|| panic!("{place} in {decodes:#?}"))
    };
    for threads in [1, 2] {
        let (one, three) = (of("f32", threads, 16, 1), of("f32", threads, 16, 3));
        let more = number(three, "/weight_bytes") / number(one, "/weight_bytes");
        assert!((1.0..1.001).contains(&more), "but for rows of the embedding: {more}");
        assert!((number(three, "/gop") / number(one, "/gop") - 3.0).abs() < 1e-6);
        let rate = 3.0 / number(three, "/ms/median") * 1e3;
        assert!((number(three, "/tokens_per_s") / rate - 1.0).abs() < 1e-9);
        assert!(number(of("int8", threads, 8, 1), "/weight_bytes") < number(one, "/weight_bytes"));
    }
    let table = demo.bench(&[&copy]).ok();
    assert!(table.contains("artifact") && table.contains("engine"), "{table}");
}

#[test]
fn scenarios_tell_what_a_user_waits_for() {
    let demo = Demo::new();
    let page = demo.scratch.path().join("scenarios.html").display().to_string();
    let ran = demo.bench(&["--scenario", "all", "--fps", "50", "--html", &page, "--json"]);
    let notes = ran.stderr.clone();
    let found = parse(&ran.ok());
    let scenarios = at(&found, "/scenarios").as_array().unwrap();
    let names: Vec<&str> = scenarios.iter().filter_map(|s| at(s, "/scenario").as_str()).collect();
    let all = ["caption", "vqa-4shot", "few-shot-32", "chat", "video", "camera-stream"];
    let left: Vec<&str> = all.into_iter().filter(|name| !names.contains(name)).collect();
    for name in &left {
        assert!(notes.contains(&format!("no room for scenario `{name}`")), "{notes}");
    }
    assert!(names.len() >= 4, "{names:?}");
    for scenario in scenarios {
        let [first, whole, token] = ["first_token_ms", "end_to_end_ms", "token_ms"]
            .map(|time| number(scenario, &format!("/{time}/median")));
        assert!(0.0 < token && token < whole && first < whole, "{scenario:#}");
        assert!(number(scenario, "/session_bytes") > 0.0);
        assert_eq!(
            number(scenario, "/media_found"),
            0.0,
            "a picture that was there before: {scenario:#}"
        );
    }
    let stream = scenarios.iter().find(|s| at(s, "/scenario") == "camera-stream").unwrap();
    let [arrived, answered, dropped] =
        ["arrived", "answered", "dropped"].map(|count| number(stream, &format!("/stream/{count}")));
    assert!((24.0..=60.0).contains(&arrived), "half a second at 50: {arrived}");
    assert!(answered >= 1.0 && arrived == answered + dropped, "{stream:#}");
    assert_eq!(at(&found, "/results").as_array().unwrap().len(), 1, "load alone");
    assert!(fs::read_to_string(&page).unwrap().contains("camera-stream"));
    let unknown = demo.bench(&["--scenario", "nap"]);
    assert_eq!(unknown.status, Some(2));
    assert!(unknown.stderr.contains("camera-stream"), "{}", unknown.stderr);
}
