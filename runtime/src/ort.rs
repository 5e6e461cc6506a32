//! The ONNX Runtime backend: the artifact's ONNX files in ONNX Runtime sessions.
//!
//! ONNX Runtime is a shared library that is found when a backend is opened (see [`OrtOptions`]);
//! nothing is linked or downloaded when this program is built. A process can use one library.

mod library;
mod placement;
mod provider;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use flamingo_ir::{DType, Graph};
use flamingo_models::profile::{MAX_BATCH, Profile, Profiles, shapes_text};
use half::f16;
use half::slice::HalfFloatSliceExt;
use ort::environment::Environment;
use ort::ep::{CUDA, ExecutionProviderDispatch, TensorRT};
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::SessionBuilder;
use ort::session::{IoBinding, Session};
use ort::value::{DynTensorValueType, DynValue, Tensor};

use crate::backend::{Backend, BackendError, Media, Sequence};
use crate::engines::{BuiltWith, Engines, hash_of, loaded_tensorrt};
use crate::onnx_graph::{Buffers, Engine, Input, OnnxBackend, Stage, read_model};

pub use library::LIBRARY_VARIABLE;

/// Shapes of inputs in a profile.
type Shapes = BTreeMap<String, Vec<usize>>;

/// Name on the command line.
const NAME: &str = "ort";

/// Most nodes that a message names.
const NODES_NAMED: usize = 8;

/// What executes the nodes of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ExecutionProvider {
    /// The CPU.
    #[default]
    Cpu,
    /// The first NVIDIA GPU, through CUDA.
    Cuda,
    /// The first NVIDIA GPU, through TensorRT.
    TensorRt,
}

impl ExecutionProvider {
    /// The provider called `name` on the command line.
    pub fn from_name(name: &str) -> Option<ExecutionProvider> {
        match name {
            "cpu" => Some(ExecutionProvider::Cpu),
            "cuda" => Some(ExecutionProvider::Cuda),
            "tensorrt" => Some(ExecutionProvider::TensorRt),
            _ => None,
        }
    }

    /// Where it computes.
    fn device(self) -> AllocationDevice<'static> {
        match self {
            ExecutionProvider::Cpu => AllocationDevice::CPU,
            ExecutionProvider::Cuda | ExecutionProvider::TensorRt => AllocationDevice::CUDA,
        }
    }

    /// ONNX Runtime's name of it.
    fn onnx_runtime_name(self) -> &'static str {
        match self {
            ExecutionProvider::Cpu => "CPUExecutionProvider",
            ExecutionProvider::Cuda => "CUDAExecutionProvider",
            ExecutionProvider::TensorRt => "TensorrtExecutionProvider",
        }
    }

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            ExecutionProvider::Cpu => "cpu",
            ExecutionProvider::Cuda => "cuda",
            ExecutionProvider::TensorRt => "tensorrt",
        }
    }

    /// What registers it; nothing for the CPU, which is always there. A registration that fails
    /// is an error. The device is always named: without it, a machine without one is found out
    /// only when a session is made.
    fn dispatch(
        self,
        profiles: &[Profile],
        options: &OrtOptions,
    ) -> Vec<ExecutionProviderDispatch> {
        let cuda = || CUDA::default().with_device_id(0).build().error_on_failure();
        match self {
            ExecutionProvider::Cpu => Vec::new(),
            ExecutionProvider::Cuda => vec![cuda()],
            // What TensorRT cannot take, CUDA does.
            ExecutionProvider::TensorRt => {
                vec![tensor_rt(profiles, options).build().error_on_failure(), cuda()]
            }
        }
    }
}

/// TensorRT with engines for these sizes, kept from one start to the next. The graph says what is f16.
fn tensor_rt(profiles: &[Profile], options: &OrtOptions) -> TensorRT {
    let mut provider = TensorRT::default().with_device_id(0).with_layer_norm_fp32_fallback(true);
    if !profiles.is_empty() {
        let shapes = |of: fn(&Profile) -> &Shapes| shapes_text(profiles.iter().map(of));
        provider = provider
            .with_profile_min_shapes(shapes(|profile| &profile.min))
            .with_profile_opt_shapes(shapes(|profile| &profile.opt))
            .with_profile_max_shapes(shapes(|profile| &profile.max));
    }
    match &options.engines {
        None => provider,
        Some(plan) => {
            let folder = plan.engines.folder().display();
            provider
                .with_engine_cache(true)
                .with_engine_cache_path(&folder)
                .with_timing_cache(true)
                .with_timing_cache_path(&folder)
        }
    }
}

