//! A prompt with examples of a bank is the prompt that begins with their segments, to the bit; no picture of the bank is
//! decoded or encoded, and the keys and values of its beginning are not computed. Banks of others and damaged ones are
//! refused.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use flamingo_runtime::visual_cache::{VisualCache, VisualCacheOptions};
use flamingo_runtime::{
    Bank, GenerateOptions, KvFormat, Limits, Model, OpenOptions, PromptEncoder, PromptFile,
    Segment, Selection, Shots,
};
use flamingo_tests::{compiled_as, golden_folders, opening, tiny_scenes};
use flamingoc::scheme::Precision;

const N_EXAMPLES: usize = 12;

fn picture(name: &str) -> PathBuf {
    tiny_scenes().join("images").join(name)
}

fn text(text: &str) -> Segment {
    Segment::Text { text: text.into() }
}

/// Examples with pictures, one with two, one with a video, one without.
fn examples() -> Vec<Vec<Segment>> {
    let image = |name: String| Segment::Image { image: picture(&name) };
    let end = Segment::EndOfChunk { end_of_chunk: true };
    let colours = ["big purple 0 bottom", "small red 6 bottom", "two green 5"];
    let example = |n: usize| match n {
        3 => vec![text("what color ?"), end.clone()],
        5 => {
            let frames = (0..3).map(|n| picture(&format!("video-000-f{n}.png"))).collect();
            let video = flamingo_runtime::VideoFiles::Frames(frames);
            let video = Segment::Video { video, fps: None, frames: None };
            vec![video, text("blue square flash three"), end.clone()]
        }
        7 => vec![
            image(format!("multi-{n:03}.png")),
            text("first"),
            image("multi-000.png".into()),
            text("second"),
            end.clone(),
        ],
        _ => vec![image(format!("multi-{n:03}.png")), text(colours[n % 3]), end.clone()],
    };
    (0..N_EXAMPLES).map(example).collect()
}

