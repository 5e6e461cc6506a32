//! What a source is and which of its parts are there, before all are: enough to say what is missing.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::config::Family;
use crate::family::{Recipe, RecipeFamily};
use crate::source::SourceError;

/// A source whose parts may be missing or broken.
pub struct Survey {
    /// What it is, in words.
    pub what: String,
    /// Its family, where the files tell it.
    pub family: Option<Family>,
    /// Whether its parts together are a model, and not one part of one.
    pub is_model: bool,
    /// Its parts.
    pub parts: Vec<SurveyedPart>,
}

/// A part of a source.
pub struct SurveyedPart {
    /// `checkpoint`, `language_model` or `vision_encoder`.
    pub part: &'static str,
    /// Where it should be.
    pub path: PathBuf,
    /// Its tensors; none if there is no such path; or what is wrong with it.
    pub found: Option<Result<Checkpoint, String>>,
}

impl SurveyedPart {
    fn open(part: &'static str, path: PathBuf) -> SurveyedPart {
        let found = path.exists();
        let found = found.then(|| Checkpoint::open(&path).map_err(|error| error.to_string()));
        SurveyedPart { part, path, found }
    }

    /// Its tensors, if they can be read.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        self.found.as_ref()?.as_ref().ok()
    }
}

impl Survey {
    /// Looks at a recipe, a folder or a weight file.
    ///
    /// # Errors
    /// A recipe or config that cannot be read.
    pub fn of(path: &Path) -> Result<Survey, SourceError> {
        let recipe = path.join("recipe.toml");
        match () {
            () if path.extension().is_some_and(|extension| extension == "toml") => {
                of_recipe(&Recipe::read(path)?)
            }
            () if recipe.is_file() => of_recipe(&Recipe::read(&recipe)?),
            () if path.is_dir() => of_folder(path),
            () => Ok(of_file(path)),
        }
    }

    /// Whether parts are lacking, and nothing that is there is broken.
    pub fn lacks_parts(&self) -> bool {
        let is_broken = |part: &SurveyedPart| part.found.is_some() && part.checkpoint().is_none();
        let is_missing = |part: &SurveyedPart| part.found.is_none();
        let parts = &self.parts;
        !parts.iter().any(is_broken) && (!self.is_model || parts.iter().any(is_missing))
    }
}

fn of_recipe(recipe: &Recipe) -> Result<Survey, SourceError> {
    let (what, family) = match recipe.family {
        RecipeFamily::OpenFlamingo => ("a recipe of an OpenFlamingo", Family::OpenFlamingo),
        RecipeFamily::FlamingoPytorch => ("a recipe of a FlamingoPaLM", Family::FlamingoPytorch),
    };
    let parts = [
        ("checkpoint", &recipe.checkpoint),
        ("language_model", &recipe.language_model),
        ("vision_encoder", &recipe.vision_encoder),
    ];
    let parts = parts.into_iter().filter(|(_, path)| !path.as_os_str().is_empty());
    let parts = parts.map(|(part, path)| SurveyedPart::open(part, path.clone()));
    Ok(Survey {
        what: what.to_owned(),
        family: Some(family),
        is_model: true,
        parts: parts.collect(),
    })
}

fn of_folder(folder: &Path) -> Result<Survey, SourceError> {
    let path = folder.join("config.json");
    let io = |source| SourceError::Io { path: path.clone(), source };
    let text = std::fs::read_to_string(&path).map_err(io)?;
    let wrong = |reason: String| SourceError::Config { path: path.clone(), reason };
    let config: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("none");
    let (what, family, part) = match model_type {
        "idefics" => ("an IDEFICS-1".to_owned(), Some(Family::Idefics), "checkpoint"),
        "otter" | "flamingo" => ("an Otter".to_owned(), Some(Family::Otter), "checkpoint"),
        "clip" | "clip_vision_model" | "siglip" | "siglip_vision_model" => {
            ("a vision encoder, one part of an OpenFlamingo".to_owned(), None, "vision_encoder")
        }
        other => (
            format!("a language model (`{other}`), one part of an OpenFlamingo"),
            None,
            "language_model",
        ),
    };
    let parts = vec![SurveyedPart::open(part, folder.to_owned())];
    Ok(Survey { what, is_model: family.is_some(), family, parts })
}

/// Tensors that tell the file of a vision encoder.
const VISION: [&str; 5] = [
    "visual.conv1.weight",
    "conv1.weight",
    "visual.trunk.patch_embed.proj.weight",
    "trunk.patch_embed.proj.weight",
    "patch_embed.proj.weight",
];

fn of_file(path: &Path) -> Survey {
    let mut part = SurveyedPart::open("checkpoint", path.to_owned());
    let has = |key: &str| part.checkpoint().is_some_and(|found| found.get(key).is_some());
    let (what, family, name) = match () {
        () if has("perceiver.latents") => {
            let what = part.checkpoint().map_or_else(String::new, open_flamingo_weights);
            (what, Some(Family::OpenFlamingo), "checkpoint")
        }
        () if has("perceiver_resampler.media_pos_emb") && has("token_emb.weight") => {
            let what = "the state dict of flamingo-pytorch's `FlamingoPaLM`, one part of a recipe, with `vision_encoder`";
            (what.to_owned(), Some(Family::FlamingoPytorch), "checkpoint")
        }
        () if VISION.iter().any(|name| has(name)) => {
            ("a vision encoder, one part of an OpenFlamingo".to_owned(), None, "vision_encoder")
        }
        () => ("a weight file".to_owned(), None, "checkpoint"),
    };
    part.part = name;
    Survey { what, family, is_model: false, parts: vec![part] }
}

/// What OpenFlamingo's weights tell of the language model that they were trained with.
fn open_flamingo_weights(checkpoint: &Checkpoint) -> String {
    let norm = ".gated_cross_attn_layer.attn.norm.weight";
    let blocks =
        || checkpoint.infos().filter_map(|info| Some((info.name.strip_suffix(norm)?, info)));
    let first = blocks().next();
    let layers = first.and_then(|(block, _)| block.strip_prefix("lang_encoder.")?.rsplit_once('.'));
    let width = first.and_then(|(_, info)| info.shape.first()).copied().unwrap_or(0);
    format!(
        "weights of an OpenFlamingo, with {} gated blocks for a language model of width {width} whose layers are called \
         `{}`; one part of a recipe, with `language_model` and `vision_encoder`",
        blocks().count(),
        layers.map_or("?", |(layers, _)| layers)
    )
}