/// Where TensorRT keeps its engines, and whether it may build some.
#[derive(Clone, Debug)]
pub struct EnginePlan {
    /// Those of the artifact.
    pub engines: Engines,
    /// What they depend on but for what the process has loaded.
    pub built_with: BuiltWith,
    /// Whether to build all anew, which takes minutes; else engines that do not fit are an error.
    pub build: bool,
}

impl EnginePlan {
    /// The plan with what is loaded, once a session of the provider was begun.
    fn of_this_process(&self, library: Option<&Path>) -> EnginePlan {
        let mut plan = self.clone();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        plan.built_with.tensorrt = loaded_tensorrt(&maps);
        plan.built_with.provider = provider_hash(library);
        plan
    }

    /// Before sessions are made: there are engines that fit, or none and they may be built.
    fn begin(&self) -> Result<(), BackendError> {
        let place = || self.engines.folder().display().to_string();
        if self.build {
            return self.engines.begin().map_err(|error| BackendError::Engine {
                engine: NAME,
                place: place(),
                reason: error.to_string(),
                hint: "make the artifact's folder writable",
            });
        }
        match &self.engines.problems(&self.built_with)[..] {
            [] => Ok(()),
            problems => Err(BackendError::Engine {
                engine: NAME,
                place: place(),
                reason: format!("no engines that fit: {}", problems.join("; ")),
                hint: "run `flamingoc engine build ARTIFACT` on this device, which takes minutes",
            }),
        }
    }
}

/// Hash of the TensorRT provider beside the library that is used, or would be.
pub fn provider_hash(library: Option<&Path>) -> Option<String> {
    let file = library_folder(library)?.join("libonnxruntime_providers_tensorrt.so");
    hash_of(&[&file], "").ok()
}

/// How ONNX Runtime is used.
#[derive(Clone, Debug, Default)]
pub struct OrtOptions {
    /// The shared library, or a folder that has it. Default: the path in [`LIBRARY_VARIABLE`],
    /// else the first that is new enough next to the program, in
    /// `target/test-deps/onnxruntime`, or where the system keeps libraries.
    pub library: Option<PathBuf>,
    /// Threads within a node; default: ONNX Runtime's, one for each physical core.
    pub n_threads: Option<NonZeroUsize>,
    /// What executes the nodes.
    pub execution_provider: ExecutionProvider,
    /// The sizes for which TensorRT builds engines; it takes none that it was not told.
    pub profiles: Option<Profiles>,
    /// Where TensorRT keeps its engines; none: it builds them at every start.
    pub engines: Option<EnginePlan>,
    /// Media that are encoded in one run; default: one on the CPU, whose cores one picture fills, and as many as engines
    /// are built for on a GPU.
    pub media_batch: Option<NonZeroUsize>,
    /// Whether it is an error, not a warning, if another provider would run a node. Nodes that compute target shapes do
    /// not count: they always run on the CPU.
    pub strict: bool,
    /// Where ONNX Runtime writes a Chrome trace of each graph when the session ends: this and `_STAGE_DATE.json`.
    pub trace: Option<PathBuf>,
}

/// Runs the ONNX files of an artifact with ONNX Runtime.
pub struct OrtBackend {
    inner: OnnxBackend<OrtEngine>,
    warnings: Mutex<Vec<String>>,
    execution_provider: ExecutionProvider,
}

impl fmt::Debug for OrtBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.execution_provider.name();
        f.debug_struct("OrtBackend").field("execution_provider", &name).finish_non_exhaustive()
    }
}