fn write_examples(folder: &Path) -> PathBuf {
    let line = |segments| serde_json::json!({ "segments": segments }).to_string();
    let lines: Vec<String> = examples().iter().map(line).collect();
    let path = folder.join("examples.jsonl");
    fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn query() -> PromptFile {
    let segments = vec![Segment::Image { image: picture("multi-002.png") }, text("how many ?")];
    PromptFile { segments, ..PromptFile::default() }
}

fn open(artifact: &Path, kv_format: Option<KvFormat>) -> Model {
    Model::open(artifact, &OpenOptions { kv_format, ..opening("native") }).unwrap()
}

fn build(model: &Model, folder: &Path) -> PathBuf {
    let bank = folder.join("bank");
    let report = Bank::build(model, &write_examples(folder), &bank, false, &mut |_, _| {}).unwrap();
    assert_eq!((report.n_examples, report.n_prefix_examples), (N_EXAMPLES, N_EXAMPLES));
    // One has no picture; of one with two, the second is also the first example's.
    assert_eq!((report.n_media, report.skipped.len()), (N_EXAMPLES - 1, 0));
    bank
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// The segments of the examples, and the query's.
fn inline(numbers: &[usize], text_only: bool) -> PromptFile {
    let mut segments: Vec<Segment> =
        numbers.iter().flat_map(|number| examples()[number - 1].clone()).collect();
    if text_only {
        segments.retain(|s| matches!(s, Segment::Text { .. } | Segment::EndOfChunk { .. }));
    }
    segments.extend(query().segments);
    PromptFile { segments, ..PromptFile::default() }
}

/// Logits and tokens of examples and query on a fresh model are those of the inline prompt on one without caches. Returns
/// the tokens reused, and the media that came from the bank's files.
fn check_shots(
    artifact: &Path,
    kv: Option<KvFormat>,
    dir: &Path,
    choose: &dyn Fn(&Bank) -> Shots,
    text_only: bool,
) -> (usize, usize) {
    let options = GenerateOptions { max_new_tokens: 6, ignore_stops: true, ..Default::default() };
    let visual_cache = Some(VisualCache::new(&VisualCacheOptions::off()).into());
    let plain =
        OpenOptions { kv_format: kv, visual_cache, prefix_bytes: Some(0), ..opening("native") };
    let plain = Model::open(artifact, &plain).unwrap();
    let model = open(artifact, kv);
    let shots = choose(&Bank::open(dir, &model).unwrap());
    let prompt = inline(shots.numbers(), text_only);
    let config = &model.manifest().config;
    let (tokenizer, family, tokens) = (model.tokenizer().unwrap(), config.family, &config.tokens);
    let encoder = PromptEncoder { tokenizer, family, tokens };
    assert_eq!(model.encode_prompt(&prompt).unwrap(), encoder.encode(&prompt).unwrap());
    let mut expected = plain.session().unwrap();
    expected.append(&prompt, &Limits::default()).unwrap();
    let mut session = model.session().unwrap();
    session.append_after(&shots, &query(), &Limits::default()).unwrap();
    assert_eq!(bits(&session.logits().unwrap()), bits(&expected.logits().unwrap()));
    let reused = session.cache().prefix_tokens_reused;

    let fresh = open(artifact, kv);
    let answer = fresh.generate_after(&shots, &query(), &options, &mut |_| {}).unwrap();
    let plain_answer = plain.generate(&prompt, &options, &mut |_| {}).unwrap();
    assert_eq!(answer.tokens, plain_answer.tokens);
    assert_eq!((answer.cache.visual_misses, fresh.visual_cache().stats().misses), (1, 1));
    assert_eq!(answer.cache.prefix_tokens_reused, reused);
    (reused, answer.cache.visual_disk_hits)
}

#[test]
fn a_bank_is_the_inline_prompt_to_the_bit() {
    for (precision, kv) in
        [(Precision::F32, None), (Precision::F32, Some(KvFormat::Int8)), (Precision::Int8, None)]
    {
        let (scratch, artifact) = compiled_as(&tiny_scenes(), precision.into());
        let dir = build(&open(&artifact, kv), scratch.path());
        for n in [0, 1, 4, 8, N_EXAMPLES] {
            let selections = [
                Selection::Fixed,
                Selection::Random { seed: 1 },
                Selection::Random { seed: 2 },
                Selection::Rices,
            ];
            for selection in selections {
                // An example has no picture, and is like nothing.
                let n = if selection == Selection::Rices { n.min(N_EXAMPLES - 1) } else { n };
                let choose = |bank: &Bank| bank.choose(n, selection, &query()).unwrap();
                let (reused, from_files) = check_shots(&artifact, kv, &dir, &choose, false);
                if selection != Selection::Fixed {
                    continue;
                }
                let numbers: Vec<usize> = (1..=n).collect();
                let query_len = open(&artifact, kv).encode_prompt(&query()).unwrap().len() - 1;
                let whole = open(&artifact, kv).encode_prompt(&inline(&numbers, false)).unwrap();
                assert_eq!(reused, (whole.len() - query_len) / 4 * 4 * usize::from(n > 0));
                // Of tokens that were not reused, at most 3 before the query see media of the bank.
                assert!(from_files <= 3, "{from_files}");
            }
        }
        let text_only =
            |bank: &Bank| bank.choose(2, Selection::Fixed, &query()).unwrap().text_only();
        assert_eq!(check_shots(&artifact, kv, &dir, &text_only, true), (0, 0));
    }
}

#[test]
fn selections_are_what_they_say() {
    let (scratch, artifact) = compiled_as(&tiny_scenes(), Precision::F32.into());
    let model = open(&artifact, None);
    let bank = Bank::open(&build(&model, scratch.path()), &model).unwrap();
    bank.verify().unwrap();
    let choose = |n, selection| bank.choose(n, selection, &query()).unwrap().numbers().to_vec();
    assert_eq!(choose(3, Selection::Fixed), [1, 2, 3]);
    let random: Vec<_> = (0..8).map(|seed| choose(4, Selection::Random { seed })).collect();
    assert!(random.iter().collect::<BTreeSet<_>>().len() > 4, "{random:?}");
    assert_eq!(random[3], choose(4, Selection::Random { seed: 3 }));
    assert!(random.iter().all(|numbers| numbers.iter().collect::<BTreeSet<_>>().len() == 4));
    // The query's picture is that of the third example.
    let rices = choose(5, Selection::Rices);
    assert_eq!((rices.last(), rices.len()), (Some(&3), 5));
    assert!(!choose(N_EXAMPLES - 1, Selection::Rices).contains(&4), "it has no picture");
    for (n, selection, prompt, words) in [
        (N_EXAMPLES + 1, Selection::Fixed, query(), "at least 13 examples, found 12"),
        (N_EXAMPLES, Selection::Rices, query(), "12 examples with a picture, found 11"),
        (1, Selection::Rices, PromptFile::from_text("hi", &[]).unwrap(), "has no picture"),
    ] {
        let error = bank.choose(n, selection, &prompt).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// A session that is rewound into the examples, forked and scored makes the media that it then sees.
#[test]
fn sessions_go_on_from_the_middle_of_examples() {
    let (scratch, artifact) = compiled_as(&tiny_scenes(), Precision::F32.into());
    let model = open(&artifact, None);
    let dir = build(&model, scratch.path());
    let model = open(&artifact, None);
    let shots = Bank::open(&dir, &model).unwrap().choose(8, Selection::Fixed, &query()).unwrap();
    let turn = PromptFile { segments: vec![text("what color ?")], ..PromptFile::default() };
    let mut session = model.session().unwrap();
    let start = session.mark();
    session.append_after(&shots, &turn, &Limits::default()).unwrap();
    let plain = open(&artifact, None);
    let mut expected = plain.session().unwrap();
    let whole = PromptFile { segments: shots.before(&turn).segments.clone(), ..turn.clone() };
    expected.append(&whole, &Limits::default()).unwrap();
    let continuations = [vec![5, 6, 7], vec![9]];
    let mut fork = session.fork();
    assert_eq!(
        fork.score(&continuations, &Limits::default()).unwrap(),
        expected.score(&continuations, &Limits::default()).unwrap()
    );
    assert_eq!(bits(&session.logits().unwrap()), bits(&expected.logits().unwrap()));
    session.rewind(start).unwrap();
    session.append_after(&shots, &query(), &Limits::default()).unwrap();
    assert_eq!(model.visual_cache().stats().misses, 1);
}

#[test]
fn banks_of_others_and_damaged_ones_are_refused() {
    let (scratch, artifact) = compiled_as(&tiny_scenes(), Precision::F32.into());
    let model = open(&artifact, None);
    let dir = build(&model, scratch.path());
    let int8 = compiled_as(&tiny_scenes(), Precision::Int8.into());
    let golden = golden_folders().into_iter().find(|f| f.ends_with("openflamingo-mpt")).unwrap();
    let other = compiled_as(&golden, Precision::F32.into());
    let error = |model: &Model| Bank::open(&dir, model).err().unwrap().to_string();
    assert!(error(&open(&int8.1, None)).contains("artifact: expected "));
    assert!(error(&open(&other.1, None)).contains("artifact: expected "));
    let kv = error(&open(&artifact, Some(KvFormat::F16)));
    assert!(kv.contains("keys and values: expected f16, found f32"), "{kv}");
    assert!(error(&Model::open(&artifact, &opening("tract")).unwrap()).contains("`tract`"));
    let shots = Bank::open(&dir, &model).unwrap().choose(1, Selection::Fixed, &query()).unwrap();
    let of_other = open(&int8.1, None).generate_after(
        &shots,
        &query(),
        &GenerateOptions::default(),
        &mut |_| {},
    );
    assert!(of_other.err().unwrap().to_string().contains("artifact: expected "));
    let twice = Bank::build(&model, &write_examples(scratch.path()), &dir, false, &mut |_, _| {});
    assert!(twice.err().unwrap().to_string().contains("exists already"));

    let medium = fs::read_dir(dir.join("media")).unwrap().next().unwrap().unwrap().path();
    for (file, at_open) in [
        (dir.join("bank.json"), true),
        (dir.join("prefix.kv"), false),
        (dir.join("features.f32"), false),
        (medium, false),
    ] {
        let whole = fs::read(&file).unwrap();
        let mut damaged = whole.clone();
        let place = whole.iter().rposition(|byte| byte.is_ascii_alphanumeric()).unwrap();
        damaged[place] ^= 1;
        fs::write(&file, &damaged).unwrap();
        let opened = Bank::open(&dir, &open(&artifact, None));
        assert_eq!(opened.is_err(), at_open, "{}", file.display());
        let error = opened.and_then(|bank| bank.verify()).err().unwrap().to_string();
        assert!(error.contains("the bank is damaged"), "{}: {error}", file.display());
        fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        let opened = Bank::open(&dir, &open(&artifact, None));
        assert!(opened.and_then(|bank| bank.verify()).is_err(), "{}", file.display());
        fs::write(&file, &whole).unwrap();
    }
    Bank::open(&dir, &model).unwrap().verify().unwrap();
}

#[test]
fn bad_lines_are_listed_at_once_or_left_out() {
    let (scratch, artifact) = compiled_as(&tiny_scenes(), Precision::F32.into());
    let model = open(&artifact, None);
    let good = serde_json::json!({ "segments": examples()[0] }).to_string();
    let lines = [
        &good,
        "{\"segments\": [",
        "",
        "{\"segments\": [{\"picture\": \"a.png\"}]}",
        "{\"segments\": [{\"image\": \"gone.png\"}]}",
        "{\"segments\": []}",
        "{\"segments\": [{\"text\": \"a\"}], \"temperature\": 1}",
        &good,
    ];
    let path = scratch.path().join("examples.jsonl");
    fs::write(&path, lines.join("\n")).unwrap();
    let dir = scratch.path().join("bank");
    let build = |skip_bad| Bank::build(&model, &path, &dir, skip_bad, &mut |_, _| {});
    let error = build(false).err().unwrap().to_string();
    let expected = ["line 2: ", "line 4: segment 1", "line 5: ", "line 6: ", "line 7: "];
    assert!(expected.iter().all(|words| error.contains(words)), "{error}");
    assert!(error.contains("5 examples cannot be used"), "{error}");
    let left: Vec<_> = fs::read_dir(scratch.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(!left.iter().any(|path| path.to_string_lossy().ends_with(".tmp")), "{left:?}");
    let report = build(true).unwrap();
    assert_eq!((report.n_examples, report.skipped.len(), report.n_media), (2, 5, 1));
}

#[test]
fn scores_are_averaged_over_orders_of_the_examples() {
    let (scratch, artifact) = compiled_as(&tiny_scenes(), Precision::F32.into());
    let model = open(&artifact, None);
    let bank = Bank::open(&build(&model, scratch.path()), &model).unwrap();
    let shots = bank.choose(3, Selection::Random { seed: 4 }, &query()).unwrap();
    let orders = bank.permutations(&shots, 4, 9).unwrap();
    let numbers: BTreeSet<&[usize]> = orders.iter().map(Shots::numbers).collect();
    assert_eq!((orders.len(), numbers.len(), orders[0].numbers()), (4, 4, shots.numbers()));
    assert_eq!(bank.permutations(&shots, 100, 9).unwrap().len(), 6, "all orders of three");
    assert_eq!(bank.permutations(&Shots::default(), 3, 0).unwrap().len(), 1);

    let words = ["four".to_owned(), "two green".to_owned()];
    let limits = Limits::default();
    let score = |orders: &[Shots]| model.score_after(orders, &query(), &words, &limits).unwrap();
    let alone: Vec<_> = orders.iter().map(|order| score(std::slice::from_ref(order))).collect();
    for (place, together) in score(&orders).iter().enumerate() {
        let mean = alone.iter().map(|scores| scores[place].log_likelihood).sum::<f64>() / 4.0;
        assert!((together.log_likelihood - mean).abs() < 1e-9);
        assert_eq!(together.n_tokens, place + 1);
    }
    let inline = inline(shots.numbers(), false);
    assert_eq!(alone[0], model.score(&inline, &words, &limits).unwrap(), "as the inline prompt");
    assert_ne!(alone[0], alone[1]);
}
