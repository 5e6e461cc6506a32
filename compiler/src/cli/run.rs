//! `flamingoc run`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use flamingo_runtime::{BeamOptions, GenerateOptions, PromptFile, SamplingOptions, Stop};

use super::bank::Shooting;
use super::output::Output;
use super::profile::Profiling;
use super::prompt::PromptArgs;
use super::{Caching, Opening, Outcome};

/// Answer a prompt with pictures; the text streams to stdout
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc run demo.flamingo --prompt \"<image>what color ?\" --image a.png
  flamingoc run otter.flamingo --ask \"What is in the image?\" --image a.png
  flamingoc run demo.flamingo --prompt-file p.json --json
  flamingoc run demo.flamingo --bank bank/ --shots 8 --prompt \"<image>\" --image a.png

A prompt file: {\"segments\": [{\"image\": \"a.jpg\"}, {\"text\": \"Output: a cat.\"},
  {\"end_of_chunk\": true}, {\"video\": \"b.gif\", \"fps\": 1, \"frames\": 8},
  {\"text\": \"Output:\"}], \"max_new_tokens\": 20, \"temperature\": 0}")]
pub(super) struct Run {
    /// The artifact
    artifact: PathBuf,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Most new tokens [default: the prompt file's, else 64]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Sampling temperature; 0 takes the most likely token [default: the prompt file's, else 0]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Sample from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value = "0")]
    top_k: usize,
    /// Sample from the most likely tokens of together this probability
    #[arg(long, value_name = "P", default_value = "1")]
    top_p: f32,
    /// Make tokens that occurred less likely
    #[arg(long, value_name = "X", default_value = "1")]
    repetition_penalty: f32,
    /// Let no run of N tokens occur twice, prompt included; 0 for no such rule
    #[arg(long, value_name = "N", default_value = "0")]
    no_repeat_ngram: usize,
    /// Follow N continuations at once and answer with the best; the text comes at the end
    #[arg(long, value_name = "N", default_value = "1")]
    num_beams: NonZeroUsize,
    /// With beams: divide scores by length^X; above 0 favours long answers
    #[arg(long, value_name = "X", default_value = "1", allow_negative_numbers = true)]
    length_penalty: f64,
    /// End the answer before this text; repeat it for more
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on when the context is full, without its oldest 64 tokens; models with linear position
    /// biases only (MPT)
    #[arg(long)]
    slide: bool,
    /// Seed of sampling, and of `--select random`
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    #[command(flatten)]
    shooting: Shooting,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    caching: Caching,
    #[command(flatten)]
    profiling: Profiling,
    /// Print text, token ids, timings, cache counts and chosen examples as JSON at the end
    #[arg(long)]
    json: bool,
}

impl Run {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let prompt = self.prompt.read()?;
        let mut options = self.options(&prompt)?;
        let model = self.caching.open(&self.artifact, &self.opening)?;
        let (prompt, stops) = self.prompt.in_form(prompt, &model);
        options.stop_strings.extend(stops);
        self.profiling.start(model.backend())?;
        let shots = self.shooting.shots(&model, &prompt, self.seed, self.opening.engine.verify)?;
        let mut shown = Ok(());
        let answer = model.generate_after(&shots, &prompt, &options, &mut |piece| {
            if !self.json && shown.is_ok() {
                shown = output.text(piece);
            }
        })?;
        shown?;
        output.warnings(&model);
        match self.json {
            true => output.json(&self.shooting.to_json(&answer, &shots))?,
            false => output.line("")?,
        }
        if self.profiling.is_on() {
            self.profiling.finish(model.backend(), self.opening.threads, output)?;
        }
        if answer.stop == Stop::Context {
            output.note("note: stopped at the context limit");
        }
        Ok(Outcome::Ok)
    }

    fn options(&self, prompt: &PromptFile) -> Result<GenerateOptions> {
        let temperature = self.temperature.or(prompt.temperature).unwrap_or(0.0);
        let within = |name: &str, value: f32, low: f32, high: f32| {
            if value.is_finite() && (low..=high).contains(&value) {
                return Ok(());
            }
            bail!("`--{name}`: expected {low} to {high}, got {value}")
        };
        within("temperature", temperature, 0.0, 100.0)?;
        within("top-p", self.top_p, 0.0, 1.0)?;
        if !self.length_penalty.is_finite() {
            bail!("`--length-penalty`: expected a number, got {}", self.length_penalty);
        }
        if self.num_beams.get() > 1 && temperature > 0.0 {
            bail!(
                "`--num-beams` and `--temperature`: beams take the most likely tokens\n\n\
                 hint: leave one of them out"
            );
        }
        within("repetition-penalty", self.repetition_penalty, 0.01, 100.0)?;
        Ok(GenerateOptions {
            max_new_tokens: self.max_new_tokens.or(prompt.max_new_tokens).unwrap_or(64),
            sampling: SamplingOptions {
                temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                repetition_penalty: self.repetition_penalty,
                no_repeat_ngram: self.no_repeat_ngram,
                seed: self.seed,
            },
            beams: BeamOptions {
                n_beams: self.num_beams.get(),
                length_penalty: self.length_penalty,
                ..BeamOptions::default()
            },
            stop_strings: self.stop.clone(),
            slide: self.slide,
            ..GenerateOptions::default()
        })
    }
}
