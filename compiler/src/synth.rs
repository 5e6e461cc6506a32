//! Seeded random checkpoints of named shapes, in the formats in which real ones come.
//!
//! For latency work and tests: a compiler that reads them reads released ones too, and a 9B
//! shape needs no download. Weights are written tensor by tensor, chunk by chunk, so memory stays
//! at a few megabytes; a tensor's values depend on the seed, its part and its name only.
//!
//! | file | written as |
//! |---|---|
//! | `checkpoint.pt`, `clip_visual.pt` or `nfnet.pt` | what `torch.save` writes: zip, pickle protocol 2, f32, 64-byte aligned |
//! | `lang_encoder/`, IDEFICS, Otter | `config.json`, `model.safetensors` (shards and an index above 5 GB), in the released precision |
//! | `tokenizer.json` | byte-level BPE without merges: 256 bytes and the special tokens at their ids |
//! | `recipe.toml` | how the files of an OpenFlamingo belong together |

mod files;
mod idefics;
mod language;
mod nfnet;
mod openflamingo;
mod otter;
mod pickle;
mod preset;
mod random;
mod tensor;
mod tokens;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use idefics::Idefics;
use openflamingo::OpenFlamingo;
use otter::Otter;
use preset::Model;
use random::{Generator, Storage};
use serde_json::Value;
use tensor::{Spread, TensorList};
use tokens::Tokens;

const CHECKPOINT: &str = "checkpoint.pt";

/// Why no checkpoint was made.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// There is no such preset.
    #[error("preset `{found}` is unknown\n\nhint: presets are {}", .known.join(", "))]
    UnknownPreset {
        /// What was asked for.
        found: String,
        /// All presets.
        known: &'static [&'static str],
    },
    /// The output folder holds something, or is a file.
    #[error("`{}`: expected an empty or no folder\n\nhint: choose another output folder", .path.display())]
    OutputExists {
        /// The output folder.
        path: PathBuf,
    },
    /// A file could not be written.
    #[error("`{}`: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl SynthError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> SynthError {
        |source| SynthError::Io { path: path.to_path_buf(), source }
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthReport {
    /// The folder.
    pub path: PathBuf,
    /// Numbers in all tensors; an embedding that was resized counts in both files.
    pub n_values: u64,
    /// Tensors in all files.
    pub n_tensors: usize,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
}

/// Names that [`synthesize`] knows.
pub fn presets() -> &'static [&'static str] {
    &preset::NAMES
}

