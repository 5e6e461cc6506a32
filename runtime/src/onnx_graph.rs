//! Backends that run an artifact's ONNX files with an engine: everything but the engine.
//!
//! An [`Engine`] runs one graph, tensors in and tensors out. [`OnnxBackend`] makes a backend of it:
//! it names what each input of the two graphs is, keeps the keys and values that the decoder puts
//! out as the engine's own tensors, and feeds them back as inputs of the next step.
#![forbid(unsafe_code)]

mod cache;

use std::any::Any;
use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use flamingo_ir::onnx::{ReadLimits, ReadModel, read_onnx};
use flamingo_ir::op::Op;
use flamingo_ir::{Constant, Dim, Fact, Graph, Tensor, ValueId};

use self::cache::{Cache, Kept};
use crate::backend::{Backend, BackendError, Media, MediaKv, Sequence, Step, frame_weights};
use crate::contract::{Contract, broken, check_medium, check_range, check_step, full, indices};

/// The graphs of an artifact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Pixels → visual tokens, keys and values of the gated blocks.
    Media,
    /// New tokens → logits, keys and values of all tokens.
    Decoder,
}

/// An input of a graph, row-major.
pub(crate) enum Input<'a, T> {
    /// Numbers, which the engine hands on in the type that the graph takes.
    Numbers {
        /// Shape.
        shape: Vec<usize>,
        /// As many as the shape says; none if a size is 0.
        data: Cow<'a, [f32]>,
    },
    /// An i64 vector.
    Indices(Vec<i64>),
    /// A tensor of [`Engine::keep`].
    Kept(&'a T),
    /// One of the run's buffers.
    Buffer(usize),
}

/// Tensors that a run reads and makes anew.
pub(crate) struct Buffers<T> {
    /// Each with the place of the output that follows it.
    pub(crate) tensors: Vec<(usize, Arc<T>)>,
    /// Whether the output is the tensor itself, rows of it changed. An engine may write into it if nobody else has it, or
    /// put out a changed copy.
    pub(crate) in_place: bool,
}

impl<T> Buffers<T> {
    /// No buffers.
    fn none() -> Buffers<T> {
        Buffers { tensors: Vec::new(), in_place: false }
    }
}

/// Executes the two graphs of one artifact.
pub(crate) trait Engine: Send + Sync + 'static {
    /// An output, in the engine's own memory.
    type Tensor: Send + Sync + 'static;

    /// Name on the command line.
    const NAME: &'static str;

    /// Media that one run of the media graph takes; several need more memory.
    fn media_batch(&self) -> usize {
        1
    }

    /// Runs a graph on its inputs in the graph's order; returns its outputs in the graph's order.
    fn run(
        &self,
        stage: Stage,
        inputs: &[Input<'_, Self::Tensor>],
        buffers: &mut Buffers<Self::Tensor>,
    ) -> Result<Vec<Self::Tensor>, BackendError>;

    /// The `place`-th input of a graph as a tensor of the engine, to be given again and again.
    fn keep(
        &self,
        stage: Stage,
        place: usize,
        input: &Input<'_, Self::Tensor>,
    ) -> Result<Self::Tensor, BackendError>;

    /// The numbers of a tensor, row-major.
    fn numbers<'a>(&self, tensor: &'a Self::Tensor) -> Result<Cow<'a, [f32]>, BackendError>;
}

/// Reads one of an artifact's ONNX files, which also shows that it is of our own form.
pub(crate) fn read_model(engine: &'static str, path: &Path) -> Result<ReadModel, BackendError> {
    let wrong = |reason: String| BackendError::Engine {
        engine,
        place: path.display().to_string(),
        reason,
        hint: "copy the artifact again, or compile it again with this version",
    };
    let limits = ReadLimits::default();
    let limit = u64::try_from(limits.max_bytes).unwrap_or(u64::MAX).saturating_add(1);
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(|error| wrong(error.to_string()))?;
    read_onnx(&bytes, &limits).map_err(|error| wrong(error.to_string()))
}

