//! Optimisation profiles: the sizes for which TensorRT builds an engine
//! (<https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html>, explicit shape ranges). Every
//! dynamic input needs a smallest, a usual and a largest shape.

use std::collections::BTreeMap;

use flamingo_ir::{Bindings, Dim};
use serde::{Deserialize, Serialize};

use crate::manifest::{GraphEntry, Limits, TensorEntry};

/// Frames of a video for which engines are built.
const MAX_FRAMES: usize = 8;
/// Media that are encoded in one run at most.
pub const MAX_BATCH: usize = 4;
/// Tokens of a usual prompt.
const USUAL_TOKENS: usize = 128;

/// Shapes of every dynamic input, for one use of a stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// What it is for: `picture`, `prefill` or `step`.
    pub name: String,
    /// Smallest shape by input.
    pub min: BTreeMap<String, Vec<usize>>,
    /// The shape that is made fastest, by input.
    pub opt: BTreeMap<String, Vec<usize>>,
    /// Largest shape by input.
    pub max: BTreeMap<String, Vec<usize>>,
}

/// Profiles by stage, in the order in which the graphs' engine is given them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profiles {
    /// Of the media graph.
    pub media: Vec<Profile>,
    /// Of the decoder: prefill, then step.
    pub decoder: Vec<Profile>,
}