/// Writes the checkpoint of a preset into the folder `out`, which must be empty or absent.
///
/// `outliers` makes a few channels of the language model's residual stream far larger than the others, and logits as
/// unlike, as trained models have them: what is hard to round. `progress` hears the bytes of tensors written and to be written. The files appear in `out`
/// all at once, at the end.
///
/// # Errors
///
/// An unknown preset, an `out` that holds something, and what the file system refuses.
pub fn synthesize(
    preset: &str,
    out: &Path,
    seed: u64,
    outliers: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<SynthReport, SynthError> {
    let unknown = || SynthError::UnknownPreset { found: preset.to_owned(), known: presets() };
    let (model, spread) = preset::find(preset).ok_or_else(unknown)?;
    require_empty(out)?;
    let parts = parts(&model);
    let report = report(out, &parts);
    let spread = Spread { outliers, ..spread };
    let mut generator = Generator::new(seed, spread, report.tensor_bytes, progress);
    let staging = Staging::new(out)?;
    match &model {
        Model::OpenFlamingo(model) => write_openflamingo(model, &staging.folder, &mut generator)?,
        Model::Idefics(model) => write_idefics(model, &staging.folder, &mut generator)?,
        Model::Otter(model) => write_otter(model, &staging.folder, &mut generator)?,
    }
    staging.publish(out)?;
    Ok(report)
}

/// Writes the shapes of a preset only: the same files with the same names and sizes, whose numbers take no room on the
/// disk. Enough to say what a model is and takes, and what it would take to compile it.
///
/// # Errors
///
/// As [`synthesize`].
pub fn outline(preset: &str, out: &Path) -> Result<SynthReport, SynthError> {
    let unknown = || SynthError::UnknownPreset { found: preset.to_owned(), known: presets() };
    let (model, _) = preset::find(preset).ok_or_else(unknown)?;
    require_empty(out)?;
    let report = report(out, &parts(&model));
    let staging = Staging::new(out)?;
    let folder = &staging.folder;
    match &model {
        Model::OpenFlamingo(model) => {
            let language_folder = write_openflamingo_texts(model, folder)?;
            let language = &model.language;
            files::outline_safetensors(&language_folder, language.tensors(), language.storage)?;
            files::outline_pt(&folder.join(model.vision.file()), &model.vision.tensors())?;
            files::outline_pt(&folder.join(CHECKPOINT), &model.checkpoint())?;
        }
        Model::Idefics(model) => {
            write_folder_texts(&model.config(), &model.tokens, folder)?;
            files::outline_safetensors(folder, model.tensors(), model.storage)?;
        }
        Model::Otter(model) => {
            write_folder_texts(&model.config(), &model.model.tokens, folder)?;
            files::outline_safetensors(folder, model.tensors(), Otter::STORAGE)?;
        }
    }
    staging.publish(out)?;
    Ok(report)
}

fn write_openflamingo(
    model: &OpenFlamingo,
    folder: &Path,
    generator: &mut Generator<'_>,
) -> Result<(), SynthError> {
    let language_folder = write_openflamingo_texts(model, folder)?;
    let language = &model.language;
    let part = "language_model";
    let tensors = language.tensors();
    files::write_safetensors(&language_folder, part, tensors, language.storage, generator)?;
    let vision = folder.join(model.vision.file());
    files::write_pt(&vision, "vision_encoder", &model.vision.tensors(), generator)?;
    files::write_pt(&folder.join(CHECKPOINT), "checkpoint", &model.checkpoint(), generator)
}

/// Recipe, tokenizer, and the language model's config; gives its folder.
fn write_openflamingo_texts(model: &OpenFlamingo, folder: &Path) -> Result<PathBuf, SynthError> {
    let language_folder = folder.join("lang_encoder");
    fs::create_dir(&language_folder).map_err(SynthError::io(&language_folder))?;
    let config = model.language.config(&model.tokens);
    files::write_json(&language_folder.join("config.json"), &config)?;
    files::write_json(&folder.join("tokenizer.json"), &model.tokens.tokenizer())?;
    files::write_text(&folder.join("recipe.toml"), &model.recipe())?;
    Ok(language_folder)
}

/// Config and tokenizer of a folder that is a whole model.
fn write_folder_texts(config: &Value, tokens: &Tokens, folder: &Path) -> Result<(), SynthError> {
    files::write_json(&folder.join("config.json"), config)?;
    files::write_json(&folder.join("tokenizer.json"), &tokens.tokenizer())
}

fn write_otter(
    model: &Otter,
    folder: &Path,
    generator: &mut Generator<'_>,
) -> Result<(), SynthError> {
    write_folder_texts(&model.config(), &model.model.tokens, folder)?;
    files::write_safetensors(folder, "model", model.tensors(), Otter::STORAGE, generator)
}

fn write_idefics(
    model: &Idefics,
    folder: &Path,
    generator: &mut Generator<'_>,
) -> Result<(), SynthError> {
    write_folder_texts(&model.config(), &model.tokens, folder)?;
    files::write_safetensors(folder, "model", model.tensors(), model.storage, generator)
}

/// All tensors of a model by file, with their precision.
fn parts(model: &Model) -> Vec<(TensorList, Storage)> {
    match model {
        Model::OpenFlamingo(model) => vec![
            (model.language.tensors(), model.language.storage),
            (model.vision.tensors(), Storage::F32),
            (model.checkpoint(), Storage::F32),
        ],
        Model::Idefics(model) => vec![(model.tensors(), model.storage)],
        Model::Otter(model) => vec![(model.tensors(), Otter::STORAGE)],
    }
}

fn report(out: &Path, parts: &[(TensorList, Storage)]) -> SynthReport {
    let bytes =
        |(list, storage): &(TensorList, Storage)| list.n_values() * storage.value_bytes() as u64;
    SynthReport {
        path: out.to_path_buf(),
        n_values: parts.iter().map(|(list, _)| list.n_values()).sum(),
        n_tensors: parts.iter().map(|(list, _)| list.specs().len()).sum(),
        tensor_bytes: parts.iter().map(bytes).sum(),
    }
}

fn require_empty(out: &Path) -> Result<(), SynthError> {
    let is_full = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => true,
        Err(error) => return Err(SynthError::io(out)(error)),
    };
    match is_full {
        true => Err(SynthError::OutputExists { path: out.to_path_buf() }),
        false => Ok(()),
    }
}

/// A folder beside the output, on the same file system; removed again unless it is published.
struct Staging {
    folder: PathBuf,
    _cleanup: tempfile::TempDir,
}

impl Staging {
    fn new(out: &Path) -> Result<Staging, SynthError> {
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(SynthError::io(parent))?;
        let cleanup = tempfile::Builder::new()
            .prefix(".synth-")
            .tempdir_in(parent)
            .map_err(SynthError::io(parent))?;
        // The temporary folder itself is private; the one inside gets the user's usual rights.
        let folder = cleanup.path().join("model");
        fs::create_dir(&folder).map_err(SynthError::io(&folder))?;
        Ok(Staging { folder, _cleanup: cleanup })
    }