/// What an input of the media graph is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MediaInput {
    PixelValues,
    FrameWeights,
}

/// What an input of the decoder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DecoderInput {
    InputIds,
    Positions,
    KeyPositions,
    MediaTime,
    MediaIndex,
    LogitRows,
    Media(MediaBlock),
    /// The cache of this place in [`DecoderInputs::caches`].
    Past(usize),
}

/// Keys or values of a gated block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MediaBlock {
    is_key: bool,
    block: usize,
    /// Latents of a medium; `None` where media may differ.
    n_latents: Option<usize>,
    inner: usize,
}

/// An input that the decoder reads rows of a table by.
#[derive(Clone, Debug)]
struct TableIndex {
    name: String,
    /// Is added to the input first.
    offset: i64,
    n_rows: usize,
}

/// Inputs and outputs of the two graphs.
struct Signature {
    contract: Contract,
    media_inputs: Vec<MediaInput>,
    /// Numbers of each output of the media graph.
    media_output_sizes: Vec<Dim>,
    decoder_inputs: DecoderInputs,
    decoder_name: String,
    tables: Vec<TableIndex>,
    /// Place of the logits among the decoder's outputs, and their width.
    logits: (usize, usize),
}

impl Signature {
    fn new(media: &Graph, decoder: &Graph) -> Result<Signature, BackendError> {
        let contract = Contract::new(media, decoder)?;
        Ok(Signature {
            contract,
            media_inputs: media_inputs(media)?,
            media_output_sizes: media
                .outputs()
                .iter()
                .map(|(_, id)| media.fact(*id).n_elements())
                .collect(),
            decoder_inputs: DecoderInputs::new(decoder)?,
            decoder_name: decoder.name.clone(),
            tables: table_indices(decoder),
            logits: logits(decoder)?,
        })
    }
}

fn media_inputs(media: &Graph) -> Result<Vec<MediaInput>, BackendError> {
    let input = |(name, id): &(String, ValueId)| match name.as_str() {
        "pixel_values" => Ok(MediaInput::PixelValues),
        "frame_weights" => Ok(MediaInput::FrameWeights),
        _ => Err(format!("input `{name}`: expected no such input, found {}", media.fact(*id))),
    };
    sorted_out(media, media.inputs().iter().map(input))
}

/// What each input of the decoder is, by name, and the caches among them.
struct DecoderInputs {
    roles: Vec<(String, DecoderInput)>,
    caches: Vec<Cache>,
    /// Place of the positions of a buffer's rows, where keys and values lie in buffers.
    row_positions: Option<usize>,
}

impl DecoderInputs {
    fn new(decoder: &Graph) -> Result<DecoderInputs, BackendError> {
        let mut caches = Vec::new();
        let input = |(place, (name, id)): (usize, &(String, ValueId))| {
            let role = decoder_input(decoder, (place, name), decoder.fact(*id), &mut caches)?;
            Ok((name.clone(), role))
        };
        let roles = sorted_out(decoder, decoder.inputs().iter().enumerate().map(input))?;
        let found = decoder.outputs().iter().filter(|(n, _)| n.starts_with("present_")).count();
        if found != caches.len() {
            let expected = format!("{} `present_*`, one for each `past_*`", caches.len());
            return Err(broken(
                decoder,
                vec![format!("outputs: expected {expected}, found {found}")],
            ));
        }
        let n_fixed = caches.iter().filter(|cache| cache.is_fixed()).count();
        if n_fixed > 0 && n_fixed < caches.len() {
            let problem = "inputs `past_*`: expected all of one form, found two";
            return Err(broken(decoder, vec![problem.into()]));
        }
        let role = |(_, role): &(String, DecoderInput)| *role == DecoderInput::KeyPositions;
        let row_positions = roles.iter().position(role).filter(|_| n_fixed > 0);
        Ok(DecoderInputs { roles, caches, row_positions })
    }
}

