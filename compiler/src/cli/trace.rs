//! `flamingoc trace`: tensors in, tensors out.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use flamingo_ir::Tensor;
use flamingo_models::Family;
use flamingo_models::checkpoint::Checkpoint;
use flamingo_runtime::backend::Media;
use flamingo_runtime::{GenerateOptions, Model};
use safetensors::tensor::{Dtype, View};
use serde_json::json;

use super::output::Output;
use super::{Opening, Outcome};

/// Run tensors through an artifact, without tokenizer and pictures: the parity hook
///
/// In: `input_ids` i64 [L]; `pixel_values` f32 [n_media, n_frames, 3, H, W], normalised as
/// the reference expects (absent without media).
/// Out: `visual_tokens` f32 [n_media, n_latents, dim], `logits` f32 [L, vocab]; with
/// `--greedy N` also `tokens` i64 [N].
#[derive(Args)]
#[command(after_help = "Example:
  flamingoc trace demo.flamingo --inputs in.safetensors \\
      --outputs out.safetensors --greedy 8")]
pub(super) struct Trace {
    /// The artifact
    artifact: PathBuf,
    /// Input tensors
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// Where to write the output tensors
    #[arg(long, value_name = "FILE")]
    outputs: PathBuf,
    /// Also continue greedily by N tokens, without stopping
    #[arg(long, value_name = "N")]
    greedy: Option<usize>,
    #[command(flatten)]
    opening: Opening,
    /// Print names and shapes of the outputs as JSON
    #[arg(long)]
    json: bool,
}

impl Trace {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let model = Model::open(&self.artifact, &self.opening.options())?;
        output.warnings(&model);
        let inputs = Inputs::read(&self.inputs, model.manifest().config.vision.image_size)?;
        let traced = trace(&model, &inputs, self.greedy)?;
        let named = traced.iter().map(|(name, array)| (*name, array));
        safetensors::serialize_to_file(named, None, &self.outputs)
            .with_context(|| format!("cannot write `{}`", self.outputs.display()))?;
        let shapes: Vec<(&str, &[usize])> =
            traced.iter().map(|(name, array)| (*name, array.shape.as_slice())).collect();
        match self.json {
            true => {
                let shapes: serde_json::Map<String, serde_json::Value> =
                    shapes.iter().map(|(name, shape)| ((*name).to_owned(), json!(shape))).collect();
                output.json(&shapes)?;
            }
            false => {
                for (name, shape) in shapes {
                    output.line(&format!("{name} {shape:?}"))?;
                }
            }
        }
        Ok(Outcome::Ok)
    }
}

/// Input tensors of a trace.
pub(super) struct Inputs {
    pub(super) input_ids: Vec<u32>,
    /// Values with [n_media, n_frames].
    pub(super) pixel_values: Option<(Vec<f32>, [usize; 2])>,
}

impl Inputs {
    /// Reads and checks a file for a model of this image size.
    fn read(path: &Path, image_size: usize) -> Result<Inputs> {
        let file = Checkpoint::open(path)?;
        let read = |name: &str| -> Result<Option<Tensor>> {
            let Some(info) = file.get(name) else { return Ok(None) };
            Ok(Some(Tensor::from_le_bytes(info.dtype, &info.shape, &file.bytes(name)?)?))
        };
        let known = ["input_ids", "pixel_values"];
        let other: Vec<&str> =
            file.infos().map(|info| info.name.as_str()).filter(|n| !known.contains(n)).collect();
        if !other.is_empty() {
            bail!("`{}`: unknown tensors {other:?}\n\nhint: expected {known:?}", path.display());
        }
        let ids = read("input_ids")?;
        let ids = ids.as_ref().and_then(Tensor::as_i64).filter(|ids| ids.ndim() == 1);
        let ids = ids.with_context(|| format!("`{}`: no `input_ids` i64 [L]", path.display()))?;
        let id = |id: &i64| {
            u32::try_from(*id).with_context(|| format!("`input_ids`: {id} is no token id"))
        };
        let input_ids = ids.iter().map(id).collect::<Result<Vec<u32>>>()?;
        let pixel_values = match read("pixel_values")? {
            None => None,
            Some(tensor) => {
                let (n_media, n_frames) = match *tensor.shape() {
                    [n_media, n_frames, 3, height, width] if [height, width] == [image_size; 2] => {
                        (n_media, n_frames)
                    }
                    _ => bail!(
                        "`pixel_values`: expected f32 [n_media, n_frames, 3, {image_size}, {image_size}], got {}",
                        tensor.fact()
                    ),
                };
                let values = tensor.to_f32_vec().context("`pixel_values`: expected floats")?;
                Some((values, [n_media, n_frames])).filter(|_| n_media > 0)
            }
        };
        Ok(Inputs { input_ids, pixel_values })
    }
}

/// An output tensor in little-endian bytes.
pub(super) struct Array {
    dtype: Dtype,
    pub(super) shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Array {
    fn f32(shape: Vec<usize>, values: &[f32]) -> Array {
        Array {
            dtype: Dtype::F32,
            shape,
            bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    fn i64(values: &[u32]) -> Array {
        let bytes = values.iter().flat_map(|v| i64::from(*v).to_le_bytes()).collect();
        Array { dtype: Dtype::I64, shape: vec![values.len()], bytes }
    }
}

impl View for &Array {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn trace(
    model: &Model,
    inputs: &Inputs,
    greedy: Option<usize>,
) -> Result<Vec<(&'static str, Array)>> {
    let media: Vec<Arc<Media>> = match &inputs.pixel_values {
        Some((values, [n_media, n_frames])) => model.encode_pixels(values, *n_media, *n_frames)?,
        None => Vec::new(),
    };
    let mut outputs = Vec::new();
    if let Some(first) = media.first() {
        let values: Vec<f32> = media.iter().flat_map(|m| m.visual_tokens.iter().copied()).collect();
        let n_latents = (first.n_latents * (1 + first.later.len())).max(1);
        let shape = vec![media.len(), n_latents, first.visual_tokens.len() / n_latents];
        outputs.push(("visual_tokens", Array::f32(shape, &values)));
    }
    let logits = model.logits(&inputs.input_ids, &media)?;
    let vocabulary = model.manifest().config.language.vocabulary;
    outputs.push(("logits", Array::f32(vec![inputs.input_ids.len(), vocabulary], &logits)));
    if let Some(n) = greedy {
        let options = GenerateOptions {
            max_new_tokens: n,
            ignore_stops: true,
            allow_image_token: model.manifest().config.family == Family::Idefics,
            ..GenerateOptions::default()
        };
        let generated = model.generate_ids(&inputs.input_ids, &media, &options, &mut |_| {})?;
        outputs.push(("tokens", Array::i64(&generated.tokens)));
    }
    Ok(outputs)
}