impl OrtBackend {
    /// Loads the two graphs of one flavour. Their weights lie where the files say, relative to the
    /// files' own folder.
    ///
    /// # Errors
    /// If there is no usable library, if the execution provider cannot be had (there is no falling
    /// back to the CPU), or if a file is not a graph of an artifact.
    pub fn open(
        media_onnx: &Path,
        decoder_onnx: &Path,
        options: &OrtOptions,
    ) -> Result<OrtBackend, BackendError> {
        let (media, decoder) = (read_model(NAME, media_onnx)?, read_model(NAME, decoder_onnx)?);
        let environment = library::load(options.library.as_deref())?;
        let mut plan = None;
        if let Some(given) = &options.engines {
            // A provider that cannot be had is told before its engines are asked for.
            builder(&environment, &[], options).map_err(|reason| no_provider(options, &reason))?;
            let given = given.of_this_process(options.library.as_deref());
            given.begin()?;
            plan = Some(given);
        }
        let engine = OrtEngine {
            media: OrtStage::new(&environment, "media", media_onnx, &media.graph, options)?,
            decoder: OrtStage::new(&environment, "decoder", decoder_onnx, &decoder.graph, options)?,
            media_batch: match (options.media_batch, options.execution_provider) {
                (Some(batch), _) => batch.get(),
                (None, ExecutionProvider::Cpu) => 1,
                (None, _) => MAX_BATCH,
            },
        };
        if let Some(plan) = plan.filter(|plan| plan.build) {
            let place = plan.engines.folder().display().to_string();
            plan.engines.finish(&plan.built_with).map_err(|error| refused(&place, error))?;
        }
        let stages = [&engine.media, &engine.decoder];
        let warnings = stages.iter().filter_map(|stage| stage.warning.clone()).collect();
        let inner = OnnxBackend::new(&media.graph, &decoder.graph, engine)?;
        if options.execution_provider != ExecutionProvider::Cpu {
            inner.warm_up()?;
        }
        Ok(OrtBackend {
            warnings: Mutex::new(warnings),
            inner,
            execution_provider: options.execution_provider,
        })
    }

    /// What executes the nodes.
    pub fn execution_provider(&self) -> ExecutionProvider {
        self.execution_provider
    }
}

impl Backend for OrtBackend {
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

    fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct OrtEngine {
    media: OrtStage,
    decoder: OrtStage,
    media_batch: usize,
}

impl OrtEngine {
    fn stage(&self, stage: Stage) -> &OrtStage {
        match stage {
            Stage::Media => &self.media,
            Stage::Decoder => &self.decoder,
        }
    }
}

/// One graph as a session.
struct OrtStage {
    place: String,
    /// Nodes that another provider runs, if there are any.
    warning: Option<String>,
    inputs: Vec<(String, DType)>,
    outputs: Vec<String>,
    /// Where keys and values stay from step to step.
    device: AllocationDevice<'static>,
    session: Mutex<Bound>,
}

/// A session and what its inputs and outputs are bound to.
struct Bound {
    session: Session,
    binding: IoBinding,
}

impl OrtStage {
    fn new(
        environment: &Environment,
        stage: &str,
        path: &Path,
        graph: &Graph,
        options: &OrtOptions,
    ) -> Result<OrtStage, BackendError> {
        let place = path.display().to_string();
        let profiles = options.profiles.as_ref().map_or(&[][..], |profiles| profiles.of(stage));
        let mut builder = builder(environment, profiles, options)
            .map_err(|reason| no_provider(options, &reason))?;
        if let Some(trace) = &options.trace {
            let mut file = trace.clone().into_os_string();
            file.push(format!("_{stage}"));
            builder = builder.with_profiling(file).map_err(|error| refused(&place, error))?;
        }
        let session = builder.commit_from_file(path).map_err(|error| refused(&place, error))?;
        let elsewhere = elsewhere(&session, options).map_err(|error| refused(&place, error))?;
        if let Some(reason) = elsewhere.as_ref().filter(|_| options.strict) {
            return Err(BackendError::Engine {
                engine: NAME,
                place,
                reason: reason.clone(),
                hint: "leave out `--strict-ep`, or see what `flamingoc inspect --coverage` says",
            });
        }
        let binding = session.create_binding().map_err(|error| refused(&place, error))?;
        let inputs = graph.inputs().iter();
        let stage = OrtStage {
            warning: elsewhere.map(|reason| format!("{place}: {reason}")),
            place,
            inputs: inputs.map(|(name, id)| (name.clone(), graph.fact(*id).dtype)).collect(),
            outputs: graph.outputs().iter().map(|(name, _)| name.clone()).collect(),
            device: options.execution_provider.device(),
            session: Mutex::new(Bound { session, binding }),
        };
        stage.check_names()?;
        Ok(stage)
    }

    /// Checks that the session takes and gives what the graph does.
    fn check_names(&self) -> Result<(), BackendError> {
        let bound = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let session = &bound.session;
        let mut missing = Vec::new();
        let inputs: Vec<&String> = self.inputs.iter().map(|(name, _)| name).collect();
        for (kind, expected, found) in [
            ("input", inputs, session.inputs()),
            ("output", self.outputs.iter().collect(), session.outputs()),
        ] {
            let absent = expected.iter().filter(|name| found.iter().all(|f| f.name() != **name));
            missing.extend(absent.map(|name| format!("{kind} `{name}`")));
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(refused(&self.place, format!("no {}", missing.join(", ")))),
        }
    }