/// What one input of the decoder is; a past input also becomes one of `caches`.
fn decoder_input(
    decoder: &Graph,
    (place, name): (usize, &str),
    fact: &Fact,
    caches: &mut Vec<Cache>,
) -> Result<DecoderInput, String> {
    let wrong = |expected: &str| format!("input `{name}`: expected {expected}, found {fact}");
    let numbered = |prefix: &str| -> Option<usize> { name.strip_prefix(prefix)?.parse().ok() };
    let key = numbered("media_k.").map(|block| (true, block));
    if let Some((is_key, block)) = key.or(numbered("media_v.").map(|block| (false, block))) {
        let [_, n_latents, inner] = &fact.shape[..] else { return Err(wrong("rank 3")) };
        let (n_latents, inner) = (n_latents.known(), inner.known());
        let inner = inner.ok_or_else(|| wrong("a known width"))?;
        return Ok(DecoderInput::Media(MediaBlock { is_key, block, n_latents, inner }));
    }
    if let Some(part) = name.strip_prefix("past_") {
        let present = format!("present_{part}");
        let output = decoder.outputs().iter().position(|(other, _)| *other == present);
        let output = output.ok_or_else(|| wrong(&format!("an output `{present}`")))?;
        let present = (output, decoder.fact(decoder.outputs()[output].1));
        caches.push(Cache::new((place, fact), present).ok_or_else(|| {
            wrong(
                "f32 or f16[heads, past_len, head_dim] and the output longer by `text_len`, or [cache_len, width] or \
                 [1, heads, cache_len, head_dim] and the output the same",
            )
        })?);
        return Ok(DecoderInput::Past(caches.len() - 1));
    }
    match name {
        "input_ids" => Ok(DecoderInput::InputIds),
        "positions" => Ok(DecoderInput::Positions),
        "key_positions" => Ok(DecoderInput::KeyPositions),
        "media_time" => Ok(DecoderInput::MediaTime),
        "media_index" => Ok(DecoderInput::MediaIndex),
        "logit_rows" => Ok(DecoderInput::LogitRows),
        _ => Err(wrong("no such input")),
    }
}

fn logits(decoder: &Graph) -> Result<(usize, usize), BackendError> {
    let place = decoder.outputs().iter().position(|(name, _)| name == "logits");
    let width = place.and_then(|place| {
        decoder.fact(decoder.outputs()[place].1).shape.get(1).and_then(Dim::known)
    });
    place.zip(width).ok_or_else(|| {
        broken(decoder, vec!["output `logits`: expected a known width, found none".into()])
    })
}

/// Inputs that rows of a table are gathered by, as they are or after adding a constant. Engines
/// do not agree on what an index outside the table means.
fn table_indices(graph: &Graph) -> Vec<TableIndex> {
    let producers = graph.producers();
    let constant = |id: ValueId| match &graph.value(id).constant {
        Some(Constant::Literal(Tensor::I64(array))) if array.len() == 1 => array.first().copied(),
        _ => None,
    };
    let name_of =
        |id: ValueId| graph.inputs().iter().find(|(_, i)| *i == id).map(|(n, _)| n.clone());
    let source = |id: ValueId| -> Option<(String, i64)> {
        if let Some(name) = name_of(id) {
            return Some((name, 0));
        }
        let node = graph.node(*producers.get(&id)?);
        match (&node.op, &node.inputs[..]) {
            (Op::Add(_), [a, b]) => name_of(*a).zip(constant(*b)).or(name_of(*b).zip(constant(*a))),
            _ => None,
        }
    };
    let gathers = graph.nodes().iter().filter(|node| matches!(node.op, Op::Gather(_)));
    let index = |node: &flamingo_ir::Node| {
        let n_rows = graph.fact(*node.inputs.first()?).shape.first()?.known()?;
        let (name, offset) = source(*node.inputs.get(1)?)?;
        Some(TableIndex { name, offset, n_rows })
    };
    gathers.filter_map(index).collect()
}

