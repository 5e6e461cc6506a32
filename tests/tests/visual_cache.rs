//! What comes out of the visual-token cache is what the encoder gave, to the bit: media, logits and
//! answers of the demo model, from memory, from disk, and after entries had to leave.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flamingo_runtime::visual_cache::{CacheStats, VisualCache, VisualCacheOptions};
use flamingo_runtime::{
    Answer, GenerateOptions, KvFormat, Model, OpenOptions, PromptFile, Segment, VideoFiles,
};
use flamingo_tests::{compiled_as, golden_folders, opening, tiny_scenes};
use flamingoc::scheme::Precision;

fn picture(name: &str) -> PathBuf {
    tiny_scenes().join("images").join(name)
}

/// A picture, another, the first again, and a clip.
fn prompt() -> PromptFile {
    let image = |name: &str| Segment::Image { image: picture(name) };
    let text = |text: &str| Segment::Text { text: text.into() };
    let frames = (0..3).map(|n| picture(&format!("video-000-f{n}.png"))).collect();
    let video = VideoFiles::Frames(frames);
    let segments = vec![
        image("single-141.png"),
        text("what color ?"),
        image("single-188.png"),
        text("what color ?"),
        image("single-141.png"),
        Segment::Video { video, fps: None, frames: None },
        text("how many times ?"),
    ];
    PromptFile { segments, ..PromptFile::default() }
}

fn cache(memory_bytes: usize, dir: Option<&Path>) -> Arc<VisualCache> {
    let dir = dir.map(Path::to_owned);
    let options = VisualCacheOptions { memory_bytes, dir, ..VisualCacheOptions::default() };
    Arc::new(VisualCache::new(&options))
}

fn open(artifact: &Path, kv_format: Option<KvFormat>, cache: &Arc<VisualCache>) -> Model {
    let visual_cache = Some(Arc::clone(cache));
    Model::open(artifact, &OpenOptions { kv_format, visual_cache, ..opening("native") }).unwrap()
}

fn answer(model: &Model) -> Answer {
    let options = GenerateOptions { max_new_tokens: 6, ignore_stops: true, ..Default::default() };
    model.generate(&prompt(), &options, &mut |_| {}).unwrap()
}

/// Logits of the prompt over media that the model's cache gives; the same for the same bits only.
fn logits(model: &Model) -> Vec<u32> {
    let keys = model.pin_media(&prompt()).unwrap();
    let media: Vec<_> = keys.iter().map(|key| model.visual_cache().get(key).unwrap()).collect();
    keys.iter().for_each(|key| model.visual_cache().unpin(key));
    let ids = model.encode_prompt(&prompt()).unwrap();
    model.logits(&ids, &media).unwrap().iter().map(|logit| logit.to_bits()).collect()
}

fn counts(answer: &Answer) -> [usize; 3] {
    let cache = answer.cache;
    [cache.visual_misses, cache.visual_hits, cache.visual_disk_hits]
}

#[test]
fn cached_equals_uncached_to_the_bit() {
    for (precision, kv_format) in [
        (Precision::F32, None),
        (Precision::F32, Some(KvFormat::F16)),
        (Precision::Int8, None),
        (Precision::Int8, Some(KvFormat::Int8)),
    ] {
        let (scratch, artifact) = compiled_as(&tiny_scenes(), precision.into());
        let case = format!("{} {kv_format:?}", precision.name());
        let dir = scratch.path().join("cache");
        let none = Arc::new(VisualCache::new(&VisualCacheOptions::off()));
        let uncached = open(&artifact, kv_format, &none);
        let (expected, expected_logits) = (answer(&uncached), logits(&uncached));
        assert_eq!(counts(&expected), [4, 0, 0], "{case}");

        let large = 1 << 30;
        let first = open(&artifact, kv_format, &cache(large, Some(&dir)));
        let (fresh, in_memory) = (answer(&first), answer(&first));
        assert_eq!((counts(&fresh), counts(&in_memory)), ([3, 1, 0], [0, 4, 0]), "{case}");
        let second = open(&artifact, kv_format, &cache(large, Some(&dir)));
        let from_disk = answer(&second);
        assert_eq!(counts(&from_disk), [0, 4, 3], "{case}");
        // Room for one medium: each leaves memory before it comes again.
        let one = first.visual_cache().stats().memory_bytes / 3 + 1;
        let crowded = open(&artifact, kv_format, &cache(one, None));
        let after_eviction = (answer(&crowded), answer(&crowded)).1;
        assert_eq!(counts(&after_eviction), [4, 0, 0], "{case}");
        assert!(crowded.visual_cache().stats().memory_evictions >= 7, "{case}");

        for found in [fresh, in_memory, from_disk, after_eviction] {
            assert_eq!((&found.tokens, &found.text), (&expected.tokens, &expected.text), "{case}");
        }
        for model in [&first, &second, &crowded] {
            assert_eq!(logits(model), expected_logits, "{case}");
            assert_eq!(model.visual_cache().take_warnings(), [""; 0], "{case}");
        }
    }
}

