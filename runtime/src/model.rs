//! A model opened for use: tokenizer, pictures, caches, and one-shot answers. Conversations are sessions.

pub(crate) mod media;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use flamingo_kernels::KvFormat;
use flamingo_models::manifest::Manifest;
use flamingo_models::{Family, ModelConfig, SourceError, read_tokenizer};
use tokenizers::Tokenizer;

use crate::answer::{Answer, CacheCounts, GenerateOptions, Generated};
use crate::artifact::{Artifact, ArtifactError, both};
use crate::backend::{Backend, BackendError, Media, Step};
use crate::bank::{BankError, Shots};
use crate::image::ImageError;
use crate::native::NativeBackend;
use crate::prefix_cache::PrefixCache;
use crate::prompt::{ChunkIds, PromptEncoder, PromptError, PromptFile};
use crate::session::{Medium, Session};
use crate::video::VideoError;
use crate::visual_cache::{Fingerprint, VisualCache};

/// Most bytes of keys and values that prompts that begin alike share.
const PREFIX_BYTES: usize = 256 << 20;

/// Why a prompt was not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The artifact cannot be opened.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The prompt cannot be used.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// A bank of examples cannot be made or used.
    #[error(transparent)]
    Bank(#[from] BankError),
    /// A picture cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The tokenizer cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] SourceError),
    /// The artifact has no tokenizer.
    #[error(
        "{0}: the artifact has no tokenizer.json\n\nhint: name `tokenizer` in the recipe and compile again, or use \
         `trace`, which takes token ids"
    )]
    NoTokenizer(PathBuf),
    /// A backend that this program was built without, or that does not exist.
    #[error("backend `{name}`: {reason}\n\nhint: {hint}")]
    NoBackend {
        /// What was asked for.
        name: String,
        /// Why it is not there.
        reason: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// Reading a prompt, searching or scoring was given up; the session is as before.
    #[error("session: {reason} before the end\n\nhint: allow more time, or give less at once")]
    Interrupted {
        /// Why.
        reason: &'static str,
    },
    /// A video that needs ffmpeg cannot be decoded.
    #[error(transparent)]
    Decode(#[from] VideoError),
    /// A video without frames.
    #[error("{path}: {reason}\n\nhint: {hint}")]
    Video {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
}

/// How a model is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// `native` (default), `ort` or `tract`.
    pub backend: Option<String>,
    /// Execution provider of `ort`: `cpu` (default), `cuda`, `tensorrt`.
    pub execution_provider: Option<String>,
    /// Flavour of the graphs that `ort` runs; default: the execution provider's own.
    pub flavour: Option<String>,
    /// Whether it is an error, not a warning, if another execution provider than the one asked for would run a node.
    pub strict_provider: bool,
    /// Whether TensorRT may build engines of this artifact anew, which takes minutes; else engines that do not fit are an
    /// error.
    pub build_engines: bool,
    /// ONNX Runtime's shared library.
    pub ort_library: Option<PathBuf>,
    /// Where ONNX Runtime writes what it did: a Chrome trace of each graph, this and `_media_DATE.json` or
    /// `_decoder_DATE.json`.
    pub ort_trace: Option<PathBuf>,
    /// Threads; default: one for each physical core.
    pub n_threads: Option<NonZeroUsize>,
    /// How the native engine keeps keys and values, of text and of media; default: f32 for an artifact in f32, f16 for
    /// others.
    pub kv_format: Option<KvFormat>,
    /// Most bytes of keys and values of prompts that others may begin with; default 256 MiB, 0 keeps none. Engines other
    /// than ours keep none.
    pub prefix_bytes: Option<usize>,
    /// Where visual tokens are kept; default: a cache of the model's own, in memory. One cache may
    /// serve several models.
    pub visual_cache: Option<Arc<VisualCache>>,
    /// Whether to check the hash of every file.
    pub verify: bool,
}

impl OpenOptions {
    /// Flavour of the graphs that `ort` runs: the one asked for, or the execution provider's own.
    pub fn ort_flavour(&self) -> &str {
        self.flavour.as_deref().unwrap_or(match self.execution_provider.as_deref() {
            Some("cuda") => "cuda",
            Some("tensorrt") => "trt-10.3",
            _ => "ort-cpu",
        })
    }
}

/// An artifact ready to answer; clones are the same model.
#[derive(Clone)]
pub struct Model {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    manifest: Manifest,
    backend: Box<dyn Backend>,
    kv_format: KvFormat,
    tokenizer: Option<Tokenizer>,
    chunk_ids: ChunkIds,
    visual_cache: Arc<VisualCache>,
    fingerprint: Fingerprint,
    prefixes: Mutex<PrefixCache>,
}

impl Model {
    /// Opens an artifact.
    ///
    /// # Errors
    /// A broken artifact, or a backend that cannot run it.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Model, RunError> {
        let artifact = Artifact::open(path, options.verify)?;
        let kv_format = kv_format(&artifact.manifest, options);
        let tokenizer = path.join("tokenizer.json");
        let read_tokenizer = || tokenizer.is_file().then(|| read_tokenizer(&tokenizer)).transpose();
        let (tokenizer, backend) = both(read_tokenizer, || open_backend(&artifact, options));
        let (backend, tokenizer) = (backend?, tokenizer?);
        let Artifact { path, manifest } = artifact;
        let provider = options.execution_provider.as_deref().unwrap_or("cpu");
        let flavour = options.flavour.as_deref().unwrap_or_default();
        let arithmetic = format!("{} {provider}{flavour}", backend.arithmetic());
        let fingerprint = Fingerprint::new(&manifest, &arithmetic);
        let encoder = tokenizer.as_ref().map(|tokenizer| encoder(tokenizer, &manifest.config));
        let chunk_ids = ChunkIds::new(encoder.as_ref());
        let prefixes = PrefixCache::new(options.prefix_bytes.unwrap_or(PREFIX_BYTES));
        let shared = Shared {
            path,
            manifest,
            backend,
            kv_format,
            tokenizer,
            chunk_ids,
            visual_cache: options.visual_cache.clone().unwrap_or_default(),
            fingerprint,
            prefixes: Mutex::new(prefixes),
        };
        Ok(Model { shared: Arc::new(shared) })
    }

    /// The artifact's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.shared.manifest
    }

    /// Bytes of the keys and values of `n_tokens` tokens of text.
    pub fn kv_bytes(&self, n_tokens: usize) -> usize {
        let language = &self.shared.manifest.config.language;
        let layer = self.shared.kv_format.token_bytes(language.n_kv_heads, language.head_dim);
        layer.saturating_mul(language.n_layers).saturating_mul(n_tokens)
    }

    /// How keys and values are kept.
    pub fn kv_format(&self) -> KvFormat {
        self.shared.kv_format
    }

    /// The engine that runs it.
    pub fn backend(&self) -> &dyn Backend {
        self.shared.backend.as_ref()
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If the artifact has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer, RunError> {
        self.shared
            .tokenizer
            .as_ref()
            .ok_or_else(|| RunError::NoTokenizer(self.shared.path.clone()))
    }

    /// Token ids of a prompt.
    ///
    /// # Errors
    /// As [`PromptEncoder::encode`]; more media or tokens than the artifact is limited to.
    pub fn encode_prompt(&self, prompt: &PromptFile) -> Result<Vec<u32>, RunError> {
        let ids = self.encode_turn(None, 0, prompt)?;
        let limit = self.shared.manifest.limits.max_context;
        if ids.len() >= limit {
            return Err(PromptError::TooLong { tokens: ids.len(), limit }.into());
        }
        Ok(ids)
    }

    /// Token ids of a prompt after the token `last` and `n_media` media.
    pub(crate) fn encode_turn(
        &self,
        last: Option<u32>,
        n_media: usize,
        prompt: &PromptFile,
    ) -> Result<Vec<u32>, RunError> {
        let encoder = encoder(self.tokenizer()?, &self.shared.manifest.config);
        let ids = self.shared.chunk_ids.encode_after(&encoder, last, prompt)?;
        let limit = self.shared.manifest.limits.max_images;
        let config = &self.shared.manifest.config;
        let n_places = config.n_places();
        match n_media + prompt.media().count() {
            0 if config.family == Family::FlamingoPytorch => Err(PromptError::NoMedia.into()),
            given if n_places > 1 && given > n_places => {
                Err(PromptError::NoPlace { given, limit: n_places }.into())
            }
            given if given > limit => Err(PromptError::TooManyMedia { given, limit }.into()),
            _ => Ok(ids),
        }
    }

    /// Encodes a prompt's media, or finds them in memory.
    pub(crate) fn media(
        &self,
        prompt: &PromptFile,
        counts: &mut CacheCounts,
    ) -> Result<Vec<Medium>, RunError> {
        let medium = |segment| {
            let (medium, found) = self.medium(&self.pixels(segment)?)?;
            counts.count(found);
            Ok(medium)
        };
        prompt.media().map(medium).collect()
    }

    /// The cache of prompts that begin alike.
    pub(crate) fn prefixes(&self) -> MutexGuard<'_, PrefixCache> {
        self.shared.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty conversation of up to the artifact's limit of tokens.
    ///
    /// # Errors
    /// If the memory for its keys and values cannot be had.
    pub fn session(&self) -> Result<Session, RunError> {
        Session::new(self.clone(), self.manifest().limits.max_context)
    }

    /// Answers a prompt; `on_text` is given the text as it comes.
    ///
    /// # Errors
    /// Whatever is wrong with prompt, pictures or model.
    pub fn generate(
        &self,
        prompt: &PromptFile,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, RunError> {
        self.generate_after(&Shots::default(), prompt, options, on_text)
    }

    /// Answers a prompt that stands after examples of a bank, as [`Model::generate`] would if it began with them.
    ///
    /// # Errors
    /// As [`Model::generate`]; a bank of another model, or one that is damaged.
    pub fn generate_after(
        &self,
        shots: &Shots,
        prompt: &PromptFile,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Answer, RunError> {
        let started = Instant::now();
        let ids = self.encode_prompt(&shots.before(prompt))?;
        let mut session = self.session_for(ids.len(), options)?;
        session.append_encoded(shots, prompt, &ids, &options.limits)?;
        session.answer(started, options, on_text)
    }

    /// Continues token ids over encoded media.
    ///
    /// # Errors
    /// Ids, media or lengths that do not fit the model.
    pub fn generate_ids(
        &self,
        ids: &[u32],
        media: &[Arc<Media>],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32),
    ) -> Result<Generated, RunError> {
        let mut session = self.session_for(ids.len(), options)?;
        let media: Vec<Medium> = media.iter().map(Arc::clone).map(Medium::from).collect();
        session.append_ids(ids, &media, &options.limits)?;
        let mut tokens = session.tokens(options);
        while let Some(id) = tokens.next_id()? {
            on_token(id);
        }
        Ok(tokens.finish())
    }

    /// A session with room for a prompt and what is generated.
    fn session_for(&self, n_tokens: usize, options: &GenerateOptions) -> Result<Session, RunError> {
        let wanted = n_tokens.saturating_add(options.max_new_tokens);
        let mut session =
            Session::new(self.clone(), self.manifest().limits.max_context.min(wanted))?;
        if options.slide {
            session.slide()?;
        }
        Ok(session)
    }

    /// Encodes raw pixel values [n_media, n_frames, 3, size, size]; the parity hook.
    ///
    /// # Errors
    /// Sizes that do not fit the model.
    pub fn encode_pixels(
        &self,
        pixel_values: &[f32],
        n_media: usize,
        n_frames: usize,
    ) -> Result<Vec<Arc<Media>>, RunError> {
        let media = self.shared.backend.encode(pixel_values, n_media, n_frames)?;
        Ok(media.into_iter().map(Arc::new).collect())
    }

    /// Logits [len, vocabulary] of a whole sequence; the parity hook.
    ///
    /// # Errors
    /// Ids, media or lengths that do not fit the model.
    pub fn logits(&self, ids: &[u32], media: &[Arc<Media>]) -> Result<Vec<f32>, RunError> {
        let limit = self.shared.manifest.limits.max_context;
        if ids.len() > limit {
            return Err(PromptError::TooLong { tokens: ids.len(), limit }.into());
        }
        let config = &self.shared.manifest.config;
        let mut sequence = self.shared.backend.new_sequence(ids.len().max(1))?;
        let media_time = flamingo_models::media_time(config.family, &config.tokens, ids);
        let logit_rows: Vec<usize> = (0..ids.len()).collect();
        let step = Step { input_ids: ids, media_time: &media_time, media, logit_rows: &logit_rows };
        Ok(sequence.advance(&step)?)
    }
}

fn encoder<'a>(tokenizer: &'a Tokenizer, config: &'a ModelConfig) -> PromptEncoder<'a> {
    PromptEncoder { tokenizer, family: config.family, tokens: &config.tokens }
}

/// How the native engine keeps keys and values of a model whose layer groups are stored so, unless it is told.
pub fn default_kv_format(precision: &BTreeMap<String, String>) -> KvFormat {
    match precision.values().all(|precision| precision == "f32") {
        true => KvFormat::F32,
        false => KvFormat::F16,
    }
}

/// How keys and values are kept: engines other than ours keep f32.
fn kv_format(manifest: &Manifest, options: &OpenOptions) -> KvFormat {
    let is_native = options.backend.as_deref().is_none_or(|name| name == "native");
    match options.kv_format {
        _ if !is_native => KvFormat::F32,
        Some(format) => format,
        None => default_kv_format(&manifest.precision),
    }
}

fn open_backend(artifact: &Artifact, options: &OpenOptions) -> Result<Box<dyn Backend>, RunError> {
    match options.backend.as_deref().unwrap_or("native") {
        "native" => {
            let graphs = artifact.load()?;
            let (media, decoder) = (&graphs.media, &graphs.decoder);
            let backend = NativeBackend::new(media, decoder, graphs.weights, options.n_threads)?;
            Ok(Box::new(backend.with_kv_format(kv_format(&artifact.manifest, options))))
        }
        "ort" => open_ort(artifact, options),
        "tract" => open_tract(artifact),
        other => Err(RunError::NoBackend {
            name: other.to_owned(),
            reason: "there is no such backend",
            hint: "choose native, ort or tract",
        }),
    }
}

/// Opens the graphs made for the execution provider, or those asked for.
#[cfg(feature = "ort")]
fn open_ort(artifact: &Artifact, options: &OpenOptions) -> Result<Box<dyn Backend>, RunError> {
    use crate::engines::Engines;
    use crate::ort::{EnginePlan, ExecutionProvider, OrtBackend, OrtOptions};
    let name = options.execution_provider.as_deref().unwrap_or("cpu");
    let no_provider = || RunError::NoBackend {
        name: format!("ort, execution provider {name}"),
        reason: "there is no such execution provider",
        hint: "choose cpu, cuda or tensorrt",
    };
    let execution_provider = ExecutionProvider::from_name(name).ok_or_else(no_provider)?;
    let flavour = options.ort_flavour();
    let graph = |stage| artifact.graph_path(stage, flavour);
    let (mut profiles, mut engines) = (None, None);
    if execution_provider == ExecutionProvider::TensorRt {
        profiles = Some(artifact.profiles(flavour)?);
        engines = Some(EnginePlan {
            engines: Engines::of(&artifact.path),
            built_with: artifact.built_with(flavour)?,
            build: options.build_engines,
        });
    }
    let options = OrtOptions {
        library: options.ort_library.clone(),
        n_threads: options.n_threads,
        execution_provider,
        profiles,
        engines,
        media_batch: None,
        strict: options.strict_provider,
        trace: options.ort_trace.clone(),
    };
    Ok(Box::new(OrtBackend::open(&graph("media")?, &graph("decoder")?, &options)?))
}

#[cfg(not(feature = "ort"))]
fn open_ort(_artifact: &Artifact, _options: &OpenOptions) -> Result<Box<dyn Backend>, RunError> {
    Err(RunError::NoBackend {
        name: "ort".into(),
        reason: "this program was built without it",
        hint: "build with `--features ort`",
    })
}

#[cfg(feature = "tract")]
fn open_tract(artifact: &Artifact) -> Result<Box<dyn Backend>, RunError> {
    let graph = |stage| artifact.graph_path(stage, "portable");
    Ok(Box::new(crate::tract::TractBackend::open(&graph("media")?, &graph("decoder")?)?))
}

#[cfg(not(feature = "tract"))]
fn open_tract(_artifact: &Artifact) -> Result<Box<dyn Backend>, RunError> {
    Err(RunError::NoBackend {
        name: "tract".into(),
        reason: "this program was built without it",
        hint: "build with `--features tract`",
    })
}
