//! Vision transformers of CLIP and SigLIP as parts of a recipe: whose names their tensors have, and their shape from
//! tensors, `config.json` and recipe.

use std::path::Path;

use flamingo_ir::op::Activation;
use serde_json::Value;

use super::hugging_face::Config;
use super::open_flamingo::{activation_named, buffer, count};
use super::otter::hugging_face_vision;
use super::recipe::{Recipe, VisionRecipe};
use crate::build::VisionKey;
use crate::config::{ClipConfig, PositionsConfig, VisionConfig, VisionEncoder};
use crate::image_spec::MAX_IMAGE_SIZE;
use crate::source::{Parts, SourceError};

/// Whose names the vision encoder's tensors have.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum VisionNames {
    /// open_clip's and OpenAI's, behind this prefix: `visual.` where the file holds both CLIP towers.
    OpenClip(&'static str),
    /// transformers' models of CLIP and SigLIP, whole or of vision.
    HuggingFace,
    /// timm's, as open_clip has SigLIP's, behind this prefix.
    Timm(&'static str),
}

impl VisionNames {
    pub(super) fn of(parts: &Parts) -> VisionNames {
        let has = |key: &str| parts.get(&format!("vision_encoder/{key}")).is_some();
        let timm = |prefix: &&str| has(&format!("{prefix}patch_embed.proj.weight"));
        match () {
            () if has("visual.conv1.weight") => VisionNames::OpenClip("visual."),
            () if has("vision_model.embeddings.patch_embedding.weight") => VisionNames::HuggingFace,
            () => match ["visual.trunk.", "trunk.", ""].into_iter().find(|prefix| timm(prefix)) {
                Some(prefix) => VisionNames::Timm(prefix),
                None => VisionNames::OpenClip(""),
            },
        }
    }

    /// The tensor `key` with the name of its part.
    pub(super) fn key(self, key: VisionKey) -> String {
        match self {
            VisionNames::OpenClip(prefix) => format!("vision_encoder/{prefix}{}", open_clip(key)),
            VisionNames::HuggingFace => hugging_face_vision("vision_encoder/vision_model.", key),
            VisionNames::Timm(prefix) => format!("vision_encoder/{prefix}{}", timm(key)),
        }
    }

    /// Whether the patch tokens do not pass the tensor `key`: projections, poolings, the norm after the layers, and the text
    /// tower.
    pub(super) fn is_unused(self, key: &str) -> bool {
        let (tower, unused): (&str, &[&str]) = match self {
            VisionNames::OpenClip(prefix) => (prefix, &["proj", "ln_post."]),
            VisionNames::HuggingFace => ("vision_model.", &["post_layernorm.", "head."]),
            VisionNames::Timm(prefix) => (prefix, &["norm.", "fc_norm.", "attn_pool.", "head."]),
        };
        match key.strip_prefix(tower) {
            None if self == VisionNames::HuggingFace => {
                let others = ["text_model.", "text_projection.", "visual_projection.", "logit_"];
                others.iter().any(|other| key.starts_with(other))
            }
            None => true,
            Some(key) => unused.iter().any(|unused| key.starts_with(unused)) || buffer(key),
        }
    }
}

fn open_clip(key: VisionKey) -> String {
    let block = |i: usize, rest: String| format!("transformer.resblocks.{i}.{rest}");
    match key {
        VisionKey::ClassToken => "class_embedding".to_owned(),
        VisionKey::Positions => "positional_embedding".to_owned(),
        VisionKey::Patch(part) => format!("conv1.{part}"),
        VisionKey::PreNorm(part) => format!("ln_pre.{part}"),
        VisionKey::AttentionNorm(i, part) => block(i, format!("ln_1.{part}")),
        VisionKey::Qkv(i, part) => block(i, format!("attn.in_proj_{part}")),
        VisionKey::Projection(i, side, part) => block(i, format!("attn.{side}_proj.{part}")),
        VisionKey::Output(i, part) => block(i, format!("attn.out_proj.{part}")),
        VisionKey::MlpNorm(i, part) => block(i, format!("ln_2.{part}")),
        VisionKey::Up(i, part) => block(i, format!("mlp.c_fc.{part}")),
        VisionKey::Down(i, part) => block(i, format!("mlp.c_proj.{part}")),
        VisionKey::FinalNorm(part) => format!("ln_post.{part}"),
    }
}

fn timm(key: VisionKey) -> String {
    let block = |i: usize, rest: String| format!("blocks.{i}.{rest}");
    match key {
        VisionKey::ClassToken => "cls_token".to_owned(),
        VisionKey::Positions => "pos_embed".to_owned(),
        VisionKey::Patch(part) => format!("patch_embed.proj.{part}"),
        VisionKey::PreNorm(part) => format!("norm_pre.{part}"),
        VisionKey::AttentionNorm(i, part) => block(i, format!("norm1.{part}")),
        VisionKey::Qkv(i, part) => block(i, format!("attn.qkv.{part}")),
        VisionKey::Projection(i, side, part) => block(i, format!("attn.{side}.{part}")),
        VisionKey::Output(i, part) => block(i, format!("attn.proj.{part}")),
        VisionKey::MlpNorm(i, part) => block(i, format!("norm2.{part}")),
        VisionKey::Up(i, part) => block(i, format!("mlp.fc1.{part}")),
        VisionKey::Down(i, part) => block(i, format!("mlp.fc2.{part}")),
        VisionKey::FinalNorm(part) => format!("norm.{part}"),
    }
}

/// What a vision encoder's `config.json` tells.
#[derive(Default)]
struct Told {
    n_heads: Option<usize>,
    activation: Option<Activation>,
    epsilon: Option<f32>,
    image_size: Option<usize>,
}

/// From the folder's `config.json`, where the section `vision_config` of a whole model is entered.
fn told(path: &Path) -> Result<Told, SourceError> {
    let file = path.join("config.json");
    if !file.is_file() {
        return Ok(Told::default());
    }
    let whole = Config::read(&file)?;
    let is_siglip = whole.text("model_type").is_ok_and(|name| name.starts_with("siglip"));
    let vision = match whole.has("vision_config") {
        true => whole.section("vision_config"),
        false => whole,
    };
    vision.must_be("num_channels", Value::from(3))?;
    let (activation, epsilon) = match is_siglip {
        true => ("gelu_pytorch_tanh", 1e-6),
        false => ("quick_gelu", 1e-5),
    };
    let image_size = vision.has("image_size").then(|| vision.size("image_size")).transpose()?;
    Ok(Told {
        n_heads: Some(vision.size_or("num_attention_heads", 12)?),
        activation: Some(vision.activation("hidden_act", activation)?),
        epsilon: Some(vision.float_or("layer_norm_eps", epsilon)?),
        image_size,
    })
}

/// The shape that the tensors tell, and what they cannot tell from recipe or folder; `path` is what errors call the recipe.
pub(super) fn config(
    parts: &Parts,
    recipe: &Recipe,
    path: &Path,
) -> Result<VisionConfig, SourceError> {
    let told = told(&recipe.vision_encoder)?;
    let wrong = |reason| SourceError::Config { path: path.to_owned(), reason };
    shape(&Files { parts, names: VisionNames::of(parts) }, &recipe.vision, &told).map_err(wrong)
}

struct Files<'p> {
    parts: &'p Parts,
    names: VisionNames,
}