/// Smallest, usual and largest size of symbols.
type Ranges<'a> = &'a [(&'static str, [usize; 3])];

impl Profiles {
    /// Profiles for prompts within `limits`, of which `piece` tokens are read at once.
    ///
    /// # Errors
    /// An input with a symbol that has no range.
    pub fn new(
        media: &GraphEntry,
        decoder: &GraphEntry,
        limits: &Limits,
        piece: usize,
    ) -> Result<Profiles, String> {
        let (context, images) = (limits.max_context.max(1), limits.max_images.max(1));
        let piece = piece.min(context);
        let frames = [1, 1, MAX_FRAMES];
        let picture = [("n_media", [1, 1, MAX_BATCH]), ("n_frames", frames)];
        let latents = latents(media, frames)?;
        let cache = [1, USUAL_TOKENS.min(context), context];
        let prefill = [
            ("cache_len", cache),
            ("text_len", [1, USUAL_TOKENS.min(piece), piece]),
            ("past_len", [0, 0, context - 1]),
            ("n_media", [1, 1, images]),
            ("n_latents", latents),
            ("n_logits", [1, 1, piece]),
        ];
        let step = [
            ("cache_len", cache),
            ("text_len", [1, 1, 1]),
            ("past_len", [0, USUAL_TOKENS.min(context - 1), context - 1]),
            ("n_media", [1, 1, 1]),
            ("n_latents", latents),
            ("n_logits", [1, 1, 1]),
        ];
        Ok(Profiles {
            media: vec![Profile::new("picture", &media.inputs, &picture)?],
            decoder: vec![
                Profile::new("prefill", &decoder.inputs, &prefill)?,
                Profile::new("step", &decoder.inputs, &step)?,
            ],
        })
    }

    /// The profiles of a stage.
    pub fn of(&self, stage: &str) -> &[Profile] {
        if stage == "media" { &self.media } else { &self.decoder }
    }
}

impl Profile {
    fn new(name: &str, inputs: &[TensorEntry], ranges: Ranges<'_>) -> Result<Profile, String> {
        let shapes = |which: usize| -> Result<BTreeMap<String, Vec<usize>>, String> {
            let sizes = ranges.iter().map(|(name, range)| ((*name).to_owned(), range[which]));
            let sizes: Bindings = sizes.collect();
            let dynamic = inputs.iter().filter(|input| is_dynamic(input));
            dynamic.map(|input| Ok((input.name.clone(), shape(input, &sizes)?))).collect()
        };
        Ok(Profile { name: name.to_owned(), min: shapes(0)?, opt: shapes(1)?, max: shapes(2)? })
    }
}

/// Whether a size of the input is known only when it is given.
pub fn is_dynamic(input: &TensorEntry) -> bool {
    input.shape.iter().any(|dim| dim.parse::<usize>().is_err())
}

fn shape(input: &TensorEntry, sizes: &Bindings) -> Result<Vec<usize>, String> {
    let size = |text: &String| {
        let dim: Result<Dim, _> = text.parse();
        let wrong =
            |reason: String| format!("input `{}`: dimension `{text}`: {reason}", input.name);
        dim.map_err(|error| wrong(error.to_string()))?
            .evaluate(sizes)
            .map_err(|symbol| wrong(format!("no range of `{symbol}`")))
    };
    input.shape.iter().map(size).collect()
}

/// Visual tokens of a medium of so many frames.
fn latents(media: &GraphEntry, frames: [usize; 3]) -> Result<[usize; 3], String> {
    let tokens = media.outputs.iter().find(|output| output.name == "visual_tokens");
    let tokens = tokens.ok_or("the media graph has no output `visual_tokens`")?;
    let mut latents = [0; 3];
    for (latents, n_frames) in latents.iter_mut().zip(frames) {
        let sizes = [("n_media".to_owned(), 1), ("n_frames".to_owned(), n_frames)].into();
        *latents = *shape(tokens, &sizes)?.get(1).ok_or("`visual_tokens` has no rank 3")?;
    }
    Ok(latents)
}

/// Shapes as ONNX Runtime's TensorRT provider takes them: `input:1x8x4`, several profiles one after the other.
pub fn shapes_text<'a>(
    profiles: impl IntoIterator<Item = &'a BTreeMap<String, Vec<usize>>>,
) -> String {
    let input = |(name, shape): (&String, &Vec<usize>)| {
        let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
        format!("{name}:{}", sizes.join("x"))
    };
    profiles.into_iter().flatten().map(input).collect::<Vec<String>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(stage: &str, inputs: &[(&str, &str)], outputs: &[(&str, &str)]) -> GraphEntry {
        let tensors = |ends: &[(&str, &str)]| -> Vec<TensorEntry> {
            let tensor = |(name, shape): &(&str, &str)| TensorEntry {
                name: (*name).to_owned(),
                dtype: "f16".to_owned(),
                shape: shape.split(", ").map(str::to_owned).collect(),
            };
            ends.iter().map(tensor).collect()
        };
        GraphEntry {
            stage: stage.to_owned(),
            flavour: "trt-10.3".to_owned(),
            path: String::new(),
            inputs: tensors(inputs),
            outputs: tensors(outputs),
        }
    }

    #[test]
    fn every_dynamic_input_has_its_shapes() {
        let pixels = ("pixel_values", "n_media, n_frames, 3, 8, 8");
        let media = entry("media", &[pixels], &[("visual_tokens", "n_media, 5*n_frames, 4")]);
        let inputs = [
            ("input_ids", "text_len"),
            ("key_positions", "past_len+text_len"),
            ("media_k.0", "n_media, n_latents, 4"),
            ("fixed", "2, 3"),
        ];
        let decoder = entry("decoder", &inputs, &[]);
        let limits = Limits { max_context: 100, max_images: 7 };
        let profiles = Profiles::new(&media, &decoder, &limits, 512).unwrap();
        let prefill = &profiles.of("decoder")[0];
        assert_eq!(prefill.max["media_k.0"], [7, 40, 4]);
        assert_eq!((prefill.min["key_positions"][0], prefill.max["key_positions"][0]), (1, 199));
        assert!(!prefill.max.contains_key("fixed"));
        let step = &profiles.of("decoder")[1];
        assert_eq!((step.max["input_ids"][0], step.opt["key_positions"][0]), (1, 100));
        assert_eq!(
            shapes_text(profiles.media.iter().map(|profile| &profile.max)),
            "pixel_values:4x8x3x8x8"
        );
        let odd = entry("decoder", &[("x", "other")], &[]);
        let error = Profiles::new(&media, &odd, &limits, 512).unwrap_err();
        assert_eq!(error, "input `x`: dimension `other`: no range of `other`");
    }
}