/// All values, or all problems.
fn sorted_out<T>(
    graph: &Graph,
    results: impl Iterator<Item = Result<T, String>>,
) -> Result<Vec<T>, BackendError> {
    let (mut values, mut problems) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(values) } else { Err(broken(graph, problems)) }
}

/// A backend on an engine.
pub(crate) struct OnnxBackend<E> {
    shared: Arc<Shared<E>>,
}

struct Shared<E> {
    engine: E,
    signature: Signature,
}

impl<E: Engine> OnnxBackend<E> {
    /// A backend that runs `media` and `decoder` with `engine`, which has loaded them.
    ///
    /// # Errors
    /// If the graphs are not those of an artifact.
    pub(crate) fn new(
        media: &Graph,
        decoder: &Graph,
        engine: E,
    ) -> Result<OnnxBackend<E>, BackendError> {
        let signature = Signature::new(media, decoder)?;
        Ok(OnnxBackend { shared: Arc::new(Shared { engine, signature }) })
    }
}

impl<E: Engine> OnnxBackend<E> {
    /// Runs both graphs once, so that what an engine does at its first run is done when a model is open: a GPU's libraries
    /// take seconds for it.
    pub(crate) fn warm_up(&self) -> Result<(), BackendError> {
        let pictures = &self.shared.signature.contract.pictures;
        let n_frames = pictures.n_frames.unwrap_or(1);
        let n_pixels = pictures.frame_shape.iter().product::<usize>() * n_frames;
        let media: Vec<Arc<Media>> =
            self.encode(&vec![0.0; n_pixels], 1, n_frames)?.into_iter().map(Arc::new).collect();
        let mut sequence = self.new_sequence(2)?;
        for _ in 0..2 {
            let step = Step { input_ids: &[0], media_time: &[1], media: &media, logit_rows: &[0] };
            sequence.advance(&step)?;
        }
        Ok(())
    }
}

impl<E: Engine> Backend for OnnxBackend<E> {
    fn name(&self) -> &'static str {
        E::NAME
    }

    fn encode(
        &self,
        pixel_values: &[f32],
        n_media: usize,
        n_frames: usize,
    ) -> Result<Vec<Media>, BackendError> {
        let pictures = &self.shared.signature.contract.pictures;
        let medium_elements = pictures.check(pixel_values.len(), n_media, n_frames)?;
        let batch = medium_elements * self.shared.engine.media_batch().max(1);
        let mut media = Vec::with_capacity(n_media);
        for pixel_values in pixel_values.chunks(batch) {
            let n_media = pixel_values.len() / medium_elements;
            media.extend(self.shared.encode(pixel_values, n_media, n_frames)?);
        }
        Ok(media)
    }

    fn new_sequence(&self, max_context: usize) -> Result<Box<dyn Sequence>, BackendError> {
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(OnnxSequence {
            shared,
            max_context,
            len: 0,
            kept: Kept::new(),
            media: Arc::default(),
        }))
    }
}

impl<E: Engine> Shared<E> {
    /// Encodes media in one run.
    fn encode(
        &self,
        pixel_values: &[f32],
        n_media: usize,
        n_frames: usize,
    ) -> Result<Vec<Media>, BackendError> {
        let pictures = &self.signature.contract.pictures;
        let n_max = pictures.n_max_frames.unwrap_or(0);
        let input = |input: &MediaInput| match input {
            MediaInput::PixelValues => Input::Numbers {
                shape: [&[n_media, n_frames], &pictures.frame_shape[..]].concat(),
                data: Cow::Borrowed(pixel_values),
            },
            MediaInput::FrameWeights => Input::Numbers {
                shape: vec![n_frames, n_max],
                data: Cow::Owned(frame_weights(n_frames, n_max)),
            },
        };
        let inputs: Vec<_> = self.signature.media_inputs.iter().map(input).collect();
        let outputs = self.engine.run(Stage::Media, &inputs, &mut Buffers::none())?;
        let sizes = &self.signature.media_output_sizes;
        let bindings = [("n_media", n_media), ("n_frames", n_frames)];
        let bindings = bindings.map(|(name, size)| (name.to_owned(), size)).into();
        let mut data = vec![Vec::with_capacity(outputs.len()); n_media];
        for (output, size) in outputs.iter().zip(sizes) {
            let size =
                size.evaluate(&bindings).map_err(|reason| outputs_differ::<E>("sizes", &reason))?;
            let numbers = self.numbers(output, size)?;
            let each = size / n_media;
            for (index, data) in data.iter_mut().enumerate() {
                data.push(numbers[index * each..(index + 1) * each].to_vec());
            }
        }
        Ok(data.into_iter().map(|data| self.signature.contract.media_from_outputs(data)).collect())
    }