/// Models that differ in weights, in precision, or in the format of keys and values.
#[test]
fn a_cache_serves_no_model_with_what_another_saw() {
    let scratch = tempfile::tempdir().unwrap();
    let shared = cache(1 << 30, Some(scratch.path()));
    let of_golden = |folder: &PathBuf| folder.ends_with("openflamingo-mpt");
    let golden = golden_folders().into_iter().find(of_golden).unwrap();
    let f32 = compiled_as(&tiny_scenes(), Precision::F32.into());
    let int8 = compiled_as(&tiny_scenes(), Precision::Int8.into());
    let other = compiled_as(&golden, Precision::F32.into());
    let mut stats = CacheStats::default();
    for (artifact, kv_format) in [
        (&f32.1, None),
        (&f32.1, Some(KvFormat::F16)),
        (&int8.1, None),
        (&int8.1, Some(KvFormat::Int8)),
        (&other.1, None),
    ] {
        let model = open(artifact, kv_format, &shared);
        model.pin_media(&prompt()).unwrap();
        let now = shared.stats();
        assert_eq!((now.misses - stats.misses, now.disk_hits), (3, 0), "{}", artifact.display());
        stats = now;
    }
    // The same artifact elsewhere is the same model.
    let copy = compiled_as(&tiny_scenes(), Precision::F32.into());
    open(&copy.1, None, &shared).pin_media(&prompt()).unwrap();
    assert_eq!(shared.stats().misses, stats.misses);
}

#[test]
fn engines_without_a_second_stage_use_no_folder_and_say_so() {
    let (scratch, artifact) = compiled_as(&tiny_scenes(), Precision::F32.into());
    let dir = scratch.path().join("cache");
    let visual_cache = Some(cache(1 << 30, Some(&dir)));
    let model = Model::open(&artifact, &OpenOptions { visual_cache, ..opening("tract") }).unwrap();
    assert_eq!(counts(&answer(&model)), [3, 1, 0]);
    let warnings = model.visual_cache().take_warnings();
    assert!(matches!(&warnings[..], [one] if one.contains("backend `tract`")), "{warnings:?}");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}

/// Frames that clips share go through the vision encoder once, and the clips are as if they had not.
#[test]
fn frames_that_clips_share_are_encoded_once() {
    let folder = golden_folders().into_iter().find(|f| f.ends_with("openflamingo-frames")).unwrap();
    let (_scratch, artifact) = compiled_as(&folder, Precision::F32.into());
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let fresh = Model::open(&artifact, &opening("native")).unwrap();
    let side = model.manifest().config.vision.image_size;
    let frame = |seed: usize| (0..3 * side * side).map(move |i| ((i * seed) as f32).sin());
    let clip = |seeds: [usize; 3]| seeds.into_iter().flat_map(frame).collect::<Vec<f32>>();
    let n_encoded = |pixels: &[f32]| {
        assert!(model.backend().set_profiling(true));
        let media = model.encode_pixels(pixels, 1, 3).unwrap();
        let records = model.backend().take_profile();
        let is_first = |node: &str| node == "vision.patch_embedding";
        let n = records.iter().filter(|record| is_first(&record.node)).count();
        assert_eq!(media, fresh.encode_pixels(pixels, 1, 3).unwrap());
        n
    };
    assert_eq!(n_encoded(&clip([1, 2, 3])), 3);
    assert_eq!(n_encoded(&clip([2, 3, 4])), 1);
    assert_eq!(n_encoded(&clip([4, 1, 1])), 0);

    let picture: Vec<f32> = frame(9).collect();
    model.backend().vision_features(&picture, 1).unwrap().unwrap();
    model.backend().take_profile();
    assert!(model.backend().set_profiling(true));
    let media = model.encode_pixels(&picture, 1, 1).unwrap();
    let records = model.backend().take_profile();
    assert!(records.iter().all(|record| record.node != "vision.patch_embedding"), "seen before");
    assert_eq!(media, fresh.encode_pixels(&picture, 1, 1).unwrap());
}
