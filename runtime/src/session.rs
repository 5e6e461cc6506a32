//! A model opened for use, and sessions that answer prompts.

mod media;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use flamingo_kernels::KvFormat;
use flamingo_models::manifest::Manifest;
use flamingo_models::{MediaClock, SourceError, read_tokenizer};
use tokenizers::Tokenizer;

use crate::artifact::{Artifact, ArtifactError};
use crate::backend::{Backend, BackendError, Media, Step};
use crate::image::ImageError;
use crate::native::NativeBackend;
use crate::prompt::{PromptEncoder, PromptError, PromptFile};
use crate::sampling::{Sampler, SamplingOptions};
use crate::video::VideoError;
use crate::visual_cache::{Fingerprint, Found, VisualCache};

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
    /// A picture cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A video that needs ffmpeg cannot be decoded.
    #[error(transparent)]
    Decode(#[from] VideoError),
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
    /// ONNX Runtime's shared library.
    pub ort_library: Option<PathBuf>,
    /// Threads; default: one for each physical core.
    pub n_threads: Option<NonZeroUsize>,
    /// How the native engine keeps keys and values, of text and of media; default: f32 for an artifact in f32, f16 for
    /// others.
    pub kv_format: Option<KvFormat>,
    /// Whether to check the hash of every file.
    pub verify: bool,
    /// Where visual tokens are kept; default: a cache of the model's own, in memory. One cache may
    /// serve several models.
    pub visual_cache: Option<Arc<VisualCache>>,
}

/// An artifact ready to answer.
pub struct Model {
    path: PathBuf,
    manifest: Manifest,
    backend: Box<dyn Backend>,
    kv_format: KvFormat,
    tokenizer: Option<Tokenizer>,
    visual_cache: Arc<VisualCache>,
    fingerprint: Fingerprint,
}

