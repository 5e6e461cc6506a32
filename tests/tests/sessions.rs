//! Sequences and sessions that are forked, rewound, fed in pieces and begun from the prefix cache: on the native engine
//! the bits of one that was read fresh, on others the same numbers. Beams are PyTorch's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use flamingo_models::{Family, MediaClock, media_time};
use flamingo_runtime::backend::{Media, Sequence, Step};
use flamingo_runtime::visual_cache::{Fingerprint, MediaKey};
use flamingo_runtime::{
    BeamOptions, CancelToken, GenerateOptions, KvFormat, Limits, Mark, Medium, Model, OpenOptions,
    PromptFile, RunError, Segment, Session, Stop,
};
use flamingo_tests::{Golden, compiled, golden_folders, opening, tiny_scenes};
use flamingoc::parity::{F32_BOUND, compare};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Goldens that differ in how positions enter, and in the mask rule.
const KINDS: [&str; 4] =
    ["openflamingo-opt", "openflamingo-mpt", "openflamingo-llama", "idefics-vector"];

fn golden_folder(name: &str) -> PathBuf {
    let folder = golden_folders().into_iter().find(|folder| folder.ends_with(name));
    folder.unwrap_or_else(|| panic!("no golden {name}"))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn media_of(model: &Model, golden: &Golden, case: &str) -> Vec<Arc<Media>> {
    let Some(pixels) = golden.get(case, "pixel_values") else { return Vec::new() };
    let shape = pixels.shape();
    model.encode_pixels(&pixels.to_f32_vec().unwrap(), shape[0], shape[1]).unwrap()
}

fn keyed(media: &[Arc<Media>]) -> Vec<Medium> {
    let medium = |(index, media): (usize, &Arc<Media>)| Medium {
        media: Arc::clone(media),
        key: Some(MediaKey::new(&Fingerprint::of(&["a model"]), &[index as f32], 1)),
    };
    media.iter().enumerate().map(medium).collect()
}

/// Logits of the last of `ids`, by a sequence that has nothing else.
fn fresh(model: &Model, ids: &[u32], times: &[u32], media: &[Arc<Media>]) -> Vec<f32> {
    let mut sequence = model.backend().new_sequence(ids.len()).unwrap();
    advance(sequence.as_mut(), ids, times, media)
}

fn advance(
    sequence: &mut dyn Sequence,
    input_ids: &[u32],
    media_time: &[u32],
    media: &[Arc<Media>],
) -> Vec<f32> {
    let logit_rows = &[input_ids.len() - 1];
    sequence.advance(&Step { input_ids, media_time, media, logit_rows }).unwrap()
}

/// Same bits on the native engine, same numbers on others.
#[track_caller]
fn assert_same(backend: &str, found: &[f32], expected: &[f32]) {
    if backend == "native" {
        assert_eq!(bits(found), bits(expected));
    }
    let comparison = compare("logits", found, expected, expected.len()).unwrap();
    assert!(comparison.relative_error <= F32_BOUND, "{backend}: {comparison:?}");
}

/// A fork and a rewound sequence go on as one that was read fresh; the original does not see what its fork does.
fn check_sequences(folder: &Path, backend: &str) {
    let (_scratch, artifact) = compiled(folder);
    let model = Model::open(&artifact, &opening(backend)).unwrap();
    let golden = Golden::read(folder);
    let config = &model.manifest().config;
    for case in golden.cases() {
        let ids = golden.ids(&case, "input_ids").unwrap();
        let media = media_of(&model, &golden, &case);
        let times = media_time(config.family, &config.tokens, &ids);
        let mut other = ids.clone();
        let (half, len) = (ids.len() / 2, ids.len());
        other[half] = (ids[half] + 1) % 7;
        let other_times = media_time(config.family, &config.tokens, &other);
        let expected = fresh(&model, &ids, &times, &media);
        let expected_other = fresh(&model, &other, &other_times, &media);

        let mut sequence = model.backend().new_sequence(len).unwrap();
        advance(sequence.as_mut(), &ids[..half], &times[..half], &media);
        let mut fork = sequence.fork();
        assert_eq!((fork.len(), fork.max_context()), (half, len));
        let found = advance(fork.as_mut(), &other[half..], &other_times[half..], &media);
        assert_same(backend, &found, &expected_other);
        let found = advance(sequence.as_mut(), &ids[half..], &times[half..], &media);
        assert_same(backend, &found, &expected);
        let kept = sequence.fork();
        assert!(kept.kv_bytes() > 0);
        sequence.truncate(half);
        let mut fork_of_cut = sequence.fork();
        for sequence in [&mut sequence, &mut fork_of_cut] {
            let found = advance(sequence.as_mut(), &other[half..], &other_times[half..], &media);
            assert_same(backend, &found, &expected_other);
        }
        drop(fork);
        let mut kept = kept;
        kept.truncate(len - 1);
        let found = advance(kept.as_mut(), &ids[len - 1..], &times[len - 1..], &media);
        assert_same(backend, &found, &expected);
    }
}

#[test]
fn forked_and_rewound_sequences_are_as_fresh_ones() {
    for name in KINDS {
        check_sequences(&golden_folder(name), "native");
    }
}

#[test]
fn forked_and_rewound_sequences_are_as_fresh_ones_on_other_engines() {
    for backend in ["ort", "tract"] {
        check_sequences(&golden_folder("openflamingo-opt"), backend);
    }
}

/// Every golden, fed in pieces: logits and greedy tokens of one prefill.
#[test]
fn a_prompt_in_pieces_has_the_bits_of_a_whole_one() {
    for folder in golden_folders() {
        let (_scratch, artifact) = compiled(&folder);
        let model = Model::open(&artifact, &opening("native")).unwrap();
        let (golden, tokens) = (Golden::read(&folder), &model.manifest().config.tokens);
        for (round, case) in (0..3).flat_map(|n| golden.cases().into_iter().map(move |c| (n, c))) {
            let ids = golden.ids(&case, "input_ids").unwrap();
            let media = media_of(&model, &golden, &case);
            let vocabulary = model.manifest().config.language.vocabulary;
            let whole = model.logits(&ids, &media).unwrap();
            let mut session = model.session().unwrap();
            let (mut rest, mut media_left) = (ids.as_slice(), media.as_slice());
            let mut state = 0x9E37_79B9u32.wrapping_mul(round + 1 + ids.len() as u32);
            while !rest.is_empty() {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let len = (1 + (state >> 24) as usize % 9).min(rest.len());
                let piece = rest.split_off(..len).unwrap();
                let n_media = piece.iter().filter(|id| **id == tokens.image).count();
                let n_media = n_media.min(media_left.len());
                let of_piece = media_left.split_off(..n_media).unwrap();
                let of_piece: Vec<Medium> = of_piece.iter().cloned().map(Medium::from).collect();
                session.append_ids(piece, &of_piece, &Limits::default()).unwrap();
            }
            let last = &whole[(ids.len() - 1) * vocabulary..];
            assert_eq!(bits(&session.logits().unwrap()), bits(last), "{} {case}", folder.display());
            let options = GenerateOptions {
                max_new_tokens: 8,
                ignore_stops: true,
                ..GenerateOptions::default()
            };
            let expected = model.generate_ids(&ids, &media, &options, &mut |_| {}).unwrap();
            let mut tokens = session.tokens(&options);
            while tokens.next_id().unwrap().is_some() {}
            assert_eq!(tokens.finish(), expected, "{} {case}", folder.display());
        }
    }
}

/// A session, and what it must hold.
struct Pair {
    session: Session,
    /// Id, and whether it was given.
    tokens: Vec<(u32, bool)>,
    media: Vec<Arc<Media>>,
    /// Each mark with the tokens and media that there were.
    marks: Vec<(Mark, usize, usize)>,
}

impl Pair {
    fn new(model: &Model) -> Pair {
        let session = model.session().unwrap();
        Pair { session, tokens: Vec::new(), media: Vec::new(), marks: Vec::new() }
    }

    fn fork(&self) -> Pair {
        Pair {
            session: self.session.fork(),
            tokens: self.tokens.clone(),
            media: self.media.clone(),
            marks: self.marks.clone(),
        }
    }

    fn generate(&mut self, n: usize) {
        if self.tokens.is_empty() {
            return;
        }
        let options =
            GenerateOptions { max_new_tokens: n, ignore_stops: true, ..GenerateOptions::default() };
        let mut tokens = self.session.tokens(&options);
        while let Some(id) = tokens.next_id().unwrap() {
            self.tokens.push((id, false));
        }
    }

    fn mark(&mut self) {
        self.marks.push((self.session.mark(), self.tokens.len(), self.media.len()));
    }

    fn rewind(&mut self, n: usize) {
        let len = self.tokens.len();
        let valid: Vec<_> = self.marks.iter().filter(|(_, tokens, _)| *tokens <= len).collect();
        let Some(&&(mark, n_tokens, n_media)) = valid.get(n % valid.len().max(1)) else { return };
        self.session.rewind(mark).unwrap();
        self.tokens.truncate(n_tokens);
        self.media.truncate(n_media);
        // A mark that is met again on another way would have other media.
        self.marks.retain(|(_, tokens, _)| *tokens <= n_tokens);
    }

    /// The session's next logits are those of its tokens read fresh.
    fn check(&mut self, model: &Model) {
        if self.tokens.is_empty() || self.tokens.len() > self.session.max_context() {
            return;
        }
        let config = &model.manifest().config;
        let mut clock = MediaClock::new(config.family, &config.tokens);
        let time = |(id, is_given): &(u32, bool)| match is_given {
            true => clock.tick(*id),
            false => clock.generated(),
        };
        let times: Vec<u32> = self.tokens.iter().map(time).collect();
        let ids: Vec<u32> = self.tokens.iter().map(|(id, _)| *id).collect();
        assert_eq!(self.session.ids(), ids);
        let expected = fresh(model, &ids, &times, &self.media);
        assert_eq!(bits(&self.session.logits().unwrap()), bits(&expected));
    }
}

/// Tokens by position, in two variants: prompts begin alike, and see one of three media.
struct Script<'a> {
    model: &'a Model,
    media: &'a [Arc<Media>],
}

