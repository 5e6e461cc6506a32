//! Options as JSON.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use flamingo_runtime::{
    BeamOptions, GenerateOptions, KvFormat, Limits, OpenOptions, SamplingOptions,
};
use serde::Deserialize;

/// How a model is opened.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ModelForm {
    backend: Option<String>,
    threads: Option<NonZeroUsize>,
    kv: Option<String>,
    verify: bool,
}

impl ModelForm {
    pub(crate) fn options(self) -> Result<OpenOptions, String> {
        let format = |name: String| {
            let wrong = || format!("`kv`: expected f32, f16 or int8, got {name}");
            KvFormat::from_name(&name).ok_or_else(wrong)
        };
        Ok(OpenOptions {
            backend: self.backend,
            n_threads: self.threads,
            kv_format: self.kv.map(format).transpose()?,
            verify: self.verify,
            ..OpenOptions::default()
        })
    }
}

/// What to generate; what is left out is as of `flamingoc run`.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct GenerateForm {
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: Option<u64>,
    num_beams: Option<usize>,
    length_penalty: Option<f64>,
    no_repeat_ngram: Option<usize>,
    stop: Vec<String>,
    timeout_ms: Option<u64>,
}

impl GenerateForm {
    pub(crate) fn options(self) -> GenerateOptions {
        let (all, sampling) = (GenerateOptions::default(), SamplingOptions::default());
        let deadline = self.timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
        GenerateOptions {
            max_new_tokens: self.max_new_tokens.unwrap_or(all.max_new_tokens),
            sampling: SamplingOptions {
                temperature: self.temperature.unwrap_or(sampling.temperature),
                top_k: self.top_k.unwrap_or(sampling.top_k),
                top_p: self.top_p.unwrap_or(sampling.top_p),
                repetition_penalty: self.repetition_penalty.unwrap_or(sampling.repetition_penalty),
                no_repeat_ngram: self.no_repeat_ngram.unwrap_or(sampling.no_repeat_ngram),
                seed: self.seed.unwrap_or(sampling.seed),
            },
            beams: BeamOptions {
                n_beams: self.num_beams.unwrap_or(all.beams.n_beams),
                length_penalty: self.length_penalty.unwrap_or(all.beams.length_penalty),
                ..all.beams
            },
            stop_strings: self.stop,
            limits: Limits { deadline, ..Limits::default() },
            ..all
        }
    }
}

/// Reads options; NULL and an empty text are `{}`.
pub(crate) fn read<T: Default + for<'a> Deserialize<'a>>(json: Option<&str>) -> Result<T, String> {
    match json.map(str::trim) {
        None | Some("") => Ok(T::default()),
        Some(json) => serde_json::from_str(json).map_err(|error| format!("options: {error}")),
    }
}