impl Model {
    /// Opens an artifact.
    ///
    /// # Errors
    /// A broken artifact, or a backend that cannot run it.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Model, RunError> {
        let artifact = Artifact::open(path, options.verify)?;
        let kv_format = kv_format(&artifact.manifest, options);
        let backend = open_backend(&artifact, options)?;
        let tokenizer = path.join("tokenizer.json");
        let tokenizer = match tokenizer.is_file() {
            true => Some(read_tokenizer(&tokenizer)?),
            false => None,
        };
        let Artifact { path, manifest } = artifact;
        let provider = options.execution_provider.as_deref().unwrap_or("cpu");
        let arithmetic = format!("{} {provider}", backend.arithmetic());
        Ok(Model {
            fingerprint: Fingerprint::new(&manifest, &arithmetic),
            visual_cache: options.visual_cache.clone().unwrap_or_default(),
            path,
            manifest,
            backend,
            kv_format,
            tokenizer,
        })
    }

    /// The artifact's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Bytes of the keys and values of `n_tokens` tokens of text.
    pub fn kv_bytes(&self, n_tokens: usize) -> usize {
        let language = &self.manifest.config.language;
        let layer = self.kv_format.token_bytes(language.n_kv_heads, language.head_dim);
        layer.saturating_mul(language.n_layers).saturating_mul(n_tokens)
    }

    /// The engine that runs it.
    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If the artifact has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer, RunError> {
        self.tokenizer.as_ref().ok_or_else(|| RunError::NoTokenizer(self.path.clone()))
    }

    /// Token ids of a prompt.
    ///
    /// # Errors
    /// As [`PromptEncoder::encode`]; more media or tokens than the artifact is limited to.
    pub fn encode_prompt(&self, prompt: &PromptFile) -> Result<Vec<u32>, RunError> {
        let config = &self.manifest.config;
        let encoder = PromptEncoder {
            tokenizer: self.tokenizer()?,
            family: config.family,
            tokens: &config.tokens,
        };
        let ids = encoder.encode(prompt)?;
        let (given, limit) = (prompt.media().count(), self.manifest.limits.max_images);
        if given > limit {
            return Err(PromptError::TooManyMedia { given, limit }.into());
        }
        let limit = self.manifest.limits.max_context;
        if ids.len() >= limit {
            return Err(PromptError::TooLong { tokens: ids.len(), limit }.into());
        }
        Ok(ids)
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
        let started = Instant::now();
        let tokenizer = self.tokenizer()?;
        let ids = self.encode_prompt(prompt)?;
        let mut media = Vec::new();
        let mut cache = CacheCounts::default();
        for segment in prompt.media() {
            let (medium, found) = self.medium(&self.pixels(segment)?)?;
            media.push(medium);
            cache.count(found);
        }
        let mut stream = tokenizer.decode_stream(true);
        let mut text = String::new();
        let mut decoded = Ok(());
        let mut first_token_ms = None;
        let decode_started = std::cell::Cell::new(started);
        let mut on_token = |id: u32| {
            if first_token_ms.is_none() {
                first_token_ms = Some(started.elapsed().as_secs_f64() * 1e3);
                decode_started.set(Instant::now());
            }
            match stream.step(id) {
                Ok(Some(piece)) => {
                    on_text(&piece);
                    text.push_str(&piece);
                }
                Ok(None) => {}
                Err(error) => decoded = Err(PromptError::Tokenizer(error.to_string())),
            }
        };
        let generated = self.generate_ids(&ids, &media, options, &mut on_token)?;
        decoded?;
        let decode_s = decode_started.get().elapsed().as_secs_f64();
        // The first token comes from the prompt's pass; the rate is that of the steps after it.
        let n_steps = generated.n_steps.saturating_sub(1);
        let decode_tokens_per_s = (n_steps > 0).then(|| n_steps as f64 / decode_s);
        Ok(Answer {
            text,
            tokens: generated.tokens,
            n_prompt_tokens: ids.len(),
            stop: generated.stop,
            timings: Timings { first_token_ms: first_token_ms.unwrap_or(0.0), decode_tokens_per_s },
            cache,
        })
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
        let config = &self.manifest.config;
        let limit = self.manifest.limits.max_context;
        if ids.is_empty() {
            return Err(PromptError::Empty.into());
        }
        if ids.len() > limit {
            return Err(PromptError::TooLong { tokens: ids.len(), limit }.into());
        }
        let room = (limit - ids.len()).saturating_add(1);
        let max_context = limit.min(ids.len().saturating_add(options.max_new_tokens));
        let mut sequence = self.backend.new_sequence(max_context)?;
        let mut clock = MediaClock::new(config.family, &config.tokens);
        let media_time: Vec<u32> = ids.iter().map(|id| clock.tick(*id)).collect();
        let last = [ids.len() - 1];
        let prompt = Step { input_ids: ids, media_time: &media_time, media, logit_rows: &last };
        let mut logits = sequence.advance(&prompt)?;
        let mut sampler = Sampler::new(options.sampling.clone());
        let mut forbidden: Vec<u32> =
            if options.allow_image_token { vec![] } else { vec![config.tokens.image] };
        forbidden.extend(config.tokens.around_image.filter(|_| !options.allow_image_token));
        let stops = self.stops(options);
        let mut history = ids.to_vec();
        let mut generated = Generated { tokens: Vec::new(), n_steps: 0, stop: Stop::Length };
        for n in 0..options.max_new_tokens {
            if n == room {
                generated.stop = Stop::Context;
                break;
            }
            if n > 0 {
                let step = Step {
                    input_ids: &history[history.len() - 1..],
                    media_time: &[clock.generated()],
                    media,
                    logit_rows: &[0],
                };
                logits = sequence.advance(&step)?;
            }
            generated.n_steps += 1;
            let id = sampler.choose(&mut logits, &forbidden, &history);
            if stops.contains(&id) {
                generated.stop = Stop::Token(id);
                break;
            }
            history.push(id);
            generated.tokens.push(id);
            on_token(id);
        }
        Ok(generated)
    }

    fn stops(&self, options: &GenerateOptions) -> Vec<u32> {
        if options.ignore_stops {
            return Vec::new();
        }
        let tokens = &self.manifest.config.tokens;
        let mut stops = tokens.stop.clone();
        stops.extend(tokens.end_of_chunk);
        stops.extend(tokens.end);
        stops
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
        let media = self.backend.encode(pixel_values, n_media, n_frames)?;
        Ok(media.into_iter().map(Arc::new).collect())
    }

    /// Logits [len, vocabulary] of a whole sequence; the parity hook.
    ///
    /// # Errors
    /// Ids, media or lengths that do not fit the model.
    pub fn logits(&self, ids: &[u32], media: &[Arc<Media>]) -> Result<Vec<f32>, RunError> {
        let limit = self.manifest.limits.max_context;
        if ids.len() > limit {
            return Err(PromptError::TooLong { tokens: ids.len(), limit }.into());
        }
        let config = &self.manifest.config;
        let mut sequence = self.backend.new_sequence(ids.len().max(1))?;
        let media_time = flamingo_models::media_time(config.family, &config.tokens, ids);
        let logit_rows: Vec<usize> = (0..ids.len()).collect();
        let step = Step { input_ids: ids, media_time: &media_time, media, logit_rows: &logit_rows };
        Ok(sequence.advance(&step)?)
    }
}

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Go on after end-of-chunk and end-of-text tokens.
    pub ignore_stops: bool,
    /// Let the model generate image tokens, which nothing stands behind.
    pub allow_image_token: bool,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions {
            max_new_tokens: 64,
            sampling: SamplingOptions::default(),
            ignore_stops: false,
            allow_image_token: false,
        }
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// As many tokens as asked for.
    Length,
    /// The context is full.
    Context,
    /// This token came.
    Token(u32),
}

