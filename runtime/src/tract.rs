//! The tract backend: the artifact's ONNX files in tract, an independent ONNX engine in Rust.
//!
//! tract looks operators up by name and not by domain, so that a function `Attention` of ours
//! would be taken for ONNX's operator of that name. Graphs are therefore rewritten in memory with
//! the portable definitions in place of the functions; weights stay in their file.
//!
//! Each graph is one plan with symbolic sizes, so that a prompt and a single token share it. tract
//! runs on one thread, and copies the weights into memory.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use flamingo_ir::Graph;
use flamingo_ir::onnx::ReadModel;
use flamingo_ir::op::Flavour;
use tract_onnx::prelude::{
    Framework, InferenceModelExt, IntoRunnable, IntoTValue, TValue, TVec, Tensor, TractError,
    TypedRunnableModel,
};

use crate::backend::{Backend, BackendError, Media, Sequence};
use crate::onnx_graph::{Buffers, Engine, Input, OnnxBackend, Stage, read_model};

/// Name on the command line.
const NAME: &str = "tract";

/// Runs the ONNX files of an artifact with tract, in f32 on one thread.
pub struct TractBackend {
    inner: OnnxBackend<TractEngine>,
}

impl fmt::Debug for TractBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TractBackend").finish_non_exhaustive()
    }
}

impl TractBackend {
    /// Loads the two graphs of any flavour. Their weights lie where the files say, relative to the
    /// files' own folder.
    ///
    /// # Errors
    /// If a file is not a graph of an artifact, or tract refuses it.
    pub fn open(media_onnx: &Path, decoder_onnx: &Path) -> Result<TractBackend, BackendError> {
        let (media, decoder) = (read_model(NAME, media_onnx)?, read_model(NAME, decoder_onnx)?);
        let engine = TractEngine {
            media: TractStage::new(media_onnx, &media)?,
            decoder: TractStage::new(decoder_onnx, &decoder)?,
        };
        let inner = OnnxBackend::new(&media.graph, &decoder.graph, engine)?;
        Ok(TractBackend { inner })
    }
}

impl Backend for TractBackend {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn encode(
        &self,
        pixel_values: &[f32],
        n_media: usize,
        n_frames: usize,
    ) -> Result<Vec<Media>, BackendError> {
        self.inner.encode(pixel_values, n_media, n_frames)
    }

    fn new_sequence(&self, max_context: usize) -> Result<Box<dyn Sequence>, BackendError> {
        self.inner.new_sequence(max_context)
    }
}

struct TractEngine {
    media: TractStage,
    decoder: TractStage,
}

/// One graph as a plan.
struct TractStage {
    place: String,
    plan: Arc<TypedRunnableModel>,
}

impl TractStage {
    fn new(path: &Path, model: &ReadModel) -> Result<TractStage, BackendError> {
        let place = path.display().to_string();
        let refused = |error: TractError| refused(&place, &error);
        let bytes = model.inlined(Flavour::Portable);
        let bytes = bytes.map_err(|error| failed(&place, error.to_string()))?;
        let folder = path.parent().and_then(Path::to_str).ok_or_else(|| {
            failed(&place, "expected a folder with a name in UTF-8, found another".into())
        })?;
        let onnx = tract_onnx::onnx();
        let proto = onnx.proto_model_for_read(&mut &bytes[..]).map_err(refused)?;
        let parsed = onnx.parse(&proto, Some(folder)).map_err(refused)?;
        check_names(&place, &model.graph, &parsed)?;
        let plan = parsed.model.into_optimized().and_then(IntoRunnable::into_runnable);
        let plan = plan.map_err(refused)?;
        match plan.model().nodes().iter().find(|node| node.op.name() == "Dummy") {
            None => Ok(TractStage { plan, place: place.clone() }),
            Some(node) => Err(failed(&place, format!("tract lost the node \"{}\"", node.name))),
        }
    }

    fn run(
        &self,
        inputs: &[Input<'_, TValue>],
        buffers: &Buffers<TValue>,
    ) -> Result<Vec<TValue>, BackendError> {
        let refused = |error: TractError| refused(&self.place, &error);
        let value = |input: &Input<'_, TValue>| match input {
            Input::Buffer(place) => Ok(TValue::clone(&buffers.tensors[*place].1)),
            input => value_from_input(input),
        };
        let values: Result<TVec<TValue>, TractError> = inputs.iter().map(value).collect();
        let outputs = self.plan.run(values.map_err(refused)?).map_err(refused)?;
        Ok(outputs.into_vec())
    }
}

/// Checks that tract found the inputs and outputs of the graph, in its order.
fn check_names(
    place: &str,
    graph: &Graph,
    parsed: &tract_onnx::model::ParseResult,
) -> Result<(), BackendError> {
    let inputs =
        parsed.model.inputs.iter().map(|outlet| parsed.model.node(outlet.node).name.as_str());
    let outputs = parsed.model.outputs.iter().map(|outlet| parsed.model.outlet_label(*outlet));
    let same = inputs.eq(graph.inputs().iter().map(|(name, _)| name.as_str()))
        && outputs.eq(graph.outputs().iter().map(|(name, _)| Some(name.as_str())))
        && parsed.unresolved_inputs.is_empty();
    match same {
        true => Ok(()),
        false => {
            Err(failed(place, "expected the inputs and outputs of the graph, found others".into()))
        }
    }
}

fn value_from_input(input: &Input<'_, TValue>) -> Result<TValue, TractError> {
    Ok(match input {
        Input::Numbers { shape, data } => Tensor::from_shape(shape, data)?.into_tvalue(),
        Input::Indices(values) => Tensor::from_shape(&[values.len()], values)?.into_tvalue(),
        Input::Kept(value) => TValue::clone(value),
        Input::Buffer(_) => return Err(TractError::msg("a buffer is kept already")),
    })
}

/// tract's reason with everything that it says led to it.
fn refused(place: &str, error: &TractError) -> BackendError {
    failed(place, format!("{error:#}"))
}

fn failed(place: &str, reason: String) -> BackendError {
    let hint = "run with `--backend native` or `--backend ort`";
    BackendError::Engine { engine: NAME, place: place.to_owned(), reason, hint }
}

impl Engine for TractEngine {
    type Tensor = TValue;

    const NAME: &'static str = NAME;

    fn run(
        &self,
        stage: Stage,
        inputs: &[Input<'_, TValue>],
        buffers: &mut Buffers<TValue>,
    ) -> Result<Vec<TValue>, BackendError> {
        match stage {
            Stage::Media => self.media.run(inputs, buffers),
            Stage::Decoder => self.decoder.run(inputs, buffers),
        }
    }

    fn keep(
        &self,
        _stage: Stage,
        _place: usize,
        input: &Input<'_, TValue>,
    ) -> Result<TValue, BackendError> {
        value_from_input(input).map_err(|error| refused("inputs", &error))
    }

    fn numbers<'a>(&self, tensor: &'a TValue) -> Result<Cow<'a, [f32]>, BackendError> {
        let view =
            tensor.to_plain_array_view::<f32>().map_err(|error| refused("outputs", &error))?;
        let data = view.to_slice();
        let data = data.map(Cow::Borrowed);
        data.ok_or_else(|| failed("outputs", "expected contiguous numbers, found others".into()))
    }
}