    /// The numbers of an output, of which there must be `n`.
    fn numbers<'a>(&self, output: &'a E::Tensor, n: usize) -> Result<Cow<'a, [f32]>, BackendError> {
        let data = self.engine.numbers(output)?;
        match data.len() == n {
            true => Ok(data),
            false => Err(outputs_differ::<E>(&format!("{n} numbers"), &data.len().to_string())),
        }
    }
}

fn outputs_differ<E: Engine>(expected: &str, found: &str) -> BackendError {
    BackendError::Engine {
        engine: E::NAME,
        place: "outputs".into(),
        reason: format!("expected {expected}, found {found}"),
        hint: "run with `--backend native`",
    }
}

/// One sequence; keys and values are the engine's tensors.
struct OnnxSequence<E: Engine> {
    shared: Arc<Shared<E>>,
    max_context: usize,
    len: usize,
    kept: Kept<E>,
    /// Keys and values of the media that the last steps saw, for forks too: one set for the prompt and one for what follows.
    media: Arc<Mutex<Vec<Arc<KeptMedia<E>>>>>,
}

/// Sets of media that a sequence keeps.
const N_KEPT_MEDIA: usize = 2;

/// Keys and values of media as the engine's tensors, in the order of the decoder's inputs.
struct KeptMedia<E: Engine> {
    media: Vec<Arc<Media>>,
    tensors: Vec<E::Tensor>,
}

impl<E: Engine> KeptMedia<E> {
    fn is_of(&self, media: &[&Arc<Media>]) -> bool {
        let pairs = self.media.iter().zip(media);
        self.media.len() == media.len() && pairs.into_iter().all(|(kept, m)| Arc::ptr_eq(kept, m))
    }
}

