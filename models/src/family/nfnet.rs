//! NFNets of the F family as vision encoders: their shape from timm's tensors (`models/nfnet.py`).

use super::open_flamingo::count;
use super::recipe::VisionRecipe;
use crate::config::{NfnetConfig, NfnetStage, VisionConfig, VisionEncoder};
use crate::image_spec::MAX_IMAGE_SIZE;
use crate::source::Parts;

/// Most channels of anything.
const MAX_WIDTH: usize = 1 << 16;

const HINT: &str =
    "\n\nhint: `vision_encoder` takes the weights of timm's `dm_nfnet_f0` to `dm_nfnet_f6`";

/// Whether the vision encoder's file is an NFNet's.
pub(super) fn is_nfnet(parts: &Parts) -> bool {
    parts.get("vision_encoder/stem.conv1.gain").is_some()
}

/// The shape that the files tell, with the recipe's side of the pictures.
pub(super) fn config(parts: &Parts, recipe: &VisionRecipe) -> Result<VisionConfig, String> {
    refuse_keys_of_clip(recipe)?;
    let files = Files { parts };
    let n_stages = count(|stage| files.has(&format!("stages.{stage}.0.conv1.weight")));
    let stages: Result<Vec<NfnetStage>, String> =
        (0..n_stages).map(|index| files.stage(index)).collect();
    let stem = [1, 2, 3, 4].map(|index| files.size(&format!("stem.conv{index}.weight"), 0));
    let config =
        NfnetConfig { stem: stem.into_iter().collect::<Result<_, String>>()?, stages: stages? };
    check_variant(recipe, &config)?;
    let image_size = recipe.image_size.ok_or(
        "`vision.image_size`: an NFNet takes pictures of any size, and the recipe names none\n\nhint: the paper's \
         encoder has `image_size = 320`",
    )?;
    if !(1..=MAX_IMAGE_SIZE).contains(&image_size) {
        return Err(format!(
            "`vision.image_size`: expected 1 to {MAX_IMAGE_SIZE} pixels, got {image_size}"
        ));
    }
    let width = files.size("final_conv.weight", 0)?;
    Ok(VisionConfig { image_size, width, encoder: VisionEncoder::Nfnet(config) })
}

fn refuse_keys_of_clip(recipe: &VisionRecipe) -> Result<(), String> {
    let given = [
        ("patch_size", recipe.patch_size.is_some()),
        ("heads", recipe.heads.is_some()),
        ("activation", recipe.activation.is_some()),
        ("final_norm", recipe.final_norm.is_some()),
    ];
    match given.iter().find(|(_, is_given)| *is_given) {
        Some((key, _)) => Err(format!("`vision.{key}`: an NFNet has none\n\nhint: leave it out")),
        None => Ok(()),
    }
}

fn check_variant(recipe: &VisionRecipe, config: &NfnetConfig) -> Result<(), String> {
    let Some(expected) = recipe.variant.as_deref() else { return Ok(()) };
    let found = config.variant();
    if found.as_deref() == Some(expected) {
        return Ok(());
    }
    let stages: Vec<String> =
        config.stages.iter().map(|stage| format!("{} x {}", stage.n_blocks, stage.width)).collect();
    Err(format!(
        "`vision.variant`: the recipe says {expected}, the files say {} (blocks x channels: {})",
        found.as_deref().unwrap_or("none of f0 to f6"),
        stages.join(", ")
    ))
}

struct Files<'a> {
    parts: &'a Parts,
}

impl Files<'_> {
    fn has(&self, key: &str) -> bool {
        self.parts.get(&format!("vision_encoder/{key}")).is_some()
    }

    /// One size of a convolution's weight.
    fn size(&self, key: &str, axis: usize) -> Result<usize, String> {
        let info = self.parts.get(&format!("vision_encoder/{key}"));
        let shape = info.map(|info| &info.shape).ok_or_else(|| {
            format!("no tensor `vision_encoder/{key}`, which NFNets of the F family have{HINT}")
        })?;
        match shape[..] {
            [_, _, _, _] if (1..=MAX_WIDTH).contains(&shape[axis]) => Ok(shape[axis]),
            _ => Err(format!(
                "tensor `vision_encoder/{key}`: expected [c_out, c_in, h, w] up to {MAX_WIDTH}, got {shape:?}"
            )),
        }
    }

    /// A stage as its first block tells; that the others are alike is checked when they are bound.
    fn stage(&self, index: usize) -> Result<NfnetStage, String> {
        let n_blocks = count(|block| self.has(&format!("stages.{index}.{block}.conv1.weight")));
        let size = |part: &str, axis| self.size(&format!("stages.{index}.0.{part}.weight"), axis);
        size("conv2b", 0)?;
        let (inner_width, group_width) = (size("conv1", 0)?, size("conv2", 1)?);
        if !inner_width.is_multiple_of(group_width) {
            return Err(format!(
                "`stages.{index}.0.conv2.weight`: groups of {group_width} channels do not divide {inner_width}"
            ));
        }
        Ok(NfnetStage {
            n_blocks,
            width: size("conv3", 0)?,
            inner_width,
            group_width,
            squeezed_width: size("attn_last.fc1", 0)?,
        })
    }
}