impl Script<'_> {
    fn id(&self, variant: usize, position: usize) -> u32 {
        let tokens = &self.model.manifest().config.tokens;
        if position % 23 == 5 {
            return tokens.image;
        }
        let id = ((position * 7 + if position > 20 { variant * 3 } else { 0 }) % 40) as u32;
        if id == tokens.image { id + 1 } else { id }
    }

    fn medium(&self, position: usize, variant: usize) -> usize {
        (position / 23 + if position > 40 { variant } else { 0 }) % self.media.len()
    }

    fn append(&self, pair: &mut Pair, variant: usize, len: usize) {
        let start = pair.tokens.len();
        let end = (start + len).min(pair.session.max_context());
        let ids: Vec<u32> = (start..end).map(|position| self.id(variant, position)).collect();
        let image = self.model.manifest().config.tokens.image;
        let all = keyed(self.media);
        let places = (start..end).filter(|p| ids[p - start] == image);
        let media: Vec<Medium> = places.map(|p| all[self.medium(p, variant)].clone()).collect();
        if ids.is_empty() {
            return;
        }
        pair.session.append_ids(&ids, &media, &Limits::default()).unwrap();
        pair.tokens.extend(ids.into_iter().map(|id| (id, true)));
        pair.media.extend(media.into_iter().map(|medium| medium.media));
    }
}