impl<E: Engine + 'static> Sequence for OnnxSequence<E> {
    fn len(&self) -> usize {
        self.len
    }

    fn max_context(&self) -> usize {
        self.max_context
    }

    fn advance(&mut self, step: &Step<'_>) -> Result<Vec<f32>, BackendError> {
        check_step(step, self.len, self.max_context)?;
        let shared = Arc::clone(&self.shared);
        let signature = &shared.signature;
        signature.check_media(step.media)?;
        let is_fixed = self.truncates_in_place();
        let values = Values::new(step, self.len, self.max_context, is_fixed)?;
        signature.check_tables(&values)?;
        let media = self.kept_media(&values.media)?;
        let DecoderInputs { roles, caches, row_positions } = &signature.decoder_inputs;
        let sizes = (self.len, step.input_ids.len(), self.max_context);
        self.kept.prepare(&shared.engine, caches, *row_positions, sizes)?;
        let mut buffers = self.kept.take(caches);
        let outputs = {
            let mut media_tensors = media.tensors.iter();
            let mut input =
                |(_, role): &(String, DecoderInput)| self.input(*role, &values, &mut media_tensors);
            let inputs: Result<Vec<_>, BackendError> = roles.iter().map(&mut input).collect();
            inputs.and_then(|inputs| shared.engine.run(Stage::Decoder, &inputs, &mut buffers))
        };
        let read = outputs.and_then(|outputs| {
            let (place, width) = signature.logits;
            let logits = shared.numbers(&outputs[place], values.logit_rows.len() * width)?;
            let logits = logits[..step.logit_rows.len() * width].to_vec();
            Ok((logits, outputs))
        });
        let (logits, outputs) = match read {
            Ok(read) => read,
            Err(error) => {
                self.kept.put_back(buffers, None);
                return Err(error);
            }
        };
        self.len += step.input_ids.len();
        let mut outputs: Vec<Option<E::Tensor>> = outputs.into_iter().map(Some).collect();
        let present = caches.iter().filter_map(|cache| outputs[cache.output].take()).collect();
        self.kept.put_back(buffers, Some((present, self.len)));
        Ok(logits)
    }

    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    fn truncates_in_place(&self) -> bool {
        self.shared.signature.decoder_inputs.row_positions.is_some()
    }

    fn fork(&self) -> Box<dyn Sequence> {
        Box::new(OnnxSequence {
            shared: Arc::clone(&self.shared),
            max_context: self.max_context,
            len: self.len,
            kept: self.kept.clone(),
            media: Arc::clone(&self.media),
        })
    }

    fn kv_bytes(&self) -> usize {
        self.kept.bytes(&self.shared.signature.decoder_inputs.caches)
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl<E: Engine> OnnxSequence<E> {
    /// What a role is given; keys and values of media are the next of `media`.
    fn input<'a>(
        &'a self,
        role: DecoderInput,
        values: &Values<'_>,
        media: &mut std::slice::Iter<'a, E::Tensor>,
    ) -> Result<Input<'a, E::Tensor>, BackendError> {
        let indices = |values: &Vec<i64>| Ok(Input::Indices(values.clone()));
        match role {
            DecoderInput::InputIds => indices(&values.input_ids),
            DecoderInput::Positions => indices(&values.positions),
            DecoderInput::KeyPositions => match self.kept.row_positions() {
                Some(positions) => Ok(Input::Kept(positions)),
                None => indices(&values.key_positions),
            },
            DecoderInput::MediaTime => indices(&values.media_time),
            DecoderInput::MediaIndex => indices(&values.media_index),
            DecoderInput::LogitRows => indices(&values.logit_rows),
            DecoderInput::Media(_) => {
                let missing = || outputs_differ::<E>("keys and values of the media", "none");
                media.next().map(Input::Kept).ok_or_else(missing)
            }
            DecoderInput::Past(place) => Ok(Input::Buffer(place)),
        }
    }

    /// Keys and values of a step's media: those of an earlier step if it saw the same.
    fn kept_media(&self, media: &[&Arc<Media>]) -> Result<Arc<KeptMedia<E>>, BackendError> {
        let mut sets = self.media.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = sets.iter().find(|set| set.is_of(media)) {
            return Ok(Arc::clone(set));
        }
        let roles = self.shared.signature.decoder_inputs.roles.iter().enumerate();
        let mut tensors = Vec::new();
        for (place, (_, role)) in roles {
            if let DecoderInput::Media(block) = role {
                let input = block.stack(media);
                tensors.push(self.shared.engine.keep(Stage::Decoder, place, &input)?);
            }
        }
        let media = media.iter().map(|m| Arc::clone(m)).collect();
        let set = Arc::new(KeptMedia { media, tensors });
        if sets.len() == N_KEPT_MEDIA {
            sets.remove(0);
        }
        sets.push(Arc::clone(&set));
        Ok(set)
    }
}

impl MediaBlock {
    fn part<'a>(&self, media: &'a Media) -> Cow<'a, [f32]> {
        let part = |kv: &'a MediaKv| if self.is_key { kv.keys() } else { kv.values() };
        media.blocks.get(self.block).map_or(Cow::Borrowed(&[]), part)
    }

    /// What the step's media have of this block, one after the other; one medium of zeros if it
    /// has none, because engines do not take all sizes of 0.
    fn stack<'a, T>(&self, media: &[&'a Arc<Media>]) -> Input<'a, T> {
        let of_media = media.first().map_or(1, |media| media.n_latents);
        let n_latents = self.n_latents.unwrap_or(of_media);
        let data = match media {
            [] => Cow::Owned(vec![0.0; n_latents * self.inner]),
            [only] => self.part(only),
            many => many.iter().flat_map(|media| self.part(media).into_owned()).collect(),
        };
        Input::Numbers { shape: vec![media.len().max(1), n_latents, self.inner], data }
    }
}