    fn publish(self, out: &Path) -> Result<(), SynthError> {
        match fs::remove_dir(out) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(SynthError::io(out)(error));
            }
            _ => {}
        }
        fs::rename(&self.folder, out).map_err(SynthError::io(out))
    }
}

#[cfg(test)]
mod tests {
    use flamingo_models::Source;
    use flamingo_models::checkpoint::Checkpoint;

    use super::*;

    fn tiny() -> impl Iterator<Item = &'static str> {
        presets().iter().copied().filter(|name| name.starts_with("tiny-"))
    }

    fn make(preset: &str, folder: &Path, seed: u64) -> SynthReport {
        synthesize(preset, folder, seed, false, &mut |_, _| ()).unwrap()
    }

    /// Relative path and content of every file below `folder`, sorted.
    fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        let mut folders = vec![folder.to_path_buf()];
        while let Some(next) = folders.pop() {
            for entry in fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(folder).unwrap().to_path_buf();
                    found.push((name, fs::read(&path).unwrap()));
                }
            }
        }
        found.sort();
        found
    }

    #[test]
    fn tiny_presets_are_the_same_for_the_same_seed_only() {
        let dir = tempfile::tempdir().unwrap();
        for preset in tiny() {
            let at = |name: &str| dir.path().join(preset).join(name);
            make(preset, &at("a"), 7);
            make(preset, &at("b"), 7);
            make(preset, &at("c"), 8);
            let first = contents(&at("a"));
            assert!(first == contents(&at("b")), "{preset}: seed 7 twice gives different files");
            assert!(first != contents(&at("c")), "{preset}: seeds 7 and 8 give the same files");
        }
    }

    #[test]
    fn safetensors_files_parse_and_hold_finite_spread_values() {
        let dir = tempfile::tempdir().unwrap();
        for preset in tiny() {
            let folder = dir.path().join(preset);
            make(preset, &folder, 1);
            let (name, bytes) = contents(&folder)
                .into_iter()
                .find(|(name, _)| name.ends_with("model.safetensors"))
                .unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes)
                .unwrap_or_else(|error| panic!("{preset}/{}: {error}", name.display()));
            for (key, view) in tensors.tensors() {
                let values: Vec<f32> = view
                    .data()
                    .chunks(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                    .collect();
                assert!(values.iter().all(|v| v.abs() < 6.0), "{preset}: {key} is out of bounds");
                let same = values.iter().all(|v| *v == values[0]);
                assert!(values.len() == 1 || !same, "{preset}: {key} is constant");
            }
        }
    }

    #[test]
    fn pytorch_archives_are_stored_aligned_and_complete() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("m");
        make("tiny-openflamingo-opt", &folder, 1);
        let Some((Model::OpenFlamingo(model), _)) = preset::find("tiny-openflamingo-opt") else {
            panic!("no such preset");
        };
        let file = fs::File::open(folder.join("checkpoint.pt")).unwrap();
        let mut archive = zip::ZipArchive::new(file).unwrap();
        for (idx, spec) in model.checkpoint().specs().iter().enumerate() {
            let entry = archive.by_name(&format!("archive/data/{idx}")).unwrap();
            assert_eq!(entry.compression(), zip::CompressionMethod::Stored);
            assert_eq!(entry.data_start() % 64, 0, "{} is not aligned", spec.name);
            assert_eq!(entry.size(), 4 * spec.n_values() as u64, "{}", spec.name);
        }
        assert_eq!(archive.len(), model.checkpoint().specs().len() + 3);
    }

    #[test]
    fn checkpoint_reader_finds_every_tensor_with_its_shape() {
        let dir = tempfile::tempdir().unwrap();
        for preset in tiny() {
            let folder = dir.path().join(preset);
            make(preset, &folder, 1);
            let (model, _) = preset::find(preset).unwrap();
            let files: Vec<(PathBuf, TensorList)> = match &model {
                Model::Idefics(model) => vec![(folder.clone(), model.tensors())],
                Model::Otter(model) => vec![(folder.clone(), model.tensors())],
                Model::OpenFlamingo(model) => vec![
                    (folder.join("checkpoint.pt"), model.checkpoint()),
                    (folder.join(model.vision.file()), model.vision.tensors()),
                    (folder.join("lang_encoder"), model.language.tensors()),
                ],
            };
            for (path, expected) in files {
                let found = Checkpoint::open(&path)
                    .unwrap_or_else(|error| panic!("{preset}, {}: {error}", path.display()));
                let shapes: Vec<(String, Vec<usize>)> =
                    found.infos().map(|info| (info.name.clone(), info.shape.clone())).collect();
                let expected: Vec<(String, Vec<usize>)> = expected
                    .sorted()
                    .specs()
                    .iter()
                    .map(|spec| (spec.name.clone(), spec.shape.clone()))
                    .collect();
                assert_eq!(shapes, expected, "{preset}, {}", path.display());
            }
        }
    }

    #[test]
    fn importer_takes_every_tiny_preset_and_uses_every_weight() {
        let dir = tempfile::tempdir().unwrap();
        for preset in tiny() {
            let folder = dir.path().join(preset);
            make(preset, &folder, 1);
            let graphs = Source::open(&folder).and_then(|source| source.graphs());
            assert!(graphs.is_ok(), "{preset}: {}", graphs.err().unwrap());
        }
    }

    /// A safetensors file of these tensors that takes no space: its values are a hole.
    fn hollow(path: &Path, list: TensorList) {
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for spec in list.specs() {
            let begin = end;
            end += 4 * spec.n_values();
            let entry = serde_json::json!({"dtype": "F32", "shape": spec.shape, "data_offsets": [begin, end]});
            header.insert(spec.name.clone(), entry);
        }
        let mut header = serde_json::to_vec(&header).unwrap();
        header.resize(header.len().next_multiple_of(8), b' ');
        let bytes = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
        fs::write(path, &bytes).unwrap();
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len((bytes.len() + end) as u64).unwrap();
    }

    /// The paper's encoder at its own size, by shapes alone: 320 × 320 pixels become 10 × 10 tokens.
    #[test]
    fn importer_takes_the_shapes_of_nfnet_f6() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let Some((Model::OpenFlamingo(model), _)) = preset::find("nfnet-f6") else {
            panic!("no such preset");
        };
        fs::create_dir(at("lang_encoder")).unwrap();
        files::write_json(&at("lang_encoder/config.json"), &model.language.config(&model.tokens))
            .unwrap();
        hollow(&at("lang_encoder/model.safetensors"), model.language.tensors());
        hollow(&at("nfnet.safetensors"), model.vision.tensors());
        hollow(&at("checkpoint.safetensors"), model.checkpoint());
        files::write_json(&at("tokenizer.json"), &model.tokens.tokenizer()).unwrap();
        let recipe = model.recipe().replace(".pt\"", ".safetensors\"");
        let recipe = recipe.replace("[vision]\n", "[vision]\nvariant = \"f6\"\n");
        files::write_text(&at("recipe.toml"), &recipe).unwrap();
        let source = Source::open(dir.path()).unwrap();
        let vision = &source.config.vision;
        assert_eq!((vision.n_tokens(), vision.width, vision.n_layers()), (100, 3072, 84));
        let media = source.graphs().unwrap().media;
        let tokens = media.nodes().iter().find(|node| node.name == "vision.tokens").unwrap();
        let shape = media.fact(tokens.outputs[0]).shape.iter().map(ToString::to_string);
        assert_eq!(shape.collect::<Vec<_>>(), ["n_frames*n_media", "100", "3072"]);
        let shape: Vec<String> =
            media.fact(media.outputs()[0].1).shape.iter().map(ToString::to_string).collect();
        assert_eq!(shape, ["n_media", "64", "3072"]);
    }

    #[test]
    fn tied_head_has_the_values_of_the_embedding() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("m");
        make("tiny-openflamingo-opt", &folder, 1);
        let checkpoint = Checkpoint::open(&folder.join("checkpoint.pt")).unwrap();
        let bytes = |name: &str| checkpoint.bytes(&format!("lang_encoder.{name}")).unwrap();
        assert_eq!(bytes("lm_head.weight"), bytes("model.decoder.embed_tokens.weight"));
        assert_ne!(bytes("lm_head.weight"), bytes("model.decoder.embed_positions.weight"));
    }

    #[test]
    fn progress_ends_at_the_total_that_the_report_names() {
        let dir = tempfile::tempdir().unwrap();
        let mut calls = Vec::new();
        let mut progress = |done, total| calls.push((done, total));
        let report =
            synthesize("tiny-idefics", &dir.path().join("m"), 1, false, &mut progress).unwrap();
        assert_eq!(calls.last(), Some(&(report.tensor_bytes, report.tensor_bytes)));
        assert!(calls.is_sorted());
        assert_eq!(report.n_values * 4, report.tensor_bytes);
    }

    #[test]
    fn unknown_presets_and_full_folders_are_refused_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let error =
            synthesize("of-80b", dir.path(), 1, false, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains("`of-80b`") && error.contains("idefics-9b"), "{error}");
        let full = dir.path().join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("mine.txt"), "kept").unwrap();
        for out in [full.clone(), full.join("mine.txt")] {
            let error = synthesize("tiny-idefics", &out, 1, false, &mut |_, _| ()).unwrap_err();
            assert!(matches!(error, SynthError::OutputExists { .. }), "{error}");
        }
        assert_eq!(contents(dir.path()), [(PathBuf::from("full/mine.txt"), b"kept".to_vec())]);
    }
}