/// Any order of appending, generating, forking, rewinding and beginning anew.
fn check_orders(name: &str, kv: KvFormat, prefix_bytes: Option<usize>, cases: u32) {
    let (_scratch, artifact) = compiled(&golden_folder(name));
    let model = Model::open(
        &artifact,
        &OpenOptions { prefix_bytes, kv_format: Some(kv), ..opening("native") },
    )
    .unwrap();
    let golden = Golden::read(&golden_folder(name));
    let media = media_of(&model, &golden, "A").into_iter().chain(media_of(&model, &golden, "B0"));
    let media: Vec<Arc<Media>> = media.take(3).collect();
    assert!(media.len() > 1, "{name}: two media that differ");
    let script = Script { model: &model, media: &media };
    let reused = std::cell::Cell::new(0);
    let orders = prop::collection::vec((0..7u8, 0..90usize, 0..4usize), 1..16);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    let result = TestRunner::new(config).run(&orders, |orders| {
        let mut pairs = vec![Pair::new(&model)];
        for (what, n, which) in orders {
            let at = which % pairs.len();
            match what {
                0 | 1 => script.append(&mut pairs[at], which % 2, n),
                2 => pairs[at].generate(n % 7),
                3 if pairs.len() < 4 => pairs.push(pairs[at].fork()),
                3 | 4 => pairs[at].mark(),
                5 => pairs[at].rewind(n),
                _ => {
                    pairs[at] = Pair::new(&model);
                    script.append(&mut pairs[at], which % 2, n);
                }
            }
            pairs[at].check(&model);
            reused.set(
                reused.get() + usize::from(pairs[at].session.cache().prefix_tokens_reused > 0),
            );
        }
        pairs.iter_mut().for_each(|pair| pair.check(&model));
        if let Some(limit) = prefix_bytes {
            assert!(pairs[0].session.memory().prefix_bytes <= limit);
        }
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(prefix_bytes == Some(0) || reused.get() > 0, "{name}: nothing was reused");
}

#[test]
fn any_order_of_operations_has_the_bits_of_a_fresh_sequence() {
    for name in KINDS {
        check_orders(name, KvFormat::F32, None, 40);
        check_orders(name, KvFormat::F32, Some(200_000), 40); // three blocks
        check_orders(name, KvFormat::F32, Some(0), 10);
    }
    for kv in [KvFormat::F16, KvFormat::Int8] {
        check_orders("openflamingo-llama", kv, None, 20);
    }
}

fn demo() -> (tempfile::TempDir, Model, Vec<PathBuf>) {
    let (scratch, artifact) = compiled(&tiny_scenes());
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let text = std::fs::read_to_string(tiny_scenes().join("prompts.jsonl")).unwrap();
    let mut images = Vec::new();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let segments: Vec<Segment> = serde_json::from_value(line["segments"].clone()).unwrap();
        for segment in segments {
            if let Segment::Image { image } = segment {
                images.push(tiny_scenes().join(image));
            }
        }
    }
    images.sort();
    images.dedup();
    (scratch, model, images)
}

fn long_prompt(images: &[PathBuf]) -> PromptFile {
    let text = "<image>what color ? a red one . <image>what color is it ? a blue one . <image>what color ?";
    PromptFile::from_text(text, images).unwrap()
}

#[test]
fn prompts_that_begin_alike_share_their_beginning() {
    let (_scratch, model, images) = demo();
    let options = GenerateOptions { max_new_tokens: 4, ..GenerateOptions::default() };
    let answer =
        |images: &[PathBuf]| model.generate(&long_prompt(images), &options, &mut |_| {}).unwrap();
    let pictures = |order: [usize; 3]| order.map(|index| images[index].clone());
    let first = answer(&pictures([0, 1, 2]));
    assert_eq!(first.cache.prefix_tokens_reused, 0);
    let again = answer(&pictures([0, 1, 2]));
    assert_eq!(again.cache.prefix_tokens_reused, (first.n_prompt_tokens - 1) / 4 * 4);
    let told = &again.to_json()["cache"]["prefix_tokens_reused"];
    assert_eq!(told.as_u64(), Some(again.cache.prefix_tokens_reused as u64));
    assert_eq!((again.tokens, again.text), (first.tokens, first.text));
    let other = answer(&pictures([3, 1, 2]));
    assert_eq!(other.cache.prefix_tokens_reused, 0, "another first picture");
    let last_differs = answer(&pictures([0, 1, 3]));
    assert!(last_differs.cache.prefix_tokens_reused > 0, "the same first picture");
}

#[test]
fn turns_of_a_conversation_cost_their_own_tokens() {
    let (_scratch, model, images) = demo();
    let mut session = model.session().unwrap();
    let options = GenerateOptions { max_new_tokens: 3, ..GenerateOptions::default() };
    session.append(&long_prompt(&images[..3]), &Limits::default()).unwrap();
    let first = session.generate(&options, &mut |_| {}).unwrap();
    let one_shot = model.generate(&long_prompt(&images[..3]), &options, &mut |_| {}).unwrap();
    assert_eq!((&first.tokens, &first.text), (&one_shot.tokens, &one_shot.text));
    let mark = session.mark();
    let turn = PromptFile::from_text(" <image>what color ?", &images[3..4]).unwrap();
    let answers: Vec<_> = (0..2)
        .map(|_| {
            session.append(&turn, &Limits::default()).unwrap();
            let answer = session.generate(&options, &mut |_| {}).unwrap();
            session.rewind(mark).unwrap();
            answer.tokens
        })
        .collect();
    assert_eq!(answers[0], answers[1]);
    let mut fork = session.fork();
    fork.append(&turn, &Limits::default()).unwrap();
    let mut text = String::new();
    let mut pieces = fork.pieces(&options).unwrap();
    for piece in pieces.by_ref() {
        text.push_str(&piece.unwrap().text);
    }
    assert_eq!(pieces.finish().tokens, answers[0]);
    assert!(!text.is_empty());
    let memory = fork.memory();
    assert!(memory.weight_bytes > 0 && memory.kv_bytes > 0 && memory.media_bytes > 0);
    assert!(memory.buffer_bytes > 0 && memory.prefix_bytes > 0, "{memory:?}");
    fork.rewind(mark).unwrap();
    let late = {
        session.append(&turn, &Limits::default()).unwrap();
        session.mark()
    };
    let error = fork.rewind(late).unwrap_err().to_string();
    assert!(error.contains("hint: rewind"), "{error}");
}

#[test]
fn limits_end_reading_and_generating() {
    let (_scratch, model, images) = demo();
    let prompt = long_prompt(&images[..3]);
    let cancel = CancelToken::default();
    let limits = Limits { cancel: cancel.clone(), deadline: None };
    let mut session = model.session().unwrap();
    session.append(&prompt, &limits).unwrap();
    let len = session.ids().len();
    let options = GenerateOptions {
        max_new_tokens: 6,
        ignore_stops: true,
        limits: limits.clone(),
        ..GenerateOptions::default()
    };
    let answer = session.generate(&options, &mut |_| cancel.cancel()).unwrap();
    assert_eq!((answer.stop, answer.tokens.len() < 6), (Stop::Cancelled, true));
    let before = session.ids().to_vec();
    let error = session.append(&prompt, &limits).unwrap_err();
    assert!(matches!(error, RunError::Interrupted { .. }), "{error}");
    assert!(session.ids() == before && before.len() < len + 6);
    let late = Limits { deadline: Some(Instant::now()), ..Limits::default() };
    let error = session.append(&prompt, &late).unwrap_err().to_string();
    assert!(error.contains("the deadline passed"), "{error}");
    let options = GenerateOptions { limits: late, ..GenerateOptions::default() };
    assert_eq!(session.generate(&options, &mut |_| {}).unwrap().stop, Stop::Deadline);
}

#[test]
fn stop_strings_end_the_text() {
    let (_scratch, model, images) = demo();
    let prompt = long_prompt(&images[..3]);
    let free =
        GenerateOptions { max_new_tokens: 6, ignore_stops: true, ..GenerateOptions::default() };
    let whole = model.generate(&prompt, &free, &mut |_| {}).unwrap().text;
    let start = whole.char_indices().nth(2).unwrap().0;
    let stop: String = whole[start..].chars().take(3).collect();
    let options = GenerateOptions { stop_strings: vec![stop.clone()], ..free };
    let mut streamed = String::new();
    let answer = model.generate(&prompt, &options, &mut |text| streamed.push_str(text)).unwrap();
    let expected = &whole[..whole.find(&stop).unwrap()];
    assert_eq!((answer.text.as_str(), streamed.as_str()), (expected, expected));
    assert_eq!(answer.stop, Stop::Text(stop));
}

#[test]
fn a_full_context_is_an_error_for_turns_and_a_stop_for_answers() {
    let (_scratch, model, images) = demo();
    let mut session = model.session().unwrap();
    let limit = session.max_context();
    session.append(&long_prompt(&images[..3]), &Limits::default()).unwrap();
    let options = GenerateOptions {
        max_new_tokens: limit + 5,
        ignore_stops: true,
        ..GenerateOptions::default()
    };
    let answer = session.generate(&options, &mut |_| {}).unwrap();
    assert_eq!(answer.stop, Stop::Context);
    assert_eq!(session.ids().len(), limit + 1);
    let turn = PromptFile::from_text("red", &[]).unwrap();
    let error = session.append(&turn, &Limits::default()).unwrap_err().to_string();
    assert!(error.contains(&format!("do not fit the context of {limit}")), "{error}");
}

/// A session over a golden case's prompt.
fn session_of(model: &Model, golden: &Golden, case: &str) -> Session {
    let media = media_of(model, golden, case).into_iter().map(Medium::from);
    let media: Vec<Medium> = media.collect();
    let mut session = model.session().unwrap();
    let ids = golden.ids(case, "input_ids").unwrap();
    session.append_ids(&ids, &media, &Limits::default()).unwrap();
    session
}

#[test]
fn beams_are_those_of_pytorch() {
    for folder in golden_folders() {
        let (_scratch, artifact) = compiled(&folder);
        let model = Model::open(&artifact, &opening("native")).unwrap();
        let golden = Golden::read(&folder);
        for case in golden.cases() {
            let Some(expected) = golden.ids(&case, "beam3") else { continue };
            let options = GenerateOptions {
                max_new_tokens: expected.len(),
                beams: BeamOptions { n_beams: 3, length_penalty: 0.0, stop_early: false },
                ignore_stops: true,
                allow_image_token: model.manifest().config.family == Family::Idefics,
                ..GenerateOptions::default()
            };
            let mut session = session_of(&model, &golden, &case);
            let found = session.search(&options).unwrap();
            assert_eq!(found.tokens, expected, "{} {case}", folder.display());
            assert!(session.ids().ends_with(&expected));
            let one = GenerateOptions { beams: BeamOptions::default(), ..options.clone() };
            let greedy = session_of(&model, &golden, &case).search(&one).unwrap().tokens;
            assert_eq!(Some(greedy), golden.ids(&case, "greedy"), "{} {case}", folder.display());
        }
    }
}

#[test]
fn continuations_score_as_in_one_prefill() {
    let folder = golden_folder("openflamingo-llama");
    let (_scratch, artifact) = compiled(&folder);
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let golden = Golden::read(&folder);
    let mut session = session_of(&model, &golden, "A");
    let before = session.ids().to_vec();
    let continuations = vec![vec![], vec![3], vec![4, 5, 6], vec![3, 9]];
    let scores = session.score(&continuations, &Limits::default()).unwrap();
    assert_eq!(session.ids(), before);
    let media = media_of(&model, &golden, "A");
    let vocabulary = model.manifest().config.language.vocabulary;
    for (ids, scores) in continuations.iter().zip(scores) {
        assert_eq!(scores.len(), ids.len());
        let logits = model.logits(&[before.as_slice(), ids].concat(), &media).unwrap();
        for (at, (id, score)) in ids.iter().zip(scores).enumerate() {
            let row = &logits[(before.len() - 1 + at) * vocabulary..][..vocabulary];
            let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            let expected = f64::from(row[*id as usize]) - sum.ln();
            assert!((score - expected).abs() < 1e-6, "{ids:?}: {score}, expected {expected}");
        }
    }
}

/// A full context that slides goes on as its sequence does after the oldest block went.
#[test]
fn a_full_context_slides_where_positions_are_distances() {
    let (_scratch, artifact) = compiled(&golden_folder("openflamingo-mpt"));
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let golden = Golden::read(&golden_folder("openflamingo-mpt"));
    let media = media_of(&model, &golden, "A");
    let ids = golden.ids("A", "input_ids").unwrap();
    let mut session = session_of(&model, &golden, "A");
    session.slide().unwrap();
    let (limit, begin) = (session.max_context(), session.mark());
    let n_tokens = limit + 100 - ids.len();
    let options = GenerateOptions {
        max_new_tokens: n_tokens,
        ignore_stops: true,
        ..GenerateOptions::default()
    };
    let mut tokens = session.tokens(&options);
    let mut generated = Vec::new();
    while let Some(id) = tokens.next_id().unwrap() {
        generated.push(id);
    }
    assert_eq!((generated.len(), tokens.finish().stop), (n_tokens, Stop::Length));
    assert!(session.ids().len() <= limit && session.mark().n_tokens() == limit + 100);
    assert!(matches!(session.rewind(begin), Err(RunError::Prompt(_))), "what was there is gone");

    let all = [ids.as_slice(), &generated].concat();
    let config = &model.manifest().config;
    let mut clock = MediaClock::new(config.family, &config.tokens);
    let mut times: Vec<u32> = ids.iter().map(|id| clock.tick(*id)).collect();
    times.resize(all.len(), clock.generated());
    let mut sequence = model.backend().new_sequence(limit).unwrap();
    advance(sequence.as_mut(), &ids, &times[..ids.len()], &media);
    let mut last = Vec::new();
    for at in ids.len()..all.len() {
        if sequence.len() == limit {
            assert!(sequence.forget_oldest() > 0);
        }
        last = advance(sequence.as_mut(), &all[at..=at], &times[at..=at], &media);
    }
    assert_eq!(bits(&session.logits().unwrap()), bits(&last));

    let turn = &all[..3];
    let before = session.mark();
    session.append_ids(turn, &[], &Limits::default()).unwrap();
    session.rewind(before).unwrap();
    assert_eq!(bits(&session.logits().unwrap()), bits(&last), "rewound after it slid");
    let long = vec![all[0]; limit];
    assert!(session.append_ids(&long, &[], &Limits::default()).is_err(), "more than slides away");
    assert_eq!((session.mark(), bits(&session.logits().unwrap())), (before, bits(&last)));

    let rotary = golden_folder("openflamingo-llama");
    let (_scratch, artifact) = compiled(&rotary);
    let model = Model::open(&artifact, &opening("native")).unwrap();
    assert!(model.session().unwrap().slide().is_err());
}