/// Generated ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The new tokens, without the one that stopped.
    pub tokens: Vec<u32>,
    /// Tokens chosen, with the one that stopped.
    pub n_steps: usize,
    /// Why it ended.
    pub stop: Stop,
}

/// An answer with what it cost.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub n_prompt_tokens: usize,
    /// Why it ended.
    pub stop: Stop,
    /// Times.
    pub timings: Timings,
    /// Media found in the cache, and encoded.
    pub cache: CacheCounts,
}

impl Answer {
    /// The answer for machines: the contract of `run --json`.
    pub fn to_json(&self) -> serde_json::Value {
        let stop = match self.stop {
            Stop::Length => serde_json::json!("length"),
            Stop::Context => serde_json::json!("context"),
            Stop::Token(id) => serde_json::json!({ "token": id }),
        };
        serde_json::json!({
            "text": self.text,
            "tokens": self.tokens,
            "n_prompt_tokens": self.n_prompt_tokens,
            "stop": stop,
            "timings": {
                "first_token_ms": self.timings.first_token_ms,
                "decode_tokens_per_s": self.timings.decode_tokens_per_s,
            },
            "cache": {
                "visual_hits": self.cache.visual_hits,
                "visual_misses": self.cache.visual_misses,
                "visual_disk_hits": self.cache.visual_disk_hits,
                "prefix_tokens_reused": 0,
            },
        })
    }
}

/// Times of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Timings {
    /// From the call to the first token, pictures included, in milliseconds.
    pub first_token_ms: f64,
    /// Tokens a second after the first; `None` if there was no second.
    pub decode_tokens_per_s: Option<f64>,
}

/// Visual-token cache counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheCounts {
    /// Media found, in memory or on disk.
    pub visual_hits: usize,
    /// Media encoded.
    pub visual_misses: usize,
    /// Those of the media found that came from disk.
    pub visual_disk_hits: usize,
}

impl CacheCounts {
    fn count(&mut self, found: Found) {
        match found {
            Found::Memory => self.visual_hits += 1,
            Found::Disk => {
                self.visual_hits += 1;
                self.visual_disk_hits += 1;
            }
            Found::Encoded => self.visual_misses += 1,
        }
    }
}

/// How keys and values are kept: engines other than ours keep f32.
fn kv_format(manifest: &Manifest, options: &OpenOptions) -> KvFormat {
    let is_native = options.backend.as_deref().is_none_or(|name| name == "native");
    let is_f32 = manifest.precision.values().all(|precision| precision == "f32");
    match options.kv_format {
        _ if !is_native => KvFormat::F32,
        Some(format) => format,
        None if is_f32 => KvFormat::F32,
        None => KvFormat::F16,
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

/// Opens the graphs made for ONNX Runtime's CPU provider, or the portable ones.
#[cfg(feature = "ort")]
fn open_ort(artifact: &Artifact, options: &OpenOptions) -> Result<Box<dyn Backend>, RunError> {
    use crate::ort::{ExecutionProvider, OrtBackend, OrtOptions};
    let name = options.execution_provider.as_deref().unwrap_or("cpu");
    let no_provider = || RunError::NoBackend {
        name: format!("ort, execution provider {name}"),
        reason: "there is no such execution provider",
        hint: "choose cpu, cuda or tensorrt",
    };
    let execution_provider = ExecutionProvider::from_name(name).ok_or_else(no_provider)?;
    let graph = |stage| {
        let own = artifact.graph_path(stage, "ort-cpu");
        match execution_provider {
            ExecutionProvider::Cpu => own.or_else(|_| artifact.graph_path(stage, "portable")),
            ExecutionProvider::Cuda | ExecutionProvider::TensorRt => {
                artifact.graph_path(stage, "portable")
            }
        }
    };
    let library = options.ort_library.clone();
    let options = OrtOptions { library, n_threads: options.n_threads, execution_provider };
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
