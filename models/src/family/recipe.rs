//! The recipe file: names the parts of a model that is several files, and what they cannot tell.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::image_spec::ResizeMode;
use crate::source::SourceError;

/// A recipe `.toml`. Paths are relative to it and stay in its folder.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Family.
    pub family: RecipeFamily,
    /// Flamingo weights.
    pub checkpoint: PathBuf,
    /// Hugging Face folder of the language model; that of flamingo-pytorch is in the checkpoint.
    #[serde(default)]
    pub language_model: PathBuf,
    /// open_clip visual weights, OpenAI's CLIP file, a Hugging Face folder of CLIP or SigLIP, or timm's weights of
    /// `dm_nfnet_f0` to `dm_nfnet_f6`.
    pub vision_encoder: PathBuf,
    /// `tokenizer.json`; default: the one in the language model's folder, if any.
    pub tokenizer: Option<PathBuf>,
    /// What the vision encoder's tensors cannot tell.
    #[serde(default)]
    pub vision: VisionRecipe,
    /// What the resampler's tensors cannot tell.
    #[serde(default)]
    pub resampler: ResamplerRecipe,
    /// Ids of special tokens; default: the tokenizer's.
    #[serde(default)]
    pub tokens: TokensRecipe,
}

/// Families whose models are several files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecipeFamily {
    /// OpenFlamingo.
    OpenFlamingo,
    /// flamingo-pytorch's `FlamingoPaLM`.
    #[serde(rename = "flamingo-pytorch")]
    FlamingoPytorch,
}

/// Section `[vision]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionRecipe {
    /// What kind of encoder; default: what the tensors' names tell.
    pub kind: Option<VisionKind>,
    /// Side of the input in pixels; default: the folder's `config.json`, else whole patches as the positional embeddings
    /// have them, which are resampled to another number. An NFNet has none, and needs it.
    pub image_size: Option<usize>,
    /// Side of a patch in pixels; default: from the patch weight.
    pub patch_size: Option<usize>,
    /// Attention heads; default: the folder's `config.json`, else those of the known CLIPs and SigLIPs of this width.
    pub heads: Option<usize>,
    /// `quick_gelu` (OpenAI's weights), `gelu` or `gelu_tanh` (SigLIP); default: the folder's `config.json`, else that of the
    /// known CLIPs and SigLIPs of this width.
    pub activation: Option<String>,
    /// Whether tokens are handed on behind the norm after the layers; default: SigLIP's are, CLIP's are not (open_clip
    /// from 2.23 on hands them on so).
    pub final_norm: Option<bool>,
    /// Of an NFNet: `f0` to `f6`. Depths and widths are read from the files, and must be these.
    pub variant: Option<String>,
    /// How pictures of any shape become square: `shortest_side_center_crop` (default of CLIP), `squash` (of SigLIP),
    /// or `pad_to_mean` (the paper's, and the default of an NFNet).
    pub resize: Option<ResizeMode>,
}

/// Kinds of vision encoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VisionKind {
    /// A vision transformer of CLIP or SigLIP.
    Clip,
    /// An NFNet of the F family.
    Nfnet,
}

/// Section `[resampler]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResamplerRecipe {
    /// Width of a head; default 64.
    pub head_dim: Option<usize>,
    /// `gelu` (default) or `squared_relu` (the paper's).
    pub activation: Option<String>,
}

/// Section `[tokens]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokensRecipe {
    /// `<image>`.
    pub image: Option<u32>,
    /// `<|endofchunk|>`.
    pub end_of_chunk: Option<u32>,
    /// `<PAD>`.
    pub pad: Option<u32>,
}

impl Recipe {
    /// Reads a recipe; unknown keys are errors.
    pub fn read(path: &Path) -> Result<Recipe, SourceError> {
        let io = |source| SourceError::Io { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(io)?;
        let wrong = |reason| SourceError::Config { path: path.to_owned(), reason };
        let mut recipe: Recipe = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let has_its_own = recipe.family == RecipeFamily::FlamingoPytorch;
        if has_its_own && recipe.language_model != Path::new("") {
            return Err(wrong(
                "`language_model`: a `FlamingoPaLM` has its own in `checkpoint`\n\nhint: leave the key out".into(),
            ));
        }
        let language_model = (!has_its_own).then_some(&mut recipe.language_model);
        let parts = [&mut recipe.checkpoint, &mut recipe.vision_encoder];
        let parts = parts.into_iter().chain(language_model).chain(recipe.tokenizer.as_mut());
        for part in parts {
            let inside =
                part.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
            if !inside || part.as_os_str().is_empty() {
                return Err(wrong(format!(
                    "path `{}`: expected one inside the recipe's folder\n\nhint: put or link the parts beside \
                     the recipe",
                    part.display()
                )));
            }
            *part = folder.join(&part);
        }
        Ok(recipe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(extra: &str) -> Result<Recipe, SourceError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.toml");
        let parts = "family = \"openflamingo\"\ncheckpoint = \"c.pt\"\nlanguage_model = \"l\"\n\
                     vision_encoder = \"v.pt\"\n";
        std::fs::write(&path, format!("{parts}{extra}")).unwrap();
        Recipe::read(&path)
    }

    #[test]
    fn the_resize_rule_can_be_chosen() {
        assert_eq!(read("").unwrap().vision.resize, None);
        let recipe = read("[vision]\nresize = \"pad_to_mean\"\n").unwrap();
        assert_eq!(recipe.vision.resize, Some(ResizeMode::PadToMean));
        let error = read("[vision]\nresize = \"stretch\"\n").unwrap_err().to_string();
        assert!(error.contains("squash"), "{error}");
    }
}