/// What a step feeds, media renumbered so that only those of this step are there.
struct Values<'a> {
    input_ids: Vec<i64>,
    positions: Vec<i64>,
    /// None where rows of buffers have positions of their own.
    key_positions: Vec<i64>,
    media_time: Vec<i64>,
    media_index: Vec<i64>,
    logit_rows: Vec<i64>,
    media: Vec<&'a Arc<Media>>,
}

impl<'a> Values<'a> {
    fn new(
        step: &Step<'a>,
        len: usize,
        max_context: usize,
        is_fixed: bool,
    ) -> Result<Values<'a>, BackendError> {
        let total = len + step.input_ids.len();
        let too_long = || full(step, len, max_context);
        let mut used: Vec<u32> = step.media_time.iter().copied().filter(|time| *time > 0).collect();
        used.sort_unstable();
        used.dedup();
        let medium = |time: &u32| {
            let place = usize::try_from(*time).ok()?.checked_sub(1)?;
            Some(step.media.get(place)?.at(place))
        };
        let media: Vec<&Arc<Media>> = used.iter().filter_map(medium).collect();
        check_latents(&media)?;
        let renumbered = |time: &u32| used.binary_search(time).map_or(0, |place| place + 1);
        // Engines differ on results of no rows: one row is always computed.
        let rows = if step.logit_rows.is_empty() { &[0][..] } else { step.logit_rows };
        Ok(Values {
            input_ids: step.input_ids.iter().map(|id| i64::from(*id)).collect(),
            positions: indices(len..total).ok_or_else(too_long)?,
            key_positions: indices(0..if is_fixed { 0 } else { total }).ok_or_else(too_long)?,
            media_time: indices(step.media_time.iter().map(renumbered)).ok_or_else(too_long)?,
            media_index: indices(1..used.len().max(1) + 1).ok_or_else(too_long)?,
            logit_rows: indices(rows.iter().copied()).ok_or_else(too_long)?,
            media,
        })
    }
}

/// The media of a step are one tensor: they must be equally long.
fn check_latents(media: &[&Arc<Media>]) -> Result<(), BackendError> {
    let n_latents = media.first().map_or(0, |media| media.n_latents);
    match media.iter().find(|media| media.n_latents != n_latents) {
        None => Ok(()),
        Some(other) => Err(BackendError::Input {
            place: "media".into(),
            expected: format!("{n_latents} visual tokens for each medium of a step"),
            found: other.n_latents.to_string(),
            hint: "run with `--backend native`, which takes pictures and videos in one step",
        }),
    }
}

impl Signature {
    /// Checks that all media are of this model.
    fn check_media(&self, media: &[Arc<Media>]) -> Result<(), BackendError> {
        for (name, role) in &self.decoder_inputs.roles {
            let DecoderInput::Media(block) = role else { continue };
            let place = (self.decoder_name.as_str(), name.as_str());
            for (index, media) in media.iter().enumerate() {
                let sizes = [block.n_latents.unwrap_or(media.n_latents), block.inner];
                check_medium(place, index, media.block_len(block.block, block.is_key), sizes)?;
            }
        }
        Ok(())
    }

    /// Checks that no index is outside its table.
    fn check_tables(&self, values: &Values<'_>) -> Result<(), BackendError> {
        for table in &self.tables {
            let indices = match table.name.as_str() {
                "input_ids" => &values.input_ids,
                "positions" => &values.positions,
                "key_positions" => &values.key_positions,
                "media_time" => &values.media_time,
                "media_index" => &values.media_index,
                _ => continue,
            };
            check_range(&self.decoder_name, &table.name, indices, table.offset, table.n_rows)?;
        }
        Ok(())
    }
}