    /// Runs the graph with bound inputs and outputs: keys and values of tokens stay where the provider computes, what is
    /// read here comes to the CPU.
    fn run(
        &self,
        inputs: &[Input<'_, DynValue>],
        buffers: &mut Buffers<DynValue>,
    ) -> Result<Vec<DynValue>, BackendError> {
        let failed = |error: ort::Error| refused(&self.place, error);
        let mut bound = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let Bound { session, binding } = &mut *bound;
        binding.clear();
        for ((name, dtype), input) in self.inputs.iter().zip(inputs) {
            match input {
                Input::Kept(value) => binding.bind_input(name, value),
                Input::Buffer(place) => binding.bind_input(name, &*buffers.tensors[*place].1),
                input => value_from_input(input, *dtype)
                    .and_then(|value| binding.bind_input(name, &value)),
            }
            .map_err(failed)?;
        }
        let mut in_place = vec![false; self.outputs.len()];
        for (place, tensor) in buffers.tensors.iter_mut().filter(|_| buffers.in_place) {
            // A tensor that is not ONNX Runtime's own, or is also a fork's, is read, and the output is a new one.
            let Some(tensor) = Arc::get_mut(tensor) else { continue };
            in_place[*place] =
                binding.bind_output(&self.outputs[*place], tensor.view_mut()).is_ok();
        }
        let others = self.outputs.iter().zip(&in_place).filter(|(_, in_place)| !**in_place);
        for (name, _) in others {
            let device = match name.starts_with("present_") {
                true => self.device.clone(),
                false => AllocationDevice::CPU,
            };
            let memory = memory_of(device).map_err(failed)?;
            binding.bind_output_to_device(name, &memory).map_err(failed)?;
        }
        let mut outputs = session.run_binding(binding).map_err(failed)?;
        let take = |name: &String| {
            let missing = || refused(&self.place, format!("no output `{name}`"));
            outputs.remove(name).ok_or_else(missing)
        };
        self.outputs.iter().map(take).collect()
    }

    /// An input where the provider computes.
    fn keep(&self, place: usize, input: &Input<'_, DynValue>) -> Result<DynValue, BackendError> {
        let dtype = self.inputs.get(place).map_or(DType::F32, |(_, dtype)| *dtype);
        let failed = |error: ort::Error| refused(&self.place, error);
        let value = value_from_input(input, dtype).map_err(failed)?;
        let is_empty = matches!(input, Input::Numbers { data, .. } if data.is_empty());
        if is_empty || self.device.as_str() == AllocationDevice::CPU.as_str() {
            return Ok(value);
        }
        let tensor = value.view().downcast::<DynTensorValueType>().map_err(failed)?;
        tensor.to(self.device.clone(), 0).map(|tensor| tensor.into_dyn()).map_err(failed)
    }
}

/// What is to be said of nodes that another provider than the one asked for runs.
fn elsewhere(session: &Session, options: &OrtOptions) -> Result<Option<String>, ort::Error> {
    let provider = options.execution_provider;
    if provider == ExecutionProvider::Cpu {
        return Ok(None);
    }
    let others: Vec<String> = placement::placements(session)?
        .iter()
        .filter(|placed| placed.provider != provider.onnx_runtime_name() && !placed.is_of_shape())
        .map(|placed| format!("{} `{}` ({})", placed.op_type, placed.node, placed.provider))
        .collect();
    if others.is_empty() {
        return Ok(None);
    }
    let more = match others.len().saturating_sub(NODES_NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let named = others.iter().take(NODES_NAMED).cloned().collect::<Vec<_>>().join(", ");
    let (name, n) = (provider.name(), others.len());
    Ok(Some(format!("expected every node on {name}, found {n} elsewhere: {named}{more}")))
}

/// A copy in the CPU's memory of a tensor that is elsewhere.
fn on_cpu(tensor: &DynValue) -> Result<Option<DynValue>, ort::Error> {
    let tensor = tensor.view().downcast::<DynTensorValueType>()?;
    match tensor.memory_info().is_cpu_accessible() {
        true => Ok(None),
        false => tensor.to(AllocationDevice::CPU, 0).map(|tensor| Some(tensor.into_dyn())),
    }
}

fn memory_of(device: AllocationDevice<'_>) -> Result<MemoryInfo<'static>, ort::Error> {
    MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default)
}

/// A session's options. Plans of memory are off: they are kept for each set of sizes, and every
/// step has other sizes.
fn builder(
    environment: &Environment,
    profiles: &[Profile],
    options: &OrtOptions,
) -> Result<SessionBuilder, String> {
    let text = |error: ort::Error<SessionBuilder>| error.to_string();
    let builder = Session::builder(environment).map_err(|error| error.to_string())?;
    let mut builder = builder.with_memory_pattern(false).map_err(text)?;
    if let Some(n_threads) = options.n_threads {
        builder = builder.with_intra_threads(n_threads.get()).map_err(text)?;
    }
    let providers = options.execution_provider.dispatch(profiles, options);
    if providers.is_empty() {
        return Ok(builder);
    }
    let (key, value) = placement::RECORD;
    builder = builder.with_config_entry(key, value).map_err(text)?;
    builder.with_execution_providers(providers).map_err(text)
}

/// An input as a tensor of the type that the graph takes.
fn value_from_input(input: &Input<'_, DynValue>, dtype: DType) -> Result<DynValue, ort::Error> {
    Ok(match input {
        Input::Numbers { shape, data } if dtype == DType::F16 => {
            let mut halves = vec![f16::ZERO; data.len()];
            halves.convert_from_f32_slice(data);
            Tensor::from_array((shape.as_slice(), halves))?.into_dyn()
        }
        Input::Numbers { shape, data } => {
            Tensor::from_array((shape.as_slice(), data.to_vec()))?.into_dyn()
        }
        Input::Indices(values) => Tensor::from_array(([values.len()], values.clone()))?.into_dyn(),
        Input::Kept(_) | Input::Buffer(_) => {
            return Err(ort::Error::new("a tensor that is kept already"));
        }
    })
}

fn no_provider(options: &OrtOptions, reason: &str) -> BackendError {
    provider::unavailable(options.execution_provider, reason)
}

fn refused(place: &str, reason: impl fmt::Display) -> BackendError {
    BackendError::Engine {
        engine: NAME,
        place: place.to_owned(),
        reason: reason.to_string(),
        hint: "run with `--backend native`, or use a newer ONNX Runtime",
    }
}

impl Engine for OrtEngine {
    type Tensor = DynValue;

    const NAME: &'static str = NAME;

    fn media_batch(&self) -> usize {
        self.media_batch
    }

    fn run(
        &self,
        stage: Stage,
        inputs: &[Input<'_, DynValue>],
        buffers: &mut Buffers<DynValue>,
    ) -> Result<Vec<DynValue>, BackendError> {
        self.stage(stage).run(inputs, buffers)
    }

    fn keep(
        &self,
        stage: Stage,
        place: usize,
        input: &Input<'_, DynValue>,
    ) -> Result<DynValue, BackendError> {
        self.stage(stage).keep(place, input)
    }

    fn numbers<'a>(&self, tensor: &'a DynValue) -> Result<Cow<'a, [f32]>, BackendError> {
        let here = on_cpu(tensor).map_err(|error| refused("outputs", error))?;
        if let Some(here) = here {
            return self.numbers(&here).map(|data| Cow::Owned(data.into_owned()));
        }
        if let Ok((_, halves)) = tensor.try_extract_tensor::<f16>() {
            return Ok(Cow::Owned(halves.to_f32_vec()));
        }
        let data = tensor.try_extract_tensor::<f32>();
        data.map(|(_, data)| Cow::Borrowed(data)).map_err(|error| refused("outputs", error))
    }
}

/// The folder of the library in use, else of the one that `library` or [`LIBRARY_VARIABLE`] names, else the first known
/// place that has one, usable or not: ONNX Runtime looks there for its provider libraries.
pub fn library_folder(library: Option<&Path>) -> Option<PathBuf> {
    library::folder(library)
}

/// What `doctor` says: the library in use, or why there is none; then each execution provider and
/// whether it can be had here, tried for real.
pub fn report(library: Option<&Path>) -> (String, Vec<(&'static str, String)>) {
    let environment = match library::load(library) {
        Ok(environment) => environment,
        Err(error) => return (format!("not usable: {error}"), Vec::new()),
    };
    let path = library::loaded_path().map(|path| path.display().to_string()).unwrap_or_default();
    let providers = [ExecutionProvider::Cpu, ExecutionProvider::Cuda, ExecutionProvider::TensorRt];
    let state = |execution_provider: ExecutionProvider| {
        let options = OrtOptions { execution_provider, ..OrtOptions::default() };
        match builder(&environment, &[], &options) {
            Ok(_) => "available".to_owned(),
            Err(reason) => format!("not available: {reason}"),
        }
    };
    (path, providers.map(|provider| (provider.name(), state(provider))).to_vec())
}
