//! flamingo-pytorch: what a picture's place in the prompt changes, and what its artifacts refuse. Its numbers are among the
//! goldens.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flamingo_models::Source;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_runtime::backend::Media;
use flamingo_runtime::{Model, PromptFile, Segment};
use flamingo_tests::{Golden, compiled, opening};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

const IMAGE: u32 = 3;
const N_PLACES: usize = 4;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/flamingo-pytorch")
}

/// A copy of the golden whose recipe is edited.
fn source(edit: impl Fn(&str) -> String) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["checkpoint.pt", "clip_visual.pt"] {
        fs::copy(golden().join(name), folder.path().join(name)).unwrap();
    }
    let recipe = fs::read_to_string(golden().join("recipe.toml")).unwrap();
    fs::write(folder.path().join("recipe.toml"), edit(&recipe)).unwrap();
    folder
}

fn picture(model: &Model) -> Arc<Media> {
    let pixels = Golden::read(&golden()).f32("B", "pixel_values").unwrap();
    model.encode_pixels(&pixels, 1, 1).unwrap().remove(0)
}

/// One medium serves every place; what it is there differs, and the fifth place is refused.
#[test]
fn a_picture_is_encoded_once_for_all_places() {
    let (_scratch, artifact) = compiled(&golden());
    for backend in ["native", "ort", "tract"] {
        let model = Model::open(&artifact, &opening(backend)).unwrap();
        let medium = picture(&model);
        assert_eq!((medium.n_latents, medium.later.len()), (6, N_PLACES - 1));
        assert_eq!(medium.visual_tokens.len(), N_PLACES * 6 * model.manifest().config.vision.width);
        let vocabulary = model.manifest().config.language.vocabulary;
        let last_of = |n_media: usize| {
            let ids = vec![IMAGE; n_media];
            let logits = model.logits(&ids, &vec![Arc::clone(&medium); n_media]).unwrap();
            logits[(n_media - 1) * vocabulary..].to_vec()
        };
        let [second, third] = [last_of(2), last_of(3)];
        assert!(second.iter().zip(&third).any(|(a, b)| (a - b).abs() > 1e-3), "{backend}");
        let error = model.logits(&[IMAGE; 5], &vec![medium; 5]).unwrap_err().to_string();
        assert!(error.contains("at most 4 media") && error.contains("hint: "), "{error}");
        assert_eq!(model.manifest().limits.max_images, N_PLACES);
    }
}

/// Words `w0` to `w63`, of which the fourth is `<image>`.
fn tokenizer() -> Value {
    let word = |id: u32| if id == IMAGE { "<image>".to_owned() } else { format!("w{id}") };
    let vocabulary: Map<String, Value> = (0..64).map(|id| (word(id), json!(id))).collect();
    let special = json!({"id": IMAGE, "content": "<image>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}})
}

#[test]
fn prompts_have_one_to_four_pictures() {
    let folder =
        source(|recipe| recipe.replacen("\n\n", "\ntokenizer = \"tokenizer.json\"\n\n", 1));
    fs::write(folder.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let (_scratch, artifact) = compiled(folder.path());
    let model = Model::open(&artifact, &opening("native")).unwrap();
    let prompt = |n_media: usize| {
        let image = || Segment::Image { image: "a.png".into() };
        let text = Segment::Text { text: "w5 w6".into() };
        let segments = (0..n_media).map(|_| image()).chain([text]).collect();
        model.encode_prompt(&PromptFile { segments, max_new_tokens: None, temperature: None })
    };
    assert_eq!(prompt(N_PLACES).unwrap(), [IMAGE, IMAGE, IMAGE, IMAGE, 5, 6]);
    for (n_media, words) in [(0, ["no pictures", "gated blocks"]), (5, ["5 pictures", "4 places"])]
    {
        let error = prompt(n_media).unwrap_err().to_string();
        let fits = words.iter().all(|word| error.contains(word)) && error.contains("hint: ");
        assert!(fits, "{error}");
    }
}

#[track_caller]
fn refused(folder: &Path, words: &[&str]) {
    let error = match Source::open(folder).and_then(|source| source.graphs().map(drop)) {
        Ok(()) => panic!("expected a refusal with {words:?}"),
        Err(error) => error.to_string(),
    };
    assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
}

#[test]
fn recipes_that_do_not_fit_are_refused() {
    let edited = |from: &str, to: &str, words: &[&str]| {
        refused(source(|recipe| recipe.replace(from, to)).path(), words);
    };
    edited("image = 3", "pad = 3", &["`tokens.image`", "media_token_id", "hint: "]);
    edited("[vision]", "[resampler]\nhead_dim = 10\n[vision]", &["`resampler`"]);
    let own = "language_model = \"lang_encoder\"\n[vision]";
    edited("[vision]", own, &["`language_model`", "its own", "hint: "]);
    edited("checkpoint.pt", "clip_visual.pt", &["token_emb.weight", "FlamingoPaLM", "hint: "]);
    let other = golden().with_file_name("openflamingo-llama/clip_visual.pt");
    let folder = source(str::to_owned);
    fs::copy(other, folder.path().join("clip_visual.pt")).unwrap();
    refused(folder.path(), &["`vision_encoder`", "width 24", "got 16"]);
}

/// Embeddings of frames, which the package adds to videos alone.
#[test]
fn checkpoints_of_videos_are_refused() {
    let folder = source(|recipe| recipe.replace("checkpoint.pt", "checkpoint.safetensors"));
    let checkpoint = Checkpoint::open(&golden().join("checkpoint.pt")).unwrap();
    let entry = |name: &str, shape: &[usize]| {
        (name.to_owned(), shape.to_vec(), checkpoint.bytes(name).unwrap().into_owned())
    };
    let mut tensors: Vec<_> =
        checkpoint.infos().map(|info| entry(&info.name, &info.shape)).collect();
    tensors.push(("video_frame_pos_emb".to_owned(), vec![2, 24], vec![0; 2 * 24 * 4]));
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.path().join("checkpoint.safetensors"), bytes).unwrap();
    refused(folder.path(), &["video_frame_pos_emb", "max_video_frames", "hint: "]);
}