impl Files<'_> {
    fn has(&self, key: VisionKey) -> bool {
        self.parts.get(&self.names.key(key)).is_some()
    }

    fn shape(&self, key: VisionKey) -> Result<&[usize], String> {
        let name = self.names.key(key);
        self.parts.get(&name).map(|info| info.shape.as_slice()).ok_or(format!(
            "no tensor `{name}`\n\nhint: `vision_encoder` takes open_clip's `visual` weights, OpenAI's CLIP file, or \
             a Hugging Face folder of CLIP or SigLIP"
        ))
    }

    /// Width of a token and side of a patch.
    fn patch(&self) -> Result<[usize; 2], String> {
        match self.shape(VisionKey::Patch("weight"))? {
            &[width, 3, side, other] if side > 0 && side == other => Ok([width, side]),
            _ => Err("the patch weight has not the shape [width, 3, p, p]".into()),
        }
    }

    /// Patches along a side of the pictures that the positions are of.
    fn grid(&self, has_class_token: bool) -> Result<usize, String> {
        let (&[n_tokens, _] | &[1, n_tokens, _]) = self.shape(VisionKey::Positions)? else {
            return Err("the positional embedding has not the shape [tokens, width]".into());
        };
        let n_patches = n_tokens.saturating_sub(usize::from(has_class_token));
        let grid = n_patches.isqrt();
        match grid > 0 && grid * grid == n_patches {
            true => Ok(grid),
            false if has_class_token => {
                Err(format!("{n_tokens} positions are not a class token and a square of patches"))
            }
            false => Err(format!("{n_tokens} positions are not a square of patches")),
        }
    }
}

fn shape(files: &Files, recipe: &VisionRecipe, told: &Told) -> Result<VisionConfig, String> {
    if recipe.variant.is_some() {
        return Err(
            "`vision.variant`: only an NFNet has one; the files are read as CLIP or SigLIP".into(),
        );
    }
    let [width, patch_size] = files.patch()?;
    match recipe.patch_size {
        Some(other) if other != patch_size => {
            Err(format!("`vision.patch_size`: the files say {patch_size}, the recipe says {other}"))
        }
        _ => Ok(()),
    }?;
    // A file that has neither is CLIP's, and lacks its class token.
    let has_class_token = files.has(VisionKey::ClassToken) || !files.has(VisionKey::Patch("bias"));
    let grid = files.grid(has_class_token)?;
    let (image_size, positions) = image_size(recipe, told, (grid, patch_size), files.names)?;
    Ok(VisionConfig {
        image_size,
        width,
        encoder: VisionEncoder::Clip(ClipConfig {
            patch_size,
            n_layers: count(|layer| files.has(VisionKey::Up(layer, "weight"))),
            n_heads: n_heads(recipe.heads.or(told.n_heads), (width, has_class_token))?,
            mlp_width: match files.shape(VisionKey::Up(0, "weight"))? {
                [mlp_width, _] => *mlp_width,
                other => {
                    return Err(format!("the first feed-forward weight has the shape {other:?}"));
                }
            },
            activation: match (&recipe.activation, told.activation) {
                (Some(name), _) => activation_named("vision.activation", name)?,
                (None, Some(activation)) => activation,
                (None, None) => usual_activation((width, has_class_token), files.names)?,
            },
            epsilon: told.epsilon.unwrap_or(if has_class_token { 1e-5 } else { 1e-6 }),
            keep_class_token: false,
            positions,
            has_class_token,
            patch_bias: files.has(VisionKey::Patch("bias")),
            pre_norm: has_class_token || files.has(VisionKey::PreNorm("weight")),
            final_norm: recipe.final_norm.unwrap_or(!has_class_token),
        }),
    })
}

fn n_heads(given: Option<usize>, (width, has_class_token): (usize, bool)) -> Result<usize, String> {
    let n_heads = given.unwrap_or(width / usual_head_width(width, has_class_token));
    match n_heads > 0 && width.is_multiple_of(n_heads) {
        true => Ok(n_heads),
        false => {
            Err(format!("`vision.heads`: expected a divisor of the width {width}, got {n_heads}"))
        }
    }
}

/// Width of a head where no `config.json` tells: of OpenAI's B and L, open_clip's H, g and G; of SigLIP's B, L, So400m and
/// giant.
fn usual_head_width(width: usize, has_class_token: bool) -> usize {
    match (has_class_token, width) {
        (true, 1280) => 80,
        (true, 1408) => 88,
        (true, 1664) => 104,
        (false, 1152) => 72,
        (false, 1536) => 96,
        _ => 64,
    }
}

/// Activation where no `config.json` tells: of OpenAI's B and L, open_clip's H, g and G, transformers' SigLIPs. timm's
/// SigLIPs have one or the other.
fn usual_activation(
    (width, has_class_token): (usize, bool),
    names: VisionNames,
) -> Result<Activation, String> {
    match (names, width) {
        (VisionNames::Timm(_), _) => {
            Err("`vision.activation`: expected gelu or gelu_tanh, which timm's tensors do not tell\n\nhint: timm has \
                 `gelu` in ViT-B-16-SigLIP and ViT-SO400M-14-SigLIP, `gelu_tanh` in SigLIPs of So400m at patch 16, giant \
                 and B at patch 32"
                .into())
        }
        _ if !has_class_token => Ok(Activation::GeluTanh),
        (_, 1280 | 1408 | 1664) => Ok(Activation::Gelu),
        _ => Ok(Activation::QuickGelu),
    }
}

/// Side of pictures, and the positions of the files where pictures have another number of patches than theirs. Pixels beside
/// whole patches are seen by no patch.
fn image_size(
    recipe: &VisionRecipe,
    told: &Told,
    (grid, patch_size): (usize, usize),
    names: VisionNames,
) -> Result<(usize, Option<PositionsConfig>), String> {
    let of_files = told.image_size.filter(|size| size / patch_size == grid);
    let image_size = recipe.image_size.or(of_files).unwrap_or(grid.saturating_mul(patch_size));
    if !(patch_size..=MAX_IMAGE_SIZE).contains(&image_size) {
        return Err(format!(
            "`vision.image_size`: expected the patch size {patch_size} to {MAX_IMAGE_SIZE} pixels, got {image_size}"
        ));
    }
    let antialias = names != VisionNames::HuggingFace;
    let is_resampled = image_size / patch_size != grid;
    Ok((image_size, is_resampled.then_some(PositionsConfig { grid, antialias })))
}
